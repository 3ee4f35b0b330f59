"""A store's windows in the layout of LightZero's caches: looked up, aligned, filed again.

LightZero keeps a batch per layer, keys apart from values and heads before tokens; a store keeps a
token's keys and values of all layers together. Each function here is one jitted call that moves
between the two and aligns rows while it moves them, so that every window is read and written once,
in one thread: the others are torch's.

Shapes: B rows, E embedding size, C context_length in tokens, K = C - 3 stored tokens, L layers,
H heads, D head size, P environments. `batch` is [L, 2, B, H, C, D].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import pool as pools
from kvjax import statistics
from kvjax import store as stores
from kvjax.compilation import jit_small_operations, known_options, on_cpu
from kvjax.config import BLOCK
from kvjax.pool import NO_SLOT
from kvjax.types import Store, Window

MISSED, IN_ROOTS, IN_NODES = 0, 1, 2
"""Where a row was found."""

ENV, VALID = 0, 1
"""Rows of the integers that describe a batch: [2, B] int32."""

FILED, ASKED = 0, 1
"""Notes about a batch's rows: [2, B, E + 3] float32, those to file and those to look up."""

LENGTH, ROWS = -3, slice(-2, None)
"""What stands behind a row's latent: its window's length, if it is to be filed, and its integers.

They are small, so that floats hold them.
"""

_replace = dataclasses.replace
_jit = functools.partial(jit_small_operations, nested=False, one_thread=lambda **_: True)


