"""The trained pass is the searched one: whole sequences equal steps by cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_row
import pytest
from conftest import SMALL, random_params, with_mode

from kvjax.config import WINDOW_MODES
from kvjax.model import rollout, world_model
from kvjax.ops import window as windows
from kvjax.train import network

T = 4
MODES = pytest.mark.parametrize("mode", WINDOW_MODES)
ATOL = 2e-5


def example(mode):
    """A window that holds T steps and never slides."""
    config = dataclasses.replace(with_mode(SMALL, mode), context_length=2 * T + 2)
    params = random_params(config)
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(T, config.observation_size)).astype(np.float32)
    return config, params, observation, rng.integers(config.num_actions, size=T).astype(np.int32)


def by_sequence(params, latent, action, config):
    said = network.predict(params, latent[None], jnp.asarray(action)[None], config=config)
    return jax.tree.map(lambda x: np.asarray(x[0]), said)


@MODES
def test_environment_steps_by_cache_equal_one_pass(mode):
    config, params, observation, action = example(mode)
    latent = jnp.stack([one_row.encode(params, o, config=config) for o in observation])
    said = by_sequence(params, latent, action, config)
    window = windows.init(config.window)
    for t in range(T):
        last = jnp.int32(action[t - 1] if t else -1)
        window, policy, value = one_row.root_step(
            params, window, last, latent[t], jnp.int32(t), config=config
        )
        np.testing.assert_allclose(said.policy[t], policy, atol=ATOL)
        np.testing.assert_allclose(said.value[t], value, atol=ATOL)


@MODES
def test_imagined_steps_by_cache_equal_one_pass(mode):
    """But for LightZero's rotary models, which leave out two positions before them."""
    config, params, observation, action = example(mode)
    first = one_row.encode(params, observation[0], config=config)
    window = one_row.observe(
        params, windows.init(config.window), first, jnp.int32(0), config=config
    )
    _, imagined = rollout(params, window, action, config=config)
    latent = jnp.concatenate([first[None], imagined.latent[:-1]])
    said = by_sequence(params, latent, action, config)
    gaps = [
        np.abs(said.latent - imagined.latent).max(),
        np.abs(said.reward - imagined.reward).max(),
        np.abs(said.policy[1:] - imagined.policy[:-1]).max(),
        np.abs(said.value[1:] - imagined.value[:-1]).max(),
    ]
    assert max(gaps) < ATOL if mode != "rope_lightzero" else max(gaps[2:]) > 1e-3


@pytest.mark.parametrize("norm", ["simnorm", "layernorm"])
def test_batch_statistics_are_those_of_the_rows(norm):
    """What was normalised by a batch is what inference makes of that batch's statistics."""
    config = dataclasses.replace(SMALL, encoder_norm=norm, latent_norm=norm)
    params = random_params(config)
    rows = np.random.default_rng(2).normal(size=(9, config.observation_size)).astype(np.float32)
    latent, statistics = network.encode(params, rows, config=config)
    dense = params["params"]["encoder"]["input"]
    hidden = rows @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    found = statistics["encoder"]["batch_norm"]
    np.testing.assert_allclose(found["mean"], hidden.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["var"], hidden.var(axis=0), atol=1e-5)
    frozen = params | {"batch_stats": statistics}
    for row, expected in zip(rows, latent, strict=True):
        np.testing.assert_allclose(one_row.encode(frozen, row, config=config), expected, atol=1e-5)


def test_running_statistics_move_as_torchs_do():
    torch = pytest.importorskip("torch")
    config, rng = SMALL, np.random.default_rng(3)
    params = random_params(config)
    norm = torch.nn.BatchNorm1d(config.embed_dim)
    norm.running_mean[:] = torch.tensor(
        np.array(params["batch_stats"]["encoder"]["batch_norm"]["mean"])
    )
    norm.running_var[:] = torch.tensor(
        np.array(params["batch_stats"]["encoder"]["batch_norm"]["var"])
    )
    dense = params["params"]["encoder"]["input"]
    for _ in range(3):
        rows = rng.normal(size=(9, config.observation_size)).astype(np.float32)
        _, statistics = network.encode(params, rows, config=config)
        params = network.running(params, statistics, rows=9, rate=0.1)
        norm(torch.tensor(rows @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])))
    found = params["batch_stats"]["encoder"]["batch_norm"]
    np.testing.assert_allclose(found["mean"], norm.running_mean, atol=1e-5)
    np.testing.assert_allclose(found["var"], norm.running_var, atol=1e-5)


def test_a_model_begins_without_opinions():
    config = SMALL
    params = network.initial_params(jax.random.key(0), config)
    shapes = world_model.params_shapes(config)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), params, shapes)
    latent = np.random.default_rng(0).random((2, T, config.embed_dim)).astype(np.float32)
    said = network.predict(params, latent, np.zeros((2, T), np.int32), config=config)
    for logits in (said.reward, said.policy, said.value):
        np.testing.assert_array_equal(logits, np.zeros(logits.shape))
    assert 0.01 < np.std(params["params"]["blocks_0"]["expand"]["kernel"]) < 0.03
