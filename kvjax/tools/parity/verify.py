"""Replays a recorded LightZero trace and reports how far kvjax is from its answers.

Here are traces of a world model; `verify_trees` and `verify_episodes` have searches.

Shapes: B environments, C context_length in tokens, L layers, H heads, D head size.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax import store as stores
from kvjax.lightzero.traces import npz, recording
from kvjax.lightzero.traces import trace as traces
from kvjax.mcts.inference import Inference
from kvjax.model.step import Prediction
from kvjax.ops.window import Window
from kvjax.tools.parity.nodes import Carried, Stored
from kvjax.tools.parity.report import Report
from kvjax.tools.parity.verify_episodes import verify_episodes
from kvjax.tools.parity.verify_trees import verify_trees

Array = np.ndarray[Any, Any]
Comparison = tuple[str, Array, Array]
"""Name of an output, kvjax's value, the recorded value."""

OUTPUTS = (
    "policy_logits",
    "value_logits",
    "k",
    "v",
    "reward_logits",
    "next_latent",
    "sim_policy_logits",
    "sim_value_logits",
)
_POLICIES = ("policy_logits", "sim_policy_logits")
_LENGTH = "length"

TOLERANCE = 1e-4
"""Largest absolute error that counts as equal."""


def verify(
    path: str | Path,
    *,
    route: str = "tree",
    tolerance: float | None = None,
    agent: str | Path | None = None,
) -> Report:
    """Replays a trace of any kind.

    Args:
      path: a trace, see `kvjax.lightzero.traces.recording`.
      route: "tree" finds each parent by its node index and carries the root windows from step to
        step; "store" looks both up by their latents, and a tree is the host's.
      tolerance: largest error that counts as equal: absolute, 1e-4, for a world model's answers;
        relative, for root values: 1e-5 of trees, 1e-4 of episodes.
      agent: who played an episode trace, see `kvjax.tools.parity.verify_episodes.verify_episodes`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a trace that can be replayed, a tolerance that is no finite number >= 0, or
        an agent for a trace that brings its own network.
    """
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, got {tolerance}")
    given = {} if tolerance is None else {"tolerance": tolerance}
    kind = recording.kind(path, npz.read_arrays(path))
    if kind == "episodes":
        return verify_episodes(path, route=route, agent=agent, **given)
    if agent is not None:
        raise ValueError(f"{path} is a trace of {kind} and brings its own network: no checkpoint")
    if kind == "trees":
        return verify_trees(path, route=route, **given)
    return verify_world_model(path, route=route, **given)


def verify_world_model(
    path: str | Path, *, route: str = "tree", tolerance: float = TOLERANCE
) -> Report:
    """Replays a world-model trace; arguments and errors are those of `verify`.

    Returns:
      Finds `max_abs_error` by output, infinite where either side is not finite;
      `length_mismatches`, stored windows whose length differs and which are not compared further;
      `steps` and `simulations`.
    """
    trace = traces.read(path)
    clip = trace.policy_clip
    errors = dict.fromkeys(OUTPUTS, 0.0)
    mismatches = 0
    for name, ours, theirs in _replay(trace, route):
        if clip is not None and name in _POLICIES:
            ours = clip(ours)
        if name == _LENGTH:
            mismatches += int(np.sum(ours != theirs))
        else:
            errors[name] = max(errors[name], _max_abs_error(ours, theirs))
    found = {
        "max_abs_error": errors,
        "length_mismatches": mismatches,
        "steps": trace.num_steps,
        "simulations": trace.num_steps * trace.num_simulations,
    }
    within = all(error <= tolerance for error in errors.values())
    return Report(str(path), route, found, ok=within and mismatches == 0)


def _max_abs_error(ours: Array, theirs: Array) -> float:
    error = float(np.max(np.abs(ours.astype(np.float64) - theirs), initial=0.0))
    return error if math.isfinite(error) else math.inf


def _replay(trace: traces.Trace, route: str) -> Iterator[Comparison]:
    nodes = _NODES[route](trace)
    for recorded in trace.steps():
        asked = (recorded[name] for name in ("prev_latent", "action", "latent", "timestep"))
        policy, value = nodes.observe(*asked)
        yield from _compare_root(nodes.roots, policy, value, recorded)
        for index in range(trace.num_simulations):
            edge = (recorded[name][index] for name in ("parent", "sim_action", "depth"))
            yield from _compare_prediction(nodes.imagine(*edge), recorded, index)


def _carried(trace: traces.Trace) -> Carried:
    pads = trace.pads_are_read
    return Carried(trace.params, trace.config, trace.num_envs, pads_are_read=pads)


def _stored(trace: traces.Trace) -> Stored:
    store = stores.init_store(trace.config, trace.num_envs, trace.num_simulations)
    options: dict[str, Any] = {"pads_are_read": trace.pads_are_read, "miss_policy": "error"}
    return Stored(trace.params, trace.config, store, **options)


_NODES: dict[str, Callable[[traces.Trace], Carried | Stored]] = {"tree": _carried, "store": _stored}


def _compare_root(
    window: Window, policy: jax.Array, value: jax.Array, recorded: dict[str, Array]
) -> Iterator[Comparison]:
    yield "policy_logits", np.asarray(policy), recorded["policy_logits"]
    yield "value_logits", np.asarray(value), recorded["value_logits"]
    lengths, kv = np.asarray(window.length), np.asarray(window.kv)
    held = np.array([recorded[f"k{env}"].shape[2] for env in range(len(lengths))])
    # A recorded length that is not that of the recorded keys equals none.
    stored = np.where(recorded["length"] == held, held, 0)
    yield _LENGTH, lengths, stored
    for env, length in enumerate(lengths):
        if length == stored[env]:
            keys, values = kv[env, :length].transpose(2, 1, 3, 0, 4)  # [L, H, n, D] each
            yield "k", keys, recorded[f"k{env}"]
            yield "v", values, recorded[f"v{env}"]


def _compare_prediction(
    prediction: Prediction | Inference, recorded: dict[str, Array], index: int
) -> Iterator[Comparison]:
    answers = {
        "reward_logits": prediction.reward,
        "next_latent": prediction.latent,
        "sim_policy_logits": prediction.policy,
        "sim_value_logits": prediction.value,
    }
    for name, ours in answers.items():
        yield name, np.asarray(ours), recorded[name][index]
