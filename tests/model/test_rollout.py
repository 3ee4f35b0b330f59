"""Gradients through caches equal those of the same rollout without any."""

import dataclasses
import functools

import chex
import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import SMALL, in_full, random_params, with_mode

from kvjax.model import modes, rollout
from kvjax.ops import window as windows

# These programs run once: the time goes into compiling them.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT = ("rope_lightzero", "rope_consistent", "rebuild", "reset")
PREFIX, STEPS = 1, 6  # the window of 8 slides at the third imagined step and at each one after


def cached(params, config, actions, latents, **options):
    """All predictions from one observation on, by windows."""
    empty, start = windows.init(config.window), jnp.int32(0)
    window = flax_model.observe(params, empty, latents[0], start, config=config)
    imagined = jnp.asarray(actions[PREFIX - 1 :])
    return rollout(params, window, imagined, PREFIX - 1, config=config, **options)[1]


def views(config):
    """Per push of the episode: each token's position [T] and whom it may see besides itself [T, T].

    A rotary token sees what its window held when it was pushed, at its own position. In the other
    modes the window of the push is a sequence of its own, at positions 0, 1, ..
    """
    history, out = oracle.History(config), []
    total = 2 * (PREFIX + STEPS) - 1
    for push in range(total):
        t = (push + 1) // 2
        root, depth = min(t, PREFIX - 1), max(t - PREFIX + 1, 0)
        places = modes.token_positions(config, jnp.int32(root), jnp.int32(depth))
        history.push(None, 0 if places[0] is None else int(places[1 - push % 2]))
        positions, sees = np.zeros(total, np.int32), np.zeros((total, total), bool)
        if config.is_rotary:
            positions[: push + 1] = history.positions
            sees[: push + 1, : push + 1] = history.mask()
        else:
            for slot, index in enumerate(history.window):
                positions[index] = slot
                sees[index, history.window[: slot + 1]] = True
        out.append((positions, sees & ~np.eye(total, dtype=bool)))
        if push % 2 == 0:
            history.make_room()
    return [jnp.stack(part) for part in zip(*out, strict=True)]


def uncached(params, config, actions, latents):
    """The same from a list of tokens, with a full forward pass at each push and no cache."""
    with jax.ensure_compile_time_eval():
        positions, sees = views(config)
    embed = functools.partial(flax_model.embed_action, params, config=config)
    tokens = jnp.zeros((len(positions), config.embed_dim), config.dtype)
    for t in range(PREFIX):
        tokens = tokens.at[2 * t].set(latents[t])
        tokens = tokens if t == 0 else tokens.at[2 * t - 1].set(embed(jnp.int32(actions[t - 1])))

    def push(tokens, index, token):
        tokens = tokens.at[index].set(token)
        hidden, _ = flax_model.sequence(
            params, tokens, positions[index], sees[index], config=config
        )
        return tokens, hidden[index]

    def imagine(tokens, x):
        index, action = x
        tokens, hidden = push(tokens, index, embed(action))
        reward, latent = flax_model.read_action(params, hidden, config=config)
        tokens, hidden = push(tokens, index + 1, latent)
        policy, value = flax_model.read_observation(params, hidden, config=config)
        return tokens, (latent, reward, policy, value)

    first = 2 * PREFIX - 1
    imagined = jnp.arange(first, first + 2 * STEPS, 2), jnp.asarray(actions[PREFIX - 1 :])
    return jax.lax.scan(imagine, tokens, imagined)[1]


def loss_of(outputs):
    """Every output counts, each entry by its own weight."""
    leaves = jax.tree.leaves(outputs)
    rng = np.random.default_rng(3)
    return sum(jnp.sum(jnp.asarray(rng.normal(size=x.shape)) * jnp.sin(x)) for x in leaves)


def example(mode, dtype="float32"):
    config = dataclasses.replace(with_mode(SMALL, mode), observation_size=None, dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    rng = np.random.default_rng(0)
    actions = rng.integers(config.num_actions, size=PREFIX + STEPS - 1)
    return config, params, actions, rng.normal(size=(PREFIX, config.embed_dim)).astype(dtype)


spare = functools.partial(cached, checkpoint=True)


@functools.cache
def gradient(play, mode, dtype="float32"):
    """A loss and its gradients."""
    config, params, *given = example(mode, dtype)
    loss = jax.value_and_grad(lambda params: loss_of(play(params, config, *given)))
    return jax.device_get(jax.jit(loss)(params))


def example_without_mode(mode):
    return example(mode)[1:]


def relative_error(ours, theirs):
    """Largest difference of any entry, over the largest entry of its parameter.

    Some gradients are zero but for rounding (a key's bias moves all scores alike): hence the floor.
    """
    errors = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-2), ours, theirs
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.parametrize("mode", ["rebuild", *in_full("rope_lightzero")])
def test_gradients_through_caches_equal_gradients_without(mode):
    (ours, our_gradient), (theirs, their_gradient) = (
        gradient(play, mode) for play in (cached, uncached)
    )
    assert abs(ours - theirs) < 1e-4
    assert relative_error(our_gradient, their_gradient) < 1e-4
    assert all(np.any(gradient) for gradient in jax.tree.leaves(our_gradient))


@pytest.mark.parametrize("mode", ["reset", *in_full("rope_consistent")])
def test_the_same_in_float64(mode):
    with jax.enable_x64(True):
        (ours, our_gradient), (theirs, their_gradient) = (
            gradient(play, mode, "float64") for play in (cached, uncached)
        )
        assert abs(ours - theirs) < 1e-8
        assert relative_error(our_gradient, their_gradient) < 1e-8


def test_a_corrected_window_has_gradients_of_its_own():
    """The correction is an approximation, and so are its gradients: not those of a rebuild."""
    for ours, theirs in zip(*map(example_without_mode, ("learned", "rebuild")), strict=True):
        chex.assert_trees_all_equal(ours, theirs)
    (_, ours), (_, theirs) = (gradient(cached, mode) for mode in ("learned", "rebuild"))
    assert 1e-3 < relative_error(ours, theirs) < 10.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))


@pytest.mark.parametrize("mode", ["learned", *in_full("rebuild")])
def test_checkpointing_and_batching_change_nothing(mode):
    with jax.enable_x64(True):
        (value, ours), (other_value, other) = (
            gradient(play, mode, "float64") for play in (cached, spare)
        )
    assert abs(value - other_value) < 1e-12
    assert relative_error(other, ours) < 1e-12

    config, params, actions, latents = example(mode)
    window = windows.init(config.window)
    observe = jax.jit(functools.partial(flax_model.observe, config=config))
    window = observe(params, window, latents[0], jnp.int32(0))
    actions = jnp.asarray(actions)
    plain = functools.partial(rollout, config=config)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), window)
    both = jnp.stack([actions, actions[::-1]])
    batched = jax.jit(jax.vmap(plain, in_axes=(None, 0, 0)), compiler_options=QUICK)
    batched = batched(params, batch, both)
    for row, acted in enumerate(both):
        alone = jax.jit(plain, compiler_options=QUICK)(params, window, acted)
        jax.tree.map(
            lambda x, y, row=row: np.testing.assert_allclose(x[row], y, atol=1e-5), batched, alone
        )
