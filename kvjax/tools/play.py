"""Plays episodes of a Gymnasium environment with a trained agent, all of them in one batch.

Shapes: B environments played side by side, A actions.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from kvjax.base.values import require
from kvjax.config import EnvironmentConfig, SearchConfig, WorldModelConfig
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.step import first_actions
from kvjax.tools import environments, gif
from kvjax.tools.routes import ROUTES, Route, Step

Array = np.ndarray[Any, Any]

MAX_BATCH = 8
"""Environments that are searched together at most."""

MAX_EPISODES = 1_000_000
LAST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a run is."""

    fraction: float  # 0 to 1, of the steps that the episodes can have at most
    steps: int  # environment steps so far
    finished: int  # episodes
    mean_return: float  # of the finished episodes, NaN before the first


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a run. One environment's step is one search."""

    returns: tuple[float, ...]  # by episode
    mean_return: float
    steps: int
    searches_per_second: float  # searches alone: no compilation, no environment
    compile_seconds: float
    seconds: float  # of the whole run


class AnimationError(OSError):
    """The episodes were played, but their animation could not be written."""

    def __init__(self, why: Exception, summary: Summary) -> None:
        super().__init__(str(why))
        self.summary = summary


@dataclasses.dataclass
class _Row:
    """One environment of the batch and the episode that it is in (None: nothing left to play)."""

    env: gymnasium.Env[Any, Any]
    first: Array  # in place of an action before an episode: -1, or NaN
    episode: int | None = None
    observation: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    last_action: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    steps: int = 0

    def start(self, episode: int | None, seed: int) -> None:
        self.episode, self.last_action, self.steps = episode, self.first, 0
        if episode is not None:
            self.observation, _ = self.env.reset(seed=seed + episode)

    def advance(self, action: Array) -> tuple[float, bool]:
        """Acts; returns the reward and whether the episode ended."""
        acted = _in_space(action, self.env.action_space)
        self.observation, reward, terminated, truncated, _ = self.env.step(acted)
        self.last_action, self.steps = action, self.steps + 1
        return float(reward), terminated or truncated


def _in_space(action: Array, space: gymnasium.Space[Any]) -> Any:
    """An action as the environment takes it: numbers in -1 .. 1 fill a box, as in LightZero's."""
    if not isinstance(space, gymnasium.spaces.Box):
        return int(action)
    return (space.low + (action + 1) / 2 * (space.high - space.low)).astype(space.dtype)


def play(
    agent: Checkpoint,
    *,
    episodes: int = 8,
    search_config: SearchConfig | None = None,
    seed: int = 0,
    route: str | Route = "tree",
    keep_context: bool = True,
    gif_path: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[Status], None] = lambda status: None,
) -> Summary:
    """Plays episodes; episode i starts from `reset(seed=seed + i)`.

    Up to `MAX_BATCH` environments, on a mesh as many on each device, are searched together; a row
    whose episode ends goes on with the next episode while the others stay where they are.

    Args:
      agent: a model whose checkpoint names its environment.
      route: "tree" searches in one jit, "store" with trees on the host, or one of one's own; see
        `kvjax.tools.routes`.
      keep_context: False pushes every step as an episode's first, so that the window holds the
        current observation only.
      gif_path: where to write the first episode as an animation.
      mesh: devices to search on, over which the environments are divided evenly.
      progress: called before the first step and after every batch of steps.

    Raises:
      ValueError: fewer than one episode, or than devices, a seed out of range, no or an unknown
        environment, an environment that does not fit the model, or a GIF that cannot be drawn.
      OSError: the GIF cannot be written, said before the first step; an `AnimationError`, which has
        the summary, if that shows only at the end.
    """
    _check_run(episodes, seed)
    environment = agent.environment
    if environment is None:
        raise ValueError("the checkpoint names no environment: say which one to play")
    frames = None if gif_path is None else gif.Frames(gif_path)
    started = time.perf_counter()
    batch = _batch(episodes, 1 if mesh is None else mesh.size)
    search = search_config or SearchConfig()
    way = ROUTES[route] if isinstance(route, str) else route
    begin = functools.partial(way, agent.params, agent.config, search, batch, mesh)
    with _rows(environment, agent.config, batch, render=frames is not None) as rows:
        run = _Run(rows, environment.observation_scale, episodes, seed)
        step, compile_seconds = begin(), run.compile(begin())
        progress(run.status())
        while run.active():
            if frames is not None and rows[0].episode == 0:
                frames.append(rows[0].env.render())
            run.step(step, keep_context)
            progress(run.status())
    summary = Summary(
        returns=tuple(run.returns),
        mean_return=float(np.mean(run.returns)),
        steps=run.steps,
        searches_per_second=run.steps / run.search_seconds,
        compile_seconds=compile_seconds,
        seconds=time.perf_counter() - started,
    )
    if frames is not None:
        _animate(frames, rows[0].env.metadata.get("render_fps", gif.DEFAULT_FPS), summary)
    return summary


