"""Search: a tree in jit, and inference steps for a tree that lives outside."""

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
from kvjax.mcts.search import search
from kvjax.mcts.subtree import Kept, init_kept

__all__ = [
    "CacheMissError",
    "Inference",
    "Kept",
    "SearchOutput",
    "StepInterrupt",
    "StoreFullError",
    "init_kept",
    "initial_inference",
    "on_params_update",
    "recurrent_inference",
    "search",
]
