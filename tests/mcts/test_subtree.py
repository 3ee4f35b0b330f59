"""Searches that go on from the subtree of the action that was taken, against plain Python."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL, SMALL, in_full, random_params, with_mode
from subtree_oracle import Searcher

from kvjax import SearchConfig, init_contexts, init_kept
from kvjax.mcts import search
from kvjax.mcts.search import _search
from kvjax.tools.routes import ROUTES

PARAMS = random_params(SMALL)
KEEPING = SearchConfig(num_simulations=12, kept_nodes=20, discount=0.9)
CASES = (
    ("learned", 4, {"kept_nodes": 4}),
    ("rebuild", 8, {}),
    *in_full(("rope_lightzero", 8, {"kept_nodes": 6})),
    *in_full(("learned", 8, {}), ("reset", 8, {"max_depth": 3})),
)


def observations(steps, rows, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, rows, 5)).astype(np.float32)


def run(
    contexts, kept, observation, action, *, params=PARAMS, config=SMALL, legal=None, by=KEEPING
):
    """One search, whose output hands on what it kept."""
    key = jax.random.key(0)
    rows = (contexts, observation, np.asarray(action), legal)
    return search(params, key, *rows, config=config, search=by, kept=kept)


@pytest.mark.parametrize(("mode", "context_length", "options"), CASES)
def test_equals_plain_python(mode, context_length, options):
    """Row 0 follows the search; row 1 restarts; row 2 also takes actions that were illegal."""
    config = with_mode(dataclasses.replace(SMALL, context_length=context_length), mode)
    params, search_config = random_params(config), dataclasses.replace(KEEPING, **options)
    searchers = [Searcher(params, config, search_config) for _ in range(3)]
    contexts, kept = init_contexts(config, 3), None
    rng = np.random.default_rng(1)
    action, total, nothing_kept = np.full(3, -1), np.zeros((12, 3), int), np.zeros((12, 3), bool)
    for t, observation in enumerate(observations(12, 3)):
        action[1] = -1 if t == 5 else action[1]
        legal = np.ones((3, 3), bool)
        legal[2] = np.arange(3) != t % 3 if t % 2 else True
        legal[0, 2] = t % 4 < 2
        given = {"params": params, "config": config, "legal": legal, "by": search_config}
        contexts, out = run(contexts, kept, observation, action, **given)
        kept = out.kept
        assert out.finite.all()
        for b, searcher in enumerate(searchers):
            visits, q, value = searcher.act(observation[b], action[b], legal[b])
            np.testing.assert_array_equal(out.visit_counts[b], visits, err_msg=f"step {t} row {b}")
            np.testing.assert_allclose(out.q_values[b], q, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(out.root_value[b], value, rtol=1e-4, atol=1e-5)
            total[t, b] = visits.sum()
            nothing_kept[t, b] = searcher.root.visits == 13
        action = np.asarray(out.action).copy()
        action[2] = rng.integers(3)
    simulations = search_config.num_simulations
    assert (total >= simulations).all()
    assert (total[1:, 0] > simulations).all()
    assert total[5, 1] == simulations
    assert nothing_kept[1:, 2].any()
    assert (total[1:, 2] > simulations).any()


@pytest.mark.skipif(not FULL, reason="equal bits of two programs: optimised, 12 s")
def test_a_first_search_is_the_one_that_keeps_nothing():
    observation, restart = observations(1, 3)[0], np.full(3, -1)
    off = dataclasses.replace(KEEPING, kept_nodes=0)
    begun, plain = run(init_contexts(SMALL, 3), None, observation, restart, by=off)
    contexts, out = run(init_contexts(SMALL, 3), None, observation, restart)
    assert plain.kept is None
    assert out.kept.timestep.tolist() == [0] * 3
    chex.assert_trees_all_equal(contexts, begun)
    chex.assert_trees_all_equal(dataclasses.replace(out, kept=None), plain)


def test_a_loop_in_one_jit_equals_calls_one_by_one():
    """Neither compiles more than once; the loop on the host also drops what was kept, once."""
    observed = jnp.asarray(observations(6, 3))
    start = init_contexts(SMALL, 3), init_kept(SMALL, 3, KEEPING), jnp.full(3, -1)

    def step(state, observation):
        contexts, out = search(
            PARAMS,
            jax.random.key(0),
            state[0],
            observation,
            state[2],
            config=SMALL,
            search=KEEPING,
            kept=state[1],
        )
        return (contexts, out.kept, out.action), (out.visit_counts, out.root_value)

    before, state, answers = _search._cache_size(), start, []
    for t, observation in enumerate(observed):
        state, answer = step((state[0], None if t == 4 else state[1], state[2]), observation)
        answers.append(answer)
    assert _search._cache_size() <= before + 1
    visits, values = (np.stack(x) for x in zip(*answers, strict=True))
    _, (all_visits, all_values) = jax.jit(lambda: jax.lax.scan(step, start, observed))()
    np.testing.assert_array_equal(all_visits[:4], visits[:4])
    np.testing.assert_allclose(all_values[:4], values[:4], rtol=1e-5)
    searched = visits.sum(axis=2)
    assert (searched[[0, 4]] == 12).all()
    assert (searched[[1, 2, 3, 5]] > 12).all()
    assert (np.sum(all_visits, axis=2)[1:] > 12).all()


def test_trees_of_another_moment_are_dropped():
    """A tree that skipped a step, one whose context was replaced, and one that holds NaN."""
    observed, contexts, action = observations(6, 3), init_contexts(SMALL, 3), np.full(3, -1)
    for observation in observed[3:]:  # until windows are full, and alike in length
        contexts, out = run(contexts, None, observation, action)
        action = out.action
    contexts, first = run(contexts, None, observed[0], action)
    later, second = run(contexts, first.kept, observed[1], first.action)
    assert (np.sum(second.visit_counts, axis=1) > 12).all()
    _, skipped = run(later, first.kept, observed[2], first.action)
    assert (np.sum(skipped.visit_counts, axis=1) == 12).all()
    shorter = dataclasses.replace(later.window, length=later.window.length.at[1].set(1))
    low = second.kept.tree.low.at[2].set(jnp.nan)
    broken = dataclasses.replace(second.kept, tree=dataclasses.replace(second.kept.tree, low=low))
    replaced = dataclasses.replace(later, window=shorter)
    _, third = run(replaced, broken, observed[2], second.action)
    kept = np.sum(third.visit_counts, axis=1) > 12
    assert kept.tolist() == [True, False, False]
    assert third.finite.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept_nodes": -1}, "kept_nodes must be an integer, at least 0, got -1"),
        ({"kept_nodes": True}, "kept_nodes must be an integer, at least 0, got True"),
        ({"kept_nodes": 2**24 - 25}, "kept_nodes must be at most 16777190 beside 25 simulations"),
        ({"kept_nodes": 5, "tree": "gumbel"}, 'must be 0 with tree "gumbel", got 5'),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)


def test_trees_of_another_configuration():
    off = dataclasses.replace(KEEPING, kept_nodes=0)
    with pytest.raises(ValueError, match="kept needs a search with kept_nodes above 0, got 0"):
        init_kept(SMALL, 2, off)
    longer = dataclasses.replace(SMALL, context_length=10)
    deeper = dataclasses.replace(SMALL, num_layers=3)
    more = dataclasses.replace(KEEPING, num_simulations=13)
    kept = init_kept(SMALL, 2, KEEPING)
    for given, options, message in (
        (kept, {"by": off}, "kept needs a search with kept_nodes above 0, got 0"),
        (kept, {"by": more}, r"kept.tree.edges must be float32 \(34, 2, 6, 3\), got float32 \(33,"),
        (init_kept(SMALL, 3, KEEPING), {}, r"kept.tree.edges must be .* \(33, 2, 6, 3\), got"),
        (init_kept(longer, 2, KEEPING), {}, r"kept.tokens.tables\[0\] must be float32 \(69, 2, 16"),
        (init_kept(deeper, 2, KEEPING), {}, r"kept.tokens.slots must be int32 \(33, 2, 5\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            run(init_contexts(SMALL, 2), given, observations(1, 2)[0], [-1, -1], **options)


def test_routes_keep_trees_or_refuse_to():
    step, counts = ROUTES["tree"](PARAMS, SMALL, KEEPING, 3), []
    contexts, kept, action = init_contexts(SMALL, 3), None, np.full(3, -1)
    for observation in observations(4, 3):
        contexts, out = run(contexts, kept, observation, action)
        answer = step(jax.random.key(0), observation, action)
        np.testing.assert_array_equal(answer.action, out.action)
        kept, action = out.kept, np.asarray(out.action)
        counts.append(np.sum(out.visit_counts))
    assert max(counts) > 36
    with pytest.raises(ValueError, match='route "store" begins each search anew: kept_nodes must'):
        ROUTES["store"](PARAMS, SMALL, KEEPING, 3)
