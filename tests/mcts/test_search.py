"""The search in one jit: rows, restarts, choices, one compilation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import SMALL, random_params

from kvjax import init_contexts
from kvjax.config import SearchConfig
from kvjax.mcts import search
from kvjax.mcts.mctx_rules import _normalise_over_tree
from kvjax.mcts.policies import choose as _choose
from kvjax.mcts.search import _search
from kvjax.model.step import FIRST_STEP

PARAMS = random_params(SMALL)
TEN = SearchConfig(num_simulations=10)


def observations(steps, envs, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, envs, 5)).astype(np.float32)


def run(observed, actions, *, contexts=None, search_config=TEN, legal=None, seed=0):
    """Feeds given observations and actions; returns the contexts and every output."""
    contexts = contexts or init_contexts(SMALL, observed.shape[1])
    outputs = []
    for observation, action in zip(observed, actions, strict=True):
        contexts, out = search(
            PARAMS,
            jax.random.key(seed),
            contexts,
            observation,
            action,
            legal,
            config=SMALL,
            search=search_config,
        )
        outputs.append(out)
    return contexts, outputs


def test_shapes_and_counts():
    contexts, (out,) = run(observations(1, 2), [np.full(2, FIRST_STEP)])
    chex.assert_shape([out.visit_counts, out.q_values, out.prior], (2, 3))
    chex.assert_shape([out.action, out.root_value, out.network_value], (2,))
    assert np.asarray(out.visit_counts).sum(axis=1).tolist() == [10] * 2
    np.testing.assert_array_equal(out.action, np.argmax(out.visit_counts, axis=1))
    np.testing.assert_allclose(np.sum(out.prior, axis=1), 1.0, rtol=1e-6)
    assert contexts.timestep.tolist() == [0] * 2
    assert contexts.window.length.tolist() == [1] * 2
    assert np.unique(out.root_value).size == 2


def test_rows_are_independent_and_restart_alone():
    """Row b of a batch with a restart in another row equals row b searched alone."""
    observed = observations(6, 3)
    actions = np.array([[-1, 0, 1, 2, 0, 1], [-1, 2, 2, -1, 1, 0], [-1, 1, 0, 0, 2, 2]]).T
    contexts, together = run(observed, actions)
    assert contexts.timestep.tolist() == [5, 2, 5]
    assert contexts.window.length.tolist() == [5, 5, 5]
    for b in range(3):
        alone_contexts, alone = run(observed[:, [b]], actions[:, [b]])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, b=b: x[b], contexts),
            jax.tree.map(lambda x: x[0], alone_contexts),
            atol=1e-5,
        )
        for batched, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(batched.network_value[b], single.network_value[0], atol=1e-4)
            np.testing.assert_array_equal(batched.visit_counts[b], single.visit_counts[0])


def test_restarted_row_equals_a_fresh_one():
    observed = observations(4, 2)
    actions = np.array([[-1, 1, 0, -1], [-1, 1, 0, 2]]).T
    contexts, outputs = run(observed, actions)
    fresh_contexts, (fresh,) = run(observed[3:], [np.array([-1, -1])])
    for ours, theirs in ((contexts, fresh_contexts), (outputs[-1], fresh)):
        first, second = (jax.tree.map(lambda x: x[0], tree) for tree in (ours, theirs))
        chex.assert_trees_all_equal(first, second)
    assert abs(outputs[-1].network_value[1] - fresh.network_value[1]) > 1e-4


def test_one_compilation_over_an_episode_with_restarts():
    compilations = []

    def count(event, duration, **_):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    chex.clear_trace_counter()
    traced = chex.assert_max_traces(_search.__wrapped__, n=1)
    counted = jax.jit(traced, static_argnames=("config", "search"))
    rng = np.random.default_rng(1)
    contexts = init_contexts(SMALL, 3)
    keys = jax.random.split(jax.random.key(0), 40)
    jax.monitoring.register_event_duration_secs_listener(count)
    after_first_step = 0
    for t, observation in enumerate(jnp.asarray(observations(40, 3))):
        action = rng.integers(-1, 3, size=3) if t else np.full(3, -1)
        contexts, out = counted(
            PARAMS,
            keys[t],
            contexts,
            observation,
            jnp.asarray(action, jnp.int32),
            jnp.ones((3, 3), bool),
            config=SMALL,
            search=SearchConfig(num_simulations=4),
        )
        jax.block_until_ready(out)
        if t == 2:  # by then the loop's own small transfers are compiled too
            after_first_step = len(compilations)
    jax.monitoring.unregister_event_duration_listener(count)
    assert after_first_step >= 1
    assert len(compilations) == after_first_step


def test_jit_equals_no_jit():
    once = SearchConfig(num_simulations=1)
    first, second = observations(2, 2)[:, None]
    contexts, _ = run(first, [np.full(2, -1)], search_config=once)
    step = functools.partial(run, second, np.array([[1, -1]]), search_config=once)
    jitted = step(contexts=contexts)
    with jax.disable_jit():
        plain = step(contexts=contexts)
    chex.assert_trees_all_close(jitted, plain, atol=1e-4)


def test_a_search_inside_of_another_program():
    """Such as a loop over steps: XLA compiles it with the program around it."""
    observed, actions = observations(3, 2), np.array([[-1, -1], [1, -1], [0, 2]])
    rng = jax.random.key(0)

    def step(contexts, inputs):
        return search(PARAMS, rng, contexts, *inputs, config=SMALL, search=TEN)

    looped = jax.jit(lambda *inputs: jax.lax.scan(step, init_contexts(SMALL, 2), inputs))
    _, outputs = run(observed, actions)
    _, inside = looped(jnp.asarray(observed), jnp.asarray(actions))
    together = jax.tree.map(lambda *rows: np.stack(rows), *outputs)
    chex.assert_trees_all_close(inside, together, atol=1e-5)
    chex.assert_trees_all_equal(inside.visit_counts, together.visit_counts)


def test_illegal_actions_are_never_visited():
    legal = np.array([[True, False, True], [False, False, True], [True, True, True]])
    _, outputs = run(observations(3, 3), [np.full(3, -1), *np.full((2, 3), 2)], legal=legal)
    for out in outputs:
        assert not np.asarray(out.visit_counts)[~legal].any()
        assert np.take_along_axis(legal, np.asarray(out.action)[:, None], 1).all()
        np.testing.assert_array_equal(np.asarray(out.prior)[~legal], 0.0)
        np.testing.assert_allclose(np.sum(out.prior, axis=1), 1.0, rtol=1e-6)


def test_legal_actions_are_an_array_and_compile_nothing():
    before = _search._cache_size()
    for legal in (None, np.eye(3, dtype=bool), np.ones((3, 3), bool)):
        run(observations(1, 3), [np.full(3, -1)], legal=legal)
    assert _search._cache_size() <= before + 1


def test_root_noise_depends_on_the_key_and_its_absence_does_not():
    noisy = SearchConfig(num_simulations=10, noise_fraction=0.9, dirichlet_alpha=0.3)
    observed, actions = observations(1, 3), [np.full(3, -1)]
    with_noise = [run(observed, actions, search_config=noisy, seed=s)[1][0] for s in range(2)]
    without = [run(observed, actions, seed=s)[1][0] for s in range(2)]
    assert (with_noise[0].visit_counts != with_noise[1].visit_counts).any()
    chex.assert_trees_all_equal(with_noise[0].prior, with_noise[1].prior)
    np.testing.assert_array_equal(without[0].visit_counts, without[1].visit_counts)


def test_discount_reaches_the_values():
    observed, actions = observations(1, 2), [np.full(2, -1)]
    near, far = (
        run(observed, actions, search_config=SearchConfig(num_simulations=10, discount=d))[1][0]
        for d in (0.1, 1.0)
    )
    assert np.abs(near.root_value - far.root_value).min() > 1e-3


def test_most_visited_action_first_on_ties():
    counts = jnp.asarray([[3, 7, 7], [0, 0, 0], [9, 1, 1]])
    legal = jnp.asarray([[True, True, True], [False, True, True], [False, True, True]])
    assert _choose(jax.random.key(0), counts, legal, 0.0).tolist() == [1, 1, 1]


def test_temperature_samples_in_proportion_to_visits():
    counts = jnp.tile(jnp.asarray([[1, 0, 4]]), (4000, 1))
    legal = jnp.ones((4000, 3), bool)
    for temperature, expected in ((1.0, 4 / 5), (0.5, 16 / 17)):
        drawn = np.asarray(_choose(jax.random.key(0), counts, legal, temperature))
        assert not (drawn == 1).any()
        assert abs((drawn == 2).mean() - expected) < 0.02


def test_normalisation_over_the_tree():
    """A tree of three nodes, its Q values written out."""
    shape = (1, 4, 2)  # one row, four slots, two actions
    tree = mctx.Tree(
        **{
            name: jnp.zeros(())
            for name in (f.name for f in dataclasses.fields(mctx.Tree))
            if name not in ("ROOT_INDEX", "NO_PARENT", "UNVISITED")
        }
    )
    visits, rewards, values = (np.zeros(shape[1:], np.float32) for _ in range(3))
    visits[0], rewards[0], values[0] = (2, 0), (1.0, 0.0), (3.0, 0.0)
    visits[1], rewards[1], values[1] = (0, 1), (0.0, 0.5), (0.0, -1.0)
    tree = tree.replace(
        children_visits=jnp.asarray(visits),
        children_rewards=jnp.asarray(rewards),
        children_values=jnp.asarray(values),
        children_discounts=jnp.full(shape[1:], 0.5),
        node_values=jnp.asarray([4.0, 3.0, -1.0, 0.0]),
    )
    # Edges: 1 + 0.5 * 3 = 2.5 and 0.5 - 0.5 = 0; with the root's 4.0 the extremes are 0 and 4.

    def normalised(node):
        return _normalise_over_tree(tree.replace(embeddings=(0.0, 4.0, node == 0)), jnp.int32(node))

    root = normalised(0)
    np.testing.assert_allclose(root, [0.625, 0.625])  # untried: its sibling's mean
    inner = normalised(1)
    np.testing.assert_allclose(inner, [(3.0 + 0.0) / 2 / 4.0, 0.0])
    leaf = normalised(2)
    np.testing.assert_allclose(leaf, [0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": np.zeros((2, 4))}, r"observation must have shape \(2, 5\), got \(2, 4\)"),
        ({"observation": np.zeros((3, 5))}, r"observation must have shape \(2, 5\), got \(3, 5\)"),
        ({"last_action": np.zeros((3,))}, r"last_action must have shape \(2,\), got \(3,\)"),
        ({"last_action": np.array([-1, 3])}, r"last_action must be in -1 .. 2, got \[-1, 3\]"),
        ({"last_action": np.array([-2, 0])}, r"last_action must be in -1 .. 2, got \[-2, 0\]"),
        ({"last_action": [-1, 3]}, r"last_action must be in -1 .. 2, got \[-1, 3\]"),
        ({"last_action": np.array([-1.0, 0.5])}, "last_action must be integers, got float64"),
        ({"legal": np.ones((2, 2), bool)}, r"legal must have shape \(2, 3\), got \(2, 2\)"),
        ({"legal": np.eye(2, 3, dtype=bool) * [[1], [0]] > 0}, r"rows \[1\] have none"),
    ],
)
def test_bad_input(change, message):
    arguments = {"observation": np.zeros((2, 5)), "last_action": np.array([-1, 0])} | change
    with pytest.raises(ValueError, match=message):
        search(
            PARAMS,
            jax.random.key(0),
            init_contexts(SMALL, 2),
            **arguments,
            config=SMALL,
            search=TEN,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_simulations": 0}, "num_simulations must be a positive integer, got 0"),
        ({"discount": 0.0}, r"discount must be in \(0, 1\], got 0.0"),
        ({"discount": float("nan")}, r"discount must be in \(0, 1\], got nan"),
        ({"noise_fraction": 1.5}, r"noise_fraction must be in \[0, 1\], got 1.5"),
        ({"dirichlet_alpha": 0.0}, "dirichlet_alpha must be above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"pb_c_base": 0.0}, "pb_c_base must be above 0, got 0.0"),
    ],
)
def test_bad_search_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**change)


def test_no_environments():
    with pytest.raises(ValueError, match="num_envs must be a positive integer, got 0"):
        init_contexts(SMALL, 0)
