"""Training: a UniZero agent from nothing, its losses, and environments as pure functions."""

from kvjax.train.config import TrainConfig
from kvjax.train.environments import CartPole, Environment, Step
from kvjax.train.known import ENVIRONMENTS
from kvjax.train.losses import Losses, Targets
from kvjax.train.network import Predictions
from kvjax.train.run import NotFiniteError, Summary, train
from kvjax.train.tmaze import TMaze

__all__ = [
    "ENVIRONMENTS",
    "CartPole",
    "Environment",
    "Losses",
    "NotFiniteError",
    "Predictions",
    "Step",
    "Summary",
    "TMaze",
    "Targets",
    "TrainConfig",
    "train",
]