def _animate(frames: gif.Frames, fps: float, summary: Summary) -> None:
    try:
        frames.write(fps)
    except (OSError, ValueError, MemoryError) as error:
        raise AnimationError(error, summary) from error


def _check_run(episodes: int, seed: int) -> None:
    require(episodes >= 1, f"episodes must be at least 1, got {episodes}")
    require(episodes <= MAX_EPISODES, f"episodes must be at most {MAX_EPISODES}, got {episodes}")
    require(0 <= seed <= LAST_SEED, f"seed must be in 0 .. {LAST_SEED}, got {seed}")


def _batch(episodes: int, devices: int) -> int:
    """Environments to play side by side, as many on each device."""
    require(
        episodes >= devices,
        f"episodes must be at least as many as devices, got {episodes} for {devices}",
    )
    return min(episodes // devices, MAX_BATCH) * devices


class _Run:
    """Episodes in progress: the host's side of the loop."""

    def __init__(
        self, rows: list[_Row], scale: tuple[float, ...] | None, episodes: int, seed: int
    ) -> None:
        self._rows = rows
        self.returns = [0.0] * episodes
        self.steps = 0
        self.search_seconds = 0.0
        self._scale = np.asarray(1.0 if scale is None else scale, np.float32)
        self._seed, self._rng = seed, jax.random.key(seed)
        self._waiting = list(range(episodes))
        for row in rows:
            row.start(self._next_episode(), seed)

    def active(self) -> list[_Row]:
        """Rows that are in an episode."""
        return [row for row in self._rows if row.episode is not None]

    def status(self) -> Status:
        """Where the run is now."""
        active = self.active()
        unfinished = {row.episode for row in active} | set(self._waiting)
        finished = [score for i, score in enumerate(self.returns) if i not in unfinished]
        spec = self._rows[0].env.spec
        limit = (spec and spec.max_episode_steps) or max(1, *(row.steps + 1 for row in self._rows))
        progress = len(finished) + sum(row.steps / limit for row in active)
        mean = float(np.mean(finished)) if finished else float("nan")
        return Status(progress / len(self.returns), self.steps, len(finished), mean)

    def compile(self, search: Step) -> float:
        """Lets a route of its own search twice, a first step and a later one: seconds it took."""
        started = time.perf_counter()
        rng, observation = jax.random.key(0), self._observation()
        action = search(rng, observation, self._firsts()).action
        search(rng, observation, action)
        return time.perf_counter() - started

    def step(self, search: Step, keep_context: bool) -> None:
        """Searches all rows at once and acts in each environment that is in an episode."""
        started = time.perf_counter()
        last_action = np.array([row.last_action for row in self._rows])
        self._rng = jax.random.fold_in(self._rng, self.steps)
        if not keep_context:
            last_action = self._firsts()
        actions = search(self._rng, self._observation(), last_action).action
        self.search_seconds += time.perf_counter() - started
        for row, action in zip(self._rows, actions, strict=True):
            if row.episode is None:
                continue
            reward, ended = row.advance(action)
            self.returns[row.episode] += reward
            self.steps += 1
            if ended:
                row.start(self._next_episode(), self._seed)

    def _firsts(self) -> Array:
        return np.stack([row.first for row in self._rows])

    def _observation(self) -> Array:
        """What the agent sees of each row: [B, *observation_shape] float32."""
        seen = np.stack([row.observation for row in self._rows]).astype(np.float32)
        return seen * self._scale

    def _next_episode(self) -> int | None:
        return self._waiting.pop(0) if self._waiting else None


@contextlib.contextmanager
def _rows(
    environment: EnvironmentConfig, config: WorldModelConfig, count: int, *, render: bool
) -> Iterator[list[_Row]]:
    """Environments side by side, of which the first may be rendered; what they refuse is told."""
    rows: list[_Row] = []
    try:
        while len(rows) < count:
            (first,) = first_actions(1, config)
            env = environments.make(environment, config, render=render and not rows)
            rows.append(_Row(env, first))
        yield rows
    except gymnasium.error.Error as error:
        raise ValueError(f"{environment.env_id}: {error}") from error
    finally:
        for row in rows:
            row.env.close()
