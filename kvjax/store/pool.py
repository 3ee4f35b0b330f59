"""Hashed slots with eviction: fixed-shape arrays, constant-time lookup, no model.

A pool has P segments of S slots each (one per environment, or a single shared one). A slot's record
holds its key, its place in a chain of keys with the same bucket, and its age; its entry is a row of
any pytree. Key, age and entry live under one index, so maps cannot drift apart.

Batches: `add` treats its rows in order, as if each were a call of its own.

* Rows with equal keys share a slot, and the last row's entry stays.
* A row may evict what an earlier row of the batch has stored or rewritten. The earlier row's slot
  is then NO_SLOT, never another row's slot.
* More rows than slots: the last S of a segment stay.

Shapes: P segments, S slots of a segment, B rows, K lanes of a key, M buckets of a segment.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import display, loops
from kvjax.base.values import require_count, require_one_of, require_shape
from kvjax.ops import hashing

# Columns of a pool's record; the key's lanes follow.
PREVIOUS, NEXT = 0, 1  # neighbours in the chain; the sentinel ends it
BUCKET = 2  # 32 bits of the key
RANK = 3  # eviction order: time of insertion (fifo), of use (lru), or the priority
GENERATION = 4  # how many keys the slot has held; 0 only if it was never filled
ERA = slice(5, 7)  # the segment's era when the slot was filled; another one: it was cleared
KEY = 7

# Columns of a segment's state.
CURSOR, CLOCK = 0, 1
SEGMENT_ERA = slice(2, 4)  # 64 bits, the lower half first: it counts up and never comes back


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("records", "heads", "segments", "entries"),
    meta_fields=("eviction",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Pool(display.Drawn):
    """P segments of S hashed slots, see `kvjax.store.pool`.

    Attributes:
      records: [P * S + 1, 7 + K] uint32, links, age and key of each slot.
      heads: [P * M + 1] uint32, first slot of each bucket's chain.
      segments: [P, 4] uint32, cursor, clock and era.
      entries: what the slots hold, rows [P * S, ...].
      eviction: "fifo", "lru" or "priority" (static).
    """

    records: jax.Array
    heads: jax.Array
    segments: jax.Array
    entries: Any
    eviction: str

    def _picture(self, name: str = "Pool") -> display.Picture | None:
        records, segments = np.asarray(self.records), np.asarray(self.segments)
        if records.ndim != segments.ndim or records.ndim != 2:
            return None
        era, clock = segments[:, None, SEGMENT_ERA], segments[:, [CLOCK]]
        slots = records[:-1].reshape(len(segments), -1, records.shape[1])
        live, rank = (slots[..., ERA] == era).all(axis=-1), slots[..., RANK]
        if self.eviction != "priority":
            rank = ~(clock - rank)  # ages, as the clock may have wrapped
        return display.pool(name, live, rank, len(segments), self.eviction)


Eviction = Literal["fifo", "lru", "priority"]
EVICTIONS = ("fifo", "lru", "priority")

_replace = dataclasses.replace

NO_SLOT = -1
"""What stands where no slot can be named."""

_FIRST_ERA = np.array([1, 0], np.uint32)  # the slots that were never filled are of era 0


def init(
    entry: Any,
    *,
    num_slots: int,
    num_segments: int = 1,
    key_lanes: int = hashing.KEY_LANES,
    eviction: Eviction = "fifo",
) -> Pool:
    """An empty pool.

    Args:
      entry: an example of what a slot holds; only shapes and dtypes matter.
      num_slots: S, slots of each segment.
      num_segments: P.
      key_lanes: K.
      eviction: "fifo" (rewriting keeps the age), "lru" (a hit and a rewrite refresh) or "priority"
        (the lowest goes first, on ties the lowest slot). "lru" and "priority" fill the lowest free
        slot first.

    Raises:
      ValueError: a size below 1 or an unknown policy.
    """
    num_slots = require_count("num_slots", num_slots)
    num_segments = require_count("num_segments", num_segments)
    require_one_of("eviction", eviction, EVICTIONS)
    total = num_segments * num_slots
    buckets = 1 << (2 * num_slots - 1).bit_length()  # at most half full
    records = jnp.zeros((total + 1, KEY + key_lanes), jnp.uint32)
    first_era = jnp.zeros((num_segments, 4), jnp.uint32).at[:, SEGMENT_ERA].set(_FIRST_ERA)
    return Pool(
        records=records.at[:, : NEXT + 1].set(total),
        heads=jnp.full((num_segments * buckets + 1,), total, jnp.uint32),
        segments=first_era,
        entries=jax.tree.map(lambda x: jnp.zeros((total, *jnp.shape(x)), x.dtype), entry),
        eviction=eviction,
    )


def num_slots(pool: Pool) -> int:
    """S, slots of one segment."""
    return total_slots(pool) // pool.segments.shape[0]


def total_slots(pool: Pool) -> int:
    """P * S. It is also the sentinel: the record behind the last one, which ends every chain."""
    return pool.records.shape[0] - 1


def _head(pool: Pool, bucket: jax.Array, segment: jax.Array) -> jax.Array:
    """Where a bucket's chain begins: index into `heads`."""
    buckets = (pool.heads.shape[0] - 1) // pool.segments.shape[0]
    return segment.astype(jnp.uint32) * np.uint32(buckets) + (bucket & np.uint32(buckets - 1))


