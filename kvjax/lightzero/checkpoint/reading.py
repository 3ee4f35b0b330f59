"""LightZero's torch weights to kvjax: names, shapes, variants.

Reads UniZero models of release 0.2.0 and of the main branch in inference. What a checkpoint's
shapes tell is inferred; what they don't tell (heads, context length) is taken from the options, a
live model's configuration, or LightZero's `total_config.py` beside the file. What contradicts the
tensors is refused.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax.base.values import listed, require
from kvjax.config import WorldModelConfig
from kvjax.lightzero import module
from kvjax.lightzero.checkpoint import (
    configuration,
    described,
    encoder_tensors,
    shapes,
    tensors,
    torch_file,
)
from kvjax.lightzero.checkpoint.described import CLIP, Described
from kvjax.lightzero.checkpoint.tensors import Tensors
from kvjax.model import world_model
from kvjax.model.world_model import Params

_UNSUPPORTED = {
    r"transformer\.blocks\.\d+\.gate[12]\.": "GRU gating",
    r"transformer\.blocks\.\d+\.(experts|feed_forward\.(experts|gate))\.": "mixture of experts",
    r".*\.lora_": "LoRA adapters",
    r"act_embedding_table\.0\.": "continuous actions",
    r".*task_emb|head_\w+_multi_task\.": "multi-task models",
    r"head_\w+\.head_module\.\d+\.(experts|gate|phi)\b": "heads with a mixture of experts",
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

_FEED_FORWARD = {"0.2.0": "mlp", "main": "feed_forward"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A LightZero model in kvjax's terms, where that is from, and what was left out."""

    config: WorldModelConfig
    params: Params
    ignored: tuple[str, ...]  # tensors that inference does not read, as the source names them
    origins: Mapping[str, str]  # fields of the configuration: "as you said", "from ..."
    notes: tuple[str, ...] = ()  # what whoever runs the model should know of it


def load(source: Any, **options: Any) -> tuple[WorldModelConfig, Params]:
    """Reads a LightZero UniZero model.

    Args:
      source: path of a `.pth.tar` file (read weights-only), its dictionary, a state dict, or a
        torch `WorldModel` or `UniZeroModel`, whose configuration is then read too. Beside a file,
        or one folder above, LightZero's `total_config.py` is read (and never executed).
      **options: fields of `WorldModelConfig` that shapes do not tell: `num_heads` and
        `context_length` where no configuration does, `simnorm_group`, `rope_theta`, `support` or
        `image_shape` where they differ from LightZero's defaults. They win over a configuration.
        `use_policy_logits_clip="ignore"` reads a model of main whose policy logits are clipped in
        inference, which kvjax does not do: priors, and so searches, differ where logits are large.

    Returns:
      The configuration and the Flax variables. The log names where the configuration is from and
      the tensors that inference ignores (`tensors.IGNORED` and the tokenizer's copies
      of the encoder); it warns of options that contradict the model's configuration.

    Raises:
      FileNotFoundError: no such file.
      ImportError: a torch file without torch installed.
      ValueError: an unreadable or damaged file, an unsupported variant, a missing, unused,
        misshapen or non-finite tensor or one that is no floating-point number, an option that is
        missing, or an option or a configuration that contradicts the tensors: a table or a mask of
        positions shorter than a window of C - 1 tokens, another width, other heads.
    """
    imported = read(source, **options)
    _log.info("ignored by inference: %s", ", ".join(imported.ignored) or "nothing")
    for name, origin in imported.origins.items():
        _log.info("%s=%r, %s", name, getattr(imported.config, name), origin)
    return imported.config, imported.params


def read(source: Any, **options: Any) -> Imported:
    """Like `load`, with the names of the ignored tensors and where the configuration is from."""
    said = {name: value for name, value in options.items() if value is not None}
    clip = said.pop(CLIP, None)
    require(clip in (None, "ignore"), f'{CLIP} can only be "ignore", got {clip!r}')
    configuration.check_names(said)
    told, state = _open(source)
    found = tensors.sort(state)
    _refuse_unsupported(found)
    notes = _clip_notes(found, told, clip)
    config, origins = configuration.configure(found, said, told)
    params = _to_flax(found.weights, config)
    return Imported(config, params, found.ignored, origins, notes)


def _open(source: Any) -> tuple[Described, Any]:
    """What a source's own configuration says, and its state dict."""
    told = Described()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        source = torch_file.read(path)
        told = described.by_file(path)
    source = module.unwrap(source)
    if hasattr(source, "state_dict"):
        told = described.by_module(source)
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ValueError(f"expected a path, a state dict or a torch module, got {type(source)}")
    return told, source.get("model", source)


def _clip_notes(found: tensors.Sorted, told: Described, clip: str | None) -> tuple[str, ...]:
    """Refuses clipped logits, or says what it means to ignore that they are clipped."""
    bounds = tensors.CLIP_BOUND in found.telling
    if not (bounds if told.clips_logits is None else told.clips_logits):
        return ()
    require(
        clip == "ignore",
        f"unsupported variant: {CLIP} ({told.origin or tensors.CLIP_BOUND} says so): LightZero"
        f' clips the logits of the policy in inference, kvjax does not; {CLIP}="ignore" reads it'
        " all the same",
    )
    note = (
        f"{CLIP} is ignored: logits of the policy are not clipped, searches differ from LightZero's"
    )
    _log.warning("%s", note)
    return (note,)


def _refuse_unsupported(found: tensors.Sorted) -> None:
    weights = found.weights
    for pattern, variant in _UNSUPPORTED.items():
        for name in weights:
            if re.match(pattern, name):
                raise ValueError(f"unsupported variant: {variant} (tensor {name})")
    encoder_tensors.refuse_unsupported(weights)
    for head in shapes.HEADS.values():
        name = f"{head}.head_module.1.weight"
        hidden, width = (weights[name].shape if name in weights else (0, 1))[:2]
        require(
            hidden != width,
            f"unsupported variant: multi-task heads ({name} has {hidden} rows of {width} numbers;"
            " main's models of one task have four times as many rows)",
        )
    has_rotations = any(name.endswith(tensors.ROTATIONS) for name in found.telling)
    is_early = shapes.layout(weights) == "0.2.0" and not has_rotations  # else it saves them
    if is_early and shapes.FINAL_NORM in weights:
        shapes.shape_of(weights, shapes.POSITIONS, 2)


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
    for head, torch_head in shapes.HEADS.items():
        for layer, index in shapes.HEAD_LAYERS[config.layout].items():
            yield f"{head}/{layer}", f"{torch_head}.head_module.{index}"
    yield "latent_final/norm", shapes.LATENT_NORM


def _to_flax(weights: Tensors, config: WorldModelConfig) -> Params:
    """Fills the model's variables; every tensor is used, none is missing, all are finite."""
    modules = dict(_modules(config))
    expected = flatten_dict(world_model.params_shapes(config))
    remaining = dict(weights)
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
        raise ValueError(f"tensors that kvjax does not know: {listed(remaining)}")
    return unflatten_dict(params)
