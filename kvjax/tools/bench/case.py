"""A row of a benchmark of searches: its sizes, LightZero's model of them, what is observed."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kvjax.config import BLOCK
from kvjax.tools.bench import lightzero_020

OBSERVATION_SIZE = 4
NUM_ACTIONS = 6
_MIN_BLOCKS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one row."""

    embed: int
    envs: int
    context: int = 8  # tokens
    simulations: int = 50
    layers: int = 2
    heads: int = 8
    repeats: int = 15

    SIZES: ClassVar = ("embed", "layers", "context", "envs", "simulations")

    def label(self) -> str:
        """What `--only` is matched against."""
        return ",".join(f"{name}={getattr(self, name)}" for name in self.SIZES)

    @property
    def blocks(self) -> int:
        """Steps that fill a window."""
        return self.context // BLOCK

    @property
    def max_blocks(self) -> int:
        """Length of the position table, in blocks."""
        return max(_MIN_BLOCKS, self.blocks)


def choose(cases: Sequence[Case], only: str, *, besides: Sequence[str] = ()) -> list[Case]:
    """Cases whose label contains all comma-separated parts of `only`; none if it is in `besides`.

    Raises:
      ValueError: nothing fits.
    """
    parts = [part for part in only.split(",") if part]
    chosen = [case for case in cases if all(part in case.label().split(",") for part in parts)]
    if not chosen and only not in besides:
        labels = "; ".join([*(case.label() for case in cases), *besides])
        raise ValueError(f"no benchmark row matches {only!r}; rows are {labels}")
    return chosen


def lightzero_model(case: Case) -> Any:
    """LightZero 0.2.0's model of a case, with random weights."""
    return lightzero_020.build_model(
        observation_size=OBSERVATION_SIZE,
        num_actions=NUM_ACTIONS,
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        context_length=case.context,
        num_envs=case.envs,
        num_simulations=case.simulations,
        max_blocks=case.max_blocks,
    )


def observations(case: Case) -> Any:
    """What each environment observes at every step: [envs, 4] float32."""
    shape = (case.envs, OBSERVATION_SIZE)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
