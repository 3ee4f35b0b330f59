"""The drop-in manager against LightZero main's rules in plain Python; aliasing; bad input."""

import copy
import enum
import logging
import types

import numpy as np
import pytest
from conftest import in_full

from kvjax.lightzero import KVCacheManager
from kvjax.lightzero.manager import KVCachePool
from kvjax.tools.bench import lightzero_020

torch = pytest.importorskip("torch")
pytest.importorskip("lzero")

KeysValues = lightzero_020._load("lzero.model.unizero_world_models.kv_caching").KeysValues

LAYERS, HEADS, SLOTS, WIDTH = 2, 2, 6, 8
BIG = 2**64 - 1  # the largest xxh64


def filled(number, size=3, dtype=torch.float32, layers=LAYERS, slots=SLOTS):
    """LightZero's own class, every tensor random and different."""
    value = KeysValues(1, HEADS, slots, WIDTH, layers, torch.device("cpu"))
    generator = torch.Generator().manual_seed(number)
    for layer in value._keys_values:
        for cache in (layer._k_cache, layer._v_cache):
            cache._cache = torch.randn(cache._cache.shape, generator=generator).to(dtype)
            cache._size = size
    return value


def content(value):
    """All that a `KeysValues` holds, copied."""
    if value is None:
        return None
    caches = [c for layer in value._keys_values for c in (layer._k_cache, layer._v_cache)]
    return [c._size for c in caches], [c._cache.clone() for c in caches]


