"""Recorded searches of LightZero: whole trees, and episodes that an agent played.

Shapes: A actions, N simulations, T steps of an episode.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config import MAX_SIMULATIONS, EnvironmentConfig, SearchConfig, WindowMode
from kvjax.lightzero.traces import archive

Array = np.ndarray[Any, Any]

NOISE_FRACTION = 0.25
"""Weight of the noise that a tree trace holds."""

_TREE_FIELDS = {"actions", "simulations", "discount", "noise"}
_EPISODE_FIELDS = {
    "simulations",
    "discount",
    "seeds",
    "env",
    "obs_scale",
    "num_heads",
    "context_length",
    "support",
}


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
    arrays = archive.read_arrays(path)
    if archive.TREES not in arrays:
        raise ValueError(f"{path} holds no {archive.TREES}: it is no tree trace")
    described = archive.read_json(path, arrays, archive.TREES)
    if not isinstance(described, list) or not described:
        raise ValueError(
            f"{path}: {archive.TREES} must be a JSON list of trees, got {reprlib.repr(described)}"
        )
    return tuple(_tree(path, arrays, index, tree) for index, tree in enumerate(described))


def _tree(
    path: str | Path, arrays: dict[str, Array], index: int, described: dict[str, Any]
) -> RecordedTree:
    where = f"{archive.TREES}[{index}]"
    archive.check_fields(path, where, described, _TREE_FIELDS)
    actions = archive.count(path, where, described, "actions")
    config = _search_config(path, described)
    edges = (config.num_simulations + 1, actions)
    shapes = {"root_logits": (actions,), "reward": edges, "value": edges}
    shapes |= {"logits": (*edges, actions), "root_value": ()}
    if archive.flag(path, where, described, "noise"):
        shapes["noise"] = (actions,)
    found = {
        name: archive.check_array(path, arrays, f"{index}/{name}", shape)
        for name, shape in shapes.items()
    }
    found["visits"] = _visits(path, arrays, f"{index}/visits", (actions,))
    legal = archive.check_array(path, arrays, f"{index}/legal", (actions,)).astype(bool)
    if not legal.any():
        raise ValueError(f"{path}: {index}/legal allows no action")
    return RecordedTree(
        config=config,
        root_logits=found["root_logits"].astype(np.float32),
        legal=legal,
        noise=found.get("noise"),
        reward=found["reward"],
        value=found["value"],
        logits=found["logits"],
        visits=found["visits"],
        root_value=float(found["root_value"]),
    )


def _visits(path: str | Path, arrays: dict[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    return archive.check_indices(path, arrays, name, shape, 0, MAX_SIMULATIONS)


def _search_config(path: str | Path, described: dict[str, Any]) -> SearchConfig:
    try:
        return SearchConfig(described["simulations"], discount=described["discount"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_episodes(path: str | Path) -> EpisodeTrace:
    """Reads an episode trace.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no episode trace or is incomplete.
    """
    arrays = archive.read_arrays(path)
    described = archive.read_config(path, arrays)
    where = archive.DESCRIPTION
    archive.check_fields(path, where, described, _EPISODE_FIELDS)
    num_heads, context_length = (
        archive.count(path, where, described, name) for name in ("num_heads", "context_length")
    )
    search = _search_config(path, described)
    episodes = tuple(_episode(path, arrays, seed) for seed in _seeds(path, described))
    for other in episodes[1:]:
        _check_alike(path, episodes[0], other)
    return EpisodeTrace(
        search=search,
        environment=_environment(path, described),
        num_heads=num_heads,
        context_length=context_length,
        support=_support(path, described),
        window_mode=archive.window_mode(path, described),
        episodes=episodes,
    )


def _seeds(path: str | Path, described: dict[str, Any]) -> list[int]:
    seeds: list[int] = described["seeds"]
    numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not numbers or not seeds:
        raise ValueError(f"{path}: seeds must be a list of numbers, got {reprlib.repr(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds must differ, got {reprlib.repr(seeds)}")
    return seeds


def _support(path: str | Path, described: dict[str, Any]) -> tuple[int, int]:
    match described["support"]:
        case [int(first), int(last)] if first < last:
            return first, last
    raise ValueError(
        f"{path}: support must be the first and the last bin, got"
        f" {reprlib.repr(described['support'])}"
    )


def _environment(path: str | Path, described: dict[str, Any]) -> EnvironmentConfig:
    """What was played; a name "module:environment" would import that module."""
    env_id, scale = described["env"], described["obs_scale"]
    if isinstance(env_id, str) and ":" in env_id:
        raise ValueError(f"{path}: env must name no module, got {env_id!r}")
    try:
        return EnvironmentConfig(env_id, tuple(scale) if isinstance(scale, list) else scale)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_alike(path: str | Path, first: Episode, other: Episode) -> None:
    for name in ("observations", "visits"):
        sizes = [getattr(episode, name).shape[1] for episode in (first, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{path}: {name} of seed {first.seed} are {sizes[0]} wide, of seed {other.seed}"
                f" {sizes[1]}"
            )


def _episode(path: str | Path, arrays: dict[str, Array], seed: int) -> Episode:
    prefix = f"seed{seed}"
    for name in ("obs", "visits"):
        array = arrays.get(f"{prefix}/{name}")
        if array is None:
            raise ValueError(f"{path}: {prefix}/{name} is missing")
        if array.ndim != 2 or array.size == 0:
            raise ValueError(
                f"{path}: {prefix}/{name} has shape {array.shape}, expected a row per step"
            )
    steps, num_actions = arrays[f"{prefix}/visits"].shape
    shapes: dict[str, tuple[int, ...]] = {"root_value": (steps,)}
    shapes |= {"obs": (steps, arrays[f"{prefix}/obs"].shape[1])}
    shapes |= {"policy_logits": (steps, num_actions)}
    found = {
        name: archive.check_array(path, arrays, f"{prefix}/{name}", shape)
        for name, shape in shapes.items()
    }
    actions = archive.check_indices(path, arrays, f"{prefix}/action", (steps,), 0, num_actions - 1)
    return Episode(
        seed=seed,
        observations=found["obs"].astype(np.float32),
        actions=actions.astype(np.int32),
        visits=_visits(path, arrays, f"{prefix}/visits", (steps, num_actions)),
        root_values=found["root_value"],
        policy_logits=found["policy_logits"],
    )
