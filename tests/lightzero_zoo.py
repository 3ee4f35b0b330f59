"""LightZero's UniZero configurations, each built with its own classes and tried with kvjax.

Works on whichever LightZero is imported: release 0.2.0 as it is installed, or a clone of main whose
folder comes first on the path. Weights are random; widths, depths and encoders are the files' own.
"""

import ast
import contextlib
import copy
import dataclasses
import importlib
import importlib.machinery
import inspect
import io
import json
import logging
import runpy
import sys
import tempfile
import types
import warnings
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import kvjax
from kvjax import lightzero
from kvjax.model import unizero
from kvjax.model.contexts import advance
from kvjax.model.step import first_actions
from kvjax.tools.parity.verify import verify

ROWS, STEPS, SIMULATIONS = 2, 7, 3
RESTART = 5  # the step at which all rows begin anew
TOLERANCE = 1e-4
NOISE = 0.05

SEARCH = kvjax.SearchConfig(num_simulations=SIMULATIONS)
LEAST = {"env_num": ROWS, "num_simulations": 10, "device": "cpu"}
"""Settings that no weight depends on, made small."""

UNSAID = {
    "final_norm_option_in_obs_head": "LayerNorm",
    "final_norm_option_in_encoder": "LayerNorm",
    "task_embed_option": None,
    "lora_r": 0,
}
"""What main's classes read where neither its policies nor a configuration say it."""

CLASSES = {
    "unizero": ("unizero_model", "UniZeroModel"),
    "sampled_unizero": ("sampled_unizero_model", "SampledUniZeroModel"),
    "unizero_ppo": ("unizero_ppo_model", "UniZeroPPOModel"),
    "unizero_multitask": ("unizero_model_multitask", "UniZeroMTModel"),
    "sampled_unizero_multitask": ("sampled_unizero_model_multitask", "SampledUniZeroMTModel"),
}
"""Module and class of the model that a policy trains."""


STAND_INS = (
    *("transformers", "transformers.modeling_outputs", "nltk", "nltk.translate"),
    *("nltk.translate.bleu_score", "sklearn", "sklearn.manifold", "sklearn.cluster"),
)
"""What main imports for language models and pictures."""


class Captured(Exception):  # noqa: N818
    """What a configuration file would train."""


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


def files():
    """The configurations of the LightZero that is imported, by name."""
    (root,) = importlib.import_module("zoo").__path__
    found = sorted(Path(root).rglob("*unizero*_config.py"))
    return {x.stem.removesuffix("_config"): x for x in found if "tests" not in x.parts}


def settings(file):
    """The model's settings in a file, those of the policy's class included, and its policy.

    Main's sampled and multi-task classes read settings that only the class of "unizero" has.
    """
    said, policy = _trained_by(file)
    own = {} if policy.endswith("_ppo") else _defaults(policy)  # its class changes none
    model = _merged(_merged(_defaults("unizero"), own), said)
    model["world_model_cfg"] = UNSAID | model["world_model_cfg"] | LEAST
    return model, policy


