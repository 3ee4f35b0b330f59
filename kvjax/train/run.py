"""A run: compiles its two programs, calls them in turn, evaluates, keeps what it needs to go on."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.compilation import known_options, on_cpu
from kvjax.base.values import require, require_count
from kvjax.mcts.search import is_narrow
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.train import curves, loop, saving
from kvjax.train.config import TrainConfig
from kvjax.train.curves import Row
from kvjax.train.environments import Environment
from kvjax.train.known import ENVIRONMENTS
from kvjax.train.loop import Report, Setup, TrainState

BEST, LAST = "best.safetensors", "last.safetensors"
STATE, FAILURE = "state.npz", "failure.npz"
CURVE, PICTURE = "curve.csv", "curve.png"
LAST_SEED = 2**32 - 1


class NotFiniteError(ValueError):
    """A search or an update met NaN or infinity; `path` has what it started from."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a run: how its best agent played episodes that no choice depended on."""

    mean_return: float
    returns: tuple[float, ...]
    env_steps: int  # all that were played to learn
    seconds: float  # of the whole run, compilation included
    compile_seconds: float
    reached_target_at: int | None  # environment steps


@dataclasses.dataclass
class _Course:
    """What the host knows of a run."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    best: float = -math.inf
    seconds: float = 0.0  # of earlier processes
    compile_seconds: float = 0.0
    summary: Summary | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def as_json(self) -> dict[str, Any]:
        rows = [dataclasses.astuple(row) for row in self.rows]
        summary = None if self.summary is None else dataclasses.asdict(self.summary)
        best = self.best if math.isfinite(self.best) else None
        seconds = {"seconds": self.elapsed(), "compile_seconds": self.compile_seconds}
        return {"rows": rows, "best": best, **seconds, "summary": summary}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "_Course":
        summary, best = content["summary"], content["best"]
        return cls(
            rows=[Row(*row) for row in content["rows"]],
            best=-math.inf if best is None else best,
            seconds=content["seconds"],
            compile_seconds=content["compile_seconds"],
            summary=summary and Summary(**summary | {"returns": tuple(summary["returns"])}),
        )


def train(
    env: str | Environment,
    config: TrainConfig | None = None,
    *,
    output: str | Path,
    seed: int = 0,
    max_env_steps: int = 20_000,
    target: float | None = None,
    resume: bool = False,
    progress: Callable[[Row, float], None] = lambda row, share: None,
) -> Summary:
    """Trains an agent from nothing.

    The folder then has the best and the last agent (`best.safetensors`, `last.safetensors`), the
    run's course (`curve.csv`, `curve.png`) and its state (`state.npz`), from which `resume` goes on
    as if nothing had happened.

    Args:
      env: a name of `kvjax.train.ENVIRONMENTS`, or an environment of your own.
      config: how to train; None for the environment's own recipe (`TrainConfig.of`).
      output: a folder, which is made if it is missing.
      seed: of weights, environments and searches.
      max_env_steps: steps of all environments together, after which the run ends (max_env_step).
      target: mean return at which the run ends, if the same agent reaches it in as many episodes
        again.
      resume: go on with the run that the folder holds, if it holds one.
      progress: called after every iteration with its row and the share of the steps that are made.

    Raises:
      NotFiniteError: a search or an update met NaN; the batch and weights are in `failure.npz`.
      ValueError: an unknown environment, a seed out of range; the folder holds a run and `resume`
        is not said, or another run than this, or a damaged one.
      OSError: the folder cannot be written to.
      ImportError: matplotlib is missing, which draws the curve.
    """
    environment = _environment(env)
    require(0 <= seed <= LAST_SEED, f"seed must be in 0 .. {LAST_SEED}, got {seed}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("training draws its curve by matplotlib: pip install 'kvjax[train]'")
    require_count("max_env_steps", max_env_steps)
    setup = Setup(environment, TrainConfig.of(environment) if config is None else config)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    name = env if isinstance(env, str) else repr(env)
    run = _Run(setup, name, seed, folder, max_env_steps, target)
    run.start(resume)
    while run.course.summary is None:
        row, share = run.step()
        progress(row, share)
    return run.course.summary


def _environment(env: str | Environment) -> Environment:
    if not isinstance(env, str):
        return env
    known = ", ".join(ENVIRONMENTS)
    require(env in ENVIRONMENTS, f"env must be one of {known}, got {env!r}")
    return ENVIRONMENTS[env]


class _Programs(NamedTuple):
    begin: Callable[..., Any]
    iterate: Callable[..., Any]
    evaluate: Callable[..., Any]


@functools.lru_cache(maxsize=1)
def _compiled(setup: Setup) -> _Programs:
    """All programs of a run, compiled at the same time; the next run of the same kind has them."""
    begin, iterate, evaluate = (
        functools.partial(function, setup=setup)
        for function in (loop.begin, loop.iterate, loop.evaluate)
    )
    key = jax.random.key(0)
    like = jax.eval_shape(begin, key)
    options = known_options(is_narrow(setup.model)) if on_cpu() else None
    lowered = [
        jax.jit(begin).lower(key),
        jax.jit(iterate, donate_argnums=0).lower(like, key),
        jax.jit(evaluate, compiler_options=options).lower(like.learner, key),
    ]
    with ThreadPoolExecutor(len(lowered)) as threads:
        return _Programs(*threads.map(lambda each: each.compile(), lowered))


class _Run:
    """A run's host side."""

    def __init__(
        self,
        setup: Setup,
        name: str,
        seed: int,
        folder: Path,
        max_env_steps: int,
        target: float | None,
    ) -> None:
        self.setup, self.name, self.seed, self.folder = setup, name, seed, folder
        self.max_env_steps, self.target = max_env_steps, target
        self._begin_key, self._key, self._eval_key = jax.random.split(jax.random.key(seed), 3)
        self.course = _Course()

    def start(self, resume: bool) -> None:
        """Compiles, and begins or goes on."""
        path = self.folder / STATE
        found = path.exists()
        told = f"{self.folder} holds a run already: say --resume (resume=True), or another folder"
        require(resume or not found, told)
        begin = functools.partial(loop.begin, setup=self.setup)
        like = jax.eval_shape(begin, self._begin_key)
        if found:
            self._go_on(path, like)
        if self.course.summary is None:
            started = time.perf_counter()
            self._programs = _compiled(self.setup)
            self.course.compile_seconds += time.perf_counter() - started
            if not found:
                self.state = self._programs.begin(self._begin_key)

    def _go_on(self, path: Path, like: TrainState) -> None:
        """Takes up a run where its file was written; one that was over may go on for longer."""
        state, about = saving.load(path, like)
        self._check_same(path, about)
        self.state, self.course = jax.tree.map(jnp.array, state), _Course.of_json(about["course"])
        over = self.course.summary
        if over and over.reached_target_at is None and over.env_steps < self.max_env_steps:
            self.course.summary = None

    def _about(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.setup.train) | {"env": self.name, "seed": self.seed}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}

    def _check_same(self, path: Path, about: dict[str, Any]) -> None:
        said, stored = self._about(), about["run"]
        for name in said:
            same = said[name] == stored.get(name)
            require(same, f"{path} is a run with {name} {stored.get(name)}, got {said[name]}")

    def step(self) -> tuple[Row, float]:
        """An iteration, an evaluation if it is time, and what is written after it."""
        train, started = self.setup.train, time.perf_counter()
        self.state, report = self._programs.iterate(self.state, self._key)
        iteration = int(self.state.iteration)  # waits
        self._check_finite(report, iteration)
        searches = train.steps_per_iteration / (time.perf_counter() - started)
        env_steps = iteration * train.steps_per_iteration
        is_last = env_steps >= self.max_env_steps
        returns = None
        if is_last or iteration % train.eval_every == 0:
            returns = self._returns(2 * iteration)
        row = self._row(report, iteration, returns, searches)
        self.course.rows.append(row)
        if returns is not None:
            self._judge(returns, iteration, is_last)
        return row, min(1.0, env_steps / self.max_env_steps)

    def _judge(self, returns: Any, iteration: int, is_last: bool) -> None:
        """Keeps the best agent, ends the run where that is due, and writes everything."""
        score, reached = float(np.mean(returns)), None
        if self.target is not None and score >= self.target:
            returns = self._returns(2 * iteration + 1)
            score = min(score, float(np.mean(returns)))
            reached = self.course.rows[-1].env_steps if score >= self.target else None
        self._save_agent(LAST)
        if score >= self.course.best:
            self.course.best = score
            self._save_agent(BEST)
        if reached is not None or is_last:
            self._finish(returns, iteration, reached)
        self._save()

    def _finish(self, returns: Any, iteration: int, reached: int | None) -> None:
        if reached is None:
            best = checkpoint.load(self.folder / BEST)
            learner = dataclasses.replace(self.state.learner, params=best.params)
            returns = np.asarray(
                self._programs.evaluate(learner, self._eval_key_of(2 * iteration + 1))
            )
        course = self.course
        self.course.summary = Summary(
            mean_return=float(np.mean(returns)),
            returns=tuple(map(float, returns)),
            env_steps=course.rows[-1].env_steps,
            seconds=course.elapsed(),
            compile_seconds=course.compile_seconds,
            reached_target_at=reached,
        )

    def _returns(self, number: int) -> Any:
        return np.asarray(self._programs.evaluate(self.state.learner, self._eval_key_of(number)))

    def _eval_key_of(self, number: int) -> jax.Array:
        return jax.random.fold_in(self._eval_key, number)

    def _row(self, report: Report, iteration: int, returns: Any, searches: float) -> Row:
        train, losses = self.setup.train, jax.device_get(report.losses)
        return Row(
            env_steps=iteration * train.steps_per_iteration,
            updates=iteration * train.updates,
            seconds=self.course.elapsed(),
            mean_return=None if returns is None else float(np.mean(returns)),
            least_return=None if returns is None else float(np.min(returns)),
            played_return=float(report.score) if int(report.episodes) else None,
            loss=float(losses.total),
            latent_loss=float(losses.latent),
            reward_loss=float(losses.reward),
            policy_loss=float(losses.policy),
            value_loss=float(losses.value),
            entropy=float(losses.entropy),
            searches_per_second=searches,
        )

    def _save_agent(self, name: str) -> None:
        params = jax.device_get(self.state.learner.params)
        environment = getattr(self.setup.env, "played_as", None)
        checkpoint.save(self.folder / name, Checkpoint(self.setup.model, params, environment))

    def _save(self) -> None:
        rows, course = self.course.rows, self.course
        saving.save(
            self.folder / STATE, self.state, {"run": self._about(), "course": course.as_json()}
        )
        curves.write_csv(self.folder / CURVE, rows)
        if course.summary is not None:
            title = f"{self.name}, seed {self.seed}"
            curves.draw(self.folder / PICTURE, rows, title, self.target)

    def _check_finite(self, report: Report, iteration: int) -> None:
        failed_at = int(self.state.failed_at)
        if failed_at < 0 and bool(report.finite):
            return
        what = f"update {failed_at} of iteration" if failed_at >= 0 else "a search in iteration"
        path = self.folder / FAILURE
        batch = None
        if failed_at >= 0:
            batch = jax.jit(functools.partial(loop.failed_batch, setup=self.setup))(
                self.state, self._key
            )
        with contextlib.suppress(OSError):
            saving.save(path, {"learner": self.state.learner, "batch": batch}, self._about())
        raise NotFiniteError(
            f"{what} {iteration} met NaN or infinity: its weights"
            f"{'' if batch is None else ' and its batch'} are in {path}",
            path,
        )
