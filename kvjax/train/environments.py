"""Environments as pure functions, so that collecting is part of one compiled program.

One item each; `vmap` makes a batch. An environment of your own is a frozen dataclass with two
methods:

    @dataclasses.dataclass(frozen=True)
    class Walk:
        observation_size: int = 1
        num_actions: int = 2
        max_steps: int = 50

        def reset(self, key):
            return jnp.zeros(1), jnp.zeros(1)

        def step(self, state, action, key):
            state = state + 2 * action - 1
            return state, Step(state, reward=state[0], terminated=state[0] > 9)

Shapes: O observation_size.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kvjax.base.values import require, require_positive
from kvjax.config import EnvironmentConfig

State = Any
"""Any pytree of arrays."""


class Step(NamedTuple):
    """What an environment answers to an action."""

    observation: jax.Array  # [O]
    reward: jax.Array  # []
    terminated: jax.Array  # [] bool: nothing follows; the time limit is not the environment's


class Environment(Protocol):
    """What is asked of an environment. It must be hashable: programs are compiled for it.

    What it may have besides: `solved_at`, a mean return that ends a run; `recipe`, fields of
    `TrainConfig` that it needs to be other than they are; `played_as`, an `EnvironmentConfig` of
    what `kvjax play` plays.
    """

    @property
    def observation_size(self) -> int:
        """Entries O of an observation."""

    @property
    def num_actions(self) -> int:
        """Discrete actions, 0 .. num_actions - 1."""

    @property
    def max_steps(self) -> int:
        """Steps after which an episode is cut off."""

    def reset(self, key: jax.Array) -> tuple[State, jax.Array]:
        """A first state and its observation [O]."""

    def step(self, state: State, action: jax.Array, key: jax.Array) -> tuple[State, Step]:
        """The next state, and what is seen of it."""


_GRAVITY, _CART, _POLE, _HALF_LENGTH, _FORCE, _SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_MAX_POSITION, _MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360
_FIRST = 0.05
"""Bound of each entry of a first state."""

MASK = (1.0, 0.0, 10.0, 0.0)
"""Hides both velocities and spreads the angle: what the shipped agents see of CartPole."""


@dataclasses.dataclass(frozen=True)
class CartPole:
    """Gymnasium's CartPole-v0, whose observations may be scaled entry by entry.

    States are (position, velocity, angle, angular velocity), [4] float32.

    Source: `gymnasium.envs.classic_control.cartpole`, Euler integration.

    Raises:
      ValueError: the scale has other than four factors, or `max_steps` is not a positive integer.
    """

    scale: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_steps: int = 200
    observation_size: int = dataclasses.field(default=4, init=False)
    num_actions: int = dataclasses.field(default=2, init=False)
    solved_at: float = dataclasses.field(default=195.0, init=False)  # Gym's reward_threshold

    def __post_init__(self) -> None:
        require_positive(self, "max_steps")
        require(len(self.scale) == 4, f"scale must have 4 factors, got {self.scale!r}")

    @property
    def played_as(self) -> EnvironmentConfig:
        """What `kvjax play` plays with an agent of this environment."""
        return EnvironmentConfig("CartPole-v0", self.scale)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A state near the upright one."""
        state = jax.random.uniform(key, (4,), minval=-_FIRST, maxval=_FIRST)
        return state, self._seen(state)

    def step(self, state: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, Step]:
        """Pushes the cart to the left (0) or to the right (1); each step gives a reward of 1."""
        del key
        _, velocity, angle, spin = state
        sine, cosine, mass = jnp.sin(angle), jnp.cos(angle), _CART + _POLE
        force = jnp.where(action == 1, _FORCE, -_FORCE)
        push = (force + _POLE * _HALF_LENGTH * spin**2 * sine) / mass
        lever = _HALF_LENGTH * (4.0 / 3.0 - _POLE * cosine**2 / mass)
        turn = (_GRAVITY * sine - cosine * push) / lever
        shift = push - _POLE * _HALF_LENGTH * turn * cosine / mass
        state = state + _SECONDS * jnp.stack([velocity, shift, spin, turn])
        fell = (jnp.abs(state[0]) > _MAX_POSITION) | (jnp.abs(state[2]) > _MAX_ANGLE)
        return state, Step(self._seen(state), jnp.ones(()), fell)

    def _seen(self, state: jax.Array) -> jax.Array:
        return state * jnp.asarray(self.scale)
