"""Plays episodes of a Gymnasium environment with a trained agent, all of them in one batch.

Shapes: B environments played side by side, A actions.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.values import require, require_count
from kvjax.config import SearchConfig
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.folding import prepare
from kvjax.tools import gif, play_saving
from kvjax.tools.play_rows import DIGEST_SIZE, Row, side_by_side
from kvjax.tools.play_saving import Keeper, SavedRun, Tensors
from kvjax.tools.routes import ROUTES, Route, Step

Array = np.ndarray[Any, Any]

MAX_BATCH = 8
"""Environments that are searched together at most."""

MAX_EPISODES = 1_000_000
LAST_SEED = 2**32 - 1

SAVE_EVERY = 20
"""Steps of the batch from one save to the next, unless said otherwise."""


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
    actions_digest: str = ""  # of all actions by episode: equal where all of them are


class AnimationError(OSError):
    """The episodes were played, but their animation could not be written."""

    def __init__(self, why: Exception, summary: Summary) -> None:
        super().__init__(str(why))
        self.summary = summary


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
    dtype: str = "float32",
    save: str | Path | None = None,
    save_every: int = SAVE_EVERY,
    resume: bool = False,
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
      dtype: of the model's matrices, see `kvjax.prepare`.
      save: a folder, made if it is missing, that takes what another process needs to go on with the
        same actions; see `kvjax.tools.play_saving`.
      save_every: steps of the batch from one save to the next.
      resume: go on with the run that the folder holds, if it holds one, in the same batch, on
        however many devices divide it.
      progress: called before the first step and after every batch of steps.

    Raises:
      ValueError: fewer than one episode, or than devices, a seed out of range, no or an unknown
        environment, an environment that does not fit the model, or a GIF that cannot be drawn; a
        folder that holds a run already, or with `resume` another or a damaged one; an environment
        that does not repeat itself.
      OSError: a file cannot be written, said before the first step; an `AnimationError`, which has
        the summary, if that shows only at the end.
    """
    _check_run(episodes, seed)
    _check_saving(save, save_every, resume, gif_path)
    environment = agent.environment
    if environment is None:
        raise ValueError("the checkpoint names no environment: say which one to play")
    frames = None if gif_path is None else gif.Frames(gif_path)
    search = search_config or SearchConfig()
    way = ROUTES[route] if isinstance(route, str) else route
    devices = 1 if mesh is None else mesh.size
    with contextlib.ExitStack() as stack:
        folder = None if save is None else stack.enter_context(play_saving.alone_in(save))
        saved = play_saving.saved_run(folder) if folder and resume else None
        batch = _batch(episodes, devices) if saved is None else _batch_of(saved, devices)
        model = prepare(agent.params, config=agent.config, dtype=dtype)
        begin = functools.partial(way, model, agent.config, search, batch, mesh)
        rows = stack.enter_context(
            side_by_side(environment, agent.config, batch, render=frames is not None)
        )
        run = _Run(rows, environment.observation_scale, episodes, seed)
        step = begin()
        keeper = None
        if folder is not None:
            said = play_saving.said_of(agent, search, str(route), batch)
            said |= {"episodes": episodes, "seed": seed, "keep_context": keep_context}
            keeper = Keeper(folder, said | {"dtype": dtype}, run, step, save_every)
            keeper.begin(agent, saved)
        run.play(step, begin, keep_context, keeper, frames, progress)
    summary = run.summary()
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


def _batch_of(saved: SavedRun, devices: int) -> int:
    batch = int(saved.about["run"]["batch"])
    told = f"{saved.path} plays {batch} environments at once, which {devices} devices cannot share"
    require(batch % devices == 0, told)
    return batch


def _check_saving(save: Any, save_every: int, resume: bool, gif_path: Any) -> None:
    require_count("save_every", save_every)
    require(save is not None or not resume, "resume needs the folder of a run: say save")
    if save is not None and not resume:
        play_saving.require_no_run(save)
    told = "an animation needs its episode in one process: play without --save and --resume"
    require(save is None or gif_path is None, told)


