"""Pools against a dict-and-list oracle, for each policy; and what batches do to themselves."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.ops import hashing
from kvjax.store import pool as pools
from kvjax.store.pool import NO_SLOT

SLOTS, SEGMENTS, ROWS, UNIVERSE = 3, 2, 4, 7
MOST_ROWS = 5


class Oracle:
    """One segment: a list of slots, each None or [key, entry, rank]."""

    def __init__(self, eviction, num_slots=SLOTS):
        self.eviction, self.slots = eviction, [None] * num_slots
        self.cursor = self.clock = 0

    def find(self, key):
        return next((i for i, s in enumerate(self.slots) if s and s[0] == key), NO_SLOT)

    def touch(self, slot):
        self.clock += 1
        if slot != NO_SLOT:
            self.slots[slot][2] = self.clock

    def add(self, key, entry, priority):
        self.clock += 1
        slot = self.find(key)
        is_new = slot == NO_SLOT
        if is_new and self.eviction == "fifo":
            slot, self.cursor = self.cursor, (self.cursor + 1) % len(self.slots)
        elif is_new and None in self.slots:
            slot = self.slots.index(None)
        elif is_new:
            slot = min(range(len(self.slots)), key=lambda i: self.slots[i][2])
        evicts = is_new and self.slots[slot] is not None
        rank = priority if self.eviction == "priority" else self.clock
        self.slots[slot] = [key, entry, rank]
        return slot, evicts

    def clear(self):
        self.slots, self.cursor = [None] * len(self.slots), 0

    def remove(self, key):
        self.slots = [None if s and s[0] == key else s for s in self.slots]


@jax.jit
@jax.vmap
def keys_of(latent):
    return hashing.latent_key(latent, jnp.int32(0), jnp.uint32(0))


KEYS = np.asarray(keys_of(np.repeat(np.arange(UNIVERSE, dtype=np.float32)[:, None], 2, axis=1)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make(eviction, num_slots=SLOTS, num_segments=SEGMENTS):
    return pools.init(
        jnp.zeros((2,)), num_slots=num_slots, num_segments=num_segments, eviction=eviction
    )


add = jax.jit(pools.add, static_argnames="may_evict")
clear = jax.jit(pools.clear)
touch = jax.jit(pools.touch)
find = jax.jit(jax.vmap(pools.find, in_axes=(None, 0, 0)))
take = jax.jit(pools.take)
check_invariants = jax.jit(pools.check_invariants)


@jax.jit
def look(pool):
    """The invariants, and each key's slot and entry [SEGMENTS, UNIVERSE]."""
    segments = jnp.arange(SEGMENTS)[:, None]
    slots, _ = jax.vmap(lambda s: find(pool, KEYS, jnp.broadcast_to(s, UNIVERSE)))(segments)
    entries = jax.vmap(lambda slot: pools.take(pool, slot))(slots)
    return pools.check_invariants(pool), slots, entries[..., 0]


@jax.jit
def remove_key(pool, key):
    return pools.remove(pool, jnp.all(pool.records[:-1, pools.KEY :] == key, axis=1))


def put(pool, numbers, segments=None, entries=None, valid=None, priorities=None, **options):
    """Adds keys by number; each entry is the number itself unless said.

    Rows that are not valid fill a batch up, so that few programs serve all tests.
    """
    count = len(numbers)

    def filled(rows, dtype):
        return np.pad(np.asarray(rows, dtype), (0, MOST_ROWS - count))

    entries = filled(numbers if entries is None else entries, np.float32)
    segments = filled(np.zeros(count) if segments is None else segments, np.int32)
    valid = filled(np.ones(count) if valid is None else valid, bool)
    if priorities is not None:
        options["priorities"] = filled(priorities, np.float32)
    rows = KEYS[filled(numbers, int)], segments, np.stack([entries, entries], axis=1)
    pool, slots, evicted = add(pool, *rows, valid=valid, **options)
    return pool, np.asarray(slots)[:count], np.asarray(evicted)[:count]


