"""LightZero's models, checkpoints and recorded traces, and its world model with kvjax's caches."""

from kvjax.lightzero.attach import Handle, attach, handle_of
from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.shadow import ShadowError

__all__ = ["Handle", "ShadowError", "attach", "handle_of", "load"]
