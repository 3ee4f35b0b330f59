"""The Gaussian policy of continuous actions, squashed by a tanh: how it is made and drawn from.

Shapes: A numbers of an action, K actions that are drawn.
"""

import jax
import jax.numpy as jnp

from kvjax.config import WorldModelConfig

_LOWEST, _HIGHEST = -20.0, 2.0
"""Of logarithms of "conditioned" deviations."""

_HAPPO_SCALE = 0.5


def of_head(
    mean: jax.Array, log_sigma: jax.Array | None, config: WorldModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Means and deviations out of what a policy head says of them, as DI-engine makes them.

    Args:
      mean: [A, ...].
      log_sigma: [A, ...] or [A, 1]; None of "fixed" deviations.
    """
    mean = jnp.tanh(mean) if config.bound_type == "tanh" else mean
    if log_sigma is None:
        return mean, jnp.full_like(mean, config.fixed_sigma_value)
    if config.sigma_type == "conditioned":
        sigma = jnp.exp(jnp.clip(log_sigma, _LOWEST, _HIGHEST))
    elif config.sigma_type == "happo":
        sigma = jax.nn.sigmoid(log_sigma) * _HAPPO_SCALE
    else:
        sigma = jnp.exp(log_sigma)
    return mean, jnp.broadcast_to(sigma, mean.shape)
