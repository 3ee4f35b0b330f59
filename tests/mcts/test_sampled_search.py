"""Searches whose nodes draw their actions, against plain numpy and against themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL, SMALL, random_params

from kvjax import SearchConfig, init_contexts, init_kept, init_store, search, stats
from kvjax.mcts import sampling
from kvjax.tools.parity import reference_tree, sampled_tree
from kvjax.tools.parity.host_search import sampled_host_search

CONTINUOUS = dataclasses.replace(
    SMALL, num_layers=1, num_actions=2, sigma_type="conditioned", num_sampled_actions=4
)
DISCRETE = dataclasses.replace(SMALL, num_layers=1, num_actions=9, num_sampled_actions=4)
MODELS = {"continuous": CONTINUOUS, "discrete": DISCRETE}
TEN = SearchConfig(num_simulations=10)
FIRST = {"continuous": np.full((2, 2), np.nan, np.float32), "discrete": np.array([-1, -1])}
OBSERVATION = np.random.default_rng(5).normal(size=(2, 5)).astype(np.float32)


def searched(name, rng=0, contexts=None, observation=OBSERVATION, last=None, **options):
    config = MODELS[name]
    contexts = init_contexts(config, 2) if contexts is None else contexts
    return search(
        random_params(config),
        jax.random.key(rng),
        contexts,
        observation,
        FIRST[name] if last is None else last,
        config=config,
        **({"search": TEN} | options),
    )


def drawn(name, seed=0):
    """Any actions for all nodes of two trees."""
    rng = np.random.default_rng(seed)
    if name == "continuous":
        return rng.uniform(-1, 1, size=(2, 11, 4, 2)).astype(np.float32)
    return rng.permuted(np.broadcast_to(np.arange(9), (2, 11, 9)), axis=2)[:, :, :4].astype(
        np.int32
    )


@pytest.mark.parametrize("name", MODELS if FULL else ["continuous"])
def test_the_tree_that_numpy_grows_in_front_of_a_store(name):
    """Three steps of an episode, in the last of which a row begins anew; numpy draws for both."""
    config, model = MODELS[name], random_params(MODELS[name])
    store, latent, last = init_store(config, 2, 10), np.zeros((2, 16), np.float32), FIRST[name]
    contexts, engine, timestep = None, np.random.default_rng(0), np.zeros(2, np.int32)
    for time in range(3):
        observation = OBSERVATION + time
        args = engine, model, store, latent, observation, last, timestep
        store, latent, forest = sampled_host_search(*args, config=config, search=TEN)
        draws = np.stack([np.stack(tree.actions) for tree in forest])
        draws = draws.astype(np.float32 if config.is_continuous else np.int32)
        contexts, out = searched(name, 0, contexts, observation, last, draws=draws)
        for row, sampled in enumerate(forest):
            tree = sampled.tree
            np.testing.assert_array_equal(out.visit_counts[row], reference_tree.visit_counts(tree))
            value = reference_tree.root_value(tree)
            np.testing.assert_allclose(out.root_value[row], value, atol=2e-5)
            np.testing.assert_array_equal(out.action[row], sampled_tree.best(sampled))
        np.testing.assert_array_equal(out.sampled_actions, draws[:, 0])
        last, timestep = np.array(out.action), timestep + 1
        if time == 1:
            last[1], timestep[1] = FIRST[name][1], 0
    assert stats(store)["misses"] == 0
    assert contexts.window.length.tolist() == [5, 1]
    assert np.unique(np.asarray(out.visit_counts)).size > 1


@pytest.mark.parametrize("name", MODELS)
def test_shapes_keys_and_what_is_drawn(name):
    config = MODELS[name]
    _, out = searched(name)
    shape = (2, 4, *config.action_shape)
    assert out.sampled_actions.shape == shape
    assert out.action.shape == (2, *config.action_shape)
    assert out.visit_counts.shape == out.prior.shape == out.q_values.shape == (2, 4)
    assert out.visit_counts.sum(axis=1).tolist() == [10, 10]
    assert out.finite.all()
    np.testing.assert_array_equal(out.prior, np.full((2, 4), 0.25))
    again, other = searched(name)[1], searched(name, rng=1)[1]
    np.testing.assert_array_equal(again.sampled_actions, out.sampled_actions)
    assert (other.sampled_actions != out.sampled_actions).any()
    if name == "discrete":
        assert all(len(set(row)) == 4 for row in np.asarray(out.sampled_actions).tolist())
    taken = " ".join(f"{x:.2f}" for x in out.action[0]) if config.is_continuous else out.action[0]
    assert f"row 0: action {taken}, value" in repr(out)


@pytest.mark.parametrize("name", MODELS)
def test_rows_restart_alone_and_broken_ones_are_reported(name):
    """A restarted row is as fresh; NaN in an observation stays in its row."""
    draws = drawn(name)
    contexts, out = searched(name, draws=draws)
    last = np.array(out.action)
    last[1] = FIRST[name][1]
    _, mixed = searched(name, 0, contexts, last=last, draws=draws)
    np.testing.assert_array_equal(mixed.visit_counts[1], out.visit_counts[1])
    np.testing.assert_allclose(mixed.root_value[1], out.root_value[1], atol=1e-6)
    assert abs(mixed.network_value[0] - out.network_value[0]) > 1e-4
    broken = OBSERVATION.copy()
    broken[0, 0] = np.nan
    _, told = searched(name, observation=broken)
    assert told.finite.tolist() == [False, True]


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_policy_breaks_its_node_and_no_other(name):
    """What would be drawn of NaN is NaN, or some action; the value tells, by the prior."""
    config = MODELS[name]
    policy = np.zeros((4, config.policy_size), np.float32)
    policy[:, 1] = [0.0, np.nan, np.inf, -np.inf]  # a logit of -inf is as good as any
    logits = np.asarray(sampling.uniform(jnp.asarray(policy), config))
    assert logits.shape == (4, 4)
    broken = [False, True, True, config.is_continuous]
    assert np.isnan(logits).all(axis=1).tolist() == broken
    np.testing.assert_array_equal(logits[0], 0.0)


def test_the_law_of_gaussian_draws():
    """Means and deviations of what a tanh has squashed; the clip; [-1, 1]."""
    policy = jnp.array([[0.3, -1.0, 0.5, 0.2], [9.0, 0.0, 1.0, 2.0]])
    config = dataclasses.replace(CONTINUOUS, num_sampled_actions=20_000)
    actions = np.asarray(sampling.draw(jax.random.key(0), policy, config), np.float64)
    before = np.arctanh(actions[0])
    np.testing.assert_allclose(before.mean(axis=0), [0.3, -1.0], atol=0.015)
    np.testing.assert_allclose(before.std(axis=0), [0.5, 0.2], rtol=0.02)
    assert abs(np.corrcoef(before.T)[0, 1]) < 0.03
    np.testing.assert_allclose(actions[1, :, 0], np.tanh(4.0), rtol=1e-6)  # none is below 4
    clipped = np.abs(actions[1, :, 1]) > np.tanh(4.0) - 1e-6
    assert abs(clipped.mean() - 0.0455) < 0.006  # two deviations and beyond


def test_the_law_of_draws_without_replacement():
    """How often each of four actions is among two: by the sum over which came first."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    config = dataclasses.replace(SMALL, num_actions=4, num_sampled_actions=2)
    policy = jnp.broadcast_to(jnp.log(p) + 3.0, (20_000, 4))
    actions = np.asarray(sampling.draw(jax.random.key(0), policy, config))
    assert (actions[:, 0] != actions[:, 1]).all()
    shares = [(actions == i).any(axis=1).mean() for i in range(4)]
    np.testing.assert_allclose(shares, p + second, atol=0.012)
    np.testing.assert_allclose((actions[:, 0] == 0).mean(), 0.5, atol=0.012)


