"""The windows of a search's roots, read where they lie.

Every node of a search reads its root's window, long as it may be, so it is arranged once for the
products of attention and never copied. Nodes below have slid past some of its tokens: the window
stays, and what is read of it moves. What learned positions add to a key or a value depends on the
slot alone, and enters by products of its own.

Shapes: B rows, T slots of a stored window up to a multiple of 16, E embedding size, L layers, H
heads, D head size.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

_FOLDS = 16
"""Parts of a window that are summed element by element, which takes a fraction of a sum's time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RootWindow:
    """Windows of the roots, layer by layer, and what a slot adds to keys and values.

    Attributes:
      keys, values: [H, B, D, T] each.
      length: [B] int32, tokens.
      key_positions, value_positions: [H, D, T] each; none if positions add nothing.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    key_positions: tuple[jax.Array, ...]
    value_positions: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What nodes read of their roots' windows: the last `count` [B] tokens of these."""

    window: RootWindow
    count: jax.Array

    def scores(self, query: jax.Array, layer: int) -> jax.Array:
        """Of queries [B, E] with the keys of one layer: [H, B, T], -inf where none is read."""
        keys, gone = self.window.keys[layer], self._gone
        by_head = query.reshape(keys.shape[1], keys.shape[0], -1).swapaxes(0, 1)
        scores = jnp.einsum("hbd,hbdt->hbt", by_head, keys)
        if self.window.key_positions:
            added = jnp.einsum("hbd,hdt->hbt", by_head, self.window.key_positions[layer])
            scores = scores + _moved(added, -gone)
        token = jnp.arange(keys.shape[3], dtype=jnp.int32)[None]
        read = (token >= gone[:, None]) & (token < self.window.length[:, None])
        return jnp.where(read[None], scores, -jnp.inf)

    def read(self, weights: jax.Array, layer: int) -> jax.Array:
        """Values of one layer, weighed by [H, B, T] and summed: [B, E]."""
        read = jnp.einsum("hbt,hbdt->hbd", weights, self.window.values[layer])
        if self.window.value_positions:
            moved, added = _moved(weights, self._gone), self.window.value_positions[layer]
            read = read + jnp.einsum("hbt,hdt->hbd", moved, added)
        return read.swapaxes(0, 1).reshape(read.shape[1], -1)

    @property
    def _gone(self) -> jax.Array:
        """Tokens that came before those that are read: [B]."""
        return self.window.length - self.count


def arrange(
    tokens: tuple[jax.Array, ...], length: jax.Array, positions: jax.Array | None, heads: int
) -> RootWindow:
    """Windows as tables hold them, keys and values [B, T, E] of each layer in turn.

    Args:
      length: [B] int32.
      positions: [C, L, 2, H, D], C at least T; None if they add nothing.
    """
    rows, size = tokens[0].shape[:2]
    missing = -size % _FOLDS
    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in tokens]
    by_head = [x.reshape(rows, size + missing, heads, -1).transpose(2, 0, 3, 1) for x in padded]
    added: list[jax.Array] = []
    if positions is not None:
        slots = jnp.pad(positions[:size], ((0, missing), *[(0, 0)] * 4))
        parts = slots.reshape(size + missing, len(tokens), heads, -1)
        added = [parts[:, part].transpose(1, 2, 0) for part in range(len(tokens))]
    return RootWindow(
        keys=tuple(by_head[0::2]),
        values=tuple(by_head[1::2]),
        length=length,
        key_positions=tuple(added[0::2]),
        value_positions=tuple(added[1::2]),
    )


def largest(scores: jax.Array) -> jax.Array:
    """Of [H, B, T] along T: [H, B]."""
    return jnp.max(_folded(jnp.maximum, scores), axis=2)


def total(weights: jax.Array) -> jax.Array:
    """Of [H, B, T] along T: [H, B]."""
    return jnp.sum(_folded(jnp.add, weights), axis=2)


def _folded(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    parts = jnp.split(x, _FOLDS, axis=2)
    folded = parts[0]
    for part in parts[1:]:
        folded = combine(folded, part)
    return folded


def _moved(x: jax.Array, ahead: jax.Array) -> jax.Array:
    """What stands `ahead` [B] places further along the last axis of [H, B, T]; 0 beyond."""
    size = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (size, size)))

    def one_row(row: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, first, size, axis=1)

    return jax.vmap(one_row, in_axes=(1, 0), out_axes=1)(padded, ahead + size)
