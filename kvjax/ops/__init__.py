"""Pure functions on one item; `jax.vmap` at the edges."""

from kvjax.ops import attention, position, support, window

__all__ = ["attention", "position", "support", "window"]
