"""LightZero's encoders: what their tensors' shapes tell, and what their modules are called.

Names are those below `representation_network.`.
"""

import re
from collections.abc import Callable
from typing import Any

from kvjax.base.values import require
from kvjax.config import (
    IMAGE_SIDES,
    POOLED_SIDES,
    VIT_HEAD,
    VIT_PATCH,
    Layout,
    WorldModelConfig,
)

Shapes = dict[str, tuple[int, ...]]
Names = dict[str, str]
"""Paths of Flax's modules, and torch's."""

ENCODER = "representation_network."
LEAVE_OUT = (
    ": encoder=None (kvjax convert --no-encoder) reads the model without it, observations are then"
    " latents"
)

UNSUPPORTED = {
    rf"{ENCODER}\d+\.": "a list of encoders, as multi-task models have it",
    rf"{ENCODER}(pretrained_model|model|embed_proj_head)\.": "text encoders",
    rf"{ENCODER}conv\.": "image encoders without downsampling",
}
"""Patterns of names, and the variants that have such tensors."""

MEMORY_SIDE = 5
"""Of MemoryEnv's pictures, which no tensor tells."""

_IMAGE_NDIM = 3  # channels, height, width

_VECTORS, _VECTORS_STATISTICS = "fc_representation.0.weight", "fc_representation.1.running_mean"
_STEM, _STEM_NORM = "downsample_net.conv1.weight", "downsample_net.norm1.weight"
_LAST, _FINAL_NORM = "last_linear.weight", "final_norm.weight"
_MEMORY, _MEMORY_LAST = "cnn.0.weight", "cnn.6.weight"
_PATCHES, _POSITIONS = "to_patch_embedding.1.weight", "pos_embedding"
_QKV, _EXPAND = (f"transformer.layers.0.{name}.weight" for name in ("0.to_qkv", "1.net.1"))