def _trained_by(file):
    """Runs a file up to where it would train."""

    def train(configs, *args, **options):
        raise Captured(configs)

    def offered(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return train

    entry = types.ModuleType("lzero.entry")
    entry.__getattr__ = offered
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(mock.patch("ding.utils.DDPContext", contextlib.nullcontext))
        stack.callback(setattr, sys, "argv", sys.argv)
        stack.callback(sys.modules.__setitem__, entry.__name__, sys.modules.get(entry.__name__))
        sys.argv, sys.modules[entry.__name__] = [str(file)], entry
        try:
            runpy.run_path(str(file), run_name="__main__")
        except Captured as captured:
            (configs,) = captured.args
            main, create = configs[0][1] if isinstance(configs[0], list | tuple) else configs
            return main.policy.model, create.policy.type
    raise ValueError(f"{file} trains nothing")


def _defaults(policy):
    """The model's settings in a policy's class, read from its source: it imports much."""
    (root,) = importlib.util.find_spec("lzero").submodule_search_locations
    tree = ast.parse((Path(root) / "policy" / f"{policy}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    config = next(x.value for x in nodes if getattr(x.targets[0], "id", None) == "config")
    return eval(compile(ast.Expression(config), policy, "eval"), {"dict": dict, "int": int})[
        "model"
    ]


def _merged(default, said):
    both = dict(default)
    for name, value in said.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = _merged(both[name], value) if nested else value
    return both


def build(model, policy):
    """A model with random weights, and the patches that it took."""
    import torch
    from easydict import EasyDict

    name, class_name = CLASSES[policy]
    torch.set_num_threads(1)
    with quiet(), torch.no_grad():
        torch.manual_seed(0)
        module, patches = importlib.import_module(f"lzero.model.{name}"), set()
        try:
            made = getattr(module, class_name)(**EasyDict(model))
        except Exception:  # LightZero's own
            with patched(importlib.import_module("lzero.model.unizero_model")) as patches:
                made = getattr(module, class_name)(**EasyDict(model))
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=NOISE)
        if hasattr(made.world_model, "pos_emb"):  # else positions are rotary
            made.world_model.precompute_pos_emb_diff_kv()
    return made.eval(), ", ".join(sorted(patches))


@contextlib.contextmanager
def patched(module):
    """Lets a module of LightZero make what it cannot make as it stands; tells what was needed."""
    patches = set()
    with contextlib.ExitStack() as stack:
        for name in ("RepresentationNetworkMLP", "VectorDecoderForMemoryEnv"):
            if hasattr(module, name):
                made = _without_unknown(getattr(module, name), patches)
                stack.enter_context(mock.patch.object(module, name, made))
        if hasattr(module, "Tokenizer"):
            made = _with_lpips(module.Tokenizer, patches)
            stack.enter_context(mock.patch.object(module, "Tokenizer", made))
        yield patches


def _without_unknown(made, patches):
    known = inspect.signature(made).parameters

    def make(*args, **options):
        if "output_shape" in options and "output_dim" in known:
            patches.add(f"`output_dim` of {made.__name__}")
            options["output_dim"] = options.pop("output_shape")
        unknown = options.keys() - known.keys()
        patches.update(f"no `{name}` of {made.__name__}" for name in unknown)
        return made(*args, **{name: options[name] for name in options.keys() - unknown})

    return make


def _with_lpips(made, patches):
    def make(*args, **options):
        import torch

        tokenizer = made(*args, **options)
        if "lpips" in vars(tokenizer) and tokenizer.lpips is None:
            patches.add("an empty `lpips`")
            tokenizer.lpips = torch.nn.Identity()
        return tokenizer

    return make


@contextlib.contextmanager
def quiet():
    """Swallows what LightZero says, and undoes what it does to logging."""
    root, sink = logging.getLogger(), io.StringIO()
    level, handlers = root.level, root.handlers[:]
    try:
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


class Walk:
    """Random observations and actions for a model."""

    def __init__(self, model):
        self.model, self.rng = model, np.random.default_rng(0)
        self.actions = model["action_space_size"]
        self.is_continuous = model["world_model_cfg"].get("continuous_action_space", False)

    def observation(self):
        shape = self.model["observation_shape"]
        shape = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
        return self.rng.random((ROWS, *shape), np.float32)

    def action(self):
        if self.is_continuous:
            return self.rng.uniform(-1, 1, (ROWS, self.actions)).astype(np.float32)
        return self.rng.integers(self.actions, size=ROWS)


def drive(torch_model, model):
    """Root steps, each with simulations of random parents: what was asked, and the answers."""
    import torch

    walk, steps = Walk(model), []
    last = torch.tensor(walk.observation())
    for step in range(STEPS):
        action = [-1] * ROWS if step in (0, RESTART) else list(walk.action())
        seen, time = walk.observation(), np.full(ROWS, step % RESTART)
        now = torch.tensor(seen)
        out = torch_model.initial_inference(last, action, now, time)
        steps.append((seen, np.array(action), out))
        last, nodes = now, [out.latent_state.numpy()]
        for index in range(SIMULATIONS):
            chosen = walk.rng.integers(len(nodes), size=ROWS)
            parents = np.stack([nodes[node][row] for row, node in enumerate(chosen)])
            asked = parents, torch.tensor(walk.action())
            out = torch_model.recurrent_inference([asked], index, [1] * ROWS, time)
            nodes.append(out.latent_state.numpy())
    return steps


def loads(torch_model, model, folder):
    """Reads the weights."""
    config, _ = lightzero.load(torch_model)
    return f"{config.embed_dim} x {config.num_layers}"


def searches(torch_model, model, folder):
    """Plays along by the observations alone: the largest error of the root's policy; searches."""
    config, params = lightzero.load(torch_model)
    import torch

    with torch.no_grad(), quiet():
        steps = drive(torch_model, model)
    model, contexts, worst = unizero.prepare(params, config=config), None, 0.0
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
    path = Path(folder) / "trace.npz"
    with quiet():
        lightzero.record_trace(torch_model, path, steps=STEPS, simulations=SIMULATIONS, rows=ROWS)
    report = verify(path)
    if not report.ok:
        raise AssertionError(report)
    return f"{max(report.found['max_abs_error'].values()):.0e}"


def attaches(torch_model, model, folder):
    """LightZero's own caches run beside: how many comparisons agreed."""
    import torch

    handle = lightzero.attach(torch_model.world_model, shadow="log")
    with torch.no_grad(), quiet():
        drive(torch_model, model)
    if handle.disagreements:
        raise AssertionError(handle.disagreements[0])
    return f"{handle.comparisons} of {handle.comparisons}"


def described(model):
    """A configuration in a few words."""
    world, shape = types.SimpleNamespace(**model["world_model_cfg"]), model["observation_shape"]
    seen = "x".join(map(str, shape)) if isinstance(shape, list | tuple) else shape
    kind = "continuous " if getattr(world, "continuous_action_space", False) else ""
    return (
        f"{world.obs_type} {seen}; {kind}{model['action_space_size']} actions;"
        f" {world.embed_dim} x {world.num_layers}, context {world.context_length}"
    )


def tried(name, file, folder):
    """A line of the table."""
    row = Row(name, "")
    try:
        model, policy = settings(file)
        row.model = described(model)
        built, row.patches = build(model, policy)
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


def _stand_in(*names):
    """Modules that main imports and no model here calls, where they are not installed."""
    absent = {x for x in names if "." not in x and importlib.util.find_spec(x) is None}
    for name in names:
        if name.partition(".")[0] in absent:
            sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))


def main():
    """Prints the rows of the LightZero that is imported, a JSON object each."""
    _stand_in(*STAND_INS)
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files().items():
            print(json.dumps(dataclasses.asdict(tried(name, file, folder))), flush=True)


if __name__ == "__main__":
    main()
