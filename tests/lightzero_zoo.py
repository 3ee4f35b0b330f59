"""LightZero's UniZero configurations, each built with its own classes and tried with kvjax.

Works on whichever LightZero is imported: release 0.2.0 as it is installed, or a clone of main whose
folder comes first on the path. Weights are random; widths, depths and encoders are the files' own.
"""

import copy
import dataclasses
import json
import sys
import tempfile
import types
from pathlib import Path

import jax
import lightzero_building as building
import numpy as np

import kvjax
from kvjax import lightzero
from kvjax.lightzero.traces import one_task
from kvjax.model import folding
from kvjax.model.contexts import advance
from kvjax.model.step import first_actions
from kvjax.tools.parity.verify import verify

ROWS, STEPS, SIMULATIONS = building.ROWS, 7, 3
RESTART = 5  # the step at which all rows begin anew
TOLERANCE = 1e-4

SEARCH = kvjax.SearchConfig(num_simulations=SIMULATIONS)


@dataclasses.dataclass
class Row:
    """A line of the table: figures, or the words of a refusal."""

    name: str
    model: str
    patches: str = ""  # of LightZero, without which it does not build its own file
    loads: str = ""
    searches: str = ""
    verifies: str = ""
    attaches: str = ""


class Walk:
    """Random observations and actions for a model, and what it is told at each call."""

    def __init__(self, torch_model, model):
        self.model, self.rng = model, np.random.default_rng(0)
        self.actions = model.get("action_space_size")
        world = model["world_model_cfg"]
        self.is_continuous = world.get("continuous_action_space", False)
        self.latents = world["embed_dim"] if world["obs_type"] == "text" else None
        self.task = task_of(torch_model)

    def observation(self):
        shape = self.latents or self.model["observation_shape"]
        shape = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
        return self.rng.random((ROWS, *shape), np.float32)

    def action(self):
        if self.is_continuous:
            return self.rng.uniform(-1, 1, (ROWS, self.actions)).astype(np.float32)
        return self.rng.integers(self.actions, size=ROWS)


def task_of(torch_model):
    """The task that is tried, the last one; nothing where a model has one."""
    world_model = torch_model.world_model
    return {"task_id": world_model.task_num - 1} if one_task.has_tasks(world_model) else {}


def drive(torch_model, model):
    """Root steps, each with simulations of random parents: what was asked, and the answers."""
    import torch

    walk, steps = Walk(torch_model, model), []
    last = torch.tensor(walk.observation())
    for step in range(STEPS):
        action = [-1] * ROWS if step in (0, RESTART) else list(walk.action())
        seen, time = walk.observation(), np.full(ROWS, step % RESTART)
        told = walk.task or {"start_pos": time}
        now = torch.tensor(seen)
        out = torch_model.initial_inference(last, action, now, **told)
        steps.append((seen, np.array(action), out))
        last, nodes = now, [out.latent_state.numpy()]
        for index in range(SIMULATIONS):
            chosen = walk.rng.integers(len(nodes), size=ROWS)
            parents = np.stack([nodes[node][row] for row, node in enumerate(chosen)])
            asked = parents, torch.tensor(walk.action())
            out = torch_model.recurrent_inference([asked], index, [1] * ROWS, **told)
            nodes.append(out.latent_state.numpy())
    return steps


def load(torch_model, model):
    """Configuration and parameters; of a text model without its encoder."""
    options = {"encoder": None} if model["world_model_cfg"]["obs_type"] == "text" else {}
    return lightzero.load(torch_model, **options, **task_of(torch_model))


def loads(torch_model, model, folder):
    """Reads the weights."""
    config, _ = load(torch_model, model)
    without = "" if config.has_encoder else ", no encoder"
    return f"{config.embed_dim} x {config.num_layers}{without}"


def searches(torch_model, model, folder):
    """Plays along by the observations alone: the largest error of the root's policy; searches."""
    config, params = load(torch_model, model)
    import torch

    with torch.no_grad(), building.quiet():
        steps = drive(torch_model, model)
    model, contexts, worst = folding.prepare(params, config=config), None, 0.0
    contexts = kvjax.init_contexts(config, ROWS)
    for seen, action, out in steps:
        before = contexts
        if action.shape != (ROWS, *config.action_shape):  # all rows begin
            action = first_actions(ROWS, config)
        contexts, policy, _ = _advance(model, contexts, seen, action, config=config)
        worst = max(worst, float(np.abs(policy - out.policy_logits.numpy()).max()))
    rng = jax.random.key(0)
    _, found = kvjax.search(model, rng, before, seen, action, config=config, search=SEARCH)
    if worst > TOLERANCE or not bool(np.all(found.finite)):
        raise AssertionError(f"policies differ by {worst:.2g}, finite {found.finite}")
    return f"{worst:.0e}"


_advance = jax.jit(advance, static_argnames=("config",))


def verifies(torch_model, model, folder):
    """Records a trace and replays it: the largest error of anything."""
    path, sizes = Path(folder) / "trace.npz", {"rows": ROWS, "steps": STEPS}
    with building.quiet():
        lightzero.record_trace(
            torch_model, path, simulations=SIMULATIONS, **sizes, **task_of(torch_model)
        )
    report = verify(path)
    if not report.ok:
        raise AssertionError(report)
    return f"{max(report.found['max_abs_error'].values()):.0e}"


def attaches(torch_model, model, folder):
    """LightZero's own caches run beside: how many comparisons agreed."""
    import torch

    handle = lightzero.attach(torch_model.world_model, shadow="log")
    with torch.no_grad(), building.quiet():
        drive(torch_model, model)
    if handle.disagreements:
        raise AssertionError(handle.disagreements[0])
    return f"{handle.comparisons} of {handle.comparisons}"


def described(model):
    """A configuration in a few words."""
    world, shape = types.SimpleNamespace(**model["world_model_cfg"]), model["observation_shape"]
    seen = "x".join(map(str, shape)) if isinstance(shape, list | tuple) else shape
    kind = "continuous " if getattr(world, "continuous_action_space", False) else ""
    tasks = f", {world.task_num} tasks" if hasattr(world, "task_num") else ""
    actions = model.get("action_space_size") or world.action_space_size_list[0]
    return (
        f"{world.obs_type} {seen}; {kind}{actions} actions;"
        f" {world.embed_dim} x {world.num_layers}, context {world.context_length}{tasks}"
    )


def tried(name, file, folder):
    """A line of the table."""
    row = Row(name, "")
    try:
        model, policy, patches = building.settings(file)
        row.model = described(model)
        built, more = building.build(model, policy)
        row.patches = ", ".join(sorted(patches | more))
    except Exception as error:  # LightZero's own
        row.loads = f"LightZero does not build it: {_line(error)}"
        return row
    for attempt in (loads, searches, verifies, attaches):
        try:
            said = attempt(copy.deepcopy(built), model, folder)
        except (ValueError, TypeError) as error:
            said = f"refused: {_line(error)}"
        setattr(row, attempt.__name__, said)
    return row


def _line(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]


def main(kept, *names):
    """Adds a row, a JSON object, to a file for each configuration that it lacks."""
    building.stand_in(*building.STAND_INS)
    path = Path(kept)
    path.touch()
    there = {json.loads(line)["name"] for line in path.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in building.files().items():
            if name not in there and (name in names or not names):
                row = json.dumps(dataclasses.asdict(tried(name, file, folder)))
                with path.open("a") as lines:
                    lines.write(f"{row}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