def assert_same(found, expected):
    if expected is None:
        assert found is None
        return
    assert found is not None
    sizes, tensors = content(found)
    assert sizes == expected[0]
    for ours, theirs in zip(tensors, expected[1], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


class Oracle:
    """One pool by LightZero main's rules: a list of slots, each None or [key, content, rank]."""

    def __init__(self, size, eviction="fifo"):
        self.slots, self.eviction = [None] * size, eviction
        self.cursor = self.clock = self.hits = self.misses = self.evictions = 0

    def find(self, key):
        return next((i for i, s in enumerate(self.slots) if s and s[0] == key), None)

    def get(self, key):
        slot = self.find(key)
        if slot is None:
            self.misses += 1
            return None
        self.hits += 1
        self.clock += 1
        if self.eviction == "lru":
            self.slots[slot][2] = self.clock
        return self.slots[slot][1]

    def set(self, key, value, priority=None):
        self.clock += 1
        slot = self.find(key)
        is_new = slot is None
        if is_new and self.eviction == "fifo":
            slot, self.cursor = self.cursor, (self.cursor + 1) % len(self.slots)
        elif is_new and None in self.slots:
            slot = self.slots.index(None)
        elif is_new:
            slot = min(range(len(self.slots)), key=lambda i: self.slots[i][2])
        self.evictions += is_new and self.slots[slot] is not None
        self.slots[slot] = [key, value, self.clock if priority is None else priority]
        return slot

    def clear(self):
        self.slots, self.cursor = [None] * len(self.slots), 0

    def index(self):
        return {s[0]: i for i, s in enumerate(self.slots) if s}

    def counters(self):
        return self.hits, self.misses, self.evictions, self.hits + self.misses


def counters(pool):
    stats = pool.stats
    return stats.hits, stats.misses, stats.evictions, stats.total_queries


KEYS = (0, 1, 2, -1, 1 << 63, BIG, BIG ^ 1, -(1 << 63), (1 << 100) + 1, -BIG)


@pytest.mark.parametrize("eviction", ["fifo", "lru", "priority"])
@pytest.mark.parametrize("seed", [0, *in_full(1)])
def test_a_pool_follows_the_rules(eviction, seed):
    rng = np.random.default_rng(seed)
    pool, oracle = KVCachePool(4, eviction), Oracle(4, eviction)
    for number in range(250):
        key = KEYS[rng.integers(len(KEYS))]
        operation = rng.choice(["get", "set", "clear"], p=[0.48, 0.5, 0.02])
        if operation == "clear":
            pool.clear()
            oracle.clear()
        elif operation == "get":
            assert_same(pool.get(key), oracle.get(key))
        else:
            value = filled(number, size=int(rng.integers(SLOTS)))
            rank = float(rng.integers(5)) if eviction == "priority" else None
            assert pool.set(key, value, rank) == oracle.set(key, content(value), rank)
        assert pool._key_to_index == oracle.index()
        assert len(pool) == len(oracle.index())
    assert counters(pool) == oracle.counters()
    assert oracle.evictions > 20


def test_rewriting_gives_no_new_age():
    pool = KVCachePool(2)
    for key in (1, 2, 1, 3):
        pool.set(key, filled(key))
    assert set(pool._key_to_index) == {2, 3}


def test_least_recently_used_by_hits_and_rewrites():
    pool = KVCachePool(2, "lru")
    for key in (1, 2):
        pool.set(key, filled(key))
    pool.get(1)
    pool.set(3, filled(3))
    assert set(pool._key_to_index) == {1, 3}


def test_the_lowest_priority_goes():
    pool = KVCachePool(2, "priority")
    pool.set(1, filled(1), priority=5.0)
    pool.set(2, filled(2))
    pool.set(3, filled(3), priority=-1.0)
    assert set(pool._key_to_index) == {1, 3}


class Strategy(enum.Enum):
    LRU = "lru"


def test_an_enumeration_names_the_strategy():
    assert KVCachePool(2, Strategy.LRU).eviction_strategy == "lru"


CONFIG = types.SimpleNamespace(num_simulations=2, max_cache_size=3)


def test_managers_follow_the_rules_of_both_levels():
    rng = np.random.default_rng(5)
    manager = KVCacheManager(CONFIG, 2)
    init, recur, wm = [Oracle(3), Oracle(3)], Oracle(4), Oracle(2)
    for number in range(300):
        env, key = int(rng.integers(2)), KEYS[rng.integers(len(KEYS))]
        value = filled(number)
        match int(rng.integers(10)):
            case 0 | 1:
                slot = init[env].set(key, content(value))
                assert manager.set_init_cache(env_id=env, cache_key=key, kv_cache=value) == slot
            case 2 | 3:
                slot = recur.set(key, content(value))
                assert manager.set_recur_cache(cache_key=key, kv_cache=value) == slot
            case 4:
                assert manager.set_wm_cache(key, value) == wm.set(key, content(value))
            case 5:
                assert_same(manager.get_wm_cache(key), wm.get(key))
            case 6:
                assert_same(
                    manager.hierarchical_get(env, key), init[env].get(key) or recur.get(key)
                )
            case 7:
                expected = init[env].get(key)
                found = manager.retrieve_cache_hierarchical(env, key, check_recur=False)
                assert_same(found, expected)
            case 8:
                assert_same(manager.get_recur_cache(key), recur.get(key))
            case _:
                assert_same(manager.get_init_cache(env, key), init[env].get(key))
        if number % 40 == 39:
            manager.clear_recur_cache()
            recur.clear()
        if number % 60 == 59:
            manager.init_pools[1].clear()
            init[1].clear()
    oracles = [*init, recur, wm]
    for pool, oracle in zip(
        (*manager.init_pools, manager.recur_pool, manager.wm_pool), oracles, strict=True
    ):
        assert pool._key_to_index == oracle.index()
        assert counters(pool) == oracle.counters()
    summary = manager.get_stats_summary()
    assert summary["stats_enabled"]
    hits, misses, evictions, queries = recur.counters()
    assert summary["recur_pool"] == (
        f"CacheStats(hits={hits}, misses={misses}, evictions={evictions},"
        f" hit_rate={hits / queries:.2%})"
    )
    assert summary["init_pools"]["env_1"] == str(manager.init_pools[1].stats)
    assert summary["wm_pool"] == str(manager.wm_pool.stats)


def test_a_hit_in_the_second_level_is_a_miss_of_the_first():
    manager = KVCacheManager(CONFIG, 2)
    manager.set_recur_cache(7, filled(7))
    assert_same(manager.retrieve_cache_hierarchical(1, 7), content(filled(7)))
    assert counters(manager.init_pools[1]) == (0, 1, 0, 1)
    assert counters(manager.recur_pool) == (1, 0, 0, 1)
    assert manager.init_pools[1].stats.miss_rate == 1.0
    assert manager.init_pools[0].stats.hit_rate == 0.0


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({}, (256, 150, 3)),
        ({"num_simulations": 200}, (400, 600, 3)),
        ({"num_simulations": 25, "max_cache_size": 20}, (20, 75, 3)),
        ({"num_simulations": 3000}, (5000, 9000, 3)),
    ],
)
def test_sizes_of_the_pools(config, sizes):
    manager = KVCacheManager(types.SimpleNamespace(**config), 3)
    pools = (manager.init_pools[2], manager.recur_pool, manager.wm_pool)
    assert tuple(pool.pool_size for pool in pools) == sizes
    assert len(manager.init_pools) == 3


