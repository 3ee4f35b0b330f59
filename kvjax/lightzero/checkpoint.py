"""LightZero's torch weights to kvjax: names, shapes, variants.

Reads UniZero models of release 0.2.0 and of the main branch in inference. What a checkpoint's
shapes tell is inferred; what they don't tell (heads, context length) must be said.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax import world_model
from kvjax.config import Layout, WindowMode, WorldModelConfig
from kvjax.lightzero import encoder_tensors
from kvjax.types import Params

Tensors = dict[str, np.ndarray[Any, Any]]

IGNORED = (
    r"decoder_network\..*",
    r"head_dict\..*",
    r"lpips\..*",
    r".*\.attn\.mask",
    r".*\.freqs_cis",
    r".*\.num_batches_tracked",
)
"""Tensors that a checkpoint holds and inference does not read (patterns of their names)."""

_WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|module)\."  # torch.compile, DistributedDataParallel
_ENCODER_COPY = "tokenizer.encoder."

_UNSUPPORTED = {
    r"transformer\.blocks\.\d+\.gate[12]\.": "GRU gating",
    r"transformer\.blocks\.\d+\.(experts|feed_forward\.(experts|gate))\.": "mixture of experts",
    r".*\.lora_": "LoRA adapters",
    r"act_embedding_table\.0\.": "continuous actions",
    r".*task_emb": "multi-task models",
    r".*register_token": "register tokens",
}

_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""Flax's leaf names and torch's."""

_HEAD_LAYERS = {
    "0.2.0": {"hidden": 0, "output": 2},
    "main": {"input_norm": 0, "hidden": 1, "hidden_norm": 2, "output": 4},
}
_HEADS = {
    "reward_head": "head_rewards",
    "latent_head": "head_observations",
    "policy_head": "head_policy",
    "value_head": "head_value",
}
_FEED_FORWARD = {"0.2.0": "mlp", "main": "feed_forward"}
_POSITIONS = "pos_emb.weight"
_LATENT_NORM = "head_observations.head_module.5"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A LightZero model in kvjax's terms, and the tensors that inference left out."""

    config: WorldModelConfig
    params: Params
    ignored: tuple[str, ...]  # names as the source has them


def load(source: Any, **options: Any) -> tuple[WorldModelConfig, Params]:
    """Reads a LightZero UniZero model.

    Args:
      source: path of a `.pth.tar` file (read weights-only), its dictionary, a state dict, or a
        torch `WorldModel` or `UniZeroModel`, whose configuration is then read too.
      **options: fields of `WorldModelConfig` that shapes do not tell: `num_heads` and
        `context_length` always, `simnorm_group` or `support` where they differ from LightZero's
        defaults.

    Returns:
      The configuration and the Flax variables. Tensors that inference ignores (`IGNORED` and the
      tokenizer's copies of the encoder) are named in the log.

    Raises:
      FileNotFoundError: no such file.
      ImportError: a torch file without torch installed.
      ValueError: an unreadable file, an unsupported variant, a missing, unused, misshapen or
        non-finite tensor, or an option that is missing or contradicts the shapes.
    """
    imported = read(source, **options)
    _log.info("ignored by inference: %s", ", ".join(imported.ignored) or "nothing")
    return imported.config, imported.params


def read(source: Any, **options: Any) -> Imported:
    """Like `load`, with the names of the ignored tensors."""
    if isinstance(source, str | os.PathLike):
        source = _read_torch_file(Path(source))
    if hasattr(source, "state_dict"):
        options = _module_options(source) | options
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ValueError(f"expected a path, a state dict or a torch module, got {type(source)}")
    tensors, ignored = _canonical(source.get("model", source))
    _refuse_unsupported(tensors, ignored)
    config = _infer_config(tensors, options)
    params = _to_flax(tensors, config)
    return Imported(config, params, ignored)


def _read_torch_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading the torch file {path} needs torch (pip install torch); or convert it once"
            " with `kvjax convert` where torch is installed"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated or foreign files
        raise ValueError(
            f"{path} is not a readable torch checkpoint (truncated, or more than weights):"
            f" {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def _module_options(module: Any) -> dict[str, Any]:
    """What a live torch module's own configuration tells."""
    config = getattr(getattr(module, "world_model", module), "config", None)
    if config is None:
        raise ValueError(f"{type(module).__name__} has no config: expected a LightZero WorldModel")
    if getattr(config, "use_policy_logits_clip", False):
        raise ValueError("unsupported variant: use_policy_logits_clip")
    options = {"num_heads": config.num_heads, "context_length": config.context_length}
    options["window_mode"] = _module_window_mode(config)
    if getattr(config, "rotary_emb", False):
        options["rope_theta"] = float(getattr(config, "rope_theta", 10000.0))
    if hasattr(config, "group_size"):
        options["simnorm_group"] = config.group_size
    encoder = getattr(getattr(module, "tokenizer", None), "encoder", None)
    options |= encoder_tensors.module_options(encoder)
    return options


def _module_window_mode(config: Any) -> WindowMode:
    modes: dict[str, WindowMode] = {
        "rotary_emb": "rope_lightzero",
        "rebuild_kv_window_from_tokens": "rebuild",
        "exact_kv_window_reset": "reset",
    }
    said = [name for name in modes if getattr(config, name, False)]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} exclude each other")
    return modes[said[0]] if said else "learned"


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    return cast(
        "np.ndarray[Any, Any]",
        (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy(),
    )


def _canonical(state: Mapping[str, Any]) -> tuple[Tensors, tuple[str, ...]]:
    """Strips wrappers, folds the encoder's copies into one, sets ignored tensors aside."""
    tensors: Tensors = {}
    ignored = []
    for original, tensor in state.items():
        if not hasattr(tensor, "shape"):
            raise ValueError(f"{original} is a {type(tensor).__name__}, expected a tensor")
        name = re.sub(_WRAPPERS, "", original).removeprefix("world_model.")
        if name.startswith(_ENCODER_COPY):
            name = encoder_tensors.PREFIX + name.removeprefix(_ENCODER_COPY)
        name = name.removeprefix("tokenizer.")
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            ignored.append(original)
            continue
        value = _to_numpy(tensor)
        if name in tensors:
            if not np.array_equal(tensors[name], value, equal_nan=True):
                raise ValueError(f"{original} differs from the first copy of {name}")
            ignored.append(original)
        tensors.setdefault(name, value)
    return tensors, tuple(ignored)


def _refuse_unsupported(tensors: Tensors, ignored: tuple[str, ...]) -> None:
    for pattern, variant in _UNSUPPORTED.items():
        for name in tensors:
            if re.match(pattern, name):
                raise ValueError(f"unsupported variant: {variant} (tensor {name})")
    encoder_tensors.refuse_unsupported(tensors)
    has_rotations = any(name.endswith("freqs_cis") for name in ignored)  # only 0.2.0 saves them
    if _layout(tensors) == "0.2.0" and not has_rotations and "transformer.ln_f.weight" in tensors:
        _shape(tensors, _POSITIONS)


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"missing tensor {name}: this is not a UniZero world model, or not all")
    return tuple(tensors[name].shape)


