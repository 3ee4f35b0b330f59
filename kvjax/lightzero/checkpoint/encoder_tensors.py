"""The observation encoders among LightZero's tensors: names, what shapes tell, refused variants."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kvjax.base.values import require
from kvjax.config import IMAGE_SIDES, POOLED_SIDES, Norm, WorldModelConfig

Tensors = Mapping[str, np.ndarray[Any, Any]]

PREFIX = "representation_network."

UNSUPPORTED = {
    "pretrained_model": "text encoders",
    "model": "text encoders",
    "embed_proj_head": "text encoders",
    "to_patch_embedding": "vision transformers",
    "cnn": "encoders of MemoryEnv",
    "conv": "image encoders without downsampling",
}
"""Modules of encoders that are not read, and what they are."""

_FIRST_VECTOR = "fc_representation.0"
_FIRST_IMAGE = "downsample_net.conv1"
_STATISTICS = "downsample_net.norm1.running_mean"

_VECTOR_MODULES = {
    "input": _FIRST_VECTOR,
    "batch_norm": "fc_representation.1",
    "output": "fc_representation.3",
    "final/norm": "norm",
}
_IMAGE_MODULES = {
    "stem": _FIRST_IMAGE,
    "stem_norm": "downsample_net.norm1",
    "output": "last_linear",
    "final/norm": "final_norm",
}
_STAGES = {
    "stage1": "downsample_net.resblocks1.0",
    "downsample": "downsample_net.downsample_block",
    "stage2": "downsample_net.resblocks2.0",
    "stage3": "downsample_net.resblocks3.0",
}
_BLOCK_MODULES = {
    "conv1": "conv1.0",
    "norm1": "conv1.1",
    "conv2": "conv2.0",
    "norm2": "conv2.1",
    "shortcut": "conv3.0",
}


def refuse_unsupported(tensors: Tensors) -> None:
    """Raises `ValueError` naming the first tensor of an encoder that kvjax does not have."""
    for module, variant in UNSUPPORTED.items():
        for name in tensors:
            if name.startswith(f"{PREFIX}{module}."):
                raise ValueError(f"unsupported variant: {variant} (tensor {name})")
    is_image = f"{PREFIX}{_FIRST_IMAGE}.weight" in tensors
    if is_image and f"{PREFIX}{_STATISTICS}" not in tensors:
        raise ValueError(
            "unsupported variant: image encoders without BatchNorm (the checkpoint has no"
            f" {PREFIX}{_STATISTICS})"
        )


def inferred_fields(tensors: Tensors) -> dict[str, Any]:
    """Fields of `WorldModelConfig` that the encoder's shapes tell; none without an encoder.

    Sides of 84 and 96 make equal shapes: the larger one is taken.
    """
    encoder = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    if f"{_FIRST_VECTOR}.weight" in encoder:
        return {
            "observation_size": _shape(encoder, f"{_FIRST_VECTOR}.weight", 2)[1],
            "encoder_norm": _norm_kind(encoder, _VECTOR_MODULES),
        }
    if f"{_FIRST_IMAGE}.weight" in encoder:
        return _image_fields(encoder)
    return {}


def _norm_kind(encoder: Tensors, modules: dict[str, str]) -> Norm:
    return "layernorm" if f"{modules['final/norm']}.weight" in encoder else "simnorm"


def _image_fields(encoder: Tensors) -> dict[str, Any]:
    half, planes = _shape(encoder, f"{_FIRST_IMAGE}.weight", 4)[:2]
    name = f"{_IMAGE_MODULES['output']}.weight"
    features = _shape(encoder, name, 2)[1] / max(1, 2 * half)
    sides = {plane_side(side) ** 2: side for side in IMAGE_SIDES}
    require(
        features in sides,
        f"{PREFIX}{name} has shape {encoder[name].shape}: no image side of {IMAGE_SIDES} makes"
        f" that of {2 * half} channels",
    )
    blocks = {m[1] for k in encoder if (m := re.match(r"resblocks\.(\d+)\.", k))}
    return {
        "image_shape": (planes, sides[int(features)], sides[int(features)]),
        "image_channels": 2 * half,
        "image_blocks": len(blocks),
        "encoder_norm": _norm_kind(encoder, _IMAGE_MODULES),
    }


def _shape(encoder: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    require(name in encoder, f"missing tensor {PREFIX}{name}")
    shape = tuple(encoder[name].shape)
    require(len(shape) == ndim, f"{PREFIX}{name} has shape {shape}, expected {ndim} dimensions")
    return shape


def plane_side(image_side: int) -> int:
    """Side of the feature plane that the encoder makes of an image: 8 of 64, 6 of 84 and 96."""
    for _ in range(4 if image_side in POOLED_SIDES else 3):
        image_side = (image_side + 1) // 2
    return image_side


def agree(name: str, said: Any, inferred: Any) -> bool:
    """Whether an option agrees with what shapes tell; either side that is pooled alike may be."""
    if name != "image_shape" or not isinstance(said, tuple | list):
        return bool(said == inferred)
    planes, side, _ = inferred
    sides = POOLED_SIDES if side in POOLED_SIDES else (side,)
    return tuple(said) in {(planes, side, side) for side in sides}


def modules(config: WorldModelConfig) -> Iterator[tuple[str, str]]:
    """Paths of the encoder's Flax modules and the torch modules that they come from."""
    plain = _VECTOR_MODULES if config.image_shape is None else _IMAGE_MODULES
    for name, torch_name in plain.items():
        yield f"encoder/{name}", PREFIX + torch_name
    stages = _STAGES | {f"blocks_{i}": f"resblocks.{i}" for i in range(config.image_blocks)}
    for stage, torch_stage in stages.items():
        for name, torch_name in _BLOCK_MODULES.items():
            yield f"encoder/{stage}/{name}", f"{PREFIX}{torch_stage}.{torch_name}"


def module_options(encoder: Any) -> dict[str, Any]:
    """What a live encoder tells beside its tensors, or {}.

    Raises:
      ValueError: it ends in another norm than SimNorm or LayerNorm, or has another activation.
    """
    norm = getattr(encoder, "final_norm_option_in_encoder", "SimNorm")
    if norm not in ("SimNorm", "LayerNorm"):
        raise ValueError(f"unsupported variant: image encoders that end in {norm}")
    activation = getattr(encoder, "activation", None)
    if activation is not None and getattr(activation, "approximate", None) != "tanh":
        raise ValueError(f"unsupported variant: image encoders with activation {activation}")
    shape = getattr(encoder, "observation_shape", None)
    return {"image_shape": tuple(map(int, shape))} if isinstance(shape, tuple | list) else {}