def test_clearing():
    manager = KVCacheManager(CONFIG, 2)
    lists = manager.keys_values_wm_list, manager.keys_values_wm_size_list

    def fill():
        for env in range(2):
            manager.set_init_cache(env, 1, filled(1))
        manager.set_recur_cache(1, filled(1))
        manager.set_wm_cache(1, filled(1))
        manager.keys_values_wm_list.append(filled(1))
        manager.keys_values_wm_size_list.append(3)

    def lengths():
        return [len(p) for p in (*manager.init_pools, manager.recur_pool, manager.wm_pool)]

    fill()
    manager.init_pools[0].clear()
    assert lengths() == [0, 1, 1, 1]
    manager.clear_recur_cache()
    assert lengths() == [0, 1, 0, 1]
    fill()
    manager.clear_init_caches()
    assert lengths() == [0, 0, 1, 1]
    manager.get_recur_cache(1)
    manager.clear_all()
    assert lengths() == [0, 0, 0, 0]
    assert lists == ([], [])
    assert lists[0] is manager.keys_values_wm_list
    assert manager.recur_pool.stats.hits == 1  # the statistics survive
    manager.reset_stats()
    assert counters(manager.recur_pool) == (0, 0, 0, 0)
    assert manager.get_recur_cache(1) is None
    assert manager.set_recur_cache(9, filled(9)) == 0  # the ring starts again


def test_a_cleared_pool_takes_caches_of_another_layout():
    pool = KVCachePool(2)
    pool.set(1, filled(1))
    with pytest.raises(ValueError, match=r"holds 2 layers .*got 3 layers .*clear it first"):
        pool.set(2, filled(2, layers=3))
    pool.clear()
    pool.set(2, filled(2, layers=3, slots=4))
    assert_same(pool.get(2), content(filled(2, layers=3, slots=4)))
    assert pool.get(1) is None


def test_neither_side_sees_later_writes_of_the_other():
    pool, value = KVCachePool(2), filled(1)
    expected = content(value)
    pool.set(1, value)
    value._keys_values[0]._k_cache._cache.zero_()
    value._keys_values[0]._k_cache._size = 1
    first = pool.get(1)
    assert_same(first, expected)
    for layer in first._keys_values:
        layer._v_cache._cache.add_(1.0)
        layer._v_cache._size = 0
    first._keys_values[0]._k_cache._cache = torch.zeros(1)
    second = pool.get(1)
    assert_same(second, expected)
    pool.set(1, filled(8))
    pool.set(2, filled(9))
    assert_same(second, expected)
    pool.clear()
    pool.set(3, filled(10))
    assert_same(second, expected)


