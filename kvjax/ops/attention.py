"""One new token attends to a read-only window and to itself.

Shapes: C context_length in tokens, H heads, D head size.
"""

import jax
import jax.numpy as jnp

from kvjax.base.values import require_shape


def attend(
    query: jax.Array,
    fresh: jax.Array,
    cached: jax.Array,
    valid: jax.Array,
    zero_keys: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of one token, scaled by 1 / sqrt(D), in float32.

    Args:
      query: [H, D].
      fresh: [2, H, D], the token's own key and value.
      cached: [C, 2, H, D], the window's keys and values in one layer.
      valid: [C] bool, the slots that may be read.
      zero_keys: [] int32, extra keys with score 0 and value 0. LightZero 0.2.0 reads its padding
        that way; for parity with it and for nothing else.

    Returns:
      [H, D].
    """
    require_shape("query", query, ("H", "D"))
    require_shape("valid", valid, ("C",))
    num_heads, head_dim = query.shape
    require_shape("fresh", fresh, (2, num_heads, head_dim))
    require_shape("cached", cached, (valid.shape[0], 2, num_heads, head_dim))
    cached = cached.astype(query.dtype)
    query = query / jnp.sqrt(head_dim).astype(query.dtype)

    cached_scores = jnp.where(valid[None], jnp.einsum("hd,chd->hc", query, cached[:, 0]), -jnp.inf)
    scores = [cached_scores, jnp.sum(query * fresh[0], axis=-1, keepdims=True)]
    if zero_keys is not None:
        score = jnp.log(zero_keys.astype(query.dtype))  # n keys of score 0; log 0 is no key
        scores.append(jnp.full((num_heads, 1), score))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)

    capacity = valid.shape[0]
    read = jnp.einsum("hc,chd->hd", weights[:, :capacity], cached[:, 1])
    return read + weights[:, capacity, None] * fresh[1]
