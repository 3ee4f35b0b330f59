"""Environments side by side, each in an episode, and the way back to where one was.

Gymnasium's environments cannot be written to a file. What can is how one came to where it is: the
seed of its episode and the actions since. They are taken again, and what the environment answers
must have the digest of what it answered before.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np

from kvjax.config import EnvironmentConfig, WorldModelConfig
from kvjax.model.step import first_actions
from kvjax.tools import environments

Array = np.ndarray[Any, Any]

DIGEST_SIZE = 16
_NOTHING = bytes(DIGEST_SIZE)


@dataclasses.dataclass
class Row:
    """One environment of the batch and the episode that it is in (None: nothing left to play)."""

    env: gymnasium.Env[Any, Any]
    first: Array  # in place of an action before an episode: -1, or NaN
    goes_on: bool = False  # whether an episode begins where the one before it ended
    episode: int | None = None
    observation: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    last_action: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    steps: int = 0
    acted: bytes = _NOTHING  # digest of the episode's actions
    seen: bytes = _NOTHING  # digest of all answers since the way began
    way: list[tuple[int, list[Array]]] = dataclasses.field(default_factory=list)
    """Episodes and their actions, that lead to where the environment is."""

    def start(self, episode: int | None, seed: int) -> None:
        """Begins an episode."""
        self.episode, self.last_action, self.steps = episode, self.first, 0
        self.acted = _NOTHING
        if not self.goes_on or episode is None:
            self.way, self.seen = [], _NOTHING
        if episode is not None:
            self.way.append((episode, []))
            self.observation, _ = self.env.reset(seed=seed + episode)
            self.seen = chained(self.seen, self.observation)

    def advance(self, action: Array) -> tuple[float, bool]:
        """Acts; returns the reward and whether the episode ended."""
        acted = _in_space(action, self.env.action_space)
        self.observation, reward, terminated, truncated, _ = self.env.step(acted)
        self.last_action, self.steps = action, self.steps + 1
        self.way[-1][1].append(action)
        self.acted = chained(self.acted, np.asarray(action, self.first.dtype))
        ends = np.array([terminated, truncated])
        self.seen = chained(self.seen, self.observation, np.float64(reward), ends)
        return float(reward), terminated or truncated

    def go(self, way: Sequence[tuple[int, Sequence[Array]]], seed: int, seen: bytes) -> None:
        """Takes a way again.

        Raises:
          ValueError: the environment did not answer as it did before.
        """
        self.way, self.seen = [], _NOTHING
        for episode, actions in way:
            self.start(episode, seed)
            for action in actions:
                self.advance(action)
        if self.seen != seen:
            raise ValueError(
                f"the environment does not repeat itself: to the seed {seed + way[-1][0]} of"
                f" episode {way[-1][0]} and the {self.steps} actions since it answers otherwise"
                " than before, so that this run cannot go on"
            )


def chained(digest: bytes, *values: Any) -> bytes:
    """The digest of what came before and of these values' bytes."""
    parts = (np.ascontiguousarray(value).tobytes() for value in values)
    return hashlib.blake2b(digest + b"".join(parts), digest_size=DIGEST_SIZE).digest()


def _in_space(action: Array, space: gymnasium.Space[Any]) -> Any:
    """An action as the environment takes it: numbers in -1 .. 1 fill a box, as in LightZero's."""
    if not isinstance(space, gymnasium.spaces.Box):
        return int(action)
    return (space.low + (action + 1) / 2 * (space.high - space.low)).astype(space.dtype)


@contextlib.contextmanager
def side_by_side(
    environment: EnvironmentConfig, config: WorldModelConfig, count: int, *, render: bool
) -> Iterator[list[Row]]:
    """Environments, of which the first may be rendered; what they refuse is told."""
    rows: list[Row] = []
    frames = environment.completed(config).frames
    try:
        while len(rows) < count:
            (first,) = first_actions(1, config)
            env = environments.make(environment, config, render=render and not rows)
            rows.append(Row(env, first, frames is not None and frames.episode_life))
        yield rows
    except gymnasium.error.Error as error:
        raise ValueError(f"{environment.env_id}: {error}") from error
    finally:
        for row in rows:
            row.env.close()
