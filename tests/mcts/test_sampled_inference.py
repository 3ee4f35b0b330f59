"""A store's steps with continuous actions: handles, rows that cannot be, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_row
import pytest
from conftest import SMALL, random_params

from kvjax import init_store, initial_inference, recurrent_inference
from kvjax.model.contexts import init_contexts, replay
from kvjax.model.rollout import rollout
from kvjax.ops import hashing
from kvjax.ops import window as windows

CONFIG = dataclasses.replace(
    SMALL, num_layers=1, num_actions=2, sigma_type="conditioned", num_sampled_actions=4
)
PARAMS = random_params(CONFIG)
RNG = np.random.default_rng(3)
LATENT, ACTION = RNG.normal(size=(3, 2, 16)), RNG.uniform(-1, 1, size=(3, 2, 2))
LATENT, ACTION = LATENT.astype(np.float32), ACTION.astype(np.float32)
NAN = np.full((2, 2), np.nan, np.float32)
ROWS, ZERO = np.arange(2), np.zeros(2, np.int32)


def begun():
    """A store after two steps of both environments, and the second step's answer."""
    store = init_store(CONFIG, 2, 4)
    args = (LATENT[0], NAN, LATENT[0], ROWS, ZERO)
    store, _ = initial_inference(PARAMS, store, *args, config=CONFIG)
    args = (LATENT[0], ACTION[0], LATENT[1], ROWS, ZERO + 1)
    return initial_inference(PARAMS, store, *args, config=CONFIG)


def test_steps_equal_those_of_one_item():
    """By latents and by handles; children of unlike actions are filed apart."""
    store, root = begun()
    assert root.hit.all()
    window = windows.init(CONFIG.window)
    first = (jnp.full(2, jnp.nan), LATENT[0, 0], 0)
    window, *_ = one_row.root_step(PARAMS, window, *first, config=CONFIG)
    then = (ACTION[0, 0], LATENT[1, 0], 1)
    window, policy, value = one_row.root_step(PARAMS, window, *then, config=CONFIG)
    np.testing.assert_allclose(root.policy[0], policy, atol=1e-5)
    np.testing.assert_allclose(root.value[0], value, atol=1e-5)
    acted, imagined = (ACTION[1, 0], 1, 1), {}
    _, expected = one_row.recurrent_step(PARAMS, window, *acted, config=CONFIG)
    for slot in (None, root.slot):
        args = (root.latent, ACTION[1], ROWS, ZERO + 1, ZERO + 1)
        store, imagined[slot is None] = recurrent_inference(
            PARAMS, store, *args, config=CONFIG, slot=slot
        )
        assert imagined[slot is None].hit.all()
    for out in imagined.values():
        for field in ("latent", "reward", "policy", "value"):
            came, wanted = getattr(out, field)[0], getattr(expected, field)
            np.testing.assert_allclose(came, wanted, atol=1e-5, err_msg=field)
    parent, actions = jnp.arange(6, dtype=jnp.uint32), jnp.float32([[0.5, 0.1], [0.1, 0.5]])
    keys = [hashing.path_key(parent, action) for action in actions]
    assert (keys[0] != keys[1]).any()


def test_a_row_that_takes_no_finite_action_is_not_valid():
    """A device's array cannot be looked into: NaN is no action of an imagined step."""
    store, root = begun()
    action = jnp.asarray(ACTION[1]).at[0, 1].set(jnp.nan)
    args = (root.latent, action, ROWS, ZERO + 1, ZERO + 1)
    _, out = recurrent_inference(PARAMS, store, *args, config=CONFIG)
    assert out.valid.tolist() == [False, True]
    assert jnp.isnan(out.value).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(2, int), r"action must have shape \(2, 2\), got \(2,\)"),
        (np.zeros((2, 2), int), "action must be floating-point numbers"),
        (NAN, "action must be finite numbers, got"),
        ([[0.0, 0.0]] * 2, "action must be an array, got list"),
    ],
)
def test_bad_actions(action, message):
    store, args = init_store(CONFIG, 2, 4), (LATENT[0], action, ROWS, ZERO + 1, ZERO)
    with pytest.raises(ValueError, match=message):
        recurrent_inference(PARAMS, store, *args, config=CONFIG)


def test_a_history_and_a_rollout():
    """What `replay` leaves is what the steps leave; a rollout takes its vectors one by one."""
    observation = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    action = np.stack([NAN, ACTION[0], ACTION[1]], axis=1)
    length = np.array([3, 2])
    contexts, policy, _ = replay(PARAMS, observation, action, length, config=CONFIG)
    assert contexts.window.length.tolist() == [5, 3]
    window, latent = windows.init(CONFIG.window), one_row.encode
    for t in range(2):
        seen = latent(PARAMS, observation[1, t], config=CONFIG)
        window, said, _ = one_row.root_step(PARAMS, window, action[1, t], seen, t, config=CONFIG)
    np.testing.assert_allclose(policy[1], said, atol=1e-5)
    np.testing.assert_allclose(contexts.window.kv[1], window.kv, atol=1e-5)
    _, imagined = rollout(PARAMS, window, jnp.asarray(ACTION[:, 0]), config=CONFIG)
    _, once = one_row.recurrent_step(PARAMS, window, ACTION[0, 0], 1, 0, config=CONFIG)
    np.testing.assert_allclose(imagined.policy[0], once.policy, atol=1e-5)
    assert imagined.policy.shape == (3, 4)
    with pytest.raises(ValueError, match=r"action must have shape \[B, T, A\], got \(2, 3\)"):
        replay(PARAMS, observation, np.zeros((2, 3)), length, config=CONFIG)
    with pytest.raises(ValueError, match=r"action must have shape \[K, 2\], got \[3\]"):
        rollout(PARAMS, window, jnp.zeros(3), config=CONFIG)
    assert jax.tree.structure(init_contexts(CONFIG, 2)) == jax.tree.structure(contexts)