@functools.partial(_jit, static_argnames=("roots_only",))
def look_up(
    store: Store,
    latent: jax.Array,
    rows: jax.Array,
    *,
    roots_only: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Finds windows and aligns them on the longest one, as `kvjax.ops.window.trim_and_pad` does.

    A row that is not found gets one empty slot, for the token that its caller will put there.

        [. . a .]
        [. b c .]
        [d e f .]
        [. . _ .]  not found

    Args:
      latent: [B, E] float32.
      rows: [2, B] int32, see `ENV`.
      roots_only: as at root steps.

    Returns:
      The store's counters, with this look-up counted; `batch`; [2, B] int32: each row's length and
      where it was found, see `MISSED`; raw tokens [B, K, E], None if the store keeps none.
    """
    keys = stores.latent_keys(store, latent, rows[ENV])
    return _look_up(store, keys, rows, roots_only=roots_only)


def _look_up(
    store: Store,
    keys: jax.Array,
    rows: jax.Array,
    *,
    roots_only: bool,
    batch: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """`look_up` by keys [B, K]; into `batch`, which keeps what lies behind its rows' ends."""
    env_id, valid = rows[ENV], rows[VALID] > 0
    found = stores.only(stores.find(store, keys, env_id, roots_only=roots_only), valid)
    in_root = found.root != NO_SLOT
    where = jnp.where(in_root, IN_ROOTS, jnp.where(found.hit, IN_NODES, MISSED))
    root_length = store.roots.entries.length[found.root]
    node_length = store.nodes.entries.length[found.node]
    length = jnp.where(in_root, root_length, jnp.where(found.hit, node_length, 1))
    pad = jnp.max(jnp.where(valid, length, 0)) - length
    batch = _aligned_batch(store, found, pad, batch)
    store = stores.count_lookups(store, found, valid, roots_only=roots_only)
    store = stores.count_padding(store, length, valid)
    return store.counters, batch, jnp.stack([length, where]), _raw_tokens(store, found)


def _raw_tokens(store: Store, found: stores.Found) -> jax.Array | None:
    if store.latest is None:
        return None
    in_root = (found.root != NO_SLOT)[:, None, None]
    roots, nodes = (jnp.asarray(pool.entries.raw) for pool in (store.roots, store.nodes))
    return jnp.where(in_root, roots[found.root], nodes[found.node])


def _aligned_batch(
    store: Store, found: stores.Found, pad: jax.Array, batch: jax.Array | None
) -> jax.Array:
    """Reads windows [K, L, 2, H, D] row by row straight into their places of a batch.

    A stored window has zeros behind its length, so it may be copied whole.
    """
    in_root = found.root != NO_SLOT
    slot = jnp.where(in_root, found.root, found.node)
    stored, layers, two, heads, size = store.nodes.entries.kv.shape[1:]
    free = 1 + BLOCK
    start = jnp.minimum(pad, free)
    if batch is None:
        shape = (layers, two, len(slot), heads, stored + free, size)
        batch = jnp.zeros(shape, store.nodes.entries.kv.dtype)

    def write(batch: jax.Array, row: jax.Array, first: Any, window: jax.Array) -> jax.Array:
        window = jnp.transpose(window, (1, 2, 3, 0, 4))[:, :, None]
        written: jax.Array = jax.lax.dynamic_update_slice(batch, window, (0, 0, row, 0, first, 0))
        return written

    def copy(row: jax.Array, batch: jax.Array, *, table: jax.Array) -> jax.Array:
        return write(batch, row, 0, table[slot[row]])

    def copy_aligned(row: jax.Array, batch: jax.Array, *, table: jax.Array) -> jax.Array:
        window = table[slot[row]]
        batch = write(batch, row, 0, jnp.zeros((free, *window.shape[1:]), window.dtype))
        return write(batch, row, start[row], jnp.roll(window, pad[row] - start[row], axis=0))

    def leave_empty(row: jax.Array, batch: jax.Array) -> jax.Array:
        shape = stored + free, layers, two, heads, size
        return write(batch, row, 0, jnp.zeros(shape, batch.dtype))

    kinds: list[Callable[..., Any]] = [
        functools.partial(function, table=pool.entries.kv)
        for pool in (store.nodes, store.roots)
        for function in (copy, copy_aligned)
    ]
    kind = jnp.where(found.hit, 2 * in_root + (pad > 0), len(kinds))
    return _each_row(kind, [*kinds, leave_empty], batch)


def _each_row(kind: jax.Array, kinds: Sequence[Callable[..., Any]], carry: jax.Array) -> jax.Array:
    """Hands each row to the function of its kind [B], one after the other; others are left out.

    A loop copies rows at the speed of memory, in one thread.
    """
    order = jnp.argsort(kind)
    ends = jnp.sum(kind[:, None] <= np.arange(len(kinds)), axis=0)
    first = jnp.zeros_like(ends[0])
    for function, end in zip(kinds, ends, strict=True):
        carry = jax.lax.fori_loop(first, end, lambda i, x, f=function: f(order[i], x), carry)
        first = end
    return carry


@functools.partial(_jit, static_argnames=("is_root", "keep"), donate_argnames=("store",))
def file(
    store: Store,
    batch: jax.Array,
    latent: jax.Array,
    rows: jax.Array,
    length: jax.Array,
    correction: jax.Array,
    raw: jax.Array | None = None,
    *,
    is_root: bool,
    keep: int | None = None,
) -> Store:
    """Undoes the alignment, slides windows that are full and stores them under their latents.

        C = 8:  [. . a b c . . .] -> [a b c . .]
                [d e f g h i j .] -> [f' g' h' i' j']

    Args:
      store: moved, use the one that comes back.
      batch: rows end at the same slot, the longest one begins at slot 0.
      latent: [B, E] float32.
      rows: [2, B] int32, see `ENV`.
      length: [B] int32, in tokens, at most C - 1.
      correction: [K, L, 2, H, D] of `kvjax.ops.window.slide`, zeros if there is none.
      raw: [B, K, E] raw tokens, zeros behind a row's last one; None if the store keeps none.
      is_root: whether these are root windows.
      keep: how many of its last tokens a full window keeps, K by default.
    """
    keys = stores.latent_keys(store, latent, rows[ENV])
    return _file(store, batch, keys, rows, length, correction, raw, is_root=is_root, keep=keep)


def _file(
    store: Store,
    batch: jax.Array,
    keys: jax.Array,
    rows: jax.Array,
    length: jax.Array,
    correction: jax.Array,
    raw: jax.Array | None,
    *,
    is_root: bool,
    keep: int | None,
) -> Store:
    """`file` by keys [B, K]."""
    env_id, valid = rows[ENV], rows[VALID] > 0
    pool, segment = (store.roots, env_id) if is_root else (store.nodes, jnp.zeros_like(env_id))
    # Slots first, windows after: each is read from the batch and written into its slot at once.
    filed, slot, evicted = pools.add(_replace(pool, entries=()), keys, segment, (), valid=valid)
    pad = jnp.max(jnp.where(valid, length, 0)) - length
    keep = correction.shape[0] if keep is None else keep
    entries = _write(pool.entries, batch, slot, length, pad, correction, raw, keep)
    filed = _replace(filed, entries=entries)
    evictions = {"root_evictions" if is_root else "node_evictions": evicted}
    lost = valid & (slot == NO_SLOT)
    counters = statistics.add(store.counters, not_stored=lost, **evictions)
    store = _replace(store, counters=counters)
    if not is_root:
        return _replace(store, nodes=filed)
    return _replace(store, roots=filed, latest=stores.with_latest(store, env_id, slot))


def _write(
    entries: Window,
    batch: jax.Array,
    slot: jax.Array,
    length: jax.Array,
    pad: jax.Array,
    correction: jax.Array,
    raw: jax.Array | None,
    keep: int,
) -> Window:
    """Writes each row's window into its slot; of rows that share a slot the last one stays."""
    capacity, stored = batch.shape[4], correction.shape[0]
    slides = length >= capacity - 1
    kept = jnp.where(slides, keep, length)
    first = pad + (length - keep) * slides
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

    kinds = [functools.partial(write, shift=shift) for shift in (False, True)]
    table = _each_row(jnp.where(written, overhangs, len(kinds)), kinds, entries.kv)
    place = jnp.where(written, slot, entries.length.shape[0])
    if raw is not None:
        raw = jnp.asarray(entries.raw).at[place].set(raw, mode="drop")
    return Window(table, entries.length.at[place].set(kept, mode="drop"), raw)


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


@functools.cache
def file_and_look_up(structure: Any, keep: int | None = None) -> Callable[..., Any]:
    """`file` of nodes and then `look_up`, as between two simulations, in one call on flat arrays.

    Args:
      structure: of the store, see `take_apart`.
      keep: see `file`.

    Returns:
      A function (batch, known, *arrays, source, correction, raw, notes) -> (changed, raw).
      `batch` and `known` are memory for what `look_up` returns under these names; behind its rows
      the batch keeps what it held. `arrays` are the store's. `source`, `correction` and `raw` are
      what `file` takes, with `source` for its batch. Changed are the batch, what is known [2, B],
      and the store's first arrays, `changing(structure)` of them; all these were donated. The raw
      tokens are those of `look_up`.
    """
    first = 2 + changing(structure)

    def between_simulations(batch: jax.Array, known: jax.Array, *arguments: Any) -> Any:
        *arrays, source, correction, raw, notes = arguments
        store = put_together(arrays, structure)
        rows = jnp.swapaxes(notes[..., ROWS], 1, 2).astype(jnp.int32)
        length = notes[FILED, :, LENGTH].astype(jnp.int32)
        latent = notes[..., :LENGTH]
        keys = jax.vmap(stores.latent_keys, in_axes=(None, 0, 0))(store, latent, rows[:, ENV])
        filing = keys[FILED], rows[FILED], length, correction, raw
        store = _file(store, source, *filing, is_root=False, keep=keep)
        counters, batch, info, raw = _look_up(
            store, keys[ASKED], rows[ASKED], roots_only=False, batch=batch
        )
        arrays, _ = take_apart(with_counters(store, counters))
        return (batch, known.at[:].set(info), *arrays[: first - 2]), raw

    options = known_options(one_thread=True) if on_cpu() else None
    return jax.jit(between_simulations, donate_argnums=range(first), compiler_options=options)


def take_apart(store: Store) -> tuple[list[jax.Array], Any]:
    """A store's arrays, first those that filing nodes changes, and the structure they make.

    A call takes and gives flat arrays in less time.
    """
    rest = _replace(store, nodes=None, counters=None)
    return jax.tree.flatten((store.nodes, store.counters, rest))


def put_together(arrays: Sequence[jax.Array], structure: Any) -> Store:
    """The store that `take_apart` took apart."""
    nodes, counters, rest = structure.unflatten(arrays)
    store: Store = _replace(rest, nodes=nodes, counters=counters)
    return store


def changing(structure: Any) -> int:
    """How many of a store's arrays filing nodes changes."""
    nodes, counters, _ = structure.children()
    count: int = nodes.num_leaves + counters.num_leaves
    return count


@functools.partial(jax.jit, donate_argnames=("store",))
def clear(store: Store, roots: jax.Array, nodes: jax.Array) -> Store:
    """Forgets the roots of chosen environments [P] bool and, if `nodes` [] bool, all nodes."""
    cleared = pools.clear(store.roots).segments
    segments = jnp.where(roots[:, None], cleared, store.roots.segments)
    latest = None if store.latest is None else jnp.where(roots, NO_SLOT, store.latest)
    store = _replace(store, roots=_replace(store.roots, segments=segments), latest=latest)
    return stores.clear_nodes(store, when=nodes)


@functools.partial(jax.jit, donate_argnames=("store",))
def new_epoch(store: Store) -> Store:
    """`kvjax.store.new_epoch` in one call."""
    return stores.new_epoch(store)


@jax.jit
def latest_tokens(store: Store, env_id: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An environment's newest root, also across `new_epoch`: raw tokens [K, E] and how many."""
    slot = jnp.asarray(store.latest)[env_id]
    entries = store.roots.entries
    length = jnp.where(slot == NO_SLOT, 0, entries.length[slot])
    return jnp.asarray(entries.raw)[slot], length


@functools.partial(jax.jit, donate_argnames=("store",))
def count_rebuilt(store: Store) -> Store:
    """Counts one window that was computed again after a miss."""
    return stores.count_rebuilt(store, jnp.ones(1, bool))


def with_counters(store: Store, counters: jax.Array) -> Store:
    """The store with other statistics."""
    return _replace(store, counters=counters)
