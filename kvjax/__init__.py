"""The memory of a transformer world model while it is searched."""

from kvjax import lightzero, ops
from kvjax.config import SearchConfig, WindowConfig, WorldModelConfig
from kvjax.search import init_contexts, search
from kvjax.types import AlignedWindow, Contexts, Prediction, SearchOutput, Window

__all__ = [
    "AlignedWindow",
    "Contexts",
    "Prediction",
    "SearchConfig",
    "SearchOutput",
    "Window",
    "WindowConfig",
    "WorldModelConfig",
    "init_contexts",
    "lightzero",
    "ops",
    "search",
]
