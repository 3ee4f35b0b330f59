"""LightZero main's vision transformer in inference: one image to one latent (Flax).

Shapes: E embedding size, F image channels (of the picture), M `image_channels` (a token's width),
T tokens: the class token and one per patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import VIT_HEAD, VIT_PATCH, VIT_SIMNORM_GROUP, WorldModelConfig
from kvjax.model.norms import Normalise, layer_norm


class _Block(nn.Module):
    """Pre-LayerNorm attention of all tokens to all, and a feed-forward layer: [T, M] -> [T, M]."""

    config: WorldModelConfig

    def setup(self) -> None:
        width, heads = self.config.image_channels, self.config.image_heads
        self.attention_norm, self.feed_forward_norm = layer_norm(), layer_norm()
        self.qkv = nn.Dense(3 * heads * VIT_HEAD, use_bias=False)
        self.projection = nn.Dense(width)
        self.expand, self.contract = nn.Dense(self.config.image_hidden), nn.Dense(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.projection(self._attend(self.attention_norm(x)))
        hidden = nn.gelu(self.expand(self.feed_forward_norm(x)), approximate=False)
        return x + self.contract(hidden)

    def _attend(self, x: jax.Array) -> jax.Array:
        parts = self.qkv(x).reshape(len(x), 3, self.config.image_heads, VIT_HEAD)
        query, key, value = jnp.moveaxis(parts, (1, 2), (0, 1))  # [heads, T, VIT_HEAD] each
        weights = nn.softmax(query @ key.mT / VIT_HEAD**0.5, axis=-1)
        return jnp.moveaxis(weights @ value, 0, 1).reshape(len(x), -1)


class VisionTransformer(nn.Module):
    """LightZero's `ViT`: image [F, H, W] -> [E]."""

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        config = self.config
        width, random = config.image_channels, nn.initializers.normal(1.0)
        _, side, _ = config.observation_shape
        tokens = 1 + (side // VIT_PATCH) ** 2
        self.patch_norm, self.embedding, self.token_norm = (
            layer_norm(),
            nn.Dense(width),
            layer_norm(),
        )
        self.class_token = self.param("class_token", random, (1, 1, width))
        self.positions = self.param("positions", random, (1, tokens, width))
        self.blocks = [_Block(config) for _ in range(config.image_blocks)]
        self.last_norm = layer_norm()
        self.output = nn.Dense(config.embed_dim)
        self.final = Normalise(config.encoder_norm, VIT_SIMNORM_GROUP)

    def __call__(self, image: jax.Array) -> jax.Array:  # noqa: D102
        tokens = self.token_norm(self.embedding(self.patch_norm(_patches(image))))
        x = jnp.concatenate([self.class_token[0], tokens]) + self.positions[0]
        for block in self.blocks:
            x = block(x)
        return self.final(self.output(self.last_norm(x)[0]))


def _patches(image: jax.Array) -> jax.Array:
    """Squares of pixels, row by row, of a picture [F, H, W]: [T - 1, pixels * F], channels last."""
    channels, height, width = image.shape
    rows, columns = height // VIT_PATCH, width // VIT_PATCH
    squares = image.reshape(channels, rows, VIT_PATCH, columns, VIT_PATCH)
    return squares.transpose(1, 3, 2, 4, 0).reshape(rows * columns, -1)
