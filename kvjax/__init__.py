"""The memory of a transformer world model while it is searched."""

from kvjax import checkpoint, lightzero, ops
from kvjax.config import SearchConfig, WindowConfig, WorldModelConfig
from kvjax.contexts import init_contexts, replay
from kvjax.dlpack import to_jax, to_torch
from kvjax.inference import (
    CacheMissError,
    StepInterrupt,
    StoreFullError,
    initial_inference,
    recurrent_inference,
)
from kvjax.params_update import on_params_update
from kvjax.rollout import rollout
from kvjax.search import prepare, search
from kvjax.serialization import register as _register
from kvjax.store import init_store, stats
from kvjax.subtree import Kept, init_kept
from kvjax.types import (
    AlignedWindow,
    Contexts,
    Inference,
    Pool,
    Prediction,
    SearchOutput,
    Store,
    Window,
)

__version__ = "0.1.0"

_register()

__all__ = [
    "AlignedWindow",
    "CacheMissError",
    "Contexts",
    "Inference",
    "Kept",
    "Pool",
    "Prediction",
    "SearchConfig",
    "SearchOutput",
    "StepInterrupt",
    "Store",
    "StoreFullError",
    "Window",
    "WindowConfig",
    "WorldModelConfig",
    "checkpoint",
    "init_contexts",
    "init_kept",
    "init_store",
    "initial_inference",
    "lightzero",
    "on_params_update",
    "ops",
    "prepare",
    "recurrent_inference",
    "replay",
    "rollout",
    "search",
    "stats",
    "to_jax",
    "to_torch",
]