class _Run:
    """Episodes in progress: the host's side of the loop."""

    def __init__(
        self, rows: list[Row], scale: tuple[float, ...] | None, episodes: int, seed: int
    ) -> None:
        self._rows = rows
        self.returns = [0.0] * episodes
        self.steps = 0
        self.search_seconds = self.compile_seconds = self._seconds = 0.0
        self._started = time.perf_counter()
        self._digests = np.zeros((episodes, DIGEST_SIZE), np.uint8)
        self._scale = np.asarray(1.0 if scale is None else scale, np.float32)
        self._seed, self._rng = seed, jax.random.key(seed)
        self._waiting = list(range(episodes))
        for row in rows:
            row.start(self._next_episode(), seed)

    def play(
        self,
        step: Step,
        begin: Callable[[], Step],
        keep_context: bool,
        keeper: Keeper | None,
        frames: gif.Frames | None,
        progress: Callable[[Status], None],
    ) -> None:
        """Plays on until all episodes are over."""
        if not self.active():
            return
        self.compile_seconds += self.compile(begin())
        progress(self.status())
        while self.active():
            if frames is not None and self._rows[0].episode == 0:
                frames.append(self._rows[0].env.render())
            self.step(step, keep_context)
            if keeper is not None:
                keeper.tell()
            progress(self.status())

    def summary(self) -> Summary:
        """Of all episodes."""
        return Summary(
            returns=tuple(self.returns),
            mean_return=float(np.mean(self.returns)),
            steps=self.steps,
            searches_per_second=self.steps / self.search_seconds,
            compile_seconds=self.compile_seconds,
            seconds=self._elapsed(),
            actions_digest=hashlib.blake2b(
                self._digests.tobytes(), digest_size=DIGEST_SIZE
            ).hexdigest(),
        )

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started

    def told(self) -> tuple[Tensors, dict[str, Any]]:
        """Arrays, and what JSON can say, of where the run is."""
        arrays: Tensors = {
            "returns": np.array(self.returns),
            "digests": self._digests,
            "rng": np.asarray(jax.random.key_data(self._rng)),
        }
        rows = []
        for number, row in enumerate(self._rows):
            rows.append(
                {
                    "way": [[episode, len(actions)] for episode, actions in row.way],
                    "seen": row.seen.hex(),
                    "active": row.episode is not None,
                }
            )
            actions = [np.asarray(action) for _, taken in row.way for action in taken]
            arrays[f"actions/{number}"] = np.stack(actions) if actions else np.zeros(0, np.int32)
        seconds = [self._elapsed(), self.search_seconds, self.compile_seconds]
        about = {"rows": rows, "next": len(self.returns) - len(self._waiting), "steps": self.steps}
        return arrays, about | {"seconds": seconds}

    def restore(self, arrays: Tensors, about: dict[str, Any]) -> None:
        """Goes to where a run was, see `told`.

        Raises:
          ValueError: an environment does not repeat itself.
        """
        self.returns, self._digests = arrays["returns"].tolist(), arrays["digests"]
        self._rng = jax.random.wrap_key_data(jnp.asarray(arrays["rng"]))
        self._waiting = list(range(about["next"], len(self.returns)))
        self.steps = about["steps"]
        self._seconds, self.search_seconds, self.compile_seconds = about["seconds"]
        for number, (row, said) in enumerate(zip(self._rows, about["rows"], strict=True)):
            if not said["active"]:
                row.start(None, self._seed)
                continue
            ends = np.cumsum([count for _, count in said["way"]])
            taken = np.split(arrays[f"actions/{number}"], ends[:-1])
            way = [(episode, list(x)) for (episode, _), x in zip(said["way"], taken, strict=True)]
            row.go(way, self._seed, bytes.fromhex(said["seen"]))

    def active(self) -> list[Row]:
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
                self._digests[row.episode] = np.frombuffer(row.acted, np.uint8)
                row.start(self._next_episode(), self._seed)

    def _firsts(self) -> Array:
        return np.stack([row.first for row in self._rows])

    def _observation(self) -> Array:
        """What the agent sees of each row: [B, *observation_shape] float32."""
        seen = np.stack([row.observation for row in self._rows]).astype(np.float32)
        return seen * self._scale

    def _next_episode(self) -> int | None:
        return self._waiting.pop(0) if self._waiting else None
