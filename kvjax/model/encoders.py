"""UniZero's observation encoders in inference: one observation to one latent (Flax).

Shapes: E embedding size, F image channels (of the picture), N `image_channels` of the network.
Images come as LightZero has them, channels first; inside, channels are last.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import POOLED_SIDES, Norm, WorldModelConfig

EPSILON = 1e-5
"""Of LayerNorm and BatchNorm, as in torch."""

_EDGE = ((1, 1), (1, 1))  # every convolution and pooling is 3x3 and pads one pixel
_HALVE = (2, 2)


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """LayerNorm as torch computes it."""
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name)


class Normalise(nn.Module):
    """The norm that ends an encoder or an observation head: SimNorm or LayerNorm."""

    kind: Norm
    group: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        if self.kind == "layernorm":
            normed: jax.Array = layer_norm(name="norm")(x)
            return normed
        grouped: jax.Array = jax.nn.softmax(x.reshape(-1, self.group), axis=-1)
        return grouped.reshape(x.shape)


def _batch_norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=EPSILON)


class VectorEncoder(nn.Module):
    """Vector observation to latent: [observation_size] -> [E]."""

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        self.input = nn.Dense(self.config.embed_dim)
        self.batch_norm = _batch_norm()
        self.output = nn.Dense(self.config.embed_dim)
        self.final = Normalise(self.config.encoder_norm, self.config.simnorm_group)

    def __call__(self, observation: jax.Array) -> jax.Array:  # noqa: D102
        hidden = nn.gelu(self.batch_norm(self.input(observation)))
        return self.final(self.output(hidden))


def _conv(channels: int, strides: tuple[int, int] = (1, 1)) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides, padding=_EDGE, use_bias=False)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; halving the picture needs a convolution there as well.

    [H, W, *] -> [H, W, channels], or [H/2, W/2, channels] with `halve`.
    """

    channels: int
    halve: bool = False

    def setup(self) -> None:  # noqa: D102
        strides = _HALVE if self.halve else (1, 1)
        self.conv1, self.norm1 = _conv(self.channels, strides), _batch_norm()
        self.conv2, self.norm2 = _conv(self.channels), _batch_norm()
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
        channels = config.image_channels
        self.stem, self.stem_norm = _conv(channels // 2, _HALVE), _batch_norm()
        self.stage1 = ResidualBlock(channels // 2)
        self.downsample = ResidualBlock(channels, halve=True)
        self.stage2 = ResidualBlock(channels)
        self.stage3 = ResidualBlock(channels)
        self.blocks = [ResidualBlock(channels) for _ in range(config.image_blocks)]
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


def make(config: WorldModelConfig) -> nn.Module:
    """The encoder of a model that has one."""
    return VectorEncoder(config) if config.image_shape is None else ImageEncoder(config)


def _pool(x: jax.Array) -> jax.Array:
    """Halves [H, W, N] by means of 3x3 pixels, of which those beyond the edge count as zero."""
    pooled: jax.Array = nn.avg_pool(x, (3, 3), _HALVE, _EDGE)  # type: ignore[no-untyped-call]
    return pooled
