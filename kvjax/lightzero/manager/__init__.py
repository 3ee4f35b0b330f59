"""The cache manager of LightZero's main branch, over kvjax's pools."""

from kvjax.lightzero.manager.kv_cache_manager import KVCacheManager

__all__ = ["KVCacheManager"]
