"""A drop-in for LightZero main's `KVCacheManager`, on kvjax's pools.

`world_model.kv_cache_manager = KVCacheManager(world_model.config, world_model.env_num)` is all that
a world model of LightZero's main branch needs.
"""

import functools
import logging
from typing import Any

from kvjax.base.values import require
from kvjax.lightzero.manager.keys_values import KeysValues
from kvjax.lightzero.manager.kv_cache_pool import KVCachePool, as_integer

_DEFAULT_SIMULATIONS, _DEFAULT_MOST_SLOTS, _LEAST_INIT_SLOTS = 50, 5000, 256

_log = logging.getLogger(__name__)


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
        self.config, self.env_num = config, as_integer("env_num", env_num)
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

    def _init_pool(self, env_id: int) -> KVCachePool:
        env = as_integer("env_id", env_id)
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
        if found is None and check_recur:
            found = self.get_recur_cache(cache_key)
        return found

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
        self.clear_init_caches()
        self.recur_pool.clear()
        self.wm_pool.clear()
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
        for pool in (*self.init_pools, self.recur_pool, self.wm_pool):
            if pool.stats is not None:
                pool.stats.reset()

    def __repr__(self) -> str:
        return (
            f"KVCacheManager(env_num={self.env_num},"
            f" init_caches={[len(pool) for pool in self.init_pools]},"
            f" recur_cache={len(self.recur_pool)}/{self.recur_pool.pool_size},"
            f" wm_cache={len(self.wm_pool)}/{self.wm_pool.pool_size})"
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
