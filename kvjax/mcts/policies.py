"""Into a search and out of it: noise at the root, an action from its visits.

Shapes: B environments, A actions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.config import SearchConfig

_TINY = float(np.finfo(np.float32).tiny)
"""The smallest number that every processor knows; a temperature below is 0."""


def with_noise(
    rng: jax.Array, prior: jax.Array, legal: jax.Array, search: SearchConfig
) -> jax.Array:
    """Mixes Dirichlet noise over the legal actions into priors [B, A]."""
    if search.noise_fraction == 0.0:
        return prior
    gamma = jax.random.gamma(rng, search.dirichlet_alpha, prior.shape, prior.dtype)
    gamma = jnp.where(legal, jnp.maximum(gamma, _TINY), 0.0)
    noise = gamma / jnp.sum(gamma, axis=1, keepdims=True)
    fraction = search.noise_fraction
    return jnp.where(legal, prior * (1 - fraction) + fraction * noise, prior)


def choose(
    rng: jax.Array, visit_counts: jax.Array, legal: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """The most visited legal action, the first on ties; or a sample of the visits: [B] int32.

    At a temperature above 0 an action is drawn in proportion to `visits ** (1 / temperature)`, and
    only one that is legal and was visited; where none was, all legal ones are alike.

    Args:
      rng: a JAX PRNG key, for the sample.
      visit_counts: [B, A] int32.
      legal: [B, A] bool.
      temperature: [], at least 0. Below float32's smallest normal number it counts as 0.
    """
    counts = jnp.where(legal, visit_counts, -1)
    temperature = jnp.asarray(temperature, jnp.float32)

    def most_visited() -> jax.Array:
        return jnp.argmax(counts, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        visited = counts > 0
        chosen = jnp.where(jnp.any(visited, axis=-1, keepdims=True), visited, legal)
        logs = jnp.log(jnp.maximum(counts, 1).astype(jnp.float32))
        below = logs - jnp.max(logs, axis=-1, keepdims=True)  # 0 at the top, however divided
        logits = jnp.where(chosen, below / temperature, -jnp.inf)
        return jax.random.categorical(rng, logits).astype(jnp.int32)

    action: jax.Array = loops.cond(temperature < _TINY, most_visited, sample)
    return action


def visit_shares(visit_counts: jax.Array) -> jax.Array:
    """Each action's share of its row's visits: [B, A]; zeros where there are none."""
    counts = visit_counts.astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)


def all_finite(*arrays: jax.Array) -> jax.Array:
    """Rows [B] in which all arrays [B] or [B, A] are finite."""
    rows = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in arrays]
    return functools.reduce(jnp.logical_and, rows)
