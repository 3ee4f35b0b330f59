"""What LightZero's models hold besides: decoders of observations, and a metric of images.

Only their training reads them, where it reconstructs observations, which it does not by default.
They are written as such a training begins with them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint.tensors import Tensors

DECODER, METRIC = "decoder_network.", "lpips."

_STD = 0.02
"""Of LightZero's first weights. Source: `init_weights`."""

_DECODED, _WIDTH = 25, 64
"""Numbers that vectors are decoded to, those of MemoryEnv, and of a hidden layer."""

_CHANNELS = (64, 32, 16, 3)
"""Of the planes that images are decoded from, the last ones those of a picture."""

_MEMORY_SIDE, _IMAGE_SIDE = 5, 8
"""Of the first planes."""

_VGG = (64, 128, 256, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the metric: channels of VGG's layers, and how pictures are scaled for it."""

_PLACES = {"memory": (0, 3, 6), "resnet": (0, 3, 6)}
_NORMS = {"memory": (1, 4), "resnet": (2, 5)}
"""Of convolutions and norms in a decoder of images."""


def tensors(config: WorldModelConfig) -> Tensors:
    """Tensors by the names that they have in a model's tokenizer."""
    rng = np.random.default_rng(0)
    found = dict(_decoder(config, rng))
    if config.num_sampled_actions is not None and config.image_shape is not None:
        found |= dict(_metric(rng))
    return found


def _decoder(config: WorldModelConfig, rng: Any) -> Iterator[tuple[str, Any]]:
    is_sampled, is_main = config.num_sampled_actions is not None, config.layout == "main"
    kind = config.image_encoder if config.image_shape is not None else "vector"
    if kind == "vector" and not (is_sampled and is_main):
        yield from _vectors(config, rng)
    elif kind == "memory":
        yield from _planes(config, rng, "linear", "deconv", _MEMORY_SIDE)
    elif kind == "resnet" and is_sampled:
        blocks = "deconv_blocks" if is_main else "conv_blocks"
        yield from _planes(config, rng, "fc", blocks, _IMAGE_SIDE)


def _vectors(config: WorldModelConfig, rng: Any) -> Iterator[tuple[str, Any]]:
    """Source: `VectorDecoderForMemoryEnv`."""
    layers = f"{DECODER}{'fc_decoder' if config.layout == 'main' else 'fc_representation'}"
    yield from _linear(f"{layers}.0", rng, (_WIDTH, config.embed_dim), _WIDTH)
    yield from _norm(f"{layers}.1", _WIDTH, is_batch=config.encoder_hidden_norm == "batchnorm")
    yield from _linear(f"{layers}.3", rng, (_DECODED, _WIDTH), _DECODED)


def _planes(
    config: WorldModelConfig, rng: Any, linear: str, blocks: str, side: int
) -> Iterator[tuple[str, Any]]:
    """Source: `LatentDecoderForMemoryEnv`, `LatentDecoder`."""
    features = _CHANNELS[0] * side**2
    yield from _linear(f"{DECODER}{linear}", rng, (features, config.embed_dim), features)
    for place, inner, outer in zip(
        _PLACES[config.image_encoder], _CHANNELS[:-1], _CHANNELS[1:], strict=True
    ):
        yield from _linear(f"{DECODER}{blocks}.{place}", rng, (inner, outer, 3, 3), outer)
    for place, channels in zip(_NORMS[config.image_encoder], _CHANNELS[1:-1], strict=True):
        yield from _norm(f"{DECODER}{blocks}.{place}", channels, is_batch=True)


def _metric(rng: Any) -> Iterator[tuple[str, Any]]:
    """Source: `LPIPS`."""
    for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
        yield f"{METRIC}scaling_layer.{name}", np.array(values, np.float32).reshape(1, -1, 1, 1)
    for index, channels in enumerate(_VGG):
        yield f"{METRIC}lin{index}.model.1.weight", _drawn(rng, (1, channels, 1, 1))


def _linear(name: str, rng: Any, shape: tuple[int, ...], outputs: int) -> Iterator[tuple[str, Any]]:
    yield f"{name}.weight", _drawn(rng, shape)
    yield f"{name}.bias", np.zeros(outputs, np.float32)


def _norm(name: str, size: int, *, is_batch: bool) -> Iterator[tuple[str, Any]]:
    yield f"{name}.weight", np.ones(size, np.float32)
    yield f"{name}.bias", np.zeros(size, np.float32)
    if is_batch:
        yield f"{name}.running_mean", np.zeros(size, np.float32)
        yield f"{name}.running_var", np.ones(size, np.float32)


def _drawn(rng: Any, shape: tuple[int, ...]) -> Any:
    return rng.normal(scale=_STD, size=shape).astype(np.float32)