_VECTOR_NAMES = {
    "input": "fc_representation.0",
    "batch_norm": "fc_representation.1",
    "layer_norm": "fc_representation.1",
    "output": "fc_representation.3",
    "final/norm": "norm",
}
_RESNET_NAMES = {
    "stem": "downsample_net.conv1",
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
_STAGE = {
    "conv1": "conv1.0",
    "norm1": "conv1.1",
    "conv2": "conv2.0",
    "norm2": "conv2.1",
    "shortcut": "conv3.0",
}
_MEMORY_NAMES = {
    **{f"convs_{index}": f"cnn.{3 * index}" for index in range(3)},
    **{f"norms_{index}": f"cnn.{3 * index + 1}" for index in range(3)},
}
_MEMORY_OUTPUT: dict[Layout, str] = {"0.2.0": "linear.0", "main": "linear"}
_VIT_NAMES = {
    "patch_norm": "to_patch_embedding.1",
    "embedding": "to_patch_embedding.2",
    "token_norm": "to_patch_embedding.3",
    "last_norm": "transformer.norm",
    "output": "last_linear",
    "final/norm": "final_norm",
}
_VIT_BLOCK = {
    "attention_norm": "0.norm",
    "qkv": "0.to_qkv",
    "projection": "0.to_out.0",
    "feed_forward_norm": "1.net.0",
    "expand": "1.net.1",
    "contract": "1.net.4",
}


def names(config: WorldModelConfig) -> Names:
    """Torch's module of each of the encoder's Flax modules."""
    kind = config.image_encoder if config.image_shape is not None else "vector"
    blocks = range(config.image_blocks)
    match kind:
        case "vector":
            return _VECTOR_NAMES
        case "resnet":
            stages = _STAGES | {f"blocks_{i}": f"resblocks.{i}" for i in blocks}
            return _RESNET_NAMES | below(stages, _STAGE)
        case "memory":
            return _MEMORY_NAMES | {"output": _MEMORY_OUTPUT[config.layout]}
        case "vit":
            layers = {f"blocks_{i}": f"transformer.layers.{i}" for i in blocks}
            return _VIT_NAMES | below(layers, _VIT_BLOCK)


def below(outer: Names, inner: Names) -> Names:
    """Each of the inner modules in each of the outer ones."""
    return {f"{a}/{b}": f"{outer[a]}.{inner[b]}" for a in outer for b in inner}


def fields(weights: dict[str, Any]) -> dict[str, Any]:
    """Fields of `WorldModelConfig` that the encoder's tensors tell; none where there is none.

    Sides of 84 and 96 make equal shapes with BatchNorm: the larger one is taken.

    Raises:
      ValueError: a tensor that would tell is missing or has other dimensions.
    """
    parts = {k.removeprefix(ENCODER): v for k, v in weights.items() if k.startswith(ENCODER)}
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    kinds: dict[str, Callable[[Shapes], dict[str, Any]]] = {
        _VECTORS: _vector_fields,
        _STEM: _resnet_fields,
        _MEMORY: _memory_fields,
        _PATCHES: _vit_fields,
    }
    for name, told in kinds.items():
        if name in shapes:
            return told(shapes)
    return {}


def tells_side(inferred: dict[str, Any]) -> bool:
    """Whether the shapes tell an image's side, or only that it is pooled like others."""
    is_resnet = inferred.get("image_encoder") == "resnet"
    is_guessed = is_resnet and inferred.get("encoder_hidden_norm") == "batchnorm"
    return not (is_guessed and inferred["image_shape"][1] in POOLED_SIDES)


def _vector_fields(shapes: Shapes) -> dict[str, Any]:
    return {
        "observation_size": _shape(shapes, _VECTORS, 2)[1],
        "encoder_norm": _final("norm.weight" in shapes),
        "encoder_hidden_norm": _hidden(_VECTORS_STATISTICS in shapes),
    }


def _resnet_fields(shapes: Shapes) -> dict[str, Any]:
    half, planes = _shape(shapes, _STEM, 4)[:2]
    side = _pooled_side(shapes, 2 * half)
    is_layer_norm = len(shapes.get(_STEM_NORM, ())) == _IMAGE_NDIM
    if is_layer_norm:
        side = 2 * shapes[_STEM_NORM][1]
    return {
        "image_shape": (planes, side, side),
        "image_channels": 2 * half,
        "image_blocks": _count(shapes, r"resblocks\.(\d+)\."),
        "image_encoder": "resnet",
        "encoder_norm": _final(_FINAL_NORM in shapes),
        "encoder_hidden_norm": _hidden(not is_layer_norm),
    }


def _pooled_side(shapes: Shapes, channels: int) -> int:
    """The largest side that makes as many features as the last layer reads."""
    shape = _shape(shapes, _LAST, 2)
    sides = {_plane_side(side) ** 2: side for side in IMAGE_SIDES}
    features = shape[1] / max(1, channels)
    require(
        features in sides,
        f"{ENCODER}{_LAST} has shape {shape}: no image side of {IMAGE_SIDES} makes that of"
        f" {channels} channels",
    )
    return sides[int(features)]


def _plane_side(image_side: int) -> int:
    """Side of the feature plane that the encoder makes of an image: 8 of 64, 6 of 84 and 96."""
    for _ in range(4 if image_side in POOLED_SIDES else 3):
        image_side = (image_side + 1) // 2
    return image_side


def _memory_fields(shapes: Shapes) -> dict[str, Any]:
    return {
        "image_shape": (_shape(shapes, _MEMORY, 4)[1], MEMORY_SIDE, MEMORY_SIDE),
        "image_channels": _shape(shapes, _MEMORY_LAST, 4)[0],
        "image_encoder": "memory",
        "encoder_norm": _final(False),
    }


def _vit_fields(shapes: Shapes) -> dict[str, Any]:
    (pixels,) = _shape(shapes, _PATCHES, 1)
    _, tokens, width = _shape(shapes, _POSITIONS, 3)
    side = VIT_PATCH * round(max(tokens - 1, 0) ** 0.5)
    return {
        "image_shape": (pixels // VIT_PATCH**2, side, side),
        "image_channels": width,
        "image_blocks": _count(shapes, r"transformer\.layers\.(\d+)\."),
        "image_heads": _shape(shapes, _QKV, 2)[0] // (3 * VIT_HEAD),
        "image_hidden": _shape(shapes, _EXPAND, 2)[0],
        "image_encoder": "vit",
        "encoder_norm": _final(_FINAL_NORM in shapes),
    }


def _final(has_weight: bool) -> str:
    return "layernorm" if has_weight else "simnorm"


def _hidden(is_batch_norm: bool) -> str:
    return "batchnorm" if is_batch_norm else "layernorm"


def _count(shapes: Shapes, pattern: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """A tensor's shape, which must be there and have so many dimensions."""
    if name not in shapes:
        raise ValueError(
            f"missing tensor {ENCODER}{name}: this is not a UniZero world model, or not all"
        )
    shape = shapes[name]
    require(len(shape) == ndim, f"{ENCODER}{name} has shape {shape}, expected {ndim} dimensions")
    return shape
