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
from kvjax.mcts.protocol import Node, Root, Transition, TreeModel
from kvjax.mcts.search import search
from kvjax.mcts.search_tree import SearchTree
from kvjax.mcts.states import load_state, save_state
from kvjax.mcts.subtree import Kept
from kvjax.mcts.tree_search import tree_search
from kvjax.mcts.unizero_tree import init_kept

__all__ = [
    "CacheMissError",
    "Inference",
    "Kept",
    "Node",
    "Root",
    "SearchOutput",
    "SearchTree",
    "StepInterrupt",
    "StoreFullError",
    "Transition",
    "TreeModel",
    "init_kept",
    "initial_inference",
    "load_state",
    "on_params_update",
    "recurrent_inference",
    "save_state",
    "search",
    "tree_search",
]
