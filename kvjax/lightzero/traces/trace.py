"""Recorded answers of LightZero's world model (`.npz`), as `kvjax verify` replays them.

Shapes: B environments, E embedding size, A actions, S support bins, N simulations per step.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvjax.base.values import is_number, require
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.traces import npz, recording
from kvjax.lightzero.traces.clip import PolicyClip
from kvjax.lightzero.traces.recording import Array, Arrays, Description
from kvjax.model.step import FIRST_STEP
from kvjax.model.world_model import Params

COUNTS = ("heads", "ctx", "envs", "steps", "sims")
ASKED = {
    "heads": "num_heads",
    "ctx": "context_length",
    "simnorm_group": "simnorm_group",
    "rope_theta": "rope_theta",
}
"""What a trace says of its model beside the weights, and fields of `WorldModelConfig`."""

GAUSSIAN = ("sigma_type", "fixed_sigma_value", "bound_type")
"""What it says of continuous actions, by the names of those fields."""

POLICY_CLIP = "policy_clip"
OF_TASK = ("task_id", "task_embed_option")
"""What a trace of one task of a multi-task model says, by the names of options of `load`."""

SIZES = {
    "layers": "num_layers",
    "embed": "embed_dim",
    "actions": "num_actions",
    "support": "support_size",
}
"""What a trace may say, and must be what the weights are."""

OTHER_COUNTS = (*SIZES, "blocks", "simnorm_group")

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
    arrays: Arrays
    policy_clip: PolicyClip | None = None  # what was done to the recorded logits of policies

    def step(self, index: int) -> Arrays:
        """Arrays of one environment step by their names in the file."""
        return recording.under(self.arrays, f"step{index}/")

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
    with recording.opened(path, "a world model") as arrays:
        described = recording.describe(arrays)
        _check_description(described)
        names = ASKED | {name: name for name in (*OF_TASK, *GAUSSIAN)}
        asked = {f: described[name] for name, f in names.items() if name in described.fields}
        weights = _weights(arrays)
        config, params = load(weights, window_mode=described.window_mode(), **asked)
        trace = Trace(
            config=config,
            params=params,
            num_envs=described["envs"],
            num_steps=described["steps"],
            num_simulations=described["sims"],
            pads_are_read="0.2.0" in described["source"],
            arrays=arrays,
            policy_clip=_policy_clip(described),
        )
        _check_sizes(described, trace)
        for index in range(trace.num_steps):
            _check_step(trace, f"step{index}/")
    return trace


def _check_description(described: Description) -> None:
    described.require(*COUNTS, "source")
    for name in (*COUNTS, *OTHER_COUNTS):
        if name in described.fields:
            described.count(name)
    described.check("source", isinstance(described["source"], str), "text")
    theta = described.fields.get("rope_theta", 1.0)
    described.check("rope_theta", is_number(theta), "a finite number")


def _policy_clip(described: Description) -> PolicyClip | None:
    said = described.fields.get(POLICY_CLIP)
    try:
        return None if said is None else PolicyClip(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config says {POLICY_CLIP} {said!r:.200}: {error}") from error


def _weights(arrays: Arrays) -> Arrays:
    weights = recording.under(arrays, "weights/")
    require(bool(weights), "it holds no weights: it is no world-model trace")
    for name, array in weights.items():
        recording.check_numbers(f"weights/{name}", array)
    return weights


def _check_sizes(described: Description, trace: Trace) -> None:
    """What the description says must be what the weights are, and what a replay has room for."""
    config = trace.config
    for name, field in SIZES.items():
        size = getattr(config, field)
        said = described.fields.get(name, size)
        require(said == size, f"config says {name} {said}, the weights {size}")
    windows = trace.num_envs * (trace.num_simulations + 1)
    token = 4 * math.prod(config.window.token_shape)
    what = f"{windows:,} windows of {config.context_length:,} tokens are too large"
    npz.check_bytes(what, windows * config.context_length * token)


def _check_step(trace: Trace, prefix: str) -> None:
    """Every array of a step must be there, in its shape, finite and in range."""
    config, rows, sims = trace.config, trace.num_envs, trace.num_simulations
    by_row, by_simulation, node = (rows,), (sims, rows), np.arange(sims)[:, None]
    size, policy, bins = config.embed_dim, config.policy_size, config.support_size
    indices: dict[str, tuple[tuple[int, ...], int, int | Array]] = {
        "timestep": (by_row, 0, _LAST_TIMESTEP),
        "length": (by_row, 1, config.context_length),
        "parent": (by_simulation, 0, node),
        "depth": (by_simulation, 1, node + 1),
    }
    numbers: dict[str, tuple[int, ...]] = {
        "prev_latent": (*by_row, size),
        "latent": (*by_row, size),
        "policy_logits": (*by_row, policy),
        "value_logits": (*by_row, bins),
        "next_latent": (*by_simulation, size),
        "reward_logits": (*by_simulation, bins),
        "sim_policy_logits": (*by_simulation, policy),
        "sim_value_logits": (*by_simulation, bins),
    }
    for name, (shape, first, last) in indices.items():
        recording.take_indices(trace.arrays, prefix + name, shape, first, last)
    for name, shape in numbers.items():
        recording.take(trace.arrays, prefix + name, shape)
    _check_actions(trace, f"{prefix}action", f"{prefix}sim_action")
    for row in range(rows):
        _check_window(trace, f"{prefix}k{row}", f"{prefix}v{row}")


def _check_actions(trace: Trace, taken: str, imagined: str) -> None:
    """Last actions [B, ..], which may start an episode, and those of simulations [N, B, ..]."""
    config, rows, sims = trace.config, trace.num_envs, trace.num_simulations
    if config.is_continuous:
        recording.take_steps(trace.arrays, taken, (rows, config.num_actions))
        recording.take(trace.arrays, imagined, (sims, rows, config.num_actions))
        return
    last = config.num_actions - 1
    recording.take_indices(trace.arrays, taken, (rows,), FIRST_STEP, last)
    recording.take_indices(trace.arrays, imagined, (sims, rows), 0, last)


def _check_window(trace: Trace, *names: str) -> None:
    """Keys and values of a row, of as many tokens both."""
    layers, _, heads, size = trace.config.window.token_shape
    keys = trace.arrays.get(names[0])
    tokens = keys.shape[2] if keys is not None and keys.ndim == 4 else 1
    for name in names:
        recording.take(trace.arrays, name, (layers, heads, tokens, size))
