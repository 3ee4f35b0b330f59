"""Context windows of one item: init, append, align, slide. Batches come by `jax.vmap`.

Shapes: C context_length in tokens, L layers, H heads, D head size, E width of a raw token, which is
what some windows keep beside keys and values. In the drawings a letter is a
token and a dot an empty (zero) slot.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.base import display
from kvjax.base.values import require_shape
from kvjax.config import BLOCK, WindowConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Window(display.Drawn):
    """A context window: tokens are left-aligned, slots past `length` are zero.

    Attributes:
      kv: [C, L, 2, H, D], keys at 0 and values at 1 of the third axis.
      length: [] int32, tokens.
      raw: [C, E], tokens before positions, where a mode keeps them; else None.
    """

    kv: jax.Array
    length: jax.Array
    raw: jax.Array | None = None

    def _picture(self) -> display.Picture | None:
        return display.window("Window", self.kv, self.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class AlignedWindow(display.Drawn):
    """A window behind `pad` empty slots, so that all rows of a batch end at the same slot.

    Attributes:
      kv: [C, L, 2, H, D], as of a `Window`.
      length: [] int32, tokens.
      pad: [] int32, empty slots before the first token.
    """

    kv: jax.Array
    length: jax.Array
    pad: jax.Array

    def _picture(self) -> display.Picture | None:
        return display.window("AlignedWindow", self.kv, self.length, self.pad)


_KV = ("C", "L", "2", "H", "D")  # only windows that a model reads need just two kinds


def init(config: WindowConfig) -> Window:
    """An empty window.

    Returns:
      `Window` with `kv` zeros [C, L, 2, H, D] of `config.dtype` and `length` 0, and `raw` zeros
      [C, E], float32 at least, if the configuration keeps raw tokens.

    Raises:
      ValueError: float64 without JAX's 64-bit mode.
    """
    if jax.dtypes.canonicalize_dtype(config.dtype) != jnp.dtype(config.dtype):
        raise ValueError('dtype float64 needs jax.config.update("jax_enable_x64", True)')
    shape, size = (config.context_length, *config.token_shape), config.raw_size
    raw_dtype = jnp.promote_types(config.dtype, jnp.float32)
    raw = None if size is None else jnp.zeros((config.context_length, size), raw_dtype)
    return Window(kv=jnp.zeros(shape, config.dtype), length=jnp.zeros((), jnp.int32), raw=raw)


def is_full(window: Window) -> jax.Array:
    """Whether the window has no free slot: [] bool. `append` leaves such a window unchanged."""
    require_shape("window.kv", window.kv, _KV)
    return window.length >= window.kv.shape[0]


def overflows(window: Window) -> jax.Array:
    """Whether the window has reached C - 1 tokens, where `slide` drops a block: [] bool."""
    require_shape("window.kv", window.kv, _KV)
    return window.length >= window.kv.shape[0] - 1


def append(window: Window, kv_token: jax.Array, raw_token: jax.Array | None = None) -> Window:
    """Writes one token behind the last one.

        [a b . .] + c -> [a b c .]

    Args:
      window: `kv` [C, L, 2, H, D].
      kv_token: [L, 2, H, D], cast to the window's dtype.
      raw_token: [E], for a window that keeps raw tokens.

    Returns:
      The longer window; the same window where `is_full`.

    Raises:
      ValueError: a raw token is missing, or the window keeps none; a shape does not fit.
    """
    if (raw_token is None) != (window.raw is None):
        keeps, got = ("none", "one") if window.raw is None else ("raw tokens", "none")
        raise ValueError(f"the window keeps {keeps}, got {got} to append")
    require_shape("window.kv", window.kv, _KV)
    require_shape("kv_token", kv_token, window.kv.shape[1:])
    if window.raw is not None:
        require_shape("raw_token", raw_token, window.raw.shape[1:])

    def write(rows: jax.Array, row: jax.Array | None) -> jax.Array:
        rows = jnp.asarray(rows)
        return rows.at[window.length].set(jnp.asarray(row, rows.dtype), mode="drop")

    return Window(
        kv=write(window.kv, kv_token),
        length=jnp.minimum(window.length + 1, window.kv.shape[0]),
        raw=None if window.raw is None else write(window.raw, raw_token),
    )


def valid_mask(window: Window | AlignedWindow) -> jax.Array:
    """Which slots hold a token: [C] bool.

    Window        [a b . .]         -> [1 1 0 0]
    AlignedWindow [. a b .] (pad 1) -> [0 1 1 0]
    """
    require_shape("window.kv", window.kv, _KV)
    start = window.pad if isinstance(window, AlignedWindow) else 0
    slots = jnp.arange(window.kv.shape[0], dtype=jnp.int32)
    return (slots >= start) & (slots < start + window.length)


def where(condition: jax.Array, window: Window, other: Window) -> Window:
    """One window or the other: `condition` [] bool."""
    require_shape("condition", condition, ())
    require_shape("other.kv", other.kv, window.kv.shape)
    chosen: Window = jax.tree.map(lambda a, b: jnp.where(condition, a, b), window, other)
    return chosen


def _shift(kv: jax.Array, slots: jax.Array) -> jax.Array:
    """Moves tokens `slots` to the right (to the left if negative), filling with zeros."""
    capacity = kv.shape[0]
    zeros = jnp.zeros_like(kv)
    padded = jnp.concatenate([zeros, kv, zeros])
    return jax.lax.dynamic_slice_in_dim(padded, capacity - slots, capacity)


def right_align(window: Window, size: jax.Array | int | None = None) -> AlignedWindow:
    """Moves the tokens to the right, so that the last one sits in slot `size` - 1.

        size 3:  [a . . .] -> [. . a .]
                 [a b . .] -> [. a b .]

    Args:
      window: `kv` [C, L, 2, H, D].
      size: [] int32 between the window's length and C, both included; C by default.

    Returns:
      `AlignedWindow` with pad `size - length`. A `size` below the length counts as the length.
    """
    require_shape("window.kv", window.kv, _KV)
    size = window.kv.shape[0] if size is None else size
    pad = jnp.maximum(jnp.asarray(size, jnp.int32) - window.length, 0)
    return AlignedWindow(kv=_shift(window.kv, pad), length=window.length, pad=pad)


def left_align(aligned: AlignedWindow) -> Window:
    """Undoes `right_align`: drops the leading pad and appends zeros.

    [. a b .] -> [a b . .]
    """
    require_shape("aligned.kv", aligned.kv, _KV)
    return Window(kv=_shift(aligned.kv, -aligned.pad), length=aligned.length)


def trim_and_pad(windows: Window) -> AlignedWindow:
    """Aligns a batch on its longest row: each row drops its last empty slots and pads the left.

        [a . . .]    [. . a .]
        [b c . .] -> [. b c .]
        [d e f .]    [d e f .]

    Args:
      windows: a batch, `kv` [B, C, L, 2, H, D] and `length` [B].

    Returns:
      `AlignedWindow` batch; `length + pad` is the same for all rows.
    """
    require_shape("windows.kv", windows.kv, ("B", *_KV))
    require_shape("windows.length", windows.length, windows.kv.shape[:1])
    return jax.vmap(right_align, in_axes=(0, None))(windows, jnp.max(windows.length))


def undo_trim_and_pad(aligned: AlignedWindow) -> Window:
    """Inverse of `trim_and_pad`, also after tokens were appended to the aligned rows.

        [. . a .]    [a . . .]
        [. b c .] -> [b c . .]
        [d e f .]    [d e f .]

    Args:
      aligned: a batch, `kv` [B, C, L, 2, H, D], `length` [B] and `pad` [B].
    """
    return jax.vmap(left_align)(aligned)


def slide(window: Window, correction: jax.Array | None = None, *, block: int = BLOCK) -> Window:
    """Drops the oldest block of a window that has reached C - 1 tokens; leaves a shorter one alone.

    The kept tokens move to earlier slots, and `correction` is what that adds to each.

        C = 8:  [a b c d e f g .] -> [c' d' e' f' g' . . .]
                [a b c d e . . .] -> [a b c d e . . .]

    Args:
      window: `kv` [C, L, 2, H, D].
      correction: [C - 3, L, 2, H, D], from `kvjax.ops.position.slide_correction`; slot i is added
        to the token that lands in slot i. None adds nothing (rotary positions).
      block: K, tokens of a step.
    """
    require_shape("window.kv", window.kv, _KV)
    capacity, *token_shape = window.kv.shape
    full_length = capacity - 1
    kept_length = full_length - block
    if correction is not None:
        require_shape("correction", correction, (kept_length, *token_shape))
    moves = overflows(window)

    def shift(rows: jax.Array, added: jax.Array | None) -> jax.Array:
        kept = rows[block:full_length]
        kept = kept if added is None else kept + added.astype(rows.dtype)
        zeros = jnp.zeros_like(rows[kept_length:])
        return jnp.where(moves, jnp.concatenate([kept, zeros]), rows)

    return Window(
        kv=shift(window.kv, correction),
        length=jnp.where(moves, kept_length, window.length),
        raw=None if window.raw is None else shift(window.raw, None),
    )
