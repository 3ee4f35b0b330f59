"""LightZero's models, checkpoints, caches and recorded traces."""

from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.kv_cache_manager import KVCacheManager
from kvjax.lightzero.record import record_trace

__all__ = ["KVCacheManager", "load", "record_trace"]
