"""LightZero's models, checkpoints and recorded traces."""

from kvjax.lightzero.checkpoint import load

__all__ = ["load"]