def is_live(pool: Pool, slots: jax.Array | None = None) -> jax.Array:
    """Which slots hold an entry: [B] bool for `slots` [B], all P * S by default."""
    slots = jnp.arange(total_slots(pool)) if slots is None else slots
    era = pool.segments[slots // num_slots(pool), SEGMENT_ERA]
    return jnp.all(pool.records[slots, ERA] == era, axis=-1)


def find(pool: Pool, key: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Looks one key up in one segment. Changes nothing: a hit's age is renewed by `touch`.

    Args:
      key: [K] uint32.
      segment: [] integer in 0 .. P - 1.

    Returns:
      The slot, [] int32, NO_SLOT if the key is not stored; and whether a stored key has the same
      32-bit bucket but is another key, [] bool.
    """
    require_shape("key", key, (pool.records.shape[1] - KEY,))
    require_shape("segment", segment, ())
    slot, false_match = _walk(pool, key, segment)
    return _or_no_slot(pool, slot), false_match


def _or_no_slot(pool: Pool, slot: jax.Array) -> jax.Array:
    named: jax.Array = jnp.where(slot < total_slots(pool), slot.astype(jnp.int32), NO_SLOT)
    return named


def _walk(pool: Pool, key: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Follows a bucket's chain to the key: the slot or the sentinel, and whether a bucket lied."""
    sentinel = np.uint32(total_slots(pool))
    bucket = hashing.bucket(key)
    era = pool.segments[segment, SEGMENT_ERA]

    def not_there_yet(state: Any) -> jax.Array:
        slot, found, _ = state
        return jnp.logical_and(slot != sentinel, ~found)

    def follow(state: Any) -> Any:
        slot, _, false_match = state
        record = pool.records[slot]
        same_bucket = jnp.all(record[ERA] == era) & (record[BUCKET] == bucket)
        found = same_bucket & jnp.all(record[KEY:] == key)
        return jnp.where(found, slot, record[NEXT]), found, false_match | (same_bucket & ~found)

    start = pool.heads[_head(pool, bucket, segment)], jnp.array(False), jnp.array(False)
    slot, _, false_match = loops.while_loop(not_there_yet, follow, start)
    return slot, false_match


def take(pool: Pool, slot: jax.Array) -> Any:
    """Entries of slots: rows [B, ...] for `slot` [B] int32, zeros where it is NO_SLOT."""
    index = jnp.where(slot < 0, total_slots(pool), slot)
    return jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), pool.entries)


def touch(pool: Pool, slot: jax.Array) -> Pool:
    """Renews the age of slots that were hit, in row order; only LRU minds.

    Args:
      slot: [B] int32, NO_SLOT rows are left out.
    """
    if pool.eviction != "lru":
        return pool

    def renew(row: jax.Array, pool: Pool) -> Pool:
        hit = slot[row] != NO_SLOT
        index = jnp.where(hit, slot[row], total_slots(pool))
        segment = jnp.where(hit, slot[row], 0) // num_slots(pool)
        clock = pool.segments[segment, CLOCK] + hit.astype(jnp.uint32)
        return _replace(
            pool,
            records=pool.records.at[index, RANK].set(clock),
            segments=pool.segments.at[segment, CLOCK].set(clock),
        )

    renewed: Pool = loops.fori_loop(0, slot.shape[0], renew, pool)
    return renewed


