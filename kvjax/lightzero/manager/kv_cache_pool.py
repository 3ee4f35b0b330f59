"""One pool of LightZero's `KeysValues` by integer keys: a `store.pool` behind LightZero's methods.

Keys are compared in full, and what is handed out is the caller's alone, whatever happens to it.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import interrupts
from kvjax.base.values import require, require_one_of
from kvjax.lightzero.manager import keys_values
from kvjax.lightzero.manager.keys_values import KeysValues
from kvjax.ops import hashing
from kvjax.store import pool as pools
from kvjax.store.pool import Pool

_SEGMENT = 0
_SIGN_LANE = hashing.EPOCH_LANE

_add = jax.jit(pools.add, donate_argnames=("pool",))
_touch = jax.jit(pools.touch, donate_argnames=("pool",))


@jax.jit
def _find_and_take(pool: Pool, key: jax.Array) -> tuple[jax.Array, Any]:
    slot, _ = pools.find(pool, key, jnp.int32(_SEGMENT))
    return slot, jax.tree.map(lambda rows: rows[0], pools.take(pool, slot[None]))


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


def as_integer(name: str, value: Any) -> int:
    """A Python integer of anything that is one; `ValueError` for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _lanes(cache_key: int) -> np.ndarray[Any, Any]:
    """A key's magnitude and sign: [6] uint32; the segment takes the environment's place."""
    key = as_integer("cache_key", cache_key)
    lanes = np.zeros(hashing.KEY_LANES, np.uint32)
    lanes[: hashing.DIGEST_LANES] = hashing.integer_digests([abs(key)])[0]
    lanes[_SIGN_LANE] = key < 0
    return lanes


def _key(lanes: np.ndarray[Any, Any]) -> int:
    """Undoes `_lanes`."""
    magnitude = int.from_bytes(lanes[: hashing.DIGEST_LANES].astype("<u4").tobytes(), "little")
    return -magnitude if lanes[_SIGN_LANE] else magnitude


class KVCachePool:
    """A fixed number of slots that hold `KeysValues` by integer keys.

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
        size, eviction = as_integer("pool_size", pool_size), eviction_strategy
        require(size >= 1, f"pool_size must be positive, got {pool_size}")
        eviction = getattr(eviction, "value", eviction)
        require_one_of("eviction_strategy", eviction, pools.EVICTIONS)
        self.pool_size, self.eviction_strategy, self.name = size, eviction, name
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

    def _look_up(self, lanes: np.ndarray[Any, Any]) -> KeysValues | None:
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
        lanes = _lanes(cache_key)
        self._admit(kv_cache)
        words, sizes = keys_values.pack(kv_cache)
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

    def _admit(self, kv_cache: KeysValues) -> None:
        """Allocates for the first value; later ones must look like it while any is stored."""
        layout = keys_values.layout(kv_cache)
        if layout == self._layout:
            return
        if len(self):
            raise ValueError(f"{self.name} holds {self._layout}, got {layout}: clear it first")
        words, sizes = keys_values.pack(kv_cache)
        self._pool = pools.init(
            (words, sizes), num_slots=self.pool_size, eviction=self.eviction_strategy
        )
        self._layout, self._skeleton = layout, keys_values.skeleton(kv_cache)

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
