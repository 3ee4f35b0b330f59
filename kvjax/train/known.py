"""Environments by the names that `kvjax train --env` takes."""

from kvjax.train.environments import MASK, CartPole, Environment
from kvjax.train.tmaze import TMaze

ENVIRONMENTS: dict[str, Environment] = {
    "cartpole": CartPole(),
    "cartpole_masked": CartPole(scale=MASK),
    "tmaze": TMaze(),
}
