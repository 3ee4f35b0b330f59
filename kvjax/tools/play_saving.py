"""A run of episodes in a folder, from which another process goes on with the same actions.

`agent.safetensors` is the agent, `command.json` what a command line said besides, and
`run.safetensors` where the run is: what the search remembers, each environment's way, returns so
far, random numbers. That file is written whole or not at all, so that a process may be killed at
any time. One process at a time plays in a folder.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

from kvjax.base import files, tensor_files
from kvjax.base.values import require
from kvjax.config import SearchConfig
from kvjax.mcts import states
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.routes import Resumable, Step

AGENT, COMMAND, RUN = "agent.safetensors", "command.json", "run.safetensors"
_LOCK = "lock"
_SEARCH, _HOST = "search", "host"

Tensors = dict[str, np.ndarray[Any, Any]]


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[Path]:
    """A folder that is made if it is missing, without what a killed process left half written.

    Raises:
      ValueError: another process plays in it.
      OSError: it cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as lock:
        _lock(lock, folder)
        for name in (AGENT, COMMAND, RUN):
            for partial in folder.glob(f"{name}.*{files.PARTIAL}"):
                partial.unlink()
        yield folder


def _lock(file: Any, folder: Path) -> None:
    """Until the file is closed, or the process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # not on every system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process plays in {folder}") from error


def write_command(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes what JSON can say."""
    with files.replacing(folder / COMMAND) as file:
        file.write(json.dumps(content).encode())


def read_command(folder: str | Path) -> dict[str, Any]:
    """Reads what `write_command` wrote.

    Raises:
      ValueError: the folder holds no run that the command line has begun.
    """
    path = Path(folder) / COMMAND
    told = f"{folder} holds no run: kvjax play --save {folder} begins one"
    require(path.is_file(), told)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return content


def require_no_run(folder: str | Path) -> None:
    """Raises `ValueError` if a folder holds a run, or one that was killed before its first step."""
    holds = any((Path(folder) / name).is_file() for name in (COMMAND, RUN))
    told = f"{folder} holds a run already: go on with --resume {folder}, or say another folder"
    require(not holds, told)


def digest_of(agent: Checkpoint) -> str:
    """SHA-256 of weights, configuration and environment."""
    environment = agent.environment
    told = {
        "config": dataclasses.asdict(agent.config),
        "environment": None if environment is None else dataclasses.asdict(environment),
    }
    flat = flatten_dict(agent.params, sep="/")
    return tensor_files.digest_of(told, {name: np.asarray(x) for name, x in flat.items()})


def write_agent(folder: Path, agent: Checkpoint) -> None:
    """Writes the agent that plays."""
    checkpoint.save(folder / AGENT, agent)


def write_run(folder: Path, search: Any, host: Tensors, about: Mapping[str, Any]) -> None:
    """Writes where a run is.

    Args:
      search: the state of a `kvjax.tools.routes.Resumable`.
      host: arrays of any shapes.
      about: what JSON can say.
    """
    tensors, structure = states.split(search)
    named = {f"{_SEARCH}/{name}": value for name, value in tensors.items()}
    named |= {f"{_HOST}/{name}": value for name, value in host.items()}
    tensor_files.write(folder / RUN, named, {_SEARCH: structure, "about": about})


def saved_run(folder: Path) -> "SavedRun | None":
    """The run that a folder holds; None if its process was killed before the first step."""
    return SavedRun(folder) if (folder / RUN).is_file() else None


class SavedRun:
    """What `write_run` wrote.

    Raises:
      ValueError: the file is damaged, or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RUN
        description, self._tensors = states.read(self.path)
        known = description.keys() == {_SEARCH, "about"}
        require(known, f"{self.path} is no run that kvjax play has saved")
        self._structure, self.about = description[_SEARCH], description["about"]

    def search(self, like: Any) -> Any:
        """The search's state, where the arrays of `like` lie."""
        return states.joined(self.path, like, self._structure, self._part(_SEARCH))

    def host(self) -> Tensors:
        """The arrays of the host."""
        return {name: value.copy() for name, value in self._part(_HOST).items()}

    def _part(self, part: str) -> Tensors:
        start = f"{part}/"
        found = self._tensors.items()
        return {k.removeprefix(start): v for k, v in found if k.startswith(start)}


def said_of(agent: Checkpoint, search: SearchConfig, route: str, batch: int) -> dict[str, Any]:
    """How a run is searched, as JSON has it."""
    said = dict(dataclasses.asdict(search))
    said["q_transform"] = search.q_transform and str(search.q_transform)
    return said | {"batch": batch, "route": route, "agent digest": digest_of(agent)}


class Run(Protocol):
    """Episodes in progress."""

    def active(self) -> Sequence[Any]:
        """What is left to play; nothing at the end."""

    def told(self) -> tuple[Tensors, dict[str, Any]]:
        """Arrays, and what JSON can say, of where the run is."""

    def restore(self, arrays: Tensors, about: dict[str, Any]) -> None:
        """Goes there."""


class Keeper:
    """Saves a run, and gives it back."""

    def __init__(
        self, folder: Path, said: dict[str, Any], run: "Run", step: Step, every: int
    ) -> None:
        if not isinstance(step, Resumable):
            raise ValueError("this route cannot be saved: its step has no state")
        self._folder, self._said, self._every = folder, said, every
        self._run, self._step, self._at = run, step, 0

    def begin(self, agent: Checkpoint, saved: SavedRun | None) -> None:
        """Takes up what was saved; else saves what the run begins with."""
        if saved is None:
            write_agent(self._folder, agent)
            self.save()
            return
        for name, wanted in self._said.items():
            came = saved.about["run"].get(name)
            told = f"{saved.path} is a run with {name} {came}, got {wanted}"
            require(came == wanted, told)
        self._step.state = saved.search(self._step.state)
        with files.naming(saved.path):
            self._run.restore(saved.host(), saved.about["host"])

    def tell(self) -> None:
        """A step was made."""
        self._at += 1
        if self._at % self._every == 0 or not self._run.active():
            self.save()

    def save(self) -> None:
        """Writes where the run is now."""
        arrays, host = self._run.told()
        about = {"run": self._said, "host": host}
        write_run(self._folder, self._step.state, arrays, about)