def stored(pool, segment=0):
    """Keys by number in their slots, None for empty."""
    live = np.asarray(pools.is_live(pool))
    numbers = {tuple(k): i for i, k in enumerate(KEYS)}
    held = [
        numbers[tuple(r[pools.KEY :])] if ok else None
        for r, ok in zip(np.asarray(pool.records)[:-1], live, strict=True)
    ]
    size = pools.num_slots(pool)
    return held[segment * size : (segment + 1) * size]


def assert_sound(pool):
    broken = [name for name, holds in check_invariants(pool).items() if not holds]
    assert not broken


def assert_agrees(pool, oracles):
    """It is sound, and each key is found where the oracle has it, with its entry."""
    invariants, slots, found = jax.device_get(look(pool))
    assert not [name for name, holds in invariants.items() if not holds]
    for segment, oracle in enumerate(oracles):
        expected = [oracle.find(i) for i in range(UNIVERSE)]
        globally = [NO_SLOT if s == NO_SLOT else s + segment * SLOTS for s in expected]
        assert slots[segment].tolist() == globally
        entries = [0 if s == NO_SLOT else oracle.slots[s][1] for s in expected]
        assert found[segment].tolist() == entries


row = st.tuples(
    st.integers(0, UNIVERSE - 1),  # key
    st.integers(0, SEGMENTS - 1),  # segment
    st.integers(-2, 2),  # priority, with ties
    st.sampled_from([True, True, True, False]),  # valid
)
operation = st.one_of(
    st.tuples(st.just("add"), st.lists(row, min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("add"), st.lists(row, min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("touch"), st.lists(row, min_size=ROWS, max_size=ROWS)),
    st.tuples(st.sampled_from(["clear", "remove"]), row),
)
EXAMPLES, OPERATIONS = (60 if FULL else 25), 40  # each with ROWS rows, for each policy


@pytest.mark.parametrize("eviction", pools.EVICTIONS)
def test_random_operations_agree_with_the_oracle(eviction):
    done = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(operation, min_size=OPERATIONS, max_size=OPERATIONS), st.booleans())
    def run(operations, is_old):
        nonlocal done
        pool, oracles = make(eviction), [Oracle(eviction) for _ in range(SEGMENTS)]
        pool = aged(pool) if is_old else pool
        for number, (name, argument) in enumerate(operations):
            pool = apply(pool, oracles, name, argument, 10.0 * (number + 1))
            pool = with_last_generations(pool) if is_old else pool
            assert_agrees(pool, oracles)
            done += ROWS

    run()
    assert done >= EXAMPLES * OPERATIONS * ROWS


def aged(pool):
    """As after 50 days: what is counted in 32 bits is about to begin anew."""
    almost = jnp.uint32(2**32 - 2)
    segments = pool.segments.at[:, pools.CLOCK].set(almost)
    return dataclasses.replace(pool, segments=segments.at[:, pools.SEGMENT_ERA.start].set(almost))


@jax.jit
def with_last_generations(pool):
    held = pool.records[:, pools.GENERATION]
    last = jnp.where(held > 0, jnp.uint32(2**32 - 1), 0)
    return dataclasses.replace(pool, records=pool.records.at[:, pools.GENERATION].set(last))


def apply(pool, oracles, name, argument, entry):
    if name == "clear":
        oracles[argument[1]].clear()
        return clear(pool, argument[1])
    if name == "remove":
        for oracle in oracles:
            oracle.remove(argument[0])
        return remove_key(pool, KEYS[argument[0]])
    numbers, segments, priorities, valid = (list(column) for column in zip(*argument, strict=True))
    if name == "touch":
        return apply_touch(pool, oracles, numbers, segments)
    return apply_add(pool, oracles, numbers, segments, priorities, valid, entry)


def apply_touch(pool, oracles, numbers, segments):
    if pool.eviction != "lru":
        return touch(pool, np.full(ROWS, NO_SLOT))
    slots, _ = find(pool, KEYS[numbers], np.asarray(segments))
    for number, segment in zip(numbers, segments, strict=True):
        oracles[segment].touch(oracles[segment].find(number))
    return touch(pool, slots)


def apply_add(pool, oracles, numbers, segments, priorities, valid, entry):
    entries = [entry + i for i in range(ROWS)]
    expected, evicted = [], []
    for i in range(ROWS):
        slot, evicts = NO_SLOT, False
        if valid[i]:
            slot, evicts = oracles[segments[i]].add(numbers[i], entries[i], priorities[i])
        expected.append(slot)
        evicted.append(evicts)
    for i in range(ROWS):  # a slot counts only if the row's key is still there after the batch
        lost = not valid[i] or oracles[segments[i]].find(numbers[i]) != expected[i]
        expected[i] = NO_SLOT if lost else expected[i] + segments[i] * SLOTS
    options = {"valid": np.asarray(valid)}
    if pool.eviction == "priority":
        options["priorities"] = np.asarray(priorities, np.float32)
    pool, slots, went = put(pool, numbers, segments, entries, **options)
    assert slots.tolist() == expected
    assert went.tolist() == evicted
    return pool


def test_fifo_keeps_the_age_of_a_rewritten_key():
    pool = make("fifo", 2)
    for number in (1, 2, 1, 3):
        pool, _, _ = put(pool, [number])
    assert stored(pool) == [3, 2]


def test_a_live_key_is_not_lost():
    """LightZero's ring loses A after A, B, A, C in three slots."""
    pool = make("fifo")
    for number in (0, 1, 0, 2):
        pool, _, _ = put(pool, [number])
    assert stored(pool) == [0, 1, 2]


def test_lru_hits_and_rewrites_refresh():
    pool = make("lru")
    pool, slots, _ = put(pool, [0, 1, 2])
    pool = touch(pool, slots[:1])  # 0 is used
    pool, _, evicted = put(pool, [3])  # 1 is the oldest
    assert stored(pool) == [0, 3, 2]
    assert evicted.tolist() == [True]
    pool, _, _ = put(pool, [2])  # rewritten
    pool, _, _ = put(pool, [4, 5])
    assert stored(pool) == [4, 5, 2]


def test_priority_evicts_the_lowest_first_slot_on_ties():
    pool = make("priority")
    pool, _, _ = put(pool, [0, 1, 2], priorities=jnp.asarray([1.0, -1.0, -1.0]))
    pool, _, _ = put(pool, [3], priorities=jnp.asarray([-5.0]))
    assert stored(pool) == [0, 3, 2]
    pool, _, _ = put(pool, [3], priorities=jnp.asarray([9.0]))  # a rewrite changes the priority
    pool, _, _ = put(pool, [4], priorities=jnp.asarray([0.0]))
    assert stored(pool) == [0, 3, 4]


def test_priorities_of_every_kind_are_ordered():
    values = [-np.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 1.0, 3e38, np.inf]
    order = pools._ordered(jnp.asarray(values, jnp.float32))
    assert (np.diff(np.asarray(order).astype(np.int64)) > 0).all()
    nan, negative_zero = pools._ordered(jnp.asarray([np.nan, -0.0], jnp.float32))
    assert nan == order[0]
    assert negative_zero == order[4]


def test_zeros_of_both_signs_are_a_tie_in_a_compiled_program():
    pool = make("priority", 2)
    pool, _, _ = put(pool, [0, 1], priorities=jnp.asarray([0.0, -0.0]))
    pool, _, _ = put(pool, [2], priorities=jnp.asarray([1.0]))
    assert stored(pool) == [2, 1]


@pytest.mark.parametrize("eviction", pools.EVICTIONS)
def test_without_leave_to_evict_what_has_no_room_is_left_out(eviction):
    pool, ranks = make(eviction, 2), {}
    if eviction == "priority":
        ranks = {"priorities": jnp.arange(4.0)}
    pool, slots, evicted = put(pool, [0, 1, 2, 0], entries=[1, 2, 3, 4], may_evict=False, **ranks)
    assert slots.tolist() == [0, 1, NO_SLOT, 0]
    assert not evicted.any()
    assert stored(pool) == [0, 1]
    assert pool.entries[:, 0].tolist() == [4.0, 2.0, 0.0, 0.0]
    assert_sound(pool)
    pool, slots, evicted = put(pool, [4, 5, 6, 1], **ranks)  # with leave
    assert evicted.any()
    assert_sound(pool)


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
def test_duplicates_in_a_batch_share_a_slot_and_the_last_entry_stays(eviction):
    pool, slots, _ = put(make(eviction), [5, 5, 6, 5], entries=[1, 2, 3, 4])
    assert slots.tolist() == [0, 0, 1, 0]
    assert take(pool, slots)[:, 0].tolist() == [4, 4, 3, 4]
    assert_sound(pool)


def test_more_rows_than_slots_keep_the_last_ones():
    pool, slots, evicted = put(make("fifo"), [0, 1, 2, 3, 4])
    assert stored(pool) == [3, 4, 2]
    assert slots.tolist() == [NO_SLOT, NO_SLOT, 2, 0, 1]
    assert evicted.tolist() == [False] * 3 + [True] * 2
    assert take(pool, slots)[:, 0].tolist() == [0, 0, 2, 3, 4]
    assert_sound(pool)


def test_a_row_may_evict_what_another_row_just_rewrote():
    pool, _, _ = put(make("fifo"), [0, 1, 2])
    pool, slots, evicted = put(pool, [0, 3], entries=[7, 8])
    assert slots.tolist() == [NO_SLOT, 0]  # 0 was rewritten in slot 0, then had to go
    assert evicted.tolist() == [False, True]
    assert take(pool, slots)[:, 0].tolist() == [0, 8]
    assert_sound(pool)


def test_a_key_evicted_and_stored_again_in_one_batch():
    pool, _, _ = put(make("fifo", 1), [0])
    pool, slots, _ = put(pool, [1, 0, 1, 1], entries=[2, 3, 4, 5])
    assert stored(pool) == [1]
    assert slots.tolist() == [0, NO_SLOT, 0, 0]
    assert take(pool, slots)[:, 0].tolist() == [5, 0, 5, 5]
    assert_sound(pool)


def test_segments_do_not_see_each_other():
    pool, slots, _ = put(make("fifo"), [1, 1], segments=[0, 1], entries=[10, 20])
    assert slots.tolist() == [0, SLOTS]
    assert take(pool, slots)[:, 0].tolist() == [10, 20]
    cleared = clear(pool, 0)
    assert stored(cleared, 0) == [None] * 3
    assert stored(cleared, 1) == [1, None, None]


@pytest.mark.parametrize("segment", [-1, SEGMENTS, 10**6])
def test_a_segment_out_of_range_stores_nothing(segment):
    before = put(make("fifo"), [0, 1, 2], segments=[0, 1, 1])[0]
    after, slots, evicted = put(before, [3], segments=[segment])
    assert slots.tolist() == [NO_SLOT]
    assert evicted.tolist() == [False]
    assert [stored(after, s) for s in (0, 1)] == [stored(before, s) for s in (0, 1)]
    assert_sound(after)


def test_the_pool_passed_in_is_unchanged():
    before = put(make("fifo"), [0, 1])[0]
    copy = jax.tree.map(np.array, before)
    put(before, [2, 3])
    clear(before)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, before), copy)


