"""Which action a search takes: any temperature, any counts, any legal actions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import SearchConfig
from kvjax.mcts.policies import choose, visit_shares

ROWS, ACTIONS = 64, 6
ENDS = (0.0, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-30, 1e-4, 1.0, 1e4, 1e30, 1e38, 3e38, 3.4028235e38)
choose_jitted = jax.jit(choose)


def drawn(counts, legal, temperature, seed=0):
    tiled = (jnp.tile(jnp.asarray(x), (ROWS, 1)) for x in (counts, legal))
    return np.asarray(choose_jitted(jax.random.key(seed), *tiled, np.float32(temperature)))


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 2**24), min_size=ACTIONS, max_size=ACTIONS),
    legal=st.lists(st.booleans(), min_size=ACTIONS, max_size=ACTIONS).filter(any),
    temperature=st.sampled_from(ENDS) | st.floats(0.0, float(np.float32(3e38)), width=32),
    seed=st.integers(0, 99),
)
def test_never_an_illegal_action_nor_one_that_was_never_visited(counts, legal, temperature, seed):
    counts, legal = np.int32(counts), np.asarray(legal)
    taken = drawn(counts, legal, temperature, seed)
    assert legal[taken].all()
    if counts[legal].any():
        assert counts[taken].all()


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-40, 1e-38])
def test_the_smallest_temperatures_take_the_first_of_the_most_visited(temperature):
    taken = drawn(np.int32([9, 3, 8, 8, 1, 0]), np.arange(ACTIONS) > 0, temperature)
    assert set(taken.tolist()) == {2}


def test_small_temperatures_take_one_of_the_most_visited():
    taken = drawn(np.int32([9, 3, 8, 8, 7, 0]), np.arange(ACTIONS) > 0, 1.2e-38)
    assert set(taken.tolist()) == {2, 3}


def test_the_largest_temperatures_take_any_that_was_visited():
    taken = drawn(np.int32([2**24, 1, 50, 0, 7, 0]), np.arange(ACTIONS) > 0, 3.4e38)
    assert set(taken.tolist()) == {1, 2, 4}


def test_where_nothing_was_visited_all_legal_actions_are_alike():
    taken = drawn(np.zeros(ACTIONS, np.int32), np.arange(ACTIONS) > 2, 1.0)
    assert set(taken.tolist()) == {3, 4, 5}


def test_visit_shares():
    shares = visit_shares(jnp.asarray([[1, 0, 3], [0, 0, 0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]])


@functools.cache
def searched(name, **options):
    rng = np.random.default_rng(0)
    return kvjax.search(
        random_params(SMALL),
        jax.random.key(0),
        kvjax.init_contexts(SMALL, 3),
        rng.normal(size=(3, 5)).astype(np.float32),
        np.full(3, -1),
        np.array([[True, False, True], [False, False, True], [True, True, True]]),
        config=SMALL,
        search=SearchConfig(num_simulations=10, tree=name, **options),
    )[1]


@pytest.mark.parametrize("name", ["lightzero", "muzero", "gumbel"])
def test_action_weights_are_the_trees_policy_target(name):
    out = searched(name)
    chex.assert_shape(out.action_weights, (3, 3))
    np.testing.assert_allclose(np.sum(out.action_weights, axis=1), 1.0, rtol=1e-5)
    assert not out.action_weights[0, 1]
    assert out.action_weights[1].tolist() == [0.0, 0.0, 1.0]
    shares = out.visit_counts / np.sum(out.visit_counts, axis=1, keepdims=True)
    same = np.allclose(out.action_weights, shares)
    assert same == (name != "gumbel")


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("temperature", 5.0, 0.0),
        ("dirichlet_alpha", 9.0, 0.3),
        ("pb_c_init", 9.0, 1.25),
        ("pb_c_base", 9.0, 19652.0),
    ],
)
def test_gumbel_refuses_what_it_does_not_read(name, value, default):
    message = f'{name} must be {default} with tree "gumbel", which does not read it, got {value}'
    with pytest.raises(ValueError, match=message):
        SearchConfig(tree="gumbel", **{name: value})
    for tree in ("lightzero", "muzero"):
        SearchConfig(tree=tree, **{name: value})


@pytest.mark.parametrize("temperature", [float("inf"), 1e39])
def test_infinite_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number, got"):
        SearchConfig(temperature=temperature)
