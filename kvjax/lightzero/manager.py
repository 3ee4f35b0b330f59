"""A drop-in for LightZero main's `KVCacheManager`, on kvjax's pools.

`world_model.kv_cache_manager = KVCacheManager(world_model.config, world_model.env_num)` is all that
a world model of LightZero's main branch needs.
"""

import functools
import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import interrupts
from kvjax.base.values import require, require_one_of
from kvjax.lightzero import keys_values
from kvjax.lightzero.keys_values import KeysValues
from kvjax.ops import hashing
from kvjax.store import pool as pools
from kvjax.store.pool import Pool

Array = np.ndarray[Any, Any]

_DEFAULT_SIMULATIONS, _DEFAULT_MOST_SLOTS, _LEAST_INIT_SLOTS = 50, 5000, 256
_SEGMENT = 0
_SIGN_LANE = hashing.EPOCH_LANE

_log = logging.getLogger(__name__)

_add = jax.jit(pools.add, donate_argnames=("pool",))
_touch = jax.jit(pools.touch, donate_argnames=("pool",))


@jax.jit
def _find_and_take(pool: Pool, key: jax.Array) -> tuple[jax.Array, Any]:
    slot, _ = pools.find(pool, key, jnp.int32(_SEGMENT))
    return slot, jax.tree.map(lambda rows: rows[0], pools.take(pool, slot[None]))


class KVCacheManager:
    """All caches of one world model, in the place of LightZero main's class of that name.

    `init_pools`, one per environment, keep root steps; `recur_pool`, shared, keeps the nodes of a
    search; `wm_pool` is at the caller's disposal. As LightZero's they have the sizes that the
    configuration says: a search that makes more simulations loses its own nodes, which a warning in
    the log tells the first time. `keys_values_wm_list` and `keys_values_wm_size_list` are lists
    that the world model uses as it likes.

    Args:
      config: the world model's configuration; `num_simulations` (50 by default) and
        `max_cache_size` (5000) are read from it.
      env_num: environments.
      enable_stats: whether the pools count hits, misses and evictions.
      clear_recur_log_freq: log every that many clearings of the recurrent pool; 0 for never.
      clear_all_log_freq: the same, of all pools.
      eviction: what a full pool does, see `KVCachePool`; LightZero's own is always "fifo".

    Raises:
      ValueError: a size that is no positive integer, or an unknown strategy.
    """

    def __init__(
        self,
        config: Any,
        env_num: int,
        enable_stats: bool = True,
        clear_recur_log_freq: int = 1000,
        clear_all_log_freq: int = 100,
        *,
        eviction: Any = "fifo",
    ) -> None:
        self.config, self.env_num = config, _as_integer("env_num", env_num)
        require(self.env_num >= 1, f"env_num must be positive, got {env_num}")
        self.enable_stats = enable_stats
        self.clear_recur_log_freq = clear_recur_log_freq
        self.clear_all_log_freq = clear_all_log_freq
        self._clear_recur_counter = self._clear_all_counter = 0
        simulations = int(getattr(config, "num_simulations", _DEFAULT_SIMULATIONS))
        most = int(getattr(config, "max_cache_size", _DEFAULT_MOST_SLOTS))
        init_size = min(most, max(_LEAST_INIT_SLOTS, 2 * simulations))
        make = functools.partial(KVCachePool, eviction_strategy=eviction, enable_stats=enable_stats)
        self.init_pools = [make(init_size, name=f"init_env{env}") for env in range(self.env_num)]
        self.recur_pool = make(
            simulations * self.env_num, name="recurrent", on_eviction=_tell_of_lost_nodes
        )
        self.wm_pool = make(self.env_num, name="world_model")
        self.keys_values_wm_list: list[KeysValues] = []
        self.keys_values_wm_size_list: list[int] = []

    def _init_pool(self, env_id: int) -> "KVCachePool":
        env = _as_integer("env_id", env_id)
        require(0 <= env < self.env_num, f"env_id must be in 0 .. {self.env_num - 1}, got {env_id}")
        return self.init_pools[env]

    def get_init_cache(self, env_id: int, cache_key: int) -> KeysValues | None:
        """What an environment's init pool holds under a key, or None; see `KVCachePool.get`."""
        return self._init_pool(env_id).get(cache_key)

    def set_init_cache(
        self, env_id: int, cache_key: int, kv_cache: KeysValues, priority: float | None = None
    ) -> int:
        """Stores a copy in an environment's init pool; see `KVCachePool.set`."""
        return self._init_pool(env_id).set(cache_key, kv_cache, priority)

    def get_recur_cache(self, cache_key: int) -> KeysValues | None:
        """What the recurrent pool holds under a key, or None; see `KVCachePool.get`."""
        return self.recur_pool.get(cache_key)

    def set_recur_cache(
        self, cache_key: int, kv_cache: KeysValues, priority: float | None = None
    ) -> int:
        """Stores a copy in the recurrent pool; see `KVCachePool.set`."""
        return self.recur_pool.set(cache_key, kv_cache, priority)

    def get_wm_cache(self, cache_key: int) -> KeysValues | None:
        """What the world-model pool holds under a key, or None; see `KVCachePool.get`."""
        return self.wm_pool.get(cache_key)

    def set_wm_cache(
        self, cache_key: int, kv_cache: KeysValues, priority: float | None = None
    ) -> int:
        """Stores a copy in the world-model pool; see `KVCachePool.set`."""
        return self.wm_pool.set(cache_key, kv_cache, priority)

    def retrieve_cache_hierarchical(
        self, env_id: int, cache_key: int, check_recur: bool = True
    ) -> KeysValues | None:
        """Looks into the environment's init pool and then, if asked to, into the recurrent pool.

        A hit in the second counts as a miss of the first as well.
        """
        found = self.get_init_cache(env_id, cache_key)
        return self.get_recur_cache(cache_key) if found is None and check_recur else found

    def hierarchical_get(self, env_id: int, cache_key: int) -> KeysValues | None:
        """The two-level lookup, as LightZero calls it."""
        return self.retrieve_cache_hierarchical(env_id, cache_key)

    def clear_init_caches(self) -> None:
        """Empties the init pools."""
        for pool in self.init_pools:
            pool.clear()

    def clear_recur_cache(self) -> None:
        """Empties the recurrent pool."""
        self.recur_pool.clear()
        self._clear_recur_counter += 1
        _log_every(self.clear_recur_log_freq, self._clear_recur_counter, "recurrent cache")

    def clear_all(self) -> None:
        """Empties all pools and both lists."""
        for pool in self._pools:
            pool.clear()
        self.keys_values_wm_list.clear()
        self.keys_values_wm_size_list.clear()
        self._clear_all_counter += 1
        _log_every(self.clear_all_log_freq, self._clear_all_counter, "all caches")

    def get_stats_summary(self) -> dict[str, Any]:
        """Each pool's statistics as text: `init_pools` by environment, `recur_pool`, `wm_pool`."""
        if not self.enable_stats:
            return {"stats_enabled": False}
        return {
            "stats_enabled": True,
            "init_pools": {f"env_{i}": str(pool.stats) for i, pool in enumerate(self.init_pools)},
            "recur_pool": str(self.recur_pool.stats),
            "wm_pool": str(self.wm_pool.stats),
        }

    def reset_stats(self) -> None:
        """Sets all counters to zero; the pools keep what they hold."""
        for pool in self._pools:
            if pool.stats is not None:
                pool.stats.reset()

    @property
    def _pools(self) -> list["KVCachePool"]:
        return [*self.init_pools, self.recur_pool, self.wm_pool]

    def __repr__(self) -> str:
        return (
            f"KVCacheManager(env_num={self.env_num},"
            f" init_caches={[len(pool) for pool in self.init_pools]},"
            f" recur_cache={len(self.recur_pool)}/{self.recur_pool.pool_size},"
            f" wm_cache={len(self.wm_pool)}/{self.wm_pool.pool_size})"
        )


