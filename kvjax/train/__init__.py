"""Training: a UniZero agent from nothing, its losses, and environments as pure functions."""

from kvjax.train.config import TrainConfig
from kvjax.train.environments import ENVIRONMENTS, CartPole, Environment, Step
from kvjax.train.losses import Losses, Targets
from kvjax.train.network import Predictions
from kvjax.train.run import NotFiniteError, Summary, train

__all__ = [
    "ENVIRONMENTS",
    "CartPole",
    "Environment",
    "Losses",
    "NotFiniteError",
    "Predictions",
    "Step",
    "Summary",
    "Targets",
    "TrainConfig",
    "train",
]
