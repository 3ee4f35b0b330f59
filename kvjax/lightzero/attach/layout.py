"""Windows in the layout of LightZero's caches: looked up, aligned, filed again.

LightZero keeps keys apart from values, each layer apart, and heads before tokens. So does this
table, and each function here is one jitted call that copies rows of it as they are: every window is
read and written once, in one thread, as the others are torch's.

Nothing is shifted on the way. A stored window stands at the end of its K slots, zeros before it, so
that rows of any lengths are aligned when they are copied whole. A batch has more slots than
LightZero's caches, which are C of them from where the longest row begins:

    stored      [. . . . a]     batch   [. . . . a . . . . . . . . .]
                [. . b c d]             [. . b c d . . . . . . . . .]
                                 LightZero's [b c d . . . . .]

The model adds a block to each row, behind slot K; what is filed are the K tokens at a row's end.

Shapes: B rows, E embedding size, C context_length in tokens, K = C - 3 stored tokens, L layers,
H heads, D head size, P environments, M slots of a row. `batch` is [L, 2, B, H, M, D].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from kvjax import store as stores
from kvjax.base.compilation import jit_small_operations, known_options, on_cpu
from kvjax.config import BLOCK, WorldModelConfig
from kvjax.store import Store, statistics
from kvjax.store import pool as pools
from kvjax.store.pool import NO_SLOT, Pool

MISSED, IN_ROOTS, IN_NODES = 0, 1, 2
"""Where a row was found."""

ENV, VALID = 0, 1
"""Rows of the integers that describe a batch: [2, B] int32."""

FILED, ASKED = 0, 1
"""Notes about a batch's rows: [2, B, E + 2] float32, those to file and those to look up."""

ROWS = slice(-2, None)
"""The integers that describe a row, behind its latent: they are small, so that floats hold them."""

_replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entry:
    """What a store's pools say of a window."""

    length: jax.Array  # [] int32, in tokens
    raw: jax.Array | None  # [K, E] raw tokens, zeros behind the last one, where a mode keeps them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filed:
    """A store and the windows of its entries: of R root slots, then of S node slots."""

    store: Store  # of `Entry`
    kv: jax.Array  # [R + S + 2, L, 2, H, K, D]; last an empty one, and one that nobody reads


EMPTY, UNREAD = -2, -1
"""Windows that belong to no slot."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("root_slots", "node_slots"))
def init(
    config: WorldModelConfig,
    num_envs: int,
    num_simulations: int,
    *,
    root_slots: int | None = None,
    node_slots: int | None = None,
) -> Filed:
    """`kvjax.init_store` in this layout."""
    store = stores.init_store(
        config, num_envs, num_simulations, root_slots=root_slots, node_slots=node_slots
    )
    kv = store.nodes.entries.kv
    stored, layers, two, heads, size = kv.shape[1:]
    roots, nodes = (
        _replace(pool, entries=Entry(pool.entries.length, pool.entries.raw))
        for pool in (store.roots, store.nodes)
    )
    shape = _num_windows(store), layers, two, heads, stored, size
    return Filed(_replace(store, roots=roots, nodes=nodes), jnp.zeros(shape, kv.dtype))


def slots_of_row(context_length: int) -> int:
    """M: K before the new tokens, and C from any row's begin; even, so that rows stay aligned."""
    return 2 * (context_length - 1)


_jit = functools.partial(jit_small_operations, nested=False, one_thread=lambda **_: True)


