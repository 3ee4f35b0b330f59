"""The world model: its variables, its steps, and the contexts that environments carry."""

from kvjax.model.contexts import Contexts, init_contexts, replay
from kvjax.model.folding import UniZero, prepare
from kvjax.model.rollout import rollout
from kvjax.model.step import Prediction
from kvjax.model.world_model import Params, init_params

__all__ = [
    "Contexts",
    "Params",
    "Prediction",
    "UniZero",
    "init_contexts",
    "init_params",
    "prepare",
    "replay",
    "rollout",
]
