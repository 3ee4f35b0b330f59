"""LightZero's own caches beside kvjax's: they agree, and a disagreement is named."""

import os
import warnings

import gymnasium
import numpy as np
import pytest
from conftest import DATA, in_full
from torch_models import Driver, make

from kvjax import lightzero
from kvjax.tools.bench import lightzero_020

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FULL = bool(os.environ.get("KVJAX_FULL"))
"""Whole episodes instead of their beginnings (minutes)."""

MASKED = {
    "observation_size": 4,
    "num_actions": 2,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 8,
    "num_simulations": 25 if FULL else 6,
}
SCALE = np.array([1.0, 0.0, 10.0, 0.0], np.float32)
FIRST_STEP = -1


class CartPoles:
    """CartPole without velocities; an end restarts all rows' contexts, as 0.2.0 does."""

    def __init__(self, rows):
        with warnings.catch_warnings(action="ignore"):
            self.envs = [gymnasium.make("CartPole-v0") for _ in range(rows)]
        self.observations = [env.reset(seed=i)[0] for i, env in enumerate(self.envs)]
        self.action = np.full(rows, FIRST_STEP)
        self.running, self.returns = np.zeros(rows), []

    def seen(self):
        return np.stack(self.observations).astype(np.float32) * SCALE

    def act(self, action):
        self.action = action
        for row, env in enumerate(self.envs):
            self.observations[row], reward, died, timed_out, _ = env.step(int(action[row]))
            self.running[row] += reward
            if died or timed_out:
                self.returns.append(self.running[row])
                self.observations[row], self.running[row] = env.reset()[0], 0
                self.action = np.full(len(self.envs), FIRST_STEP)


def search_through(searcher, poles, steps, episodes=None):
    for _ in range(steps):
        poles.act(searcher.step(poles.seen(), poles.action)["action"])
        if episodes and len(poles.returns) >= episodes:
            break


def trained(envs, **changes):
    model = make(**MASKED | {"num_envs": envs} | changes)
    path = DATA / "cartpole_masked_lightzero_0.2.0.pth.tar"
    return lightzero_020.load_checkpoint(model, path)


@pytest.mark.parametrize("context", [8, *in_full(4, 20)])
def test_no_disagreement_over_episodes(context):
    """Eight environments with LightZero's tree; the trained model at its own context length."""
    if context == 8:
        model = trained(8)
    else:
        model = make(**MASKED | {"num_envs": 8, "context_length": context})
    wm = model.world_model
    handle = lightzero.attach(wm, shadow=True)
    poles = CartPoles(8)
    search_through(lightzero_020.Searcher(model), poles, *((10_000, 24) if FULL else (14,)))
    assert handle.disagreements == []
    assert handle.comparisons > 14 * 8 * 6
    assert wm.total_query_count == wm.hit_count > 0
    if FULL:
        assert len(poles.returns) >= 24


def test_the_attached_model_plays():
    """Five episodes with LightZero's own tree; a run of 40 steps where time is short."""
    model = trained(5)
    handle = lightzero.attach(model.world_model)
    poles = CartPoles(5)
    search_through(lightzero_020.Searcher(model), poles, *((10_000, 5) if FULL else (40,)))
    if FULL:
        print("returns", poles.returns[:5])
        assert np.mean(poles.returns[:5]) >= 195
    assert not poles.returns or min(poles.returns) > 40
    assert handle.stats()["misses"] == 0


def found(handle):
    assert handle.disagreements
    return handle.disagreements[0]


@pytest.mark.parametrize("rows", [4, 3])
def test_unequal_lengths_agree(rows):
    model = make()
    handle = lightzero.attach(model.world_model, shadow=True)
    driver = Driver(model, rows)
    for step in range(7):
        driver.step(first=step in (0, 5))
    assert handle.stats()["unequal_batches"] > 0
    assert handle.disagreements == []


def test_a_wrong_value_is_found_where_it_is():
    model = make()
    wm = model.world_model
    lightzero.attach(wm, shadow=True)
    driver = Driver(model, 4)
    driver.step(2)
    index = next(iter(wm.past_kv_cache_init_infer_envs[2].values()))
    wm.shared_pool_init_infer[2][index][1]._v_cache._cache[0, 3, 0] += 1
    message = r"root look-up, environment 2 \(row 2\), layer 1 values: token 0 differs by 1"
    with pytest.raises(lightzero.ShadowError, match=message):
        driver.step(2)


def test_a_lost_entry_is_found():
    model = make()
    wm = model.world_model
    handle = lightzero.attach(wm, shadow="log")
    driver = Driver(model, 4)
    driver.step(2)
    dict.clear(wm.past_kv_cache_init_infer_envs[1])
    driver.step(2)
    assert found(handle) == (
        "root look-up, environment 1 (row 1): a hit is False in LightZero's caches and True in"
        " kvjax's"
    )
    seen = len(handle.disagreements)
    driver.step(2)
    assert len(handle.disagreements) == seen


def test_another_size_is_found():
    model = make()
    wm = model.world_model
    handle = lightzero.attach(wm, shadow="log")
    driver = Driver(model, 4)
    driver.step(2)
    index = next(iter(wm.past_kv_cache_init_infer_envs[0].values()))
    for layer in wm.shared_pool_init_infer[0][index]:
        layer._k_cache._size = layer._v_cache._size = 3
    driver.step(0)
    assert found(handle) == (
        "root look-up, environment 0 (row 0): size is 3 in LightZero's caches and 1 in kvjax's"
    )


def test_a_wrong_slide_is_found():
    """The module's own table is stale: windows that slid differ."""
    model = make()
    wm = model.world_model
    for table in wm.pos_emb_diff_k:
        table[2, 7] += 0.5
    with pytest.warns(UserWarning, match="off"):
        handle = lightzero.attach(wm, shadow="log")
    driver = Driver(model, 4)
    for _ in range(3):
        driver.step(0)
    assert handle.disagreements == []
    driver.step(0)
    assert "stored root, environment 0 (row 0), layer 0 keys" in found(handle)
    assert "differs by 0.5" in found(handle)