def test_jit_equals_no_jit():
    jitted, plain = make("lru"), make("lru")
    for numbers in ([0, 1, 0], [2, 3, 4], [1, 1, 5]):
        jitted, slots, _ = put(jitted, numbers)
        with jax.disable_jit():
            plain, plain_slots, _ = put(plain, numbers)
        np.testing.assert_array_equal(slots, plain_slots)
    sentinel = pools.total_slots(plain)
    for name in ("heads", "segments", "entries"):
        np.testing.assert_array_equal(getattr(jitted, name)[:-1], getattr(plain, name)[:-1])
    np.testing.assert_array_equal(jitted.records[:sentinel], plain.records[:sentinel])


@functools.cache
def keys_of_one_bucket():
    """Two real keys whose 32-bit buckets are equal: about 12 pairs among 300,000."""
    keys = keys_of(np.random.default_rng(0).normal(size=(300_000, 2)).astype(np.float32))
    buckets = np.asarray(jax.jit(jax.vmap(hashing.bucket))(keys))
    order = np.argsort(buckets)
    equal = np.flatnonzero(np.diff(buckets[order]) == 0)
    assert 0 < len(equal) < 50
    return np.asarray(keys)[order[equal[0] : equal[0] + 2]]


def test_a_false_match_is_a_miss_and_is_told():
    one, other = keys_of_one_bucket()
    zero = jnp.zeros(1, jnp.int32)
    pool, _, _ = add(make("fifo"), jnp.asarray([one]), zero, jnp.ones((1, 2)))
    slots, false_match = find(pool, jnp.asarray([one, other, KEYS[0]]), jnp.zeros(3, jnp.int32))
    assert slots.tolist() == [0, NO_SLOT, NO_SLOT]
    assert false_match.tolist() == [False, True, False]
    pool, slots, _ = add(pool, jnp.asarray([other]), zero, jnp.full((1, 2), 2.0))
    assert slots.tolist() == [1]
    slots, false_match = find(pool, jnp.asarray([one, other]), jnp.zeros(2, jnp.int32))
    assert slots.tolist() == [0, 1]
    assert take(pool, slots)[:, 0].tolist() == [1, 2]
    assert_sound(pool)