def add(
    pool: Pool,
    keys: jax.Array,
    segments: jax.Array,
    entries: Any,
    *,
    priorities: jax.Array | None = None,
    valid: jax.Array | None = None,
    may_evict: bool = True,
) -> tuple[Pool, jax.Array, jax.Array]:
    """Stores a batch, row by row (see the module's text for what rows do to each other).

    Args:
      keys: [B, K] uint32.
      segments: [B] int32; a row outside 0 .. P - 1 is not stored.
      entries: rows [B, ...] of the pool's entry.
      priorities: [B] float32, with the "priority" policy and only with it; NaN counts as -inf.
      valid: [B] bool, rows to store; all by default.
      may_evict: False leaves out rows for which an entry had to go.

    Returns:
      The pool; the slots, [B] int32, NO_SLOT where a row is not stored (any more); and which rows
      evicted an entry, [B] bool.

    Raises:
      ValueError: priorities are missing or not asked for, or entries of another dtype.
    """
    require_shape("keys", keys, ("B", pool.records.shape[1] - KEY))
    num_rows = keys.shape[0]
    for name, rows in {"segments": segments, "priorities": priorities, "valid": valid}.items():
        if rows is not None:
            require_shape(name, rows, (num_rows,))
    _check_entries(pool, entries, num_rows)
    if (priorities is not None) != (pool.eviction == "priority"):
        raise ValueError(f"priorities go with eviction 'priority', this is {pool.eviction!r}")
    ranks = jnp.zeros(num_rows, jnp.uint32) if priorities is None else _ordered(priorities)
    in_range = (segments >= 0) & (segments < pool.segments.shape[0])
    valid = in_range if valid is None else in_range & valid
    known, _ = jax.vmap(_walk, in_axes=(None, 0, 0))(pool, keys, segments)
    twin = _earlier_twin(keys, segments, valid)

    def store(row: jax.Array, state: Any) -> Any:
        pool, slots, evicted = state
        candidate = jnp.where(twin[row] < 0, known[row], slots[twin[row]])
        request = _Request(keys[row], segments[row], ranks[row], valid[row], candidate)
        pool, slot, evicts = _claim(pool, request, may_evict=may_evict)
        return pool, slots.at[row].set(slot), evicted.at[row].set(evicts)

    nowhere = jnp.full(num_rows, total_slots(pool), jnp.uint32)
    start = _replace(pool, entries=None), nowhere, jnp.zeros(num_rows, bool)
    filed, slots, evicted = loops.fori_loop(0, num_rows, store, start)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    later = row[:, None] < row[None]
    overwritten = jnp.any(later & (slots[:, None] == slots[None]), axis=1)
    target = jnp.where(overwritten, total_slots(pool), slots)
    stored = jax.tree.map(
        lambda table, rows: table.at[target].set(rows, mode="drop"), pool.entries, entries
    )
    stays = valid & jnp.all(filed.records[slots, KEY:] == keys, axis=1)
    slots = jnp.where(stays, _or_no_slot(pool, slots), NO_SLOT)
    return _replace(filed, entries=stored), slots, evicted


def _earlier_twin(keys: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    """For each row the last valid row before it with its key and segment, else -1: [B] int32."""
    rows = jnp.arange(keys.shape[0], dtype=jnp.int32)[None]
    same = jnp.all(keys[:, None] == keys[None], axis=2) & (segments[:, None] == segments[None])
    before = same & valid[None] & (rows < rows.T)
    return jnp.max(jnp.where(before, rows, -1), axis=1)


def _check_entries(pool: Pool, entries: Any, num_rows: int) -> None:
    def check(table: jax.Array, rows: jax.Array) -> None:
        require_shape("entries", rows, (num_rows, *table.shape[1:]))
        if rows.dtype != table.dtype:
            raise ValueError(f"the pool holds {table.dtype}, got entries of {rows.dtype}")

    jax.tree.map(check, pool.entries, entries)


def _ordered(priorities: jax.Array) -> jax.Array:
    """Floats to uint32 in the same order; NaN below all."""
    clean = jnp.where(jnp.isnan(priorities), -jnp.inf, priorities).astype(jnp.float32)
    bits = hashing.canonical_bits(clean)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | np.uint32(1 << 31))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """What one row of `add` asks for."""

    key: jax.Array  # [K] uint32
    segment: jax.Array  # []
    rank: jax.Array  # [] uint32, of the "priority" policy
    valid: jax.Array  # [] bool
    candidate: jax.Array  # [] uint32, the only slot that can hold the key by now


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """What filing one key writes, and nothing else."""

    slot: jax.Array  # [] uint32
    evicts: jax.Array  # [] bool
    record: jax.Array  # [7 + K] uint32, of the slot
    state: jax.Array  # [4] uint32, of the segment
    links: jax.Array  # [3, 2] uint32: a record's place in the flat table, and its new neighbour
    heads: jax.Array  # [2, 2] uint32: a chain's place, and its first slot


