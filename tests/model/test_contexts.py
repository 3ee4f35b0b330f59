"""Recorded histories in one call, and what becomes of contexts when the weights change."""

import functools

import chex
import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import one_row
import oracle
import pytest
from conftest import SMALL, random_params, with_mode

from kvjax import init_contexts, init_store, initial_inference, on_params_update, prepare, replay
from kvjax import store as stores
from kvjax.config import WINDOW_MODES
from kvjax.model.contexts import advance
from kvjax.ops import window as windows

ATOL = 1e-5
ROWS, STEPS = 4, 9
one_step = jax.jit(advance, static_argnames="config")
encode = jax.jit(flax_model.encode, static_argnames="config")
observe = jax.jit(one_row.observe, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def push(params, *given, config):
    return jax.vmap(functools.partial(one_row.root_step, params, config=config))(*given)


@jax.jit
def windows_at(store, slot):
    return stores.take(store, stores.resolve(store, slot, jnp.arange(2)))


LENGTHS = np.array([9, 0, 1, 6])


def histories(seed=0):
    rng = np.random.default_rng(seed)
    action = rng.integers(3, size=(ROWS, STEPS))
    action[:, 0], action[0, 4] = -1, -1  # a row restarts on the way
    return rng.normal(size=(ROWS, STEPS, 5)).astype(np.float32), action


def row(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize("mode", WINDOW_MODES)
def test_histories_of_unequal_lengths_equal_single_steps(mode):
    config = with_mode(SMALL, mode)
    params = random_params(config)
    observation, action = histories()
    contexts, policy, value = replay(params, observation, action, LENGTHS, config=config)
    contexts, policy, value = jax.device_get((contexts, policy, value))
    model = prepare(params, config=config)
    for b, length in enumerate(LENGTHS):
        alone, logits = init_contexts(config, 1), (np.zeros((1, 3)), np.zeros((1, 7)))
        for t in range(length):
            seen = observation[b : b + 1, t], action[b : b + 1, t]
            alone, *logits = one_step(model, alone, *seen, config=config)
        alone, logits = jax.device_get((alone, logits))
        chex.assert_trees_all_close(row(contexts, b), row(alone, 0), atol=ATOL)
        np.testing.assert_allclose(policy[b], logits[0][0], atol=ATOL)
        np.testing.assert_allclose(value[b], logits[1][0], atol=ATOL)
    assert contexts.timestep.tolist() == [4, -1, 0, 5]


def test_a_history_in_two_parts_equals_the_whole():
    config = with_mode(SMALL, "rope_lightzero")
    params = random_params(config)
    observation, action = histories()
    whole = replay(params, observation, action, np.full(ROWS, STEPS), config=config)
    first = replay(params, observation[:, :4], action[:, :4], np.full(ROWS, 4), config=config)[0]
    second = replay(
        params,
        observation[:, 4:],
        action[:, 4:],
        np.full(ROWS, STEPS - 4),
        config=config,
        contexts=first,
    )
    chex.assert_trees_all_close(second, whole, atol=ATOL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros(4, int)}, r"action must have shape \[B, T\], got \(4,\)"),
        ({"length": np.zeros(3, int)}, r"length must have shape \(4,\), got \(3,\)"),
        ({"length": np.full(4, 10)}, r"length must be in 0 .. 9, got \[10, 10, 10, 10\]"),
        ({"action": np.full((4, 9), 3)}, "action must be in -1 .. 2"),
        (
            {"observation": np.zeros((4, 9, 6), np.float32)},
            r"observation must have shape \(4, 9, 5\), got \(4, 9, 6\)",
        ),
        ({"contexts": init_contexts(SMALL, 3)}, "contexts must have 4 rows, got 3"),
        (
            {"contexts": init_contexts(with_mode(SMALL, "rebuild"), 4)},
            'the contexts keep raw tokens, which window_mode "learned" does not have',
        ),
        ({"action": np.zeros((4, 9))}, "action must be integers, got float64"),
        (
            {"observation": np.zeros((4, 0, 5)), "action": np.zeros((4, 0), int)},
            "length must be in 0 .. 0",
        ),
    ],
)
def test_bad_histories(change, message):
    observation, action = histories()
    given = {"observation": observation, "action": action, "length": LENGTHS} | change
    with pytest.raises(ValueError, match=message):
        replay(random_params(SMALL), **given, config=SMALL)


def held_tokens(params, observation, action, config):
    """Raw tokens of one row's window after its history, embedded by these parameters."""
    table = params["params"]["action_embedding"]["embedding"]
    history = oracle.History(config)
    for t, seen in enumerate(observation):
        if t:
            history.push(np.asarray(table[action[t]]), None)
        history.push(np.asarray(encode(params, seen, config=config)), None)
        history.make_room()
    return [history.tokens[index] for index in history.window]


