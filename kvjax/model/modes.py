"""What the window modes do: where tokens stand, what a full window keeps, what a tree stores.

A mode's facts are `kvjax.config.MODES`; whatever depends on them is in this file.

Shapes: B rows, C context_length in tokens, T = C - 3 slots of a stored window, L layers, H heads, D
head size, E embedding size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.config import WorldModelConfig
from kvjax.model import unizero
from kvjax.model.folding import UniZero
from kvjax.model.unizero import Cached, Fresh
from kvjax.ops import position
from kvjax.ops import window as windows
from kvjax.ops.window import Window

Rotations = tuple[jax.Array | None, jax.Array | None]


def token_positions(
    config: WorldModelConfig, timestep: jax.Array, depth: jax.Array | int = 0
) -> Rotations:
    """Where a step's action and observation go; None where the window's length says it.

    Args:
      timestep: [...] int32 of the root.
      depth: [...] int32 below the root.
    """
    gap = config.mode.rotary_gap
    if gap is None:
        return None, None
    observation = position.observation_position(timestep, depth, gap=gap)
    return observation - 1, observation


def rotations(timestep: jax.Array, depth: jax.Array | int, config: WorldModelConfig) -> Rotations:
    """Of each row's action and observation token: [B, 2, D / 2]; None for learned positions."""
    head_dim, theta = config.window.head_dim, config.rope_theta
    at_action, at_observation = (
        None
        if places is None
        else jax.vmap(lambda p: position.rotation(p, head_dim, theta))(places)
        for places in token_positions(config, timestep, depth)
    )
    return at_action, at_observation


def slide_correction(model: UniZero, *, config: WorldModelConfig) -> jax.Array | None:
    """What `kvjax.ops.window.slide` needs of this model: [C - 3, L, 2, H, D], or None.

    It follows from the variables alone, and is never older than they are.
    """
    if model.projected is None or not config.mode.corrected:
        return None
    return position.slide_correction(model.projected, block=config.window.block)


def make_room(
    model: UniZero, before: jax.Array, window: Window, latent: jax.Array, config: WorldModelConfig
) -> Window:
    """What the mode makes of windows [B] that have reached C - 1 tokens.

    Args:
      before: [B] int32, their lengths before the step: where no row overflows, nothing is computed.
      latent: [B, E], the last token of each.
    """
    full = jnp.any(before >= config.window.kept_length)
    slide = functools.partial(windows.slide, block=config.window.block)
    if not (config.mode.keeps_raw or config.mode.carry is not None):
        correction = slide_correction(model, config=config)
        slid: Window = jax.vmap(slide, in_axes=(0, None))(window, correction)
        return slid

    def compute_again() -> Window:
        if config.mode.keeps_raw:
            return rebuild(model, jax.vmap(slide)(window), config=config)
        kv = jnp.stack([jnp.stack(layer, 2) for layer in _alone(model, latent.T, config)], 2)
        empty = jnp.zeros_like(window.kv)
        kv = kv.reshape(latent.shape[0], 1, *config.window.token_shape).astype(empty.dtype)
        return Window(empty.at[:, :1].set(kv), jnp.ones_like(window.length))

    again: Window = loops.cond(full, compute_again, lambda: window)
    return jax.vmap(windows.where)(jax.vmap(windows.overflows)(window), again, window)


def rebuild(model: UniZero, window: Window, *, config: WorldModelConfig) -> Window:
    """Keys and values of windows [B] again, from raw tokens at positions 0 .. length - 1.

    Args:
      window: of at most C - 3 tokens, with `raw` [B, C, E].
    """
    kept = config.window.kept_length
    raw = jnp.asarray(window.raw)[:, :kept].astype(model.dtype)
    tokens = unizero.embed_latent(jnp.moveaxis(raw, -1, 0))
    layers = unizero.sequence(model, tokens, config=config)
    kv = jnp.stack([jnp.stack(layer, 2) for layer in layers], 2)  # [B, K, L, 2, E]
    kv = kv.reshape(*kv.shape[:2], *config.window.token_shape)
    valid = jnp.arange(kept, dtype=jnp.int32)[None] < window.length[:, None]
    kv = jnp.where(valid[..., None, None, None, None], kv, 0).astype(window.kv.dtype)
    return dataclasses.replace(window, kv=jnp.zeros_like(window.kv).at[:, :kept].set(kv))


