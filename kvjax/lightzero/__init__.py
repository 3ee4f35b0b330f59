"""LightZero's models, checkpoints, caches and recorded traces."""

from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.kv_cache_manager import KVCacheManager

__all__ = ["KVCacheManager", "load"]