def test_illegal_actions_are_drawn_last_and_never_visited():
    legal = np.zeros((2, 9), bool)
    legal[0, :6] = True
    legal[1, [2, 7]] = True
    _, out = searched("discrete", legal=legal)
    actions, visits = np.asarray(out.sampled_actions), np.asarray(out.visit_counts)
    assert set(actions[0]) < set(range(6))
    assert set(actions[1, :2]) == {2, 7}
    assert visits[1, 2:].tolist() == [0, 0]
    np.testing.assert_allclose(out.prior[1], [0.5, 0.5, 0, 0])
    assert all(legal[row, action] for row, action in enumerate(out.action))


@pytest.mark.skipif(not FULL, reason="takes 10 s to compile")
def test_mctxs_policies_search_what_was_drawn():
    options = SearchConfig(num_simulations=6, tree="gumbel")
    _, out = searched("continuous", search=options)
    row = (np.asarray(out.sampled_actions) == np.asarray(out.action)[:, None]).all(axis=2)
    assert row.any(axis=1).all()
    assert out.visit_counts.sum(axis=1).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("continuous", {"last": np.zeros(2)}, r"last_action must have shape \(2, 2\), got \(2,\)"),
        (
            "continuous",
            {"last": np.array([[0.1, np.nan], [0, 0]])},
            "finite numbers, or NaN in a wh",
        ),
        (
            "continuous",
            {"last": np.array([[0.1, np.inf], [0, 0]])},
            "finite numbers, or NaN in a wh",
        ),
        (
            "continuous",
            {"last": np.zeros((2, 2), int)},
            "must be floating-point numbers, got int64",
        ),
        ("continuous", {"legal": np.ones((2, 2), bool)}, "legal must be None: continuous actions"),
        ("discrete", {"last": np.array([-1, 9])}, r"last_action must be in -1 .. 8"),
        (
            "discrete",
            {"draws": drawn("discrete")[:, :3]},
            r"shape \(2, 11, 4\), got int32 \(2, 3, 4\)",
        ),
        ("discrete", {"draws": drawn("discrete") * 1.0}, "draws must be integer numbers of shape"),
        (
            "discrete",
            {"search": SearchConfig(kept_nodes=3)},
            "kept_nodes must be 0 for a model whose",
        ),
    ],
)
def test_bad_input(name, change, message):
    with pytest.raises(ValueError, match=message):
        searched(name, **change)


def test_models_that_draw_nothing_take_no_draws():
    with pytest.raises(ValueError, match="draws are for a model whose nodes draw actions"):
        search(
            random_params(SMALL),
            jax.random.key(0),
            init_contexts(SMALL, 2),
            OBSERVATION,
            FIRST["discrete"],
            config=SMALL,
            search=TEN,
            draws=drawn("discrete"),
        )
    with pytest.raises(ValueError, match="kept_nodes must be 0 for a model whose nodes draw"):
        init_kept(CONTINUOUS, 2, SearchConfig(kept_nodes=3))
