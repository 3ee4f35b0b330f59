"""Recorded searches of LightZero: whole trees, and episodes that an agent played.

Shapes: A actions, N simulations, T steps of an episode.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.base.values import require
from kvjax.config import (
    MAX_SIMULATIONS,
    EnvironmentConfig,
    SearchConfig,
    WindowMode,
    check_stored_env,
)
from kvjax.lightzero.traces import recording
from kvjax.lightzero.traces.recording import Array, Arrays, Description

NOISE_FRACTION = 0.25
"""Weight of the noise that a tree trace holds."""

_TREE_FIELDS = ("actions", "simulations", "discount", "noise")
_SIZES = ("num_heads", "context_length")
_EPISODE_FIELDS = (*_SIZES, "simulations", "discount", "seeds", "env", "obs_scale", "support")


@dataclasses.dataclass(frozen=True)
class RecordedTree:
    """One search whose network is a table: what expanding edge (node, action) answers.

    Node 0 is the root, simulation s makes node s + 1.
    """

    config: SearchConfig
    root_logits: Array  # [A]
    legal: Array  # [A] bool
    noise: Array | None  # [A], zero on illegal actions
    reward: Array  # [N + 1, A]
    value: Array  # [N + 1, A]
    logits: Array  # [N + 1, A, A]
    visits: Array  # [A] the answer
    root_value: float  # the answer


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode as it was played, step by step."""

    seed: int
    observations: Array  # [T, O] float32, as the model saw them
    actions: Array  # [T] int32
    visits: Array  # [T, A]
    root_values: Array  # [T]
    policy_logits: Array  # [T, A]


@dataclasses.dataclass(frozen=True)
class EpisodeTrace:
    """Episodes of one agent, and what it takes to search as it did."""

    search: SearchConfig
    environment: EnvironmentConfig
    num_heads: int
    context_length: int  # tokens
    support: tuple[int, int]
    window_mode: WindowMode
    episodes: tuple[Episode, ...]


def read_trees(path: str | Path) -> tuple[RecordedTree, ...]:
    """Reads a tree trace.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no tree trace or is incomplete.
    """
    with recording.opened(path, "trees") as arrays:
        trees = enumerate(recording.describe_trees(arrays))
        return tuple(_tree(arrays, f"{index}/", described) for index, described in trees)


def _tree(arrays: Arrays, prefix: str, described: Description) -> RecordedTree:
    described.require(*_TREE_FIELDS)
    actions, config = described.count("actions"), described.search()
    edges = (config.num_nodes, actions)
    shapes: dict[str, tuple[int, ...]] = {"root_logits": (actions,), "legal": (actions,)}
    shapes |= {"reward": edges, "value": edges, "logits": (*edges, actions), "root_value": ()}
    if described.flag("noise"):
        shapes["noise"] = (actions,)
    found = {name: recording.take(arrays, prefix + name, size) for name, size in shapes.items()}
    require(bool(found["legal"].any()), f"{prefix}legal allows no action")
    return RecordedTree(
        config=config,
        root_logits=found["root_logits"].astype(np.float32),
        legal=found["legal"].astype(bool),
        noise=found.get("noise"),
        reward=found["reward"],
        value=found["value"],
        logits=found["logits"],
        visits=_visits(arrays, prefix, (actions,)),
        root_value=float(found["root_value"]),
    )


def _visits(arrays: Arrays, prefix: str, shape: tuple[int, ...]) -> Array:
    return recording.take_indices(arrays, f"{prefix}visits", shape, 0, MAX_SIMULATIONS)


def read_episodes(path: str | Path) -> EpisodeTrace:
    """Reads an episode trace.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no episode trace or is incomplete.
    """
    with recording.opened(path, "episodes") as arrays:
        described = recording.describe(arrays)
        described.require(*_EPISODE_FIELDS)
        num_heads, context_length = map(described.count, _SIZES)
        episodes = tuple(_episode(arrays, seed) for seed in _seeds(described["seeds"]))
        for other in episodes[1:]:
            _check_alike(episodes[0], other)
        return EpisodeTrace(
            search=described.search(),
            environment=_environment(described["env"], described["obs_scale"]),
            num_heads=num_heads,
            context_length=context_length,
            support=_support(described["support"]),
            window_mode=described.window_mode(),
            episodes=episodes,
        )


def _seeds(said: Any) -> list[int]:
    numbers = isinstance(said, list) and all(type(seed) is int and seed >= 0 for seed in said)
    told = f"got {reprlib.repr(said)}"
    require(numbers and bool(said), f"seeds must be a list of numbers, {told}")
    require(len(set(said)) == len(said), f"seeds must differ, {told}")
    return list(said)


def _support(said: Any) -> tuple[int, int]:
    match said:
        case [int(first), int(last)] if first < last:
            return first, last
    raise ValueError(f"support must be the first and the last bin, got {reprlib.repr(said)}")


def _environment(env_id: Any, scale: Any) -> EnvironmentConfig:
    played = EnvironmentConfig(env_id, tuple(scale) if isinstance(scale, list) else scale)
    check_stored_env("it", env_id)
    return played


def _check_alike(first: Episode, other: Episode) -> None:
    for name in ("observations", "visits"):
        wide, others = (getattr(episode, name).shape[1] for episode in (first, other))
        told = f"{name} of seed {first.seed} are {wide} wide, of seed {other.seed} {others}"
        require(wide == others, told)


def _episode(arrays: Arrays, seed: int) -> Episode:
    prefix = f"seed{seed}/"
    _, size = _row_per_step(arrays, f"{prefix}obs")
    steps, actions = _row_per_step(arrays, f"{prefix}visits")
    taken = recording.take_indices(arrays, f"{prefix}action", (steps,), 0, actions - 1)
    return Episode(
        seed=seed,
        observations=recording.take(arrays, f"{prefix}obs", (steps, size)).astype(np.float32),
        actions=taken.astype(np.int32),
        visits=_visits(arrays, prefix, (steps, actions)),
        root_values=recording.take(arrays, f"{prefix}root_value", (steps,)),
        policy_logits=recording.take(arrays, f"{prefix}policy_logits", (steps, actions)),
    )


def _row_per_step(arrays: Arrays, name: str) -> tuple[int, int]:
    """The shape of an array, not empty, whose rows are steps."""
    require(name in arrays, f"{name} is missing")
    match arrays[name].shape:
        case (rows, columns) if rows and columns:
            return rows, columns
    raise ValueError(f"{name} has shape {arrays[name].shape}, expected a row per step")
