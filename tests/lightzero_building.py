"""Models of LightZero's configurations, built with its own classes at random weights.

Works on whichever LightZero is imported: release 0.2.0 as it is installed, or a clone whose folder
comes first on the path. Widths, depths and encoders are the files' own.
"""

import ast
import contextlib
import importlib
import importlib.machinery
import inspect
import io
import logging
import runpy
import sys
import tempfile
import types
import warnings
from pathlib import Path
from unittest import mock

ROWS = 2
NOISE = 0.05

LEAST = {"env_num": ROWS, "num_simulations": 10, "device": "cpu"}
"""Settings that no weight depends on, made small."""

UNSAID = {
    "final_norm_option_in_obs_head": "LayerNorm",
    "final_norm_option_in_encoder": "LayerNorm",
    "encoder_type": "resnet",
    "task_embed_option": None,
    "use_task_embed": False,
    "lora_r": 0,
    "gamma": 1.0,
    "moe_in_transformer": False,
    "multiplication_moe_in_transformer": False,
    "use_normal_head": True,
    "use_moe_head": False,
    "use_softmoe_head": False,
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

BASES = {"atari_unizero_stack4_config": "zoo.atari.config.atari_unizero_config"}
"""Files that import dictionaries out of another's `main`, where nobody finds them."""

MISSING = ("exact_kv_window_reset", "rebuild_kv_window_from_tokens", "use_new_cache_manager")
"""What `WorldModelMT` reads and only `WorldModel` sets."""

TEXT_ENCODERS = ("HFLanguageRepresentationNetwork", "QwenNetwork")
LPIPS = "lzero.model.unizero_world_models.lpips"

STAND_INS = (
    *("transformers", "transformers.modeling_outputs", "nltk", "nltk.translate"),
    *("nltk.translate.bleu_score", "sklearn", "sklearn.manifold", "sklearn.cluster"),
    *("h5py", "simple_parsing", "simple_parsing.helpers"),
)
"""What main imports for language models, pictures and settings."""


class Captured(Exception):  # noqa: N818
    """What a configuration file would train."""


def files():
    """The configurations of the LightZero that is imported, by name."""
    (root,) = importlib.import_module("zoo").__path__
    root, kinds = Path(root).resolve(), ("*unizero*.py", "*_suz_*.py")
    found = {path for kind in kinds for path in root.rglob(kind)}
    return {
        path.stem.removesuffix("_config"): path
        for path in sorted(found)
        if path.parent.name in ("config", "configs")
    }


def settings(file):
    """The model's settings in a file, those of the policy's class included; policy and patches.

    Main's sampled and multi-task classes read settings that only the class of "unizero" has.
    """
    (said, policy), patches = _trained_by(file)
    own = {} if policy.endswith("_ppo") else _defaults(policy)  # its class changes none
    model = _merged(_merged(_defaults("unizero"), own), said)
    model["world_model_cfg"] = UNSAID | model["world_model_cfg"] | LEAST
    return model, policy, patches


def _trained_by(file):
    """Runs a file up to where it would train."""

    def train(configs, *args, **options):
        raise Captured(configs)

    def offered(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return train

    entry, patches = types.ModuleType("lzero.entry"), set()
    entry.__getattr__ = offered
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))  # some write where they are
        stack.enter_context(mock.patch("ding.utils.DDPContext", contextlib.nullcontext))
        stack.enter_context(_of_objects(patches))
        stack.enter_context(mock.patch.object(sys, "argv", [str(file)]))
        stack.enter_context(_instead(entry.__name__, entry))
        if file.stem in BASES:
            _publish(importlib.import_module(BASES[file.stem]))
            patches.add(f"dictionaries of {BASES[file.stem]} taken from its `main`")
        try:
            runpy.run_path(str(file), run_name="__main__")
        except Captured as captured:
            main, create = _first(captured)
            return (main.policy.model, create.policy.type), patches
    raise ValueError(f"{file} trains nothing")


def _first(captured):
    """The configuration of the first task, or the only one."""
    (configs,) = captured.args
    return configs[0][1] if isinstance(configs[0], list | tuple) else configs


