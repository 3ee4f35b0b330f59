"""Searches that go on from the subtree of the action that was taken, against plain Python."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_params, with_mode
from subtree_oracle import Searcher

from kvjax import SearchConfig, init_contexts, search, subtree
from kvjax.search import _search

PARAMS = random_params(SMALL)
KEEPING = SearchConfig(num_simulations=12, kept_nodes=20, discount=0.9)
CASES = (
    ("learned", 4, {}),
    ("learned", 8, {}),
    ("learned", 8, {"kept_nodes": 4}),
    ("learned", 20, {"max_depth": 3}),
    ("rope_lightzero", 8, {}),
    ("rope_consistent", 4, {"kept_nodes": 1}),
    ("rebuild", 4, {}),
    ("rebuild", 8, {"kept_nodes": 6}),
    ("reset", 4, {}),
    ("reset", 8, {}),
)


def observations(steps, rows, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, rows, 5)).astype(np.float32)


def begin(config, rows, search_config):
    return init_contexts(config, rows), subtree.init_kept(config, rows, search_config)


@pytest.mark.parametrize(("mode", "context_length", "options"), CASES)
def test_equals_plain_python(mode, context_length, options):
    """Row 0 follows the search; row 1 restarts; row 2 also takes actions that were illegal."""
    config = with_mode(dataclasses.replace(SMALL, context_length=context_length), mode)
    params, search_config = random_params(config), dataclasses.replace(KEEPING, **options)
    searchers = [Searcher(params, config, search_config) for _ in range(3)]
    contexts, kept = begin(config, 3, search_config)
    rng = np.random.default_rng(1)
    action, total, nothing_kept = np.full(3, -1), np.zeros((12, 3), int), np.zeros((12, 3), bool)
    for t, observation in enumerate(observations(12, 3)):
        action[1] = -1 if t == 5 else action[1]
        legal = np.ones((3, 3), bool)
        legal[2] = np.arange(3) != t % 3 if t % 2 else True
        legal[0, 2] = t % 4 < 2
        contexts, out = search(
            params,
            jax.random.key(t),
            contexts,
            observation,
            action,
            legal,
            config=config,
            search=search_config,
            kept=kept,
        )
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
