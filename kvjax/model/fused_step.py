"""An environment's step by the folded model: `kvjax.model.contexts.advance` for all rows at once.

A search that has folded the model takes its root step with it too: the model itself, which reads
its matrices the other way round, takes as long for that step as for two or three simulations.

Shapes: B environments, C context_length in tokens, L layers, H heads, D head size, E embedding
size, A actions, S support bins.
"""

import functools

import jax
import jax.numpy as jnp

from kvjax.config import WorldModelConfig
from kvjax.model import fused, step, world_model
from kvjax.model.contexts import Contexts
from kvjax.model.fused import Folded
from kvjax.model.world_model import Params
from kvjax.ops import position
from kvjax.ops import window as windows
from kvjax.ops.window import Window


def advance(
    folded: Folded,
    params: Params,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    *,
    config: WorldModelConfig,
) -> tuple[Contexts, jax.Array, jax.Array]:
    """As `contexts.advance`; `folded` is what `fused.fold` made of `params`."""
    encode, embed_action = (
        jax.vmap(functools.partial(function, params, config=config))
        for function in (world_model.encode, world_model.embed_action)
    )
    begins = last_action == step.FIRST_STEP
    timestep = jnp.where(begins, 0, contexts.timestep + 1)
    at_action, at_observation = rotations(timestep, 0, config)
    action, latent = embed_action(jnp.maximum(last_action, 0)), encode(observation)
    before = contexts.window
    _, window = _push(folded, action, before, at_action, config)
    empty = jax.tree.map(jnp.zeros_like, window)
    window = jax.vmap(windows.where)(begins | (before.length == 0), empty, window)
    x, window = _push(folded, latent, window, at_observation, config)
    policy, value = fused.at_observation(folded, x)
    projected = folded.projected if config.window_mode == "learned" else None
    correction = None if projected is None else position.slide_correction(projected)
    full = step.any_overflows(before, config)
    make_room = functools.partial(step.make_room, params, correction, config=config)
    window = jax.vmap(make_room, in_axes=(0, 0, None))(window, latent, full)
    return Contexts(window, timestep), policy.T, value.T


def rotations(
    timestep: jax.Array, depth: jax.Array | int, config: WorldModelConfig
) -> tuple[jax.Array | None, jax.Array | None]:
    """Of each row's action and observation token: [B, 2, D / 2]; None for learned positions."""
    if not config.is_rotary:
        return None, None
    head_dim, theta = config.window.head_dim, config.rope_theta
    at_action, at_observation = (
        jax.vmap(lambda place: position.rotation(place, head_dim, theta))(places)
        for places in step.token_positions(config, timestep, depth)
    )
    return at_action, at_observation


def _push(
    folded: Folded,
    token: jax.Array,
    window: Window,
    rotation: jax.Array | None,
    config: WorldModelConfig,
) -> tuple[jax.Array, Window]:
    """The stream [E, B] behind raw tokens [B, E], and the windows with them."""
    rows, capacity = window.kv.shape[:2]
    kv = window.kv.astype(jnp.float32).reshape(rows, capacity, config.num_layers, 2, -1)
    cached = tuple((kv[:, :, layer, 0], kv[:, :, layer, 1]) for layer in range(config.num_layers))
    valid = jnp.arange(capacity, dtype=jnp.int32)[None] < window.length[:, None]
    x = fused.place(folded, fused.embed_latent(token.T), window.length)
    x, own = fused.token_step(folded, x, cached, valid, (), rotation, config=config)
    kv_token = jnp.stack(own, axis=1).reshape(rows, *config.window.token_shape)
    raw = None if window.raw is None else token
    return x, jax.vmap(windows.append)(window, kv_token, raw)
