"""Pure functions on one item; `jax.vmap` at the edges."""

from kvjax.ops import attention, hashing, position, support, window

__all__ = ["attention", "hashing", "position", "support", "window"]