@functools.partial(_jit, static_argnames=("roots_only",))
def look_up(
    filed: Filed, latent: jax.Array, rows: jax.Array, *, roots_only: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Finds windows and aligns them, as `kvjax.ops.window.trim_and_pad` does.

    All rows end at slot K. One that is not found gets an empty slot there, for the token that its
    caller will put into it.

        [. . . . a]
        [. . b c d]
        [. . . . _]  not found

    Args:
      latent: [B, E] float32.
      rows: [2, B] int32, see `ENV`.
      roots_only: as at root steps.

    Returns:
      The store's counters, with this look-up counted; `batch`; [2, B] int32: each row's length and
      where it was found, see `MISSED`; raw tokens [B, K, E], None if the store keeps none.
    """
    store, kv = filed.store, filed.kv
    keys = stores.latent_keys(store, latent, rows[ENV])
    counters, window, info, raw = _find(store, keys, rows, roots_only=roots_only)
    _, layers, two, heads, stored, size = kv.shape
    shape = layers, two, len(latent), heads, slots_of_row(stored + 1 + BLOCK), size

    def read(row: jax.Array, batch: jax.Array) -> jax.Array:
        return _read(kv, window, row, batch)

    batch = jax.lax.fori_loop(0, len(latent), read, jnp.zeros(shape, kv.dtype))
    return counters, batch, info, raw


def _find(
    store: Store, keys: jax.Array, rows: jax.Array, *, roots_only: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """`look_up` by keys; instead of a batch, the windows [B] that have to be read."""
    env_id, valid = rows[ENV], rows[VALID] > 0
    found = stores.only(stores.find(store, keys, env_id, roots_only=roots_only), valid)
    in_root, entry = found.root != NO_SLOT, _entries(store, found)
    where = jnp.where(in_root, IN_ROOTS, jnp.where(found.hit, IN_NODES, MISSED))
    length = jnp.where(found.hit, entry.length, 1)
    window = jnp.where(in_root, found.root, _node_window(store, found.node))
    window = jnp.where(found.hit, window, _num_windows(store) + EMPTY)
    store = stores.count_lookups(store, found, valid, roots_only=roots_only)
    store = stores.count_padding(store, length, valid)
    return store.counters, window, jnp.stack([length, where]), entry.raw


def _entries(store: Store, found: stores.Found) -> Entry:
    """What the pools say of rows [B], zeros of those that are not found."""
    roots, nodes = pools.take(store.roots, found.root), pools.take(store.nodes, found.node)
    in_root = found.root != NO_SLOT

    def choose(root: jax.Array, node: jax.Array) -> jax.Array:
        return jax.vmap(jnp.where)(in_root, root, node)

    entries: Entry = jax.tree.map(choose, roots, nodes)
    return entries


def _num_windows(store: Store) -> int:
    """Of the store's slots, an empty one and one that nobody reads."""
    return pools.total_slots(store.roots) + pools.total_slots(store.nodes) + 2


def _node_window(store: Store, slot: jax.Array) -> jax.Array:
    return slot + pools.total_slots(store.roots)


def _read(kv: jax.Array, window: jax.Array, row: jax.Array, batch: jax.Array) -> jax.Array:
    """Copies a row's window into the first K slots of a batch.

    A loop over rows copies at the speed of memory, in one thread.
    """
    tokens = kv[window[row]][:, :, None]
    copied: jax.Array = jax.lax.dynamic_update_slice(batch, tokens, (0, 0, row, 0, 0, 0))
    return copied


@functools.partial(_jit, static_argnames=("is_root", "keep"), donate_argnames=("filed",))
def file(
    filed: Filed,
    batch: jax.Array,
    end: jax.Array,
    latent: jax.Array,
    rows: jax.Array,
    length: jax.Array,
    correction: jax.Array,
    raw: jax.Array | None = None,
    *,
    is_root: bool,
    keep: int | None = None,
) -> Filed:
    """Slides windows that are full and stores all under their latents.

        C = 8, end = 7:  [. . . . a b c . . .] -> [. . a b c]
                         [d e f g h i j . . .] -> [f' g' h' i' j']

    Args:
      filed: moved, use the one that comes back.
      batch: all rows end at the same slot, zeros before them. M may be any number.
      end: [] int32, the slot behind the rows' ends; at least K.
      latent: [B, E] float32.
      rows: [2, B] int32, see `ENV`.
      length: [B] int32, in tokens, at most C - 1.
      correction: [L, 2, H, K, D], as of `kvjax.ops.window.slide`; zeros if there is none.
      raw: [B, K, E] raw tokens, zeros behind a row's last one; None if the store keeps none.
      is_root: whether these are root windows.
      keep: how many of its last tokens a full window keeps, K by default.
    """
    store, stored = filed.store, correction.shape[3]
    keys = stores.latent_keys(store, latent, rows[ENV])
    store, filing = _add(store, keys, rows, length, stored, raw, is_root=is_root, keep=keep)

    def write(row: jax.Array, kv: jax.Array) -> jax.Array:
        return _write(kv, filing, row, batch, end, correction)

    return Filed(store, jax.lax.fori_loop(0, len(latent), write, filed.kv))


_Filing = tuple[jax.Array, jax.Array, jax.Array]
"""Of each row [B]: its window, how many tokens at its end stay, and whether these slide."""


def _add(
    store: Store,
    keys: jax.Array,
    rows: jax.Array,
    length: jax.Array,
    stored: int,
    raw: jax.Array | None,
    *,
    is_root: bool,
    keep: int | None,
) -> tuple[Store, _Filing]:
    """`file` by keys, all but the windows: where they have to be written."""
    env_id, valid = rows[ENV], rows[VALID] > 0
    slides = length >= stored + BLOCK
    kept = jnp.where(slides, stored if keep is None else keep, length)
    pool, segment = (store.roots, env_id) if is_root else (store.nodes, jnp.zeros_like(env_id))
    pool, slot, evicted = pools.add(pool, keys, segment, Entry(kept, raw), valid=valid)
    window = slot if is_root else _node_window(store, slot)
    window = jnp.where(slot == NO_SLOT, _num_windows(store) + UNREAD, window)
    evictions = {"root_evictions" if is_root else "node_evictions": evicted}
    lost = valid & (slot == NO_SLOT)
    counters = statistics.add(store.counters, not_stored=lost, **evictions)
    filing = window, kept, slides
    if is_root:
        latest = stores.with_latest(store, env_id, slot)
        return _replace(store, roots=pool, latest=latest, counters=counters), filing
    return _replace(store, nodes=pool, counters=counters), filing


def _write(
    kv: jax.Array,
    filing: _Filing,
    row: jax.Array,
    batch: jax.Array,
    end: jax.Array | int,
    correction: jax.Array,
) -> jax.Array:
    """Writes the last tokens of a row to its window; of equal windows the last row's stays."""
    window, kept, slides = (of_rows[row] for of_rows in filing)
    layers, two, heads, stored, size = correction.shape
    start, shape = (0, 0, row, 0, end - stored, 0), (layers, two, 1, heads, stored, size)
    tokens = jax.lax.dynamic_slice(batch, start, shape)[:, :, 0]
    tokens = jnp.where(slides, tokens + correction, tokens)
    index = jnp.arange(stored)[:, None]
    tokens = jnp.where(index >= stored - kept, tokens, 0)
    written: jax.Array = jax.lax.dynamic_update_index_in_dim(kv, tokens, window, 0)
    return written


@functools.cache
def file_and_look_up(structure: Any, keep: int | None = None) -> Callable[..., Any]:
    """`file` of nodes and then `look_up`, as between two simulations, in one call on flat arrays.

    Args:
      structure: of what is filed, see `take_apart`.
      keep: see `file`.

    Returns:
      A function (batch, known, *arrays, correction, raw, notes) -> (changed, raw). It files a row
      and then looks that row up, while it is in fast memory, before it files the next one. So each
      row has an environment of its own, the same when it is filed as when it is looked up.
      `batch` has the rows to file, a block longer than they were found, and gets those that are
      looked up; behind their ends it keeps what it held. `known` [2, B] is what `look_up` said of
      the former and gets what it says of the latter. `arrays` are what `take_apart` gives;
      `correction` and `raw` are what `file` takes. Changed are the batch, what is known, and those
      arrays that filing nodes changes; all these were donated. The raw tokens are those of
      `look_up`.
    """
    changing = structure.children()[0].num_leaves
    function = functools.partial(_file_and_look_up, structure, changing, keep)
    options = known_options(one_thread=True) if on_cpu() else None
    return jax.jit(function, donate_argnums=range(2 + changing), compiler_options=options)


def _file_and_look_up(
    structure: Any,
    changing: int,
    keep: int | None,
    batch: jax.Array,
    known: jax.Array,
    *arguments: Any,
) -> Any:
    *arrays, correction, raw, notes = arguments
    filed = put_together(arrays, structure)
    rows = jnp.swapaxes(notes[..., ROWS], 1, 2).astype(jnp.int32)
    latent = notes[..., : ROWS.start]
    keys = jax.vmap(stores.latent_keys, in_axes=(None, 0, 0))(filed.store, latent, rows[:, ENV])
    stored, length = correction.shape[3], known[0] + BLOCK
    entries = keys[FILED], rows[FILED], length, stored, raw
    store, filing = _add(filed.store, *entries, is_root=False, keep=keep)
    counters, window, info, raw = _find(store, keys[ASKED], rows[ASKED], roots_only=False)

    def write_and_read(row: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        kv, batch = state
        kv = _write(kv, filing, row, batch, stored + BLOCK, correction)
        return kv, _read(kv, window, row, batch)

    kv, batch = jax.lax.fori_loop(0, len(window), write_and_read, (filed.kv, batch))
    arrays, _ = take_apart(with_counters(Filed(store, kv), counters))
    return (batch, known.at[:].set(info), *arrays[:changing]), raw


def take_apart(filed: Filed) -> tuple[list[jax.Array], Any]:
    """All arrays, first those that filing nodes changes, and the structure they make.

    A call takes and gives flat arrays in less time.
    """
    store = filed.store
    rest = _replace(store, nodes=None, counters=None)
    return jax.tree.flatten(((filed.kv, store.nodes, store.counters), rest))


def put_together(arrays: Sequence[jax.Array], structure: Any) -> Filed:
    """What `take_apart` took apart."""
    (kv, nodes, counters), rest = structure.unflatten(arrays)
    return Filed(_replace(rest, nodes=nodes, counters=counters), kv)


@functools.partial(jax.jit, donate_argnames=("filed",))
def clear(filed: Filed, roots: jax.Array, nodes: jax.Array) -> Filed:
    """Forgets the roots of chosen environments [P] bool and, if `nodes` [] bool, all nodes."""
    store = filed.store
    cleared = pools.clear(store.roots).segments
    segments = jnp.where(roots[:, None], cleared, store.roots.segments)
    latest = None if store.latest is None else jnp.where(roots, NO_SLOT, store.latest)
    store = _replace(store, roots=_replace(store.roots, segments=segments), latest=latest)
    return _replace(filed, store=stores.clear_nodes(store, when=nodes))


@functools.partial(jax.jit, static_argnames=("node_slots",))
def with_node_slots(filed: Filed, *, node_slots: int) -> Filed:
    """The same with more node slots: what is filed stays, in its order."""
    store, old = filed.store, filed.store.nodes
    roots, size = pools.total_slots(store.roots), pools.total_slots(old)
    example = jax.tree.map(lambda rows: rows[0], old.entries)
    lanes, eviction = old.records.shape[1] - pools.KEY, cast(pools.Eviction, old.eviction)
    grown = pools.init(example, num_slots=node_slots, key_lanes=lanes, eviction=eviction)
    windows = jnp.zeros((node_slots + 2, *filed.kv.shape[1:]), filed.kv.dtype)
    live, segment = pools.is_live(old), jnp.zeros(1, jnp.int32)

    def move(age: jax.Array, state: tuple[Pool, jax.Array]) -> tuple[Pool, jax.Array]:
        pool, windows = state
        at = (old.segments[0, pools.CURSOR].astype(jnp.int32) + age) % size  # the oldest first
        keys = old.records[at, pools.KEY :][None]
        entry = jax.tree.map(lambda rows: rows[at][None], old.entries)
        pool, slot, _ = pools.add(pool, keys, segment, entry, valid=live[at][None])
        window = jnp.where(slot[0] == NO_SLOT, node_slots + 2 + UNREAD, slot[0])
        return pool, windows.at[window].set(filed.kv[roots + at])

    grown, windows = jax.lax.fori_loop(0, size, move, (grown, windows))
    return Filed(_replace(store, nodes=grown), jnp.concatenate([filed.kv[:roots], windows]))


@functools.partial(jax.jit, donate_argnames=("filed",))
def new_epoch(filed: Filed) -> Filed:
    """`kvjax.store.new_epoch` in one call."""
    return _replace(filed, store=stores.new_epoch(filed.store))


@jax.jit
def outdated_tokens(store: Store, env_id: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Raw tokens [K, E] of an environment's newest root, and how many; 0 unless it is outdated.

    That is, unless the root was made before the last `new_epoch`.
    """
    slot = jnp.asarray(store.latest)[env_id][None]
    entry = pools.take(store.roots, slot)
    return entry.raw[0], jnp.where(pools.is_live(store.roots, slot), 0, entry.length)[0]


@functools.partial(jax.jit, donate_argnames=("filed",))
def count_rebuilt(filed: Filed) -> Filed:
    """Counts one window that was computed again after a miss."""
    return _replace(filed, store=stores.count_rebuilt(filed.store, jnp.ones(1, bool)))


def with_counters(filed: Filed, counters: jax.Array) -> Filed:
    """The same with other statistics."""
    return _replace(filed, store=_replace(filed.store, counters=counters))