def num_tables(config: WorldModelConfig) -> int:
    """How many tables hold a tree's tokens: keys and values of each layer, or raw tokens."""
    return 1 if config.mode.keeps_raw else 2 * config.num_layers


def table_dtype(config: WorldModelConfig) -> jax.typing.DTypeLike:
    """Of those tables; raw tokens are kept in float32 at least."""
    wide = config.mode.keeps_raw
    return jnp.promote_types(config.dtype, jnp.float32) if wide else config.dtype


def held(model: UniZero, window: Window, config: WorldModelConfig) -> list[jax.Array]:
    """What the tables hold of windows [B]: [B, T, E] each.

    * "learned", "reset": keys and values without what their position adds to them; they get what
      their slot adds when they are read. That is the sum of all corrections of the slides between.
    * rotary modes: keys and values as they are, since a key keeps its rotation.
    * "rebuild": the raw token. Keys and values of a window are computed when it is read; they are
      those of its tokens at positions 0, 1, .. whether or not it has ever overflowed.
    """
    kept = config.window.kept_length
    if window.raw is not None:
        raw = window.raw[:, :kept]
        return [raw - jnp.mean(raw, axis=-1, keepdims=True)]
    kv = window.kv[:, :kept].astype(model.dtype)
    return _parts(kv if model.projected is None else kv - model.projected[None, :kept])


def as_read(model: UniZero, tokens: list[jax.Array], config: WorldModelConfig) -> Cached:
    """Keys and values of windows out of the tables, [B, T, E] each, as the model reads them."""
    if config.mode.keeps_raw:
        return unizero.sequence(model, jnp.moveaxis(tokens[0], -1, 0), config=config)
    if model.projected is not None:
        added = _parts(model.projected[: tokens[0].shape[1]])
        tokens = [part + at[None] for part, at in zip(tokens, added, strict=True)]
    return layers(tokens)


def layers(tokens: list[jax.Array]) -> Cached:
    """Tables of keys and values in turn, layer by layer."""
    return tuple(zip(tokens[0::2], tokens[1::2], strict=True))


def block_held(
    model: UniZero,
    tokens: tuple[jax.Array, jax.Array],
    pushed: tuple[Fresh, Fresh],
    length: jax.Array,
    config: WorldModelConfig,
) -> list[jax.Array]:
    """What the tables hold of a step's two tokens: [2, B, E] each.

    Args:
      tokens: of action and observation, [E, B], centred.
      pushed: their keys and values.
      length: [B] int32, of the window before the step.
    """
    if config.mode.keeps_raw:
        return [jnp.stack([token.T for token in tokens])]
    first, second = ([part[:, i] for part in token for i in range(2)] for token in pushed)
    slot = length + 1
    if config.mode.carry is not None:
        full = length == config.window.kept_length
        second = loops.cond(
            jnp.any(full),
            lambda: [
                jnp.where(full[:, None], part[:, 0], pushed)
                for part, pushed in zip(
                    _flat(_alone(model, tokens[1], config)), second, strict=True
                )
            ],
            lambda: second,
        )
        slot = jnp.where(full, 0, slot)
    if model.projected is not None:
        first, second = (
            [part - at for part, at in zip(token, _parts(model.projected[place]), strict=True)]
            for token, place in ((first, length), (second, slot))
        )
    return [jnp.stack(parts) for parts in zip(first, second, strict=True)]


def _alone(model: UniZero, latent: jax.Array, config: WorldModelConfig) -> Cached:
    """Keys and values [B, 1, E], layer by layer, of latents [E, B] without a context."""
    return unizero.sequence(model, unizero.embed_latent(latent)[..., None], config=config)


def _flat(layers: Cached) -> list[jax.Array]:
    return [part for layer in layers for part in layer]


def _parts(kv: jax.Array) -> list[jax.Array]:
    """Splits [..., L, 2, H, D] into 2L arrays [..., E]."""
    layers, kinds, heads, head_dim = kv.shape[-4:]
    flat = kv.reshape(*kv.shape[:-4], layers * kinds, heads * head_dim)
    return [flat[..., part, :] for part in range(layers * kinds)]
