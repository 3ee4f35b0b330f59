"""UniZero's observation encoders in inference: one observation to one latent (Flax).

Shapes: E embedding size, F image channels (of the picture), N `image_channels` of the network.
Images come as LightZero has them, channels first; inside, channels are last.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import POOLED_SIDES, HiddenNorm, WorldModelConfig
from kvjax.model.norms import EPSILON, Normalise, layer_norm
from kvjax.model.vit import VisionTransformer

_EDGE = ((1, 1), (1, 1))  # every convolution and pooling is 3x3 and pads one pixel
_HALVE = (2, 2)
_PLANES = (-3, -2, -1)


def _batch_norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=EPSILON)


def _plane_norm(kind: HiddenNorm, *, scales_pixels: bool = False) -> nn.Module:
    """Norm of feature planes [H, W, N].

    LayerNorm is over all of them at once. It scales by channel, as torch's `GroupNorm` of one group
    does, or also by pixel, as torch's `LayerNorm` of [N, H, W].
    """
    if kind == "batchnorm":
        return _batch_norm()
    scaled = _PLANES if scales_pixels else -1
    return nn.LayerNorm(
        EPSILON, reduction_axes=_PLANES, feature_axes=scaled, use_fast_variance=False
    )


class VectorEncoder(nn.Module):
    """Vector observation to latent: [observation_size] -> [E]."""

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        self.input = nn.Dense(self.config.embed_dim)
        if self.config.encoder_hidden_norm == "batchnorm":
            self.batch_norm = _batch_norm()
        else:
            self.layer_norm = layer_norm()
        self.output = nn.Dense(self.config.embed_dim)
        self.final = Normalise(self.config.encoder_norm, self.config.simnorm_group)

    def __call__(self, observation: jax.Array) -> jax.Array:  # noqa: D102
        is_batch_norm = self.config.encoder_hidden_norm == "batchnorm"
        norm = self.batch_norm if is_batch_norm else self.layer_norm
        return self.final(self.output(nn.gelu(norm(self.input(observation)))))


def _conv(channels: int, strides: tuple[int, int] = (1, 1), use_bias: bool = False) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides, padding=_EDGE, use_bias=use_bias)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; halving the picture needs a convolution there as well.

    [H, W, *] -> [H, W, channels], or [H/2, W/2, channels] with `halve`.
    """

    channels: int
    norm: HiddenNorm
    halve: bool = False

    def setup(self) -> None:  # noqa: D102
        strides = _HALVE if self.halve else (1, 1)
        self.conv1, self.norm1 = _conv(self.channels, strides), _plane_norm(self.norm)
        self.conv2, self.norm2 = _conv(self.channels), _plane_norm(self.norm)
        if self.halve:
            self.shortcut = _conv(self.channels, strides)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        hidden = nn.gelu(self.norm1(self.conv1(x)))
        kept = self.shortcut(x) if self.halve else x
        return nn.gelu(kept + self.norm2(self.conv2(hidden)))


class ImageEncoder(nn.Module):
    """LightZero's `RepresentationNetworkUniZero`: image [F, H, W] -> [E].

    Two strided stages and one pooling divide the side by 8; sides of 84 and 96 are pooled again.
    """

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        config = self.config
        channels, norm = config.image_channels, config.encoder_hidden_norm
        self.stem = _conv(channels // 2, _HALVE)
        self.stem_norm = _plane_norm(norm, scales_pixels=True)
        self.stage1 = ResidualBlock(channels // 2, norm)
        self.downsample = ResidualBlock(channels, norm, halve=True)
        self.stage2 = ResidualBlock(channels, norm)
        self.stage3 = ResidualBlock(channels, norm)
        self.blocks = [ResidualBlock(channels, norm) for _ in range(config.image_blocks)]
        self.output = nn.Dense(config.embed_dim, use_bias=False)
        self.final = Normalise(config.encoder_norm, config.simnorm_group)

    def __call__(self, image: jax.Array) -> jax.Array:  # noqa: D102
        x = jnp.moveaxis(image, 0, -1)
        x = nn.gelu(self.stem_norm(self.stem(x)))
        x = self.stage2(self.downsample(self.stage1(x)))
        x = self.stage3(_pool(x))
        if image.shape[-1] in POOLED_SIDES:
            x = _pool(x)
        for block in self.blocks:
            x = block(x)
        return self.final(self.output(jnp.moveaxis(x, -1, 0).reshape(-1)))


class MemoryEncoder(nn.Module):
    """LightZero's `LatentEncoderForMemoryEnv`: image [F, H, W] -> [E].

    Three convolutions of N / 4, N / 2 and N channels keep the picture's size, then the mean of each
    plane is taken.
    """

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        config = self.config
        widths = [config.image_channels // part for part in (4, 2, 1)]
        self.convs = [_conv(width, use_bias=True) for width in widths]
        self.norms = [_batch_norm() for _ in widths]
        self.output = nn.Dense(config.embed_dim, use_bias=False)
        self.final = Normalise(config.encoder_norm, config.simnorm_group)

    def __call__(self, image: jax.Array) -> jax.Array:  # noqa: D102
        x = jnp.moveaxis(image, 0, -1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.gelu(norm(conv(x)))
        return self.final(self.output(x.mean(axis=(0, 1))))


_IMAGE_ENCODERS = {"resnet": ImageEncoder, "memory": MemoryEncoder, "vit": VisionTransformer}


def make(config: WorldModelConfig) -> nn.Module:
    """The encoder of a model that has one."""
    if config.image_shape is None:
        return VectorEncoder(config)
    return _IMAGE_ENCODERS[config.image_encoder](config)


def _pool(x: jax.Array) -> jax.Array:
    """Halves [H, W, N] by means of 3x3 pixels, of which those beyond the edge count as zero."""
    pooled: jax.Array = nn.avg_pool(x, (3, 3), _HALVE, _EDGE)  # type: ignore[no-untyped-call]
    return pooled
