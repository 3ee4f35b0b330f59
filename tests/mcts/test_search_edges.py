"""Corners of the search: models that answer NaN, other group sizes, mctx's outputs."""

import argparse
import dataclasses

import flax_model
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import SMALL, random_params

from kvjax import init_contexts
from kvjax.config import MAX_SIMULATIONS, EnvironmentConfig, SearchConfig
from kvjax.mcts import search
from kvjax.mcts.mctx_rules import _normalise_over_tree
from kvjax.model import unizero
from kvjax.model.checkpoint import Checkpoint
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.tools import gif, options
from kvjax.tools.play import play

PARAMS = random_params(SMALL)
TREES = ("lightzero", "muzero", "gumbel")


# Three rows and ten simulations: a program that test_search and test_tree run, too.
def searched(observation, *, legal=None, config=SMALL, params=PARAMS, **options):
    rows = len(observation)
    return search(
        params,
        jax.random.key(0),
        init_contexts(config, rows),
        observation,
        np.full(rows, -1),
        legal,
        config=config,
        search=SearchConfig(**{"num_simulations": 10, **options}),
    )[1]


def observations(rows):
    return np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)


@pytest.mark.parametrize("name", TREES)
def test_a_row_whose_model_answers_nan_is_reported(name):
    observation = observations(3)
    observation[1] = np.nan
    assert searched(observation, tree=name).finite.tolist() == [True, False, True]


@pytest.mark.parametrize("name", TREES)
def test_nan_inside_the_tree_is_reported(name):
    """Only the second action's embedding is broken: the root does not read it."""
    params = jax.tree.map(lambda x: x, PARAMS)
    table = params["params"]["action_embedding"]["embedding"]
    params["params"]["action_embedding"]["embedding"] = table.at[1].set(jnp.nan)
    options = {"params": params, "tree": name}
    assert not searched(observations(3), **options).finite.any()
    without = np.tile([True, False, False], (3, 1))
    assert searched(observations(3), legal=without, max_depth=1, **options).finite.all()


def test_nan_of_imagined_policies_alone_is_reported(monkeypatch):
    exact = unizero.at_observation

    def broken(folded, x):
        policy, value = exact(folded, x)
        return policy.at[:, 1].set(jnp.nan), value

    monkeypatch.setattr(unizero, "at_observation", broken)
    out = searched(observations(3), num_simulations=9)
    assert out.finite.tolist() == [True, False, True]
    assert np.isnan(out.root_value[1])


def test_more_simulations_than_a_tree_holds():
    SearchConfig(num_simulations=MAX_SIMULATIONS)
    with pytest.raises(ValueError, match=f"num_simulations must be at most {MAX_SIMULATIONS}"):
        SearchConfig(num_simulations=MAX_SIMULATIONS + 1)


@pytest.mark.parametrize("name", TREES)
def test_a_batch_that_changes_width(name):
    contexts = init_contexts(SMALL, 2)
    with pytest.raises(ValueError, match=r"observation must have shape \(2, 5\), got \(3, 5\)"):
        search(
            PARAMS,
            jax.random.key(0),
            contexts,
            observations(3),
            np.zeros(3, int),
            config=SMALL,
            search=SearchConfig(num_simulations=4, tree=name),
        )


@pytest.mark.parametrize("name", TREES)
def test_illegal_actions_of_every_tree(name):
    legal = np.array([[True, False, True], [False, False, True], [False, True, True]])
    out = searched(observations(3), legal=legal, tree=name)
    assert not np.asarray(out.visit_counts)[~legal].any()
    assert np.take_along_axis(legal, np.asarray(out.action)[:, None], 1).all()


def test_the_root_value_of_mctx_is_the_mean_of_its_children_and_the_network():
    out = searched(observations(3), tree="muzero", discount=0.9)
    visits, q = np.asarray(out.visit_counts), np.asarray(out.q_values)
    total = out.network_value + np.sum(visits * q, axis=1)
    np.testing.assert_allclose(out.root_value, total / (1 + visits.sum(axis=1)), rtol=1e-5)
    assert (q[visits > 0] != 0).all()
    assert np.abs(out.root_value - out.network_value).max() > 1e-3


