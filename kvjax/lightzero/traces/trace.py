"""Recorded answers of LightZero's world model (`.npz`), as `kvjax verify` replays them.

Shapes: B environments, E embedding size, A actions, S support bins, N simulations per step.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.base.values import is_number
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.traces import archive, npz
from kvjax.model.step import FIRST_STEP
from kvjax.model.world_model import Params

Array = np.ndarray[Any, Any]

_COUNTS = ("heads", "ctx", "envs", "steps", "sims")
_SIZES = {"layers": "num_layers", "embed": "embed_dim", "actions": "num_actions"}
"""What may be said besides, and must be what the weights are."""

_SUPPORT = "support"
_OTHER_COUNTS = (*_SIZES, _SUPPORT, "blocks", "simnorm_group")

_LAST_TIMESTEP = 2**29
"""Positions are twice a step's number and must fit in 32 bits."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """A world-model trace: a model, what it was asked step by step, and what it answered."""

    config: WorldModelConfig
    params: Params
    num_envs: int  # B
    num_steps: int
    num_simulations: int  # N
    pads_are_read: bool  # release 0.2.0 attends to its zero padding
    arrays: dict[str, Array]

    def step(self, index: int) -> dict[str, Array]:
        """Arrays of one environment step by their names in the file."""
        prefix = f"step{index}/"
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def steps(self) -> Iterator[dict[str, Array]]:
        """All steps in order."""
        return (self.step(index) for index in range(self.num_steps))


def read(path: str | Path) -> Trace:
    """Reads a world-model trace.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no trace, is damaged, incomplete or too large, says a count that is
        none or an index out of range, or needs a window mode that is not supported.
    """
    path = Path(path)
    arrays = archive.read_arrays(path)
    described = _read_description(path, arrays)
    config, params = load(
        _weights(path, arrays),
        num_heads=described["heads"],
        context_length=described["ctx"],
        window_mode=archive.window_mode(path, described),
        simnorm_group=described.get("simnorm_group", 8),
        rope_theta=described.get("rope_theta", 10000.0),
    )
    trace = Trace(
        config=config,
        params=params,
        num_envs=described["envs"],
        num_steps=described["steps"],
        num_simulations=described["sims"],
        pads_are_read="0.2.0" in described["source"],
        arrays=arrays,
    )
    _check_sizes(path, described, trace)
    for index in range(trace.num_steps):
        _check_step(path, trace, f"step{index}/")
    return trace


def _read_description(path: Path, arrays: dict[str, Array]) -> dict[str, Any]:
    found = archive.kind(path, arrays)
    if found != "world model":
        raise ValueError(f"{path} is a trace of {found}, not of a world model")
    described = archive.read_config(path, arrays)
    archive.check_fields(path, archive.DESCRIPTION, described, {*_COUNTS, "source"})
    for name in (*_COUNTS, *(name for name in _OTHER_COUNTS if name in described)):
        archive.count(path, archive.DESCRIPTION, described, name)
    if not isinstance(described["source"], str):
        raise ValueError(f"{path}: config says source {described['source']!r}, expected text")
    theta = described.get("rope_theta", 1.0)
    if not is_number(theta):
        raise ValueError(f"{path}: config says rope_theta {theta!r}, expected a finite number")
    return described


def _weights(path: Path, arrays: dict[str, Array]) -> dict[str, Array]:
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(f"{path} holds no weights: it is no world-model trace")
    for name, array in weights.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {prefix}{name} holds {array.dtype}, expected numbers")
    return weights


def _check_sizes(path: Path, described: dict[str, Any], trace: Trace) -> None:
    """What the description says must be what the weights are, and what a replay has room for."""
    config = trace.config
    sizes = {name: getattr(config, field) for name, field in _SIZES.items()}
    for name, size in (sizes | {_SUPPORT: config.support_size}).items():
        if described.get(name, size) != size:
            raise ValueError(f"{path}: config says {name} {described[name]}, the weights {size}")
    windows = trace.num_envs * (trace.num_simulations + 1)
    token = 4 * math.prod(config.window.token_shape)
    what = f"{path}: {windows:,} windows of {config.context_length:,} tokens are too large"
    npz.check_bytes(what, windows * config.context_length * token)


def _check_step(path: Path, trace: Trace, prefix: str) -> None:
    """Every array of a step must be there, in its shape, finite and in range."""
    config, rows, sims = trace.config, trace.num_envs, trace.num_simulations
    by_row, by_simulation, node = (rows,), (sims, rows), np.arange(sims)[:, None]
    indices: dict[str, tuple[tuple[int, ...], int, int | Array]] = {
        "action": (by_row, FIRST_STEP, config.num_actions - 1),
        "timestep": (by_row, 0, _LAST_TIMESTEP),
        "length": (by_row, 1, config.context_length),
        "parent": (by_simulation, 0, node),
        "sim_action": (by_simulation, 0, config.num_actions - 1),
        "depth": (by_simulation, 1, node + 1),
    }
    numbers: dict[str, tuple[int, ...]] = {}
    numbers |= dict.fromkeys(("prev_latent", "latent"), (rows, config.embed_dim))
    numbers |= {"policy_logits": (rows, config.num_actions)}
    numbers |= {"value_logits": (rows, config.support_size)}
    numbers |= {"next_latent": (sims, rows, config.embed_dim)}
    numbers |= {"sim_policy_logits": (sims, rows, config.num_actions)}
    bins = (sims, rows, config.support_size)
    numbers |= dict.fromkeys(("reward_logits", "sim_value_logits"), bins)
    for name, (shape, first, last) in indices.items():
        archive.check_indices(path, trace.arrays, prefix + name, shape, first, last)
    for name, shape in numbers.items():
        archive.check_array(path, trace.arrays, prefix + name, shape)
    for row in range(rows):
        _check_window(path, trace, prefix, row)


def _check_window(path: Path, trace: Trace, prefix: str, row: int) -> None:
    """Keys and values of a row, of as many tokens both."""
    layers, _, heads, size = trace.config.window.token_shape
    keys = trace.arrays.get(f"{prefix}k{row}")
    tokens = keys.shape[2] if keys is not None and keys.ndim == 4 else 1
    for part in ("k", "v"):
        shape = (layers, heads, tokens, size)
        archive.check_array(path, trace.arrays, f"{prefix}{part}{row}", shape)