def test_what_comes_out_is_lightzeros_own_and_works():
    pool = KVCachePool(2)
    pool.set(1, filled(1, size=3))
    found = pool.get(1)
    assert isinstance(found, KeysValues)
    assert (len(found), found.size) == (LAYERS, 3)
    token = torch.ones(1, HEADS, 1, WIDTH // HEADS)
    found[0].update(token, 2 * token)
    keys, values = found[0].get()
    assert keys.shape == (1, HEADS, 4, WIDTH // HEADS)
    assert torch.equal(values[:, :, 3:], 2 * token)
    found.reset()
    assert found.size == 0
    assert_same(pool.get(1), content(filled(1, size=3)))


def test_two_empty_objects_of_a_pool_share_nothing():
    pool = KVCachePool(2)
    pool.set(1, filled(1, size=0))
    one, two = pool.get(1), pool.get(1)
    one[1].update(torch.ones(1, HEADS, 1, 4), torch.ones(1, HEADS, 1, 4))
    assert (one[1].shape[2], two[1].shape[2]) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_bit_for_bit(dtype):
    pool, value = KVCachePool(2), filled(1, dtype=dtype)
    value._keys_values[1]._k_cache._cache[0, 0, 0, :3] = torch.tensor([np.nan, -0.0, np.inf])
    pool.set(1, value)
    sizes, tensors = content(value)
    found = content(pool.get(1))
    assert found[0] == sizes
    for ours, theirs in zip(found[1], tensors, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_strided_tensors_that_require_gradients():
    value = filled(1)
    strided = torch.randn(1, SLOTS, HEADS, WIDTH // HEADS, requires_grad=True).transpose(1, 2)
    value._keys_values[0]._k_cache._cache = strided
    pool = KVCachePool(2)
    pool.set(1, value)
    found = pool.get(1)._keys_values[0]._k_cache._cache
    assert torch.equal(found, strided.detach())
    assert not found.requires_grad


def test_a_copy_of_a_manager_goes_its_own_way():
    manager = KVCacheManager(CONFIG, 1)
    manager.set_recur_cache(1, filled(1))
    twin = copy.deepcopy(manager)
    manager.set_recur_cache(1, filled(2))
    twin.set_recur_cache(3, filled(3))
    assert_same(twin.get_recur_cache(1), content(filled(1)))
    assert_same(manager.get_recur_cache(1), content(filled(2)))
    assert manager.get_recur_cache(3) is None


def test_integers_of_any_kind_are_keys():
    pool = KVCachePool(8)
    pool.set(np.int64(-5), filled(1))
    pool.set(torch.tensor(7), filled(2))
    assert_same(pool.get(-5), content(filled(1)))
    assert_same(pool.get(7), content(filled(2)))
    assert pool.get(5) is None
    assert pool.get((1 << 64) - 5) is None  # no two's complement


def test_without_statistics():
    manager = KVCacheManager(CONFIG, 1, enable_stats=False)
    manager.set_recur_cache(1, filled(1))
    assert manager.get_recur_cache(1) is not None
    assert manager.recur_pool.stats is None
    assert manager.get_stats_summary() == {"stats_enabled": False}
    manager.reset_stats()


def test_manager_with_priorities():
    manager = KVCacheManager(types.SimpleNamespace(num_simulations=2), 1, eviction="priority")
    manager.set_recur_cache(1, filled(1), priority=2.0)
    manager.set_recur_cache(2, filled(2), priority=1.0)
    manager.set_recur_cache(3, filled(3))
    assert set(manager.recur_pool._key_to_index) == {1, 3}
    manager.set_init_cache(0, 1, filled(1), priority=1.0)
    manager.set_wm_cache(1, filled(1), priority=1.0)


def test_clearings_are_logged_now_and_then(caplog):
    manager = KVCacheManager(CONFIG, 1, clear_recur_log_freq=2, clear_all_log_freq=0)
    with caplog.at_level(logging.INFO, "kvjax"):
        for _ in range(4):
            manager.clear_recur_cache()
            manager.clear_all()
    assert [record.getMessage() for record in caplog.records] == [
        f"cleared the recurrent cache {count} times" for count in (2, 4)
    ]


@pytest.mark.parametrize("eviction", ["fifo", "lru", "priority"])
@pytest.mark.parametrize("enable_stats", [True, False])
def test_a_search_that_is_larger_than_its_pool_is_told_once(caplog, eviction, enable_stats):
    """And loses what LightZero's own would; full pools of roots are nothing to tell."""
    config = types.SimpleNamespace(num_simulations=2, max_cache_size=1)
    manager = KVCacheManager(config, 2, enable_stats, eviction=eviction)
    for key in range(4):
        manager.set_recur_cache(key, filled(key))
        manager.set_init_cache(0, key, filled(key))
        manager.set_wm_cache(key, filled(key))
    manager.set_recur_cache(0, filled(9))
    manager.clear_recur_cache()
    manager.set_recur_cache(0, filled(0))
    assert caplog.records == []
    for key in range(1, 7):
        manager.set_recur_cache(key, filled(key))
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert "is full with 4 nodes and drops some of the running search" in told.getMessage()
    assert len(manager.recur_pool) == 4


def test_representations():
    manager = KVCacheManager(CONFIG, 2)
    manager.set_init_cache(1, 1, filled(1))
    assert repr(manager) == (
        "KVCacheManager(env_num=2, init_caches=[0, 1], recur_cache=0/4, wm_cache=0/2)"
    )
    assert repr(manager.init_pools[1]) == (
        "KVCachePool(name='init_env1', size=1/3, strategy=fifo,"
        " CacheStats(hits=0, misses=0, evictions=0, hit_rate=0.00%))"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.get_init_cache(2, 1), r"env_id must be in 0 .. 1, got 2"),
        (lambda m: m.set_init_cache(-1, 1, filled(1)), r"env_id must be in 0 .. 1, got -1"),
        (lambda m: m.hierarchical_get(1.5, 1), "env_id must be an integer, got 1.5"),
        (lambda m: m.get_recur_cache("ab12"), "cache_key must be an integer, got 'ab12'"),
        (lambda m: m.get_recur_cache(None), "cache_key must be an integer, got None"),
        (lambda m: m.get_recur_cache(-(1 << 128)), r"0 .. 2\*\*128 - 1"),
        (lambda m: m.set_recur_cache(1, None), "expected LightZero's KeysValues.*got NoneType"),
        (lambda m: m.set_recur_cache(1, torch.zeros(2)), "expected LightZero's KeysValues"),
        (
            lambda m: m.set_recur_cache(1, types.SimpleNamespace(_keys_values=())),
            "expected LightZero's KeysValues",
        ),
        (
            lambda m: m.set_recur_cache(1, filled(1), priority=1.0),
            "priorities go with eviction 'priority', this is 'fifo'",
        ),
    ],
)
def test_bad_input(call, message):
    manager = KVCacheManager(CONFIG, 2)
    with pytest.raises(ValueError, match=message):
        call(manager)
    assert counters(manager.recur_pool) == (0, 0, 0, 0)


def test_layers_that_differ():
    value = filled(1)
    value._keys_values[1]._v_cache._cache = torch.zeros(1, HEADS, SLOTS + 1, WIDTH // HEADS)
    with pytest.raises(ValueError, match="layers differ: "):
        KVCachePool(2).set(1, value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVCachePool(0), "pool_size must be positive, got 0"),
        (lambda: KVCachePool(2.0), "pool_size must be an integer, got 2.0"),
        (lambda: KVCachePool(2, "random"), "eviction_strategy must be one of fifo, lru, priority"),
        (lambda: KVCacheManager(CONFIG, 0), "env_num must be positive, got 0"),
        (lambda: KVCacheManager(CONFIG, "8"), "env_num must be an integer, got '8'"),
        (
            lambda: KVCacheManager(types.SimpleNamespace(num_simulations=0), 2),
            "pool_size must be positive, got 0",
        ),
        (lambda: KVCacheManager(CONFIG, 2, eviction="mru"), "eviction_strategy must be one of"),
    ],
)
def test_bad_configuration(make, message):
    with pytest.raises(ValueError, match=message):
        make()
