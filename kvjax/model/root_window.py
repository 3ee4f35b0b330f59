"""The windows of a search's roots, read where they lie.

Every node of a search reads its root's window, long as it may be, so it is arranged once for the
products of attention and never copied. Nodes below have slid past some of its tokens: the window
stays, and what is read of it moves. What learned positions add to a key or a value depends on the
slot alone, and enters by products of its own.

Shapes: B rows, T slots of a stored window up to a multiple of 16, E embedding size, L layers, H
heads, D head size.
"""

import dataclasses
import functools
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
    """What nodes read: the last `count` [B] tokens of their roots, then those added below."""

    window: RootWindow
    count: jax.Array

    def attend(
        self,
        layer: int,
        query: jax.Array,
        path: tuple[jax.Array, jax.Array],
        valid: jax.Array,
        fresh: jax.Array,
    ) -> jax.Array:
        """Reads [B, E] in one layer. The softmax divides last, where its sum is small.

        Args:
          query: [B, E], scaled.
          path: keys and values [B, P, E] of tokens added below the roots, without positions.
          valid: [B, P] bool.
          fresh: [B, F, 2, E], pushed after those, positions included.
        """
        heads, rows, head_dim, _ = self.window.keys[layer].shape
        by_head = query.reshape(rows, heads, head_dim).swapaxes(0, 1)
        root_scores, path_added = self._scores(by_head, layer, valid.shape[1])
        path_scores = _products(query, path[0], heads) + path_added
        path_scores = jnp.where(valid[None], path_scores, -jnp.inf)
        fresh_scores = _products(query, fresh[:, :, 0], heads)
        highest = jnp.maximum(_largest(root_scores), jnp.max(path_scores, axis=2))
        highest = jnp.maximum(highest, jnp.max(fresh_scores, axis=2))[..., None]
        highest = jax.lax.stop_gradient(highest)
        root, own, new = (jnp.exp(x - highest) for x in (root_scores, path_scores, fresh_scores))
        total = _total(root) + jnp.sum(own, axis=2) + jnp.sum(new, axis=2)
        read = jnp.einsum("hbt,hbdt->hbd", root, self.window.values[layer])
        if self.window.value_positions:
            at_slots = self._by_slot(root, own)
            read = read + jnp.einsum("hbt,hdt->hbd", at_slots, self.window.value_positions[layer])
        summed = _weighed(own, path[1]) + _weighed(new, fresh[:, :, 1])
        divided = read.swapaxes(0, 1).reshape(rows, -1) + summed
        return divided / jnp.repeat(total.T, head_dim, axis=1)

    def _scores(
        self, query: jax.Array, layer: int, size: int
    ) -> tuple[jax.Array, jax.Array | float]:
        """Of queries [H, B, D] with the roots' keys: [H, B, T], -inf where none is read.

        And what positions add to their scores with tokens behind these: [H, B, size].
        """
        keys, gone = self.window.keys[layer], self._gone
        scores = jnp.einsum("hbd,hbdt->hbt", query, keys)
        behind: jax.Array | float = 0.0
        if self.window.key_positions:
            added = jnp.einsum("hbd,hdt->hbt", query, self.window.key_positions[layer])
            scores = scores + _shifted(added, -gone)
            room = jnp.pad(added, ((0, 0), (0, 0), (0, size)))
            behind = _taken(room, self.count, size)
        token = jnp.arange(keys.shape[3], dtype=jnp.int32)[None]
        read = (token >= gone[:, None]) & (token < self.window.length[:, None])
        return jnp.where(read[None], scores, -jnp.inf), behind

    def _by_slot(self, root: jax.Array, own: jax.Array) -> jax.Array:
        """Weights of root tokens [H, B, T] and of those behind [H, B, P] by their slots."""
        size, count = root.shape[2], own.shape[2]
        room = jnp.pad(own, ((0, 0), (0, 0), (size, size - count)))
        return _shifted(root, self._gone) + _taken(room, size - self.count, size)

    @property
    def _gone(self) -> jax.Array:
        """Tokens that came before those that are read: [B]."""
        return self.window.length - self.count


def _products(query: jax.Array, keys: jax.Array, heads: int) -> jax.Array:
    """Of queries [B, E] with few keys [B, P, E]: [H, B, P]."""
    products = query[:, None] * keys
    return jnp.sum(products.reshape(*keys.shape[:2], heads, -1), axis=3).transpose(2, 0, 1)


def _weighed(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Few values [B, P, E], weighed by [H, B, P] and summed: [B, E]."""
    spread = jnp.repeat(weights.transpose(1, 2, 0), values.shape[2] // weights.shape[0], axis=2)
    return jnp.sum(spread * values, axis=1)


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


def _largest(scores: jax.Array) -> jax.Array:
    """Of [H, B, T] along T: [H, B]."""
    return jnp.max(_folded(jnp.maximum, scores), axis=2)


def _total(weights: jax.Array) -> jax.Array:
    """Of [H, B, T] along T: [H, B]."""
    return jnp.sum(_folded(jnp.add, weights), axis=2)


def _folded(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    parts = jnp.split(x, _FOLDS, axis=2)
    folded = parts[0]
    for part in parts[1:]:
        folded = combine(folded, part)
    return folded


def _shifted(x: jax.Array, ahead: jax.Array) -> jax.Array:
    """What stands `ahead` [B] places further along the last axis of [H, B, T]; 0 beyond."""
    size = x.shape[2]
    return _taken(jnp.pad(x, ((0, 0), (0, 0), (size, size))), ahead + size, size)


def _taken(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """`size` entries of [H, B, T] from `first` [B] on."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
    taken: jax.Array = jax.vmap(take, in_axes=(1, 0), out_axes=1)(x, first)
    return taken