def test_long_chains():
    """Hundreds of keys through few buckets: every one is found, none is invented."""
    rng = np.random.default_rng(0)
    pool = make("fifo", 64, 1)
    keys = rng.integers(2**32, size=(640, hashing.KEY_LANES), dtype=np.uint32)
    for batch in keys.reshape(20, 32, -1):
        pool, slots, _ = add(pool, batch, jnp.zeros(32, jnp.int32), jnp.ones((32, 2)))
        assert (np.asarray(slots) >= 0).all()
    assert_sound(pool)
    slots, _ = jax.jit(jax.vmap(pools.find, in_axes=(None, 0, None)))(pool, keys, 0)
    assert (np.asarray(slots) >= 0).tolist() == [False] * 576 + [True] * 64


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: dataclasses.replace(p, heads=p.heads.at[:].set(pools.total_slots(p))),
        lambda p: dataclasses.replace(p, records=p.records.at[0, pools.KEY].add(1)),
        lambda p: dataclasses.replace(p, records=p.records.at[0, pools.NEXT].set(1)),
        lambda p: dataclasses.replace(p, records=p.records.at[1].set(p.records[0])),
        lambda p: dataclasses.replace(p, segments=p.segments.at[0, pools.CURSOR].set(99)),
        lambda p: dataclasses.replace(p, records=p.records.at[0, pools.GENERATION].set(0)),
        lambda p: dataclasses.replace(p, records=p.records.at[0, pools.BUCKET].add(1)),
    ],
)
def test_invariants_notice_damage(damage):
    pool, _, _ = put(make("fifo"), [0, 1, 2, 3], segments=[0, 0, 1, 1])
    assert_sound(pool)
    assert not all(bool(holds) for holds in check_invariants(damage(pool)).values())