def _publish(module):
    name = module.__name__.rpartition(".")[2].removesuffix("_config")
    if not hasattr(module, f"{name}_config"):
        try:
            module.main()
        except Captured as captured:
            main, create = _first(captured)
            setattr(module, f"{name}_config", main)
            setattr(module, f"{name}_create_config", create)


def _of_objects(patches):
    """Lets `EasyDict` take objects too."""
    from easydict import EasyDict

    begin = EasyDict.__init__

    def begin_with(self, said=None, **options):
        if said is not None and not hasattr(said, "__iter__"):
            patches.add(f"`vars` of {type(said).__name__}")
            said = vars(said)
        begin(self, said, **options)

    return mock.patch.object(EasyDict, "__init__", begin_with)


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
        make = getattr(module, class_name)
        seen = model["world_model_cfg"]["obs_type"]
        try:
            made = None if seen == "text" else make(**EasyDict(model))
        except Exception:  # LightZero's own
            made = None
        if made is None:
            owner = importlib.import_module(make.__module__)
            with patched(owner, seen) as patches:
                made = _with_names(make, owner, seen, patches)(**EasyDict(model))
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=NOISE)
        if hasattr(made.world_model, "pos_emb"):  # else positions are rotary
            made.world_model.precompute_pos_emb_diff_kv()
    return made.eval(), patches


@contextlib.contextmanager
def patched(module, seen):
    """Lets a module of LightZero make what it cannot make as it stands; tells what was needed."""
    patches = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_instead(LPIPS, _empty_lpips(patches)))
        for owner in {module, importlib.import_module("lzero.model.unizero_model")}:
            for name, other in _replacements(owner, seen, patches):
                stack.enter_context(mock.patch.object(owner, name, other))
        yield patches


@contextlib.contextmanager
def _instead(name, module):
    """Another module by a name; `mock.patch.dict` would forget those imported meanwhile."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before


def _with_names(make, module, seen, patches):
    """Main's `UniZeroModel` reads a name `obs_type` that it does not have when it reads text."""

    def made(**options):
        try:
            return make(**options)
        except NameError as error:
            patches.add(f"`{error.name}` of {make.__name__}")
            with mock.patch.object(module, error.name, seen, create=True):
                return make(**options)

    return made


def _replacements(module, seen, patches):
    for name in ("RepresentationNetworkMLP", "VectorDecoderForMemoryEnv"):
        if hasattr(module, name):
            yield name, _without_unknown(getattr(module, name), patches)
    if hasattr(module, "Tokenizer"):
        made = _without_unknown(module.Tokenizer, patches)
        has_none = seen == "image_memory"  # and reads its parameters all the same
        yield "Tokenizer", _with_lpips(made, patches) if has_none else made
    if hasattr(module, "WorldModelMT"):
        yield "WorldModelMT", _completed(module.WorldModelMT, patches)
    for name in TEXT_ENCODERS:
        if hasattr(module, name):
            yield name, _latents(name, patches)


def _completed(world_model, patches):
    absent = [name for name in MISSING if not hasattr(world_model, name)]
    if absent:
        patches.add(f"{', '.join(f'`{name}`' for name in absent)} of WorldModelMT")
    return type(world_model.__name__, (world_model,), dict.fromkeys(absent, False))


def _latents(name, patches):
    def make(*args, **options):
        import torch

        patches.add(f"no {name}: observations are latents")
        made = torch.nn.Identity()
        made.unread = torch.nn.Parameter(torch.zeros(1))  # main divides by how many there are
        return made

    return make


def _empty_lpips(patches):
    def make():
        import torch

        patches.add("an empty `lpips`")
        return torch.nn.Identity()

    module = types.ModuleType(LPIPS)
    module.LPIPS = make
    return module


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


def stand_in(*names):
    """Modules that main imports and no model here calls, where they are not installed."""
    absent = {x for x in names if "." not in x and importlib.util.find_spec(x) is None}
    for name in names:
        if name.partition(".")[0] in absent:
            spec = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = mock.MagicMock(__spec__=spec, Serializable=object)
