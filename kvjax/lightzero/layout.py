"""A store's windows in the layout of LightZero's caches: looked up, aligned, filed again.

LightZero keeps a batch per layer, keys apart from values and heads before tokens; a store keeps a
token's keys and values of all layers together. Each function here is one jitted call that moves
between the two and aligns rows while it moves them, so that every window is read and written once.

Shapes: B rows, E embedding size, C context_length in tokens, K = C - 3 stored tokens, L layers,
H heads, D head size, P environments. `batch` is [L, 2, B, H, C, D].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kvjax import pool as pools
from kvjax import statistics
from kvjax import store as stores
from kvjax.config import BLOCK
from kvjax.pool import NO_SLOT
from kvjax.types import Pool, Store, Window

MISSED, IN_ROOTS, IN_NODES = 0, 1, 2
"""Where a row was found."""

ENV, LENGTH, VALID = 0, 1, 2
"""Rows of the integers that describe a batch: [3, B] int32."""

_replace = dataclasses.replace


@functools.partial(jax.jit, static_argnames=("roots_only",))
def look_up(
    store: Store, latent: jax.Array, rows: jax.Array, *, roots_only: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds windows and aligns them on the longest one, as `kvjax.ops.window.trim_and_pad` does.

    A row that is not found gets one empty slot, for the token that its caller will put there.

        [. . a .]
        [. b c .]
        [d e f .]
        [. . _ .]  not found

    Args:
      latent: [B, E] float32.
      rows: [3, B] int32, see `ENV`; the lengths are not read.
      roots_only: as at root steps.

    Returns:
      The store's counters, with this look-up counted; `batch`; and [2, B] int32: each row's length
      and where it was found.
    """
    env_id, valid = rows[ENV], rows[VALID] > 0
    keys = stores.latent_keys(store, latent, env_id)
    found = stores.only(stores.find(store, keys, env_id, roots_only=roots_only), valid)
    in_root = found.root != NO_SLOT
    where = jnp.where(in_root, IN_ROOTS, jnp.where(found.hit, IN_NODES, MISSED))
    root_length = store.roots.entries.length[found.root]
    node_length = store.nodes.entries.length[found.node]
    length = jnp.where(in_root, root_length, jnp.where(found.hit, node_length, 1))
    pad = jnp.max(jnp.where(valid, length, 0)) - length
    batch = _aligned_batch(store, found, length, pad)
    store = stores.count_lookups(store, found, valid, roots_only=roots_only)
    store = stores.count_padding(store, length, valid)
    return store.counters, batch, jnp.stack([length, where])


def _aligned_batch(
    store: Store, found: stores.Found, length: jax.Array, pad: jax.Array
) -> jax.Array:
    def from_nodes() -> jax.Array:
        return _take_aligned(store.nodes, found.node, length, pad)

    def from_both() -> jax.Array:
        in_root = (found.root != NO_SLOT)[:, None, None, None]
        return jnp.where(in_root, _take_aligned(store.roots, found.root, length, pad), from_nodes())

    # Below the first level of a tree no row is a root: that pool need not be read. Left to itself
    # XLA chooses another layout inside of a conditional and copies the batch behind it.
    batch: jax.Array = jax.lax.cond(
        jnp.any(found.root != NO_SLOT),
        lambda: _row_major(from_both()),
        lambda: _row_major(from_nodes()),
    )
    return batch


def _row_major(batch: jax.Array) -> jax.Array:
    layout = Layout(major_to_minor=tuple(range(batch.ndim)))
    constrained: jax.Array = with_layout_constraint(batch, layout)  # type: ignore[no-untyped-call]
    return constrained


def _take_aligned(pool: Pool, slot: jax.Array, length: jax.Array, pad: jax.Array) -> jax.Array:
    """Reads windows [S, K, L, 2, H, D] straight into their places of a batch."""
    table = pool.entries.kv
    stored, capacity = table.shape[1], table.shape[1] + 1 + BLOCK
    token = jnp.arange(capacity) - pad[:, None]
    inside = (token >= 0) & (token < length[:, None]) & (slot != NO_SLOT)[:, None]
    tokens = table.reshape(-1, *table.shape[2:])
    place = jnp.where(inside, slot[:, None] * stored + token, tokens.shape[0])
    taken = tokens.at[place].get(mode="fill", fill_value=0)  # [B, C, L, 2, H, D]
    return jnp.transpose(taken, (2, 3, 0, 4, 1, 5))