@pytest.mark.optimised
@pytest.mark.parametrize("num_slots", [2000, 20_000])
def test_add_and_find_copy_no_table(num_slots):
    entry = jnp.zeros((5, 2, 2, 2, 32))
    pool = pools.init(entry, num_slots=num_slots)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    rows = (jnp.zeros((8, 6), jnp.uint32), jnp.zeros(8, jnp.int32), jnp.zeros((8, *entry.shape)))
    compiled = jax.jit(pools.add, donate_argnums=0).lower(pool, *rows).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < min(size / 20, 100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 0}, "num_slots must be a positive integer, got 0"),
        ({"num_segments": 0}, "num_segments must be a positive integer, got 0"),
        ({"eviction": "random"}, "eviction must be one of fifo, lru, priority, got 'random'"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        pools.init(jnp.zeros(2), **({"num_slots": 2} | change))


def test_bad_batches():
    pool, zero = make("fifo"), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=r"keys must have shape \[B, 6\], got \[1, 5\]"):
        add(pool, jnp.zeros((1, 5), jnp.uint32), zero, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"entries must have shape \[1, 2\], got \[1, 3\]"):
        add(pool, jnp.zeros((1, 6), jnp.uint32), zero, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="the pool holds float32, got entries of bfloat16"):
        add(pool, jnp.zeros((1, 6), jnp.uint32), zero, jnp.zeros((1, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match="priorities go with eviction 'priority', this is 'fifo'"):
        put(pool, [0], priorities=jnp.zeros(1))
    with pytest.raises(ValueError, match="this is 'priority'"):
        put(make("priority"), [0])