def _claim(pool: Pool, request: _Request, *, may_evict: bool) -> tuple[Pool, jax.Array, jax.Array]:
    """Finds or makes a slot for one key and files it: pool, slot, whether an entry had to go.

    All reads are done inside a conditional and all writes after it: so XLA cannot merge them, and
    updates the tables in place instead of copying them.
    """
    make = _plan if may_evict else _plan_where_there_is_room
    plan = loops.cond(request.valid, make, _no_plan, pool, request)
    width = pool.records.shape[1]
    places = plan.slot * np.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
    places = jnp.concatenate([plan.links[:, 0], places])
    values = jnp.concatenate([plan.links[:, 1], plan.record])
    records = pool.records.reshape(-1).at[places].set(values).reshape(pool.records.shape)
    heads = pool.heads.at[plan.heads[:, 0]].set(plan.heads[:, 1])
    segments = pool.segments.at[request.segment].set(plan.state)
    return _replace(pool, records=records, heads=heads, segments=segments), plan.slot, plan.evicts


def _no_plan(pool: Pool, request: _Request) -> _Plan:
    """Writes the sentinel's record and head, which nobody reads."""
    sentinel, no_head = np.uint32(total_slots(pool)), np.uint32(pool.heads.shape[0] - 1)
    nowhere = jnp.full((3, 2), sentinel * np.uint32(pool.records.shape[1]), jnp.uint32)
    return _Plan(
        slot=jnp.asarray(sentinel),
        evicts=jnp.asarray(False),
        record=jnp.zeros(pool.records.shape[1], jnp.uint32),
        state=pool.segments[request.segment],
        links=nowhere,
        heads=jnp.full((2, 2), no_head, jnp.uint32),
    )


def _plan_where_there_is_room(pool: Pool, request: _Request) -> _Plan:
    plan, nothing = _plan(pool, request), _no_plan(pool, request)
    chosen: _Plan = jax.tree.map(lambda *pair: jnp.where(plan.evicts, *pair), nothing, plan)
    return chosen


def _plan(pool: Pool, request: _Request) -> _Plan:
    sentinel, no_head = np.uint32(total_slots(pool)), np.uint32(pool.heads.shape[0] - 1)
    width = np.uint32(pool.records.shape[1])
    state, bucket = pool.segments[request.segment], hashing.bucket(request.key)
    era = state[SEGMENT_ERA]
    held = pool.records[request.candidate]
    known = (request.candidate != sentinel) & jnp.all(held[ERA] == era)
    known &= jnp.all(held[KEY:] == request.key)
    slot = jnp.where(known, request.candidate, _victim(pool, request.segment, state))
    old = pool.records[slot]
    moves = ~known & (old[GENERATION] > 0)  # the slot leaves one chain for another
    before = jnp.where(moves, old[PREVIOUS], sentinel)
    after = jnp.where(moves, old[NEXT], sentinel)
    was_first = moves & (before == sentinel)
    old_head = jnp.where(was_first, _head(pool, old[BUCKET], request.segment), no_head)
    new_head = jnp.where(known, no_head, _head(pool, bucket, request.segment))
    first = jnp.where(old_head == new_head, after, pool.heads[new_head])
    first = jnp.where(known, sentinel, first)
    after_place = jnp.where(after == first, sentinel, after)  # the first's link is written below

    clock, is_new = state[CLOCK] + 1, (~known).astype(jnp.uint32)
    rank = {"fifo": jnp.where(known, old[RANK], clock), "lru": clock, "priority": request.rank}
    chain = jnp.where(known, old[: NEXT + 1], jnp.stack([sentinel, first]))
    generation = jnp.maximum(old[GENERATION] + is_new, 1)  # after 2**32 keys it begins at 1 again
    filed = jnp.stack([bucket, rank[pool.eviction], generation])
    cursor = (state[CURSOR] + is_new) % np.uint32(num_slots(pool))
    links = [(before * width + NEXT, after), (after_place * width + PREVIOUS, before)]
    links += [(first * width + PREVIOUS, slot)]
    heads = [(jnp.where(old_head == new_head, no_head, old_head), after), (new_head, slot)]
    return _Plan(
        slot=slot,
        evicts=~known & jnp.all(old[ERA] == era),
        record=jnp.concatenate([chain, filed, era, request.key]),
        state=jnp.concatenate([jnp.stack([cursor, clock]), era]),
        links=jnp.stack([jnp.stack(pair) for pair in links]),
        heads=jnp.stack([jnp.stack(pair) for pair in heads]),
    )