def _infer_config(tensors: Tensors, options: dict[str, Any]) -> WorldModelConfig:
    known = sorted(field.name for field in dataclasses.fields(WorldModelConfig))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}; known are {', '.join(known)}")
    for name in ("num_heads", "context_length"):
        if options.get(name) is None:
            raise ValueError(f"{name} is not stored in a LightZero checkpoint: pass {name}=...")
    inferred = _inferred_fields(tensors)
    for name in inferred.keys() & options.keys():
        if name != "support" and not encoder_tensors.agree(name, options[name], inferred[name]):
            raise ValueError(f"{name}={options[name]!r}, but the tensors say {inferred[name]!r}")
    if inferred["max_tokens"] is None:
        options = {"window_mode": "rope_lightzero"} | options
    config = WorldModelConfig(**(inferred | options))
    bins = _shape(tensors, _output_layer(tensors, "head_rewards"))[0]
    if config.support_size != bins:
        raise ValueError(f"support {config.support} has {config.support_size} bins, not {bins}")
    return config


def _output_layer(tensors: Tensors, head: str) -> str:
    return f"{head}.head_module.{_HEAD_LAYERS[_layout(tensors)]['output']}.weight"


def _layout(tensors: Tensors) -> Layout:
    return "main" if "head_rewards.head_module.4.weight" in tensors else "0.2.0"


def _inferred_fields(tensors: Tensors) -> dict[str, Any]:
    embed_dim = _shape(tensors, "transformer.ln_f.weight")[0]
    is_rotary = _POSITIONS not in tensors
    layers = {m[1] for name in tensors if (m := re.match(r"transformer\.blocks\.(\d+)\.", name))}
    output = _output_layer(tensors, "head_rewards")
    bins = _shape(tensors, output)[0]
    return {
        "embed_dim": embed_dim,
        "num_layers": len(layers),
        "num_actions": _shape(tensors, "act_embedding_table.weight")[0],
        "max_tokens": None if is_rotary else _shape(tensors, _POSITIONS)[0],
        "support": (-(bins // 2), bins // 2),
        "layout": _layout(tensors),
        "latent_norm": "layernorm" if f"{_LATENT_NORM}.weight" in tensors else "simnorm",
    } | encoder_tensors.inferred_fields(tensors)


def _modules(config: WorldModelConfig) -> Iterator[tuple[str, str]]:
    """Flax module paths and the torch modules that they come from."""
    yield from encoder_tensors.modules(config)
    yield "position_embedding", "pos_emb"
    yield "action_embedding", "act_embedding_table"
    feed_forward = _FEED_FORWARD[config.layout]
    layers = {"attention_norm": "ln1", "feed_forward_norm": "ln2", "projection": "attn.proj"}
    layers |= {name: f"attn.{name}" for name in ("query", "key", "value")}
    layers |= {"expand": f"{feed_forward}.0", "contract": f"{feed_forward}.2"}
    for block in range(config.num_layers):
        for name, torch_name in layers.items():
            yield f"blocks_{block}/{name}", f"transformer.blocks.{block}.{torch_name}"
    yield "final_norm", "transformer.ln_f"
    for head, torch_head in _HEADS.items():
        for layer, index in _HEAD_LAYERS[config.layout].items():
            yield f"{head}/{layer}", f"{torch_head}.head_module.{index}"
    yield "latent_final/norm", _LATENT_NORM


def _to_flax(tensors: Tensors, config: WorldModelConfig) -> Params:
    """Fills the model's variables; every tensor is used, none is missing, all are finite."""
    modules = dict(_modules(config))
    expected = flatten_dict(world_model.params_shapes(config))
    remaining = dict(tensors)
    params = {}
    for path, leaf in expected.items():
        name = f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}"
        if name not in remaining:
            raise ValueError(f"missing tensor {name}")
        value, shape = remaining.pop(name), leaf.shape
        is_kernel = path[-1] == "kernel"  # flax keeps [.., in, out], torch [out, in, ..]
        if is_kernel:
            shape = (shape[-1], shape[-2], *shape[:-2])
        world_model.check_parameter(name, value, shape)
        value = np.moveaxis(value, (1, 0), (-2, -1)) if is_kernel else value
        params[path] = jnp.array(value, leaf.dtype)
    if remaining:
        raise ValueError(f"tensors that kvjax does not know: {', '.join(sorted(remaining))}")
    return unflatten_dict(params)
