"""kvjax's caches in LightZero's torch world model."""

from kvjax.lightzero.attach.handle import Handle, attach, handle_of
from kvjax.lightzero.attach.shadow import ShadowError

__all__ = ["Handle", "ShadowError", "attach", "handle_of"]
