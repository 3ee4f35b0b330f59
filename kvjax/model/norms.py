"""Norms as torch computes them (Flax), and what is left of one in folded weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import Norm

EPSILON = 1e-5
"""Of LayerNorm and BatchNorm, as in torch."""


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


def centre(x: jax.Array, axis: int) -> jax.Array:
    """With mean zero along an axis."""
    return x - jnp.mean(x, axis=axis, keepdims=True)