class CacheStats:
    """Counters of one pool: `hits`, `misses`, `evictions` and `total_queries`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets all counters to zero."""
        self.hits = self.misses = self.evictions = self.total_queries = 0

    @property
    def hit_rate(self) -> float:
        """Share of the queries that hit, 0 before the first."""
        return self.hits / max(self.total_queries, 1)

    @property
    def miss_rate(self) -> float:
        """What is left of 1."""
        return 1.0 - self.hit_rate

    def __repr__(self) -> str:
        return (
            f"CacheStats(hits={self.hits}, misses={self.misses}, evictions={self.evictions},"
            f" hit_rate={self.hit_rate:.2%})"
        )


class KVCachePool:
    """A fixed number of slots that hold `KeysValues` by integer keys, which are compared in full.

    Memory is allocated when the first one is stored, since only then its size is known.

    Args:
      pool_size: slots.
      eviction_strategy: "fifo" (a rewrite keeps the age), "lru" (a hit and a rewrite refresh it) or
        "priority" (the lowest goes first); LightZero's enumeration of these is taken as well.
      enable_stats: whether `stats` counts; it is None otherwise.
      name: for messages.
      on_eviction: called once, the first time that an entry has to go.

    Raises:
      ValueError: a size that is no positive integer, or an unknown strategy.
    """

    def __init__(
        self,
        pool_size: int,
        eviction_strategy: Any = "fifo",
        enable_stats: bool = True,
        name: str = "default",
        *,
        on_eviction: Callable[["KVCachePool"], None] | None = None,
    ) -> None:
        self.pool_size, self.name = _as_integer("pool_size", pool_size), name
        require(self.pool_size >= 1, f"pool_size must be positive, got {pool_size}")
        self.eviction_strategy = getattr(eviction_strategy, "value", eviction_strategy)
        require_one_of("eviction_strategy", self.eviction_strategy, pools.EVICTIONS)
        self.enable_stats, self._on_eviction = enable_stats, on_eviction
        self.stats = CacheStats() if enable_stats else None
        self._pool: Pool | None = None
        self._layout: keys_values.Layout | None = None
        self._skeleton: KeysValues = None

    def get(self, cache_key: int) -> KeysValues | None:
        """The stored value in memory of its own, or None.

        Raises:
          ValueError: the key is no integer of at most 128 bits.
        """
        found = self._look_up(_lanes(cache_key))
        if self.stats is not None:
            self.stats.total_queries += 1
            self.stats.hits += found is not None
            self.stats.misses += found is None
        return found

    def _look_up(self, lanes: Array) -> KeysValues | None:
        if self._pool is None or self._layout is None:
            return None
        slot, (words, sizes) = _find_and_take(self._pool, lanes)
        if int(slot) == pools.NO_SLOT:
            return None
        if self.eviction_strategy == "lru":
            with interrupts.held():
                self._pool = _touch(self._pool, slot[None])
        words, sizes = np.asarray(words), np.asarray(sizes)
        return keys_values.unpack(self._skeleton, self._layout, words, sizes)

    def set(self, cache_key: int, kv_cache: KeysValues, priority: float | None = None) -> int:
        """Stores a copy and returns its slot.

        Args:
          cache_key: rewriting a stored key keeps its slot.
          priority: with the "priority" strategy and only with it; 0 by default.

        Raises:
          ValueError: the key is no integer of at most 128 bits, the value is no `KeysValues` or has
            another layout than the pool's, or a priority that the strategy does not know.
        """
        lanes, (words, sizes) = _lanes(cache_key), self._admit(kv_cache)
        if self.eviction_strategy == "priority":
            priority = 0.0 if priority is None else priority
        ranks = None if priority is None else np.asarray([priority], np.float32)
        with interrupts.held():
            self._pool, slot, evicted = _add(
                pool=self._pool,
                keys=lanes[None],
                segments=np.zeros(1, np.int32),
                entries=(words[None], sizes[None]),
                priorities=ranks,
            )
        if self.stats is not None:
            self.stats.evictions += int(evicted[0])
        if self._on_eviction is not None and evicted[0]:
            tell, self._on_eviction = self._on_eviction, None
            tell(self)
        return int(slot[0])

    def _admit(self, kv_cache: KeysValues) -> tuple[Array, Array]:
        """What is to be stored; the first value allocates, later ones must look like it."""
        layout, entry = keys_values.layout(kv_cache), keys_values.pack(kv_cache)
        if layout != self._layout:
            if len(self):
                raise ValueError(f"{self.name} holds {self._layout}, got {layout}: clear it first")
            eviction = self.eviction_strategy
            self._pool = pools.init(entry, num_slots=self.pool_size, eviction=eviction)
            self._layout, self._skeleton = layout, keys_values.skeleton(kv_cache)
        return entry

    @property
    def _key_to_index(self) -> Mapping[int, int]:
        """Stored keys and their slots; LightZero's world model reads the keys."""
        if self._pool is None:
            return {}
        slots = np.flatnonzero(np.asarray(pools.is_live(self._pool)))
        keys = np.asarray(self._pool.records[:, pools.KEY :])
        return {_key(keys[slot]): int(slot) for slot in slots}

    def clear(self) -> None:
        """Forgets all values and starts again at the first slot; the statistics go on."""
        if self._pool is not None:
            self._pool = pools.clear(self._pool)

    def __len__(self) -> int:
        return 0 if self._pool is None else int(pools.is_live(self._pool).sum())

    def __repr__(self) -> str:
        stats = f", {self.stats}" if self.enable_stats else ""
        return (
            f"KVCachePool(name={self.name!r}, size={len(self)}/{self.pool_size},"
            f" strategy={self.eviction_strategy}{stats})"
        )


def _tell_of_lost_nodes(pool: KVCachePool) -> None:
    # The pool is emptied before each search, so that what has to go is the running one's.
    _log.warning(
        "the recurrent pool is full with %d nodes and drops some of the running search, which goes"
        " on without their context: set num_simulations in the world model's configuration to the"
        " most simulations that any policy makes. This is not told again",
        pool.pool_size,
    )


def _log_every(frequency: int, count: int, what: str) -> None:
    if frequency > 0 and count % frequency == 0:
        _log.info("cleared the %s %d times", what, count)


def _as_integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _lanes(cache_key: int) -> Array:
    """A key's magnitude and sign: [6] uint32; the segment takes the environment's place."""
    key = _as_integer("cache_key", cache_key)
    lanes = np.zeros(hashing.KEY_LANES, np.uint32)
    lanes[: hashing.DIGEST_LANES] = hashing.integer_digests([abs(key)])[0]
    lanes[_SIGN_LANE] = key < 0
    return lanes


def _key(lanes: Array) -> int:
    """Undoes `_lanes`."""
    magnitude = int.from_bytes(lanes[: hashing.DIGEST_LANES].astype("<u4").tobytes(), "little")
    return -magnitude if lanes[_SIGN_LANE] else magnitude
