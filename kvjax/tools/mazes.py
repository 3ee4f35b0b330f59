"""The maze of `kvjax.train` as a Gymnasium environment, so that `kvjax play` finds it."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from kvjax.train.tmaze import ENV_ID, TMaze

Array = np.ndarray[Any, Any]

_LAST_SEED = 2**31


class GymnasiumTMaze(gymnasium.Env[Array, Any]):
    """See `kvjax.train.TMaze`."""

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own way)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self._maze = render_mode, TMaze()
        self.observation_space = spaces.Box(-1.0, 1.0, (self._maze.observation_size,), np.float32)
        self.action_space = spaces.Discrete(self._maze.num_actions)
        self._reset, self._step = jax.jit(self._maze.reset), jax.jit(self._maze.step)
        self._state: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begins an episode at the start of the corridor."""
        super().reset(seed=seed, options=options)
        key = jax.random.key(int(self.np_random.integers(_LAST_SEED)))
        self._state, observation = self._reset(key)
        return np.asarray(observation), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Goes ahead (0), or turns to the left (1) or to the right (2)."""
        self._state, seen = self._step(self._state, jnp.int32(action), jax.random.key(0))
        ended = bool(seen.terminated)
        return np.asarray(seen.observation), float(seen.reward), ended, False, {}


_ENTRY = f"{__name__}:{GymnasiumTMaze.__name__}"
gymnasium.register(ENV_ID, _ENTRY, max_episode_steps=TMaze().max_steps)