@functools.partial(jax.jit, static_argnames=("is_root",), donate_argnames=("store",))
def file(
    store: Store,
    batch: jax.Array,
    latent: jax.Array,
    rows: jax.Array,
    correction: jax.Array,
    *,
    is_root: bool,
) -> Store:
    """Undoes the alignment, slides windows that are full and stores them under their latents.

        C = 8:  [. . a b c . . .] -> [a b c . .]
                [d e f g h i j .] -> [f' g' h' i' j']

    Args:
      store: moved, use the one that comes back.
      batch: rows end at the same slot, the longest one begins at slot 0.
      latent: [B, E] float32.
      rows: [3, B] int32, see `ENV`; lengths in tokens, at most C - 1.
      correction: [K, L, 2, H, D] of `kvjax.ops.window.slide`, zeros if there is none.
      is_root: whether these are root windows.
    """
    env_id, length, valid = rows[ENV], rows[LENGTH], rows[VALID] > 0
    keys = stores.latent_keys(store, latent, env_id)
    pool, segment = (store.roots, env_id) if is_root else (store.nodes, jnp.zeros_like(env_id))
    # Slots first, windows after: each is read from the batch and written into its slot at once.
    filed, slot, evicted = pools.add(_replace(pool, entries=()), keys, segment, (), valid=valid)
    pad = jnp.max(jnp.where(valid, length, 0)) - length
    entries = _write(pool.entries, batch, slot, length, pad, correction)
    filed = _replace(filed, entries=entries)
    evictions = {"root_evictions" if is_root else "node_evictions": jnp.sum(evicted)}
    lost = jnp.sum(valid & (slot == NO_SLOT))
    counters = statistics.add(store.counters, not_stored=lost, **evictions)
    store = _replace(store, counters=counters)
    return _replace(store, roots=filed) if is_root else _replace(store, nodes=filed)


def _write(
    entries: Window,
    batch: jax.Array,
    slot: jax.Array,
    length: jax.Array,
    pad: jax.Array,
    correction: jax.Array,
) -> Window:
    """Writes each row's window into its slot; of rows that share a slot the last one stays."""
    capacity, stored = batch.shape[4], correction.shape[0]
    slides = length >= capacity - 1
    kept = jnp.where(slides, stored, length)
    first = pad + BLOCK * slides
    row = jnp.arange(slot.shape[0])
    written = ~jnp.any((slot[:, None] == slot) & (row[:, None] < row), axis=1) & (slot != NO_SLOT)
    overhangs = written & (first + stored > capacity)

    def write(row: jax.Array, table: jax.Array, *, shift: bool) -> jax.Array:
        window = _read(batch, row, first[row], stored, shift=shift)
        window = jnp.where(slides[row], window + correction, window)
        token = jnp.arange(stored)[:, None, None, None, None]
        window = jnp.where(token < kept[row], window, 0)
        updated: jax.Array = jax.lax.dynamic_update_index_in_dim(table, window, slot[row], 0)
        return updated

    # Rows in two loops, those that need no shift first: they are nearly always all rows.
    order = jnp.argsort(jnp.where(written, overhangs, 2))
    direct, total = jnp.sum(written & ~overhangs), jnp.sum(written)
    table = jax.lax.fori_loop(
        0, direct, lambda i, table: write(order[i], table, shift=False), entries.kv
    )
    table = jax.lax.fori_loop(
        direct, total, lambda i, table: write(order[i], table, shift=True), table
    )
    place = jnp.where(written, slot, entries.length.shape[0])
    return Window(kv=table, length=entries.length.at[place].set(kept, mode="drop"))


def _read(
    batch: jax.Array, row: jax.Array, first: jax.Array, count: int, *, shift: bool
) -> jax.Array:
    """Tokens of one row from `first` on: [count, L, 2, H, D]; behind the last one anything.

    `shift` is needed where `first + count` lies behind the last token.
    """
    layers, two, _, heads, capacity, size = batch.shape
    start = jnp.minimum(first, capacity - count)
    shape = (layers, two, 1, heads, count, size)
    window = jax.lax.dynamic_slice(batch, (0, 0, row, 0, start, 0), shape)[:, :, 0]
    window = jnp.transpose(window, (3, 0, 1, 2, 4))
    return jnp.roll(window, start - first, axis=0) if shift else window


@functools.partial(jax.jit, donate_argnames=("store",))
def clear(store: Store, roots: jax.Array, nodes: jax.Array) -> Store:
    """Forgets the roots of chosen environments [P] bool and, if `nodes` [] bool, all nodes."""
    cleared = pools.clear(store.roots).segments
    segments = jnp.where(roots[:, None], cleared, store.roots.segments)
    store = _replace(store, roots=_replace(store.roots, segments=segments))
    return stores.clear_nodes(store, when=nodes)


@functools.partial(jax.jit, donate_argnames=("store",))
def new_epoch(store: Store) -> Store:
    """`kvjax.store.new_epoch` in one call."""
    return stores.new_epoch(store)


def with_counters(store: Store, counters: jax.Array) -> Store:
    """The store with other statistics."""
    return _replace(store, counters=counters)