def test_close_q_values_of_mctx_are_not_blown_up():
    """A range of 0.001 is scaled as if it were 0.01."""
    names = [f.name for f in dataclasses.fields(mctx.Tree)]
    tree = mctx.Tree(
        **{n: jnp.zeros(()) for n in names if n not in ("ROOT_INDEX", "NO_PARENT", "UNVISITED")}
    )
    tree = tree.replace(
        children_visits=jnp.asarray([[1, 1], [0, 0]]),
        children_rewards=jnp.asarray([[0.501, 0.5], [0.0, 0.0]]),
        children_values=jnp.zeros((2, 2)),
        children_discounts=jnp.ones((2, 2)),
        node_values=jnp.asarray([0.5, 0.0]),
        embeddings=(0.5, 0.501, True),
    )
    np.testing.assert_allclose(_normalise_over_tree(tree, jnp.int32(0)), [0.1, 0.0], atol=1e-4)


@pytest.mark.parametrize("group", [2, 4, 16])
def test_simnorm_groups(group):
    """Against softmax written out; the whole folded model is in test_tree."""
    config = dataclasses.replace(SMALL, simnorm_group=group)
    latents = np.asarray(flax_model.encode(PARAMS, observations(1)[0], config=config))
    np.testing.assert_allclose(latents.reshape(-1, group).sum(axis=1), 1.0, rtol=1e-5)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    grouped = np.exp(x.reshape(-1, group, 3))
    expected = (grouped / grouped.sum(axis=1, keepdims=True)).reshape(16, 3)
    np.testing.assert_allclose(unizero._simnorm(x, group), expected, rtol=1e-5)


def test_a_window_that_is_longer_than_full_slides_too():
    kv = jnp.ones((8, *SMALL.window.token_shape))
    correction = jnp.zeros((5, *SMALL.window.token_shape))
    for length, after in ((6, 6), (7, 5), (8, 5)):
        slid = windows.slide(Window(kv, jnp.int32(length)), correction)
        assert slid.length == after


def test_the_clock_begins_before_the_first_step():
    contexts = init_contexts(SMALL, 2)
    assert contexts.timestep.tolist() == [-1, -1]
    contexts, _ = search(
        PARAMS,
        jax.random.key(0),
        contexts,
        observations(2),
        np.array([-1, 1]),
        config=SMALL,
        search=SearchConfig(num_simulations=2),
    )
    assert contexts.timestep.tolist() == [0, 0]


def test_episodes_end_at_the_time_limit(masked_agent):
    """CartPole-v0 stops after 200 steps, balanced or not."""
    assert play(masked_agent, episodes=2, seed=1000).returns == (200.0, 200.0)


def test_the_animation_is_of_the_first_episode_at_the_environments_speed(masked_agent, tmp_path):
    from PIL import Image

    path = tmp_path / "a.gif"
    summary = play(masked_agent, episodes=3, keep_context=False, gif_path=path)
    with Image.open(path) as animation:
        shown = 0
        for index in range(animation.n_frames):
            animation.seek(index)
            shown += animation.info["duration"]
    assert len(set(summary.returns)) > 1
    assert abs(shown / 20 - summary.returns[0]) <= 1  # 50 frames a second


def test_wide_frames_are_thinned(tmp_path):
    from PIL import Image

    frames = gif.Frames(tmp_path / "a.gif")
    wide = np.zeros((40, 700, 3), np.uint8)
    wide[:, ::3] = 255
    frames.append(wide)
    frames.append(255 - wide)
    frames.write(10)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.size == (234, 14)
        assert animation.info["duration"] == 100
        assert np.asarray(animation.convert("L")).min() > 200


TWICE, THRICE = (2.0,) * 5, (3.0,) * 5


@pytest.mark.parametrize(
    ("env", "scale", "expected"),
    [
        (None, None, EnvironmentConfig("Stored-v0", TWICE)),
        ("Stored-v0", None, EnvironmentConfig("Stored-v0", TWICE)),
        ("Other-v0", None, EnvironmentConfig("Other-v0", None)),
        ("Other-v0", THRICE, EnvironmentConfig("Other-v0", THRICE)),
        (None, THRICE, EnvironmentConfig("Stored-v0", THRICE)),
    ],
)
def test_a_scale_belongs_to_its_environment(env, scale, expected):
    agent = Checkpoint(SMALL, PARAMS, EnvironmentConfig("Stored-v0", TWICE))
    args = argparse.Namespace(env=env, observation_scale=scale, frames=None)
    assert options.environment_of(args, agent) == expected
