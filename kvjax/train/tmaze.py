"""A maze in which what was seen at the start says where to turn at the end."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require_positive
from kvjax.config import BLOCK, EnvironmentConfig
from kvjax.train.environments import Step

ENV_ID = "kvjax/TMaze-v0"
"""The maze of the usual length as Gymnasium knows it."""

AHEAD, LEFT, RIGHT = range(3)
_BUMP = -0.1

_SPARE = 4
"""Steps that an agent may take beyond those that it must, and still remember the start."""


@dataclasses.dataclass(frozen=True)
class TMaze:
    """A corridor that ends in a junction; a signal at the start tells the way to turn there.

    The agent sees the signal (-1 left, 1 right, 0 behind the start) and whether it stands at the
    junction. The right turn is rewarded with 1, the other with 0, and both end the episode; to walk
    into a wall costs 0.1. All cells between look alike, and so does the junction, whatever the
    signal was: a policy of what is seen turns rightly in half of the episodes, whatever it is.

    States are (position, way), [2] int32; the way is -1 or 1.

    Source: Bakker, "Reinforcement learning with long short-term memory", 2001.

    Raises:
      ValueError: `length` or `max_steps` is not a positive integer.
    """

    length: int = 6  # steps from the start to the junction
    max_steps: int = 40
    observation_size: int = dataclasses.field(default=2, init=False)
    num_actions: int = dataclasses.field(default=3, init=False)
    solved_at: float = dataclasses.field(default=0.95, init=False)

    def __post_init__(self) -> None:
        require_positive(self, "length", "max_steps")

    @property
    def recipe(self) -> dict[str, Any]:
        """Fields of `TrainConfig`: contexts and sequences that reach back to the start."""
        steps = self.length + _SPARE
        return {
            "context_length": BLOCK * (steps + 2),
            "unroll_steps": steps,
            "seek_start": steps,
            "collect_steps": max(25, 2 * steps + 5),
        }

    @property
    def played_as(self) -> EnvironmentConfig | None:
        """What `kvjax play` plays with an agent of this environment."""
        return EnvironmentConfig(ENV_ID) if self == TMaze() else None

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The start of the corridor."""
        way = jax.random.rademacher(key, (), jnp.int32)
        state = jnp.stack([jnp.zeros((), jnp.int32), way])
        return state, self._seen(state)

    def step(self, state: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, Step]:
        """Goes ahead (0), or turns to the left (1) or to the right (2)."""
        del key
        position, way = state
        at_junction = position == self.length
        turned = at_junction & (action != AHEAD)
        walked = ~at_junction & (action == AHEAD)
        is_right = turned & (action == jnp.where(way > 0, RIGHT, LEFT))
        reward = jnp.where(turned | walked, is_right.astype(jnp.float32), _BUMP)
        state = jnp.stack([position + walked, way])
        return state, Step(self._seen(state), reward, turned)

    def _seen(self, state: jax.Array) -> jax.Array:
        position, way = state
        signal = jnp.where(position == 0, way, 0)
        return jnp.stack([signal, position == self.length]).astype(jnp.float32)
