"""One step of environments and one imagined step: push tokens, read heads, make room.

Everything here is built from these two: the search in one jit, the store's inference steps, replay
and rollout.

Shapes: B rows, C context_length in tokens, L layers, H heads, D head size, E embedding size, A
actions, S support bins.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.arrays import ArrayLike
from kvjax.base.compilation import computed_once
from kvjax.config import WorldModelConfig
from kvjax.model import modes, unizero
from kvjax.model.folding import UniZero
from kvjax.model.unizero import Cached
from kvjax.ops import window as windows
from kvjax.ops.window import Window

FIRST_STEP = -1
"""The last action of a row that starts an episode; of continuous actions, NaN in all numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a world model says about one transition.

    Attributes:
      latent: [E], the next latent state.
      reward: [S] logits over the support.
      policy: [A] logits, or [2A] means and deviations of a Gaussian.
      value: [S] logits over the support.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array


def is_first(last_action: ArrayLike) -> jax.Array:
    """Which rows start an episode: [B] bool.

    Args:
      last_action: [B] integer, -1 starts one; or [B, A], where NaN in all numbers does.
    """
    if jnp.issubdtype(last_action.dtype, jnp.floating):
        return jnp.all(jnp.isnan(last_action), axis=-1)
    return jnp.equal(last_action, FIRST_STEP)


def first_actions(rows: int, config: WorldModelConfig) -> np.ndarray[Any, Any]:
    """Last actions of rows that all start an episode: [B] int32 of -1, or [B, A] float32 of NaN."""
    if config.is_continuous:
        return np.full((rows, *config.action_shape), np.nan, np.float32)
    return np.full(rows, FIRST_STEP, np.int32)


def as_taken(last_action: ArrayLike) -> ArrayLike:
    """Actions, and what marks first steps, as programs take them: int32 or float32."""
    is_vector = jnp.issubdtype(last_action.dtype, jnp.floating)
    return last_action.astype(jnp.float32 if is_vector else jnp.int32)


def _acted(last_action: jax.Array) -> jax.Array:
    """Last actions, those of rows that start an episode replaced by some action."""
    if jnp.issubdtype(last_action.dtype, jnp.floating):
        return jnp.where(is_first(last_action)[:, None], 0.0, last_action)
    return jnp.maximum(last_action, 0)


def observe(
    model: UniZero,
    window: Window,
    latent: jax.Array,
    timestep: jax.Array,
    *,
    config: WorldModelConfig,
) -> Window:
    """Pushes latents [B, E] of observations and predicts nothing; the windows do not slide."""
    _, rotation = modes.rotations(timestep, 0, config)
    return _push(model, latent, window, rotation, config)[1]


def root_step(
    model: UniZero,
    window: Window,
    last_action: jax.Array,
    latent: jax.Array,
    timestep: jax.Array,
    *,
    config: WorldModelConfig,
) -> tuple[Window, jax.Array, jax.Array]:
    """Pushes what environments did: the last action and the latent of what was then observed.

    Args:
      window: the roots' windows before the action, `kv` [B, C, L, 2, H, D]. An empty one starts
        from the observation alone.
      last_action: [B] int32, -1 starts an episode from an empty window; or [B, A] float32, where
        NaN does.
      latent: [B, E] of the current observations.
      timestep: [B] int32 of the current observations; read by rotary positions only.

    Returns:
      The new root windows, policy logits [B, A] and value logits [B, S] of the observations. A
      Gaussian policy is its means and deviations, [B, 2A].
    """
    before = window.length
    starts = is_first(last_action) | (before == 0)
    at_action, at_observation = modes.rotations(timestep, 0, config)
    action = unizero.raw_action(model, _acted(last_action))
    _, continued = _push(model, action, window, at_action, config)
    empty = jax.tree.map(jnp.zeros_like, continued)
    window = jax.vmap(windows.where)(starts, empty, continued)
    x, window = _push(model, latent, window, at_observation, config)
    policy, value = unizero.at_observation(model, x)
    return modes.make_room(model, before, window, latent, config), policy.T, value.T


def recurrent_step(
    model: UniZero,
    window: Window,
    action: jax.Array,
    depth: jax.Array,
    timestep: jax.Array,
    *,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[Window, Prediction]:
    """Imagines one step: pushes an action, reads the next latent from it and pushes that too.

    Args:
      window: the parent nodes' windows; each parent's latent is its last token.
      action: [B] int32 in 0 .. A - 1, or [B, A] float32.
      depth: [B] int32 of the new nodes below their root, from 1; read by rotary positions only.
      timestep: [B] int32 of the roots; read by rotary positions only.
      zero_keys: [B] int32, see `kvjax.model.unizero.token_step`.

    Returns:
      The children's windows and the `Prediction` for them, each field [B, ...].
    """
    before = window.length
    at_action, at_observation = modes.rotations(timestep, depth, config)
    raw = unizero.raw_action(model, action)
    x, window = _push(model, raw, window, at_action, config, zero_keys)
    reward, latent = unizero.at_action(model, x, config=config)
    latent = computed_once(latent.T)  # it is stored, returned and hashed
    x, window = _push(model, latent, window, at_observation, config, zero_keys)
    policy, value = unizero.at_observation(model, x)
    window = modes.make_room(model, before, window, latent, config)
    return window, Prediction(latent, reward.T, policy.T, value.T)


def _push(
    model: UniZero,
    token: jax.Array,
    window: Window,
    rotation: jax.Array | None,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[jax.Array, Window]:
    """The stream [E, B] behind raw tokens [B, E], and the windows with them."""
    x = unizero.place(model, unizero.embed_latent(token.astype(model.dtype).T), window.length)
    x, own = unizero.token_step(
        model, x, *_as_read(model, window), (), rotation, config=config, zero_keys=zero_keys
    )
    kv_token = jnp.stack(own, axis=1).reshape(token.shape[0], *config.window.token_shape)
    raw = None if window.raw is None else token
    return x, jax.vmap(windows.append)(window, kv_token, raw)


def _as_read(model: UniZero, window: Window) -> tuple[Cached, jax.Array]:
    """Keys and values [B, C, E] of each layer, and which slots hold a token: [B, C] bool."""
    rows, capacity, layers = window.kv.shape[:3]
    kv = window.kv.astype(model.dtype).reshape(rows, capacity, layers, 2, -1)
    cached = tuple((kv[:, :, layer, 0], kv[:, :, layer, 1]) for layer in range(layers))
    return cached, jax.vmap(windows.valid_mask)(window)