def test_rebuilt_contexts_are_those_of_the_new_weights():
    config = with_mode(SMALL, "rebuild")
    old, new = random_params(config), random_params(config, seed=1)
    observation, action = histories(1)
    contexts, _, _ = replay(old, observation, action, LENGTHS, config=config)
    renewed = on_params_update(contexts, new, config=config)
    for b, length in enumerate(LENGTHS):
        if b == 0:
            continue  # restarts on the way
        tokens = held_tokens(old, observation[b, :length], action[b], config)
        assert int(renewed.window.length[b]) == len(tokens)
        if tokens:
            _, kv = oracle.forward_with_kv(oracle.as_float64(new), tokens, config)
            np.testing.assert_allclose(renewed.window.kv[b, : len(tokens)], kv, atol=ATOL)
    assert renewed.timestep.tolist() == contexts.timestep.tolist()


@pytest.mark.parametrize("mode", ["learned", "rope_lightzero", "reset"])
def test_other_modes_drop_their_contexts_and_go_on_from_the_next_observation(mode):
    config = with_mode(SMALL, mode)
    old, new = random_params(config), random_params(config, seed=1)
    observation, action = histories()
    contexts, _, _ = replay(old, observation, action, np.full(ROWS, 6), config=config)
    dropped = on_params_update(contexts, new, config=config)
    assert dropped.window.length.tolist() == [0] * ROWS
    assert dropped.timestep.tolist() == contexts.timestep.tolist()
    model = prepare(new, config=config)
    moved, _, _ = jax.device_get(
        one_step(model, dropped, observation[:, 6], jnp.ones(ROWS, jnp.int32), config=config)
    )
    assert moved.timestep.tolist() == [t + 1 for t in contexts.timestep.tolist()]
    for b in range(ROWS):
        latent = encode(new, observation[b, 6], config=config)
        alone = observe(new, windows.init(config.window), latent, moved.timestep[b], config=config)
        chex.assert_trees_all_close(row(moved.window, b), alone, atol=ATOL)


def test_a_state_of_another_kind():
    with pytest.raises(TypeError, match="state must be Contexts or a Store, got dict"):
        on_params_update({}, random_params(SMALL), config=SMALL)


def latents(seed):
    return np.random.default_rng(seed).normal(size=(2, SMALL.embed_dim)).astype(np.float32)


def root_steps(store, params, config, steps, start=0, **options):
    """Real steps of two environments; the latents are those of the step's number."""
    for t in range(start, start + steps):
        action = np.full(2, t % 3 if t else -1)
        store, out = initial_inference(
            params,
            store,
            latents(t - 1 if t else 99),
            action,
            latents(t),
            np.arange(2),
            np.full(2, t),
            config=config,
            **options,
        )
    return store, out


def test_a_store_forgets_and_brings_the_newest_roots_back():
    config = with_mode(SMALL, "rebuild")
    old, new = random_params(config), random_params(config, seed=1)
    store, _ = root_steps(init_store(config, 2, 5), old, config, 5)
    store = on_params_update(store, new, config=config)
    store, out = root_steps(store, new, config, 1, start=5, miss_policy="rebuild")
    assert out.hit.tolist() == [False, False]  # the old windows are not found, but computed again
    assert stores.stats(store)["rebuilt"] == 2

    contexts = init_contexts(config, 2)
    observed = functools.partial(replay_latents, old, config)
    contexts = on_params_update(observed(contexts, range(5)), new, config=config)
    expected = replay_latents(new, config, contexts, [5])
    chex.assert_trees_all_close(windows_at(store, out.slot), expected.window, atol=ATOL)


def replay_latents(params, config, contexts, steps):
    """The same steps by carried windows."""
    window = contexts.window
    for t in steps:
        action = jnp.full(2, t % 3 if t else -1)
        given = window, action, latents(t), jnp.full(2, t)
        window, _, _ = push(params, *given, config=config)
    return contexts.__class__(window, contexts.timestep)


def test_nothing_is_brought_back_after_an_episodes_end_or_into_an_empty_store():
    config = with_mode(SMALL, "rebuild")
    old, new = random_params(config), random_params(config, seed=1)
    store, _ = root_steps(init_store(config, 2, 5), old, config, 4)
    store = stores.clear_environment(store, 0)
    store = on_params_update(store, new, config=config)
    store, out = root_steps(store, new, config, 1, start=5, miss_policy="rebuild")
    assert windows_at(store, out.slot).length.tolist() == [
        3,
        5,
    ]  # alone: last observation, action, observation
    assert stores.stats(store)["rebuilt"] == 1
    store, out = root_steps(stores.clear(store), new, config, 1, start=6, miss_policy="rebuild")
    assert stores.stats(store)["rebuilt"] == 1


def test_rebuilding_needs_raw_tokens():
    with pytest.raises(
        ValueError, match='needs windows with raw tokens .*window_mode is "learned"'
    ):
        root_steps(init_store(SMALL, 2, 5), random_params(SMALL), SMALL, 1, miss_policy="rebuild")
