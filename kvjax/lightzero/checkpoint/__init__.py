"""LightZero's checkpoints: what they hold, and what they do not tell."""

from kvjax.lightzero.checkpoint.reading import load, read
from kvjax.lightzero.checkpoint.writing import save

__all__ = ["load", "read", "save"]
