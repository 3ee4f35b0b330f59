"""Recorded searches of LightZero: whole trees, and episodes that an agent played.

Shapes: A actions, N simulations, T steps of an episode.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config import EnvironmentConfig, SearchConfig, WindowMode
from kvjax.lightzero import archive

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
        raise ValueError(f"{path}: {archive.TREES} must be a JSON list of trees, got {described!r}")
    return tuple(_tree(path, arrays, index, tree) for index, tree in enumerate(described))


def _tree(
    path: str | Path, arrays: dict[str, Array], index: int, described: dict[str, Any]
) -> RecordedTree:
    archive.check_fields(path, f"{archive.TREES}[{index}]", described, _TREE_FIELDS)
    config = _search_config(path, described)
    actions, nodes = described["actions"], config.num_simulations + 1
    edges = (nodes, actions)
    shapes = {"root_logits": (actions,), "legal": (actions,), "reward": edges, "value": edges}
    shapes |= {"logits": (*edges, actions), "visits": (actions,), "root_value": ()}
    if described["noise"]:
        shapes["noise"] = (actions,)
    found = {
        name: archive.check_array(path, arrays, f"{index}/{name}", shape)
        for name, shape in shapes.items()
    }
    legal = found["legal"].astype(bool)
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
    archive.check_fields(path, archive.DESCRIPTION, described, _EPISODE_FIELDS)
    seeds = described["seeds"]
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"{path}: seeds must be a list of numbers, got {seeds!r}")
    first, last = described["support"]
    return EpisodeTrace(
        search=_search_config(path, described),
        environment=EnvironmentConfig(described["env"], tuple(described["obs_scale"])),
        num_heads=described["num_heads"],
        context_length=described["context_length"],
        support=(first, last),
        window_mode=archive.window_mode(path, described),
        episodes=tuple(_episode(path, arrays, seed) for seed in seeds),
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
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"obs": (steps, arrays[f"{prefix}/obs"].shape[1]), "visits": (steps, num_actions)}
    shapes |= {"action": (steps,), "root_value": (steps,), "policy_logits": (steps, num_actions)}
    found = {
        name: archive.check_array(path, arrays, f"{prefix}/{name}", shape)
        for name, shape in shapes.items()
    }
    action = found["action"]
    if ((action < 0) | (action >= num_actions)).any():
        raise ValueError(f"{path}: {prefix}/action must be in 0 .. {num_actions - 1}")
    return Episode(
        seed=seed,
        observations=found["obs"].astype(np.float32),
        actions=action.astype(np.int32),
        visits=found["visits"],
        root_values=found["root_value"],
        policy_logits=found["policy_logits"],
    )
