"""Recorded answers of LightZero's world model (`.npz`), as `kvjax verify` replays them.

Shapes: B environments, E embedding size, A actions, S support bins, N simulations per step.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config import WorldModelConfig
from kvjax.lightzero import archive, checkpoint
from kvjax.types import Params

Array = np.ndarray[Any, Any]

_INPUTS = ("action", "prev_latent", "latent", "timestep", "parent", "sim_action", "depth")
_ANSWERS = ("policy_logits", "value_logits", "length")
_SIMULATION_ANSWERS = ("reward_logits", "next_latent", "sim_policy_logits", "sim_value_logits")


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
      ValueError: the file is no trace, is incomplete, or needs a window mode that is not supported.
    """
    path = Path(path)
    arrays = archive.read_arrays(path)
    described = _read_description(path, arrays)
    weights = {
        name.removeprefix("weights/"): array
        for name, array in arrays.items()
        if name.startswith("weights/")
    }
    if not weights:
        raise ValueError(f"{path} holds no weights: it is no world-model trace")
    config, params = checkpoint.load(
        weights,
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
    _check_complete(path, trace)
    return trace


def _read_description(path: Path, arrays: dict[str, Array]) -> dict[str, Any]:
    found = archive.kind(path, arrays)
    if found != "world model":
        raise ValueError(f"{path} is a trace of {found}, not of a world model")
    described = archive.read_config(path, arrays)
    names = {"heads", "ctx", "envs", "steps", "sims", "source"}
    archive.check_fields(path, "config", described, names)
    return described


def _check_complete(path: Path, trace: Trace) -> None:
    config, rows, sims = trace.config, trace.num_envs, trace.num_simulations
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= dict.fromkeys(("action", "timestep", "length"), (rows,))
    shapes |= dict.fromkeys(("parent", "sim_action", "depth"), (sims, rows))
    shapes |= {"latent": (rows, config.embed_dim)}
    shapes |= {"prev_latent": (rows, config.embed_dim)}
    shapes |= {"next_latent": (sims, rows, config.embed_dim)}
    shapes |= {"policy_logits": (rows, config.num_actions)}
    shapes |= {"sim_policy_logits": (sims, rows, config.num_actions)}
    shapes |= {"value_logits": (rows, config.support_size)}
    bins = (sims, rows, config.support_size)
    shapes |= {"reward_logits": bins, "sim_value_logits": bins}
    for index, step in enumerate(trace.steps()):
        for name in (*_INPUTS, *_ANSWERS, *_SIMULATION_ANSWERS):
            if name not in step:
                raise ValueError(f"{path}: step{index}/{name} is missing")
            if step[name].shape != shapes[name]:
                raise ValueError(
                    f"{path}: step{index}/{name} has shape {step[name].shape},"
                    f" expected {shapes[name]}"
                )
