"""LightZero's models, checkpoints and recorded traces, and its world model with kvjax's caches."""

from kvjax.lightzero.attach import Handle, attach, handle_of
from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.kv_cache_manager import KVCacheManager
from kvjax.lightzero.record import record_trace
from kvjax.lightzero.shadow import ShadowError

__all__ = [
    "Handle",
    "KVCacheManager",
    "ShadowError",
    "attach",
    "handle_of",
    "load",
    "record_trace",
]