def _victim(pool: Pool, segment: jax.Array, state: jax.Array) -> jax.Array:
    """The slot that a new key takes: [] uint32."""
    size = num_slots(pool)
    start = segment.astype(jnp.uint32) * np.uint32(size)
    if pool.eviction == "fifo":
        return start + state[CURSOR]
    records = jax.lax.dynamic_slice_in_dim(pool.records, start, size)
    live, rank = jnp.all(records[:, ERA] == state[SEGMENT_ERA], axis=1), records[:, RANK]
    # Ages by unsigned difference survive a wrap of the clock.
    age = state[CLOCK] - rank if pool.eviction == "lru" else ~rank
    oldest = jnp.argmax(jnp.where(live, age, 0))
    return start + jnp.where(jnp.all(live), oldest, jnp.argmin(live)).astype(jnp.uint32)


def clear(pool: Pool, segment: jax.Array | int | None = None) -> Pool:
    """Empties one segment, or all: entries are forgotten at once, nothing is moved.

    Args:
      segment: [] integer; all segments by default.
    """
    low, high = pool.segments[:, SEGMENT_ERA].T
    era = jnp.stack([low + 1, high + (low + 1 == 0).astype(jnp.uint32)], axis=1)
    fresh = jnp.zeros_like(pool.segments).at[:, SEGMENT_ERA].set(era)
    if segment is not None:
        chosen = jnp.arange(pool.segments.shape[0]) == segment
        fresh = jnp.where(chosen[:, None], fresh, pool.segments)
    return _replace(pool, segments=fresh)


def remove(pool: Pool, slots: jax.Array) -> Pool:
    """Forgets the entries of chosen slots: [P * S] bool. Touches every record once."""
    era = jnp.where(slots[:, None], 0, pool.records[:-1, ERA])
    return _replace(pool, records=pool.records.at[:-1, ERA].set(era))


def check_invariants(pool: Pool) -> dict[str, jax.Array]:
    """What must hold of every pool, each as a [] bool. Touches every slot; for tests and doubts."""
    sentinel = np.uint32(total_slots(pool))
    slots = jnp.arange(total_slots(pool), dtype=jnp.uint32)
    records, segment = pool.records[:-1], (slots // num_slots(pool)).astype(jnp.int32)
    live, chained = is_live(pool), records[:, GENERATION] > 0
    buckets = jax.vmap(hashing.bucket)(records[:, KEY:])
    places = jax.vmap(_head, in_axes=(None, 0, 0))(pool, records[:, BUCKET], segment)
    before, after = records[:, PREVIOUS], records[:, NEXT]
    found, _ = jax.vmap(_walk, in_axes=(None, 0, 0))(pool, records[:, KEY:], segment)
    comes_after = jnp.where(
        before == sentinel, pool.heads[places] == slots, pool.records[before, NEXT] == slots
    )
    comes_before = (after == sentinel) | (pool.records[after, PREVIOUS] == slots)
    return {
        "a stored key is found in its own slot": jnp.all(~live | (found == slots)),
        "a record's bucket is its key's": jnp.all(~chained | (records[:, BUCKET] == buckets)),
        "chains are doubly linked": jnp.all(~chained | (comes_after & comes_before)),
        "a chain stays in its segment": jnp.all(
            ~chained | (after == sentinel) | (after // num_slots(pool) == segment)
        ),
        "what was never filled is empty": jnp.all(chained | ~live),
        "cursors are slots": jnp.all(pool.segments[:, CURSOR] < num_slots(pool)),
    }
