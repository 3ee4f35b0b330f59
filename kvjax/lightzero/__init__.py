"""LightZero's models, checkpoints and recorded traces, and its world model with kvjax's caches."""

from kvjax.lightzero.attach import Handle, ShadowError, attach, handle_of
from kvjax.lightzero.checkpoint import load, save
from kvjax.lightzero.manager import KVCacheManager
from kvjax.lightzero.traces import record_trace

__all__ = [
    "Handle",
    "KVCacheManager",
    "ShadowError",
    "attach",
    "handle_of",
    "load",
    "record_trace",
    "save",
]
