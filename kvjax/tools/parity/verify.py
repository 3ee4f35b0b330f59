"""Replays a recorded LightZero trace and reports how far kvjax is from its answers.

Here are traces of a world model; `verify_trees` and `verify_episodes` have searches.

Shapes: B environments, C context_length in tokens, L layers, H heads, D head size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.lightzero.traces import npz, recording
from kvjax.lightzero.traces import trace as traces
from kvjax.mcts.inference import Inference, initial_inference, recurrent_inference
from kvjax.model import step
from kvjax.model.contexts import init_contexts
from kvjax.model.step import Prediction
from kvjax.model.unizero import UniZero, prepare
from kvjax.ops.window import Window
from kvjax.tools.parity.verify_episodes import EpisodeReport, verify_episodes
from kvjax.tools.parity.verify_trees import TreeReport, verify_trees

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
_LENGTH = "length"

TOLERANCE = 1e-4
"""Largest absolute error that counts as equal."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a replay found."""

    trace: str
    route: str
    max_abs_error: dict[str, float]  # by output; infinite where either side is not finite
    length_mismatches: int  # stored windows whose length differs; these are not compared further
    steps: int
    simulations: int
    ok: bool  # no length differs and every error is within the tolerance

    def as_json(self) -> dict[str, Any]:
        """Fields for `--json`; an infinite error is null."""
        errors = {k: e if math.isfinite(e) else None for k, e in self.max_abs_error.items()}
        return dataclasses.asdict(self) | {"max_abs_error": errors}


def verify(
    path: str | Path,
    *,
    route: str = "tree",
    tolerance: float | None = None,
    agent: str | Path | None = None,
) -> Report | TreeReport | EpisodeReport:
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
    """Replays a world-model trace; arguments and errors are those of `verify`."""
    trace = traces.read(path)
    errors = dict.fromkeys(OUTPUTS, 0.0)
    mismatches = 0
    replay = {"tree": _replay_tree, "store": _replay_store}[route]
    for name, ours, theirs in replay(trace):
        if name == _LENGTH:
            mismatches += int(np.sum(ours != theirs))
        else:
            errors[name] = max(errors[name], _max_abs_error(ours, theirs))
    within = all(error <= tolerance for error in errors.values())
    return Report(
        trace=str(path),
        route=route,
        max_abs_error=errors,
        length_mismatches=mismatches,
        steps=trace.num_steps,
        simulations=trace.num_steps * trace.num_simulations,
        ok=within and mismatches == 0,
    )


def _max_abs_error(ours: Array, theirs: Array) -> float:
    error = float(np.max(np.abs(ours.astype(np.float64) - theirs), initial=0.0))
    return error if math.isfinite(error) else math.inf


def _replay_tree(trace: traces.Trace) -> Iterator[Comparison]:
    config = trace.config
    model, imagine = prepare(trace.params, config=config), _recurrent_step(trace)
    root_step = jax.jit(functools.partial(step.root_step, config=config))
    window = init_contexts(config, trace.num_envs).window
    for recorded in trace.steps():
        action, timestep = (recorded[name].astype(np.int32) for name in ("action", "timestep"))
        window, policy, value = root_step(model, window, action, recorded["latent"], timestep)
        yield from _compare_root(window, policy, value, recorded)
        nodes = [window]
        for index in range(trace.num_simulations):
            parents = _gather(nodes, recorded["parent"][index])
            action, depth = (
                recorded[name][index].astype(np.int32) for name in ("sim_action", "depth")
            )
            child, prediction = imagine(model, parents, action, depth, timestep)
            nodes.append(child)
            yield from _compare_prediction(prediction, recorded, index)


def _recurrent_step(trace: traces.Trace) -> Any:
    """The batched recurrent step; for release 0.2.0 each row reads the padding of its batch."""

    @jax.jit
    def imagine(model: UniZero, window: Window, *rows: Any) -> Any:
        pads = jnp.max(window.length) - window.length if trace.pads_are_read else None
        return step.recurrent_step(model, window, *rows, config=trace.config, zero_keys=pads)

    return imagine


def _gather(nodes: list[Window], parent: Array) -> Window:
    """Row b of node `parent[b]`, for each b."""
    rows = [jax.tree.map(lambda x, b=b: x[b], nodes[node]) for b, node in enumerate(parent)]
    gathered: Window = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return gathered


def _replay_store(trace: traces.Trace) -> Iterator[Comparison]:
    config = trace.config
    store = stores.init_store(config, trace.num_envs, trace.num_simulations)
    rows = np.arange(trace.num_envs)
    for recorded in trace.steps():
        timestep = recorded["timestep"]
        store, out = initial_inference(
            trace.params,
            store,
            recorded["prev_latent"],
            recorded["action"],
            recorded["latent"],
            rows,
            timestep,
            config=config,
        )
        window = stores.take(store, stores.resolve(store, out.slot, jnp.asarray(rows)))
        yield from _compare_root(window, out.policy, out.value, recorded)
        latents = [recorded["latent"]]
        for index in range(trace.num_simulations):
            parent = np.stack(
                [latents[node][b] for b, node in enumerate(recorded["parent"][index])]
            )
            store, out = recurrent_inference(
                trace.params,
                store,
                parent,
                recorded["sim_action"][index],
                rows,
                recorded["depth"][index],
                timestep,
                config=config,
                pads_are_read=trace.pads_are_read,
                miss_policy="error",
            )
            latents.append(np.asarray(out.latent))
            yield from _compare_prediction(out, recorded, index)


def _compare_root(
    window: Window, policy: jax.Array, value: jax.Array, recorded: dict[str, Array]
) -> Iterator[Comparison]:
    yield "policy_logits", np.asarray(policy), recorded["policy_logits"]
    yield "value_logits", np.asarray(value), recorded["value_logits"]
    lengths = np.asarray(window.length)
    held = np.array([recorded[f"k{env}"].shape[2] for env in range(len(lengths))])
    # A recorded length that is not that of the recorded keys equals none.
    stored = np.where(recorded["length"] == held, held, 0)
    yield _LENGTH, lengths, stored
    for env, length in enumerate(lengths):
        if length == stored[env]:
            kv = np.asarray(window.kv[env, :length]).transpose(2, 1, 3, 0, 4)  # [2, L, H, n, D]
            yield "k", kv[0], recorded[f"k{env}"]
            yield "v", kv[1], recorded[f"v{env}"]


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
