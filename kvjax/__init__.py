"""The memory of a transformer world model while it is searched."""

import sys

from kvjax import lightzero, ops
from kvjax.base.dlpack import to_jax, to_torch
from kvjax.config import SearchConfig, WindowConfig, WorldModelConfig
from kvjax.mcts.inference import (
    CacheMissError,
    Inference,
    StepInterrupt,
    StoreFullError,
    initial_inference,
    recurrent_inference,
)
from kvjax.mcts.output import SearchOutput
from kvjax.mcts.params_update import on_params_update
from kvjax.mcts.protocol import Node, Root, Transition, TreeModel
from kvjax.mcts.search import search
from kvjax.mcts.search_tree import SearchTree
from kvjax.mcts.serialization import register as _register
from kvjax.mcts.states import load_state, save_state
from kvjax.mcts.subtree import Kept
from kvjax.mcts.tree_search import tree_search
from kvjax.mcts.unizero_tree import init_kept
from kvjax.model import checkpoint
from kvjax.model import world_model as world_model
from kvjax.model.contexts import Contexts, init_contexts, replay
from kvjax.model.folding import prepare
from kvjax.model.rollout import rollout
from kvjax.model.step import Prediction
from kvjax.ops.window import AlignedWindow, Window
from kvjax.store import Store, init_store, stats
from kvjax.store.pool import Pool

__version__ = "0.1.0"

sys.modules[f"{__name__}.checkpoint"] = checkpoint  # `import kvjax.checkpoint`
_register()

__all__ = [
    "AlignedWindow",
    "CacheMissError",
    "Contexts",
    "Inference",
    "Kept",
    "Node",
    "Pool",
    "Prediction",
    "Root",
    "SearchConfig",
    "SearchOutput",
    "SearchTree",
    "StepInterrupt",
    "Store",
    "StoreFullError",
    "Transition",
    "TreeModel",
    "Window",
    "WindowConfig",
    "WorldModelConfig",
    "checkpoint",
    "init_contexts",
    "init_kept",
    "init_store",
    "initial_inference",
    "lightzero",
    "load_state",
    "on_params_update",
    "ops",
    "prepare",
    "recurrent_inference",
    "replay",
    "rollout",
    "save_state",
    "search",
    "stats",
    "to_jax",
    "to_torch",
    "tree_search",
]
