"""Learned absolute positions: the table, its continuation, and what a slide must add.

Shapes: C context_length in tokens, E embedding size, L layers, H heads, D head size.
"""

import chex
import jax
import jax.numpy as jnp

from kvjax.config import BLOCK


def continue_table(table: jax.Array, length: int) -> jax.Array:
    """The first `length` rows of a position table, continued linearly beyond its end.

    Row `max_tokens - 1 + n` is `last + n * (last - second to last)`, as LightZero's main branch
    has it.

    Args:
      table: [max_tokens, E], at least two rows where a continuation is needed.
      length: number of rows wanted.

    Returns:
      [length, E].

    Raises:
      ValueError: a table of one row has no direction to go on in.
    """
    chex.assert_rank(table, 2)
    beyond = length - table.shape[0]
    if beyond <= 0:
        return table[:length]
    if table.shape[0] < BLOCK:
        raise ValueError(f"a position table of {table.shape[0]} row cannot reach {length} rows")
    steps = jnp.arange(1, beyond + 1, dtype=table.dtype)[:, None]
    return jnp.concatenate([table, table[-1] + steps * (table[-1] - table[-2])])


def project(table: jax.Array, kernels: jax.Array, num_heads: int) -> jax.Array:
    """What each position adds to a token's keys and values when LayerNorm is left out.

    Args:
      table: [C, E] position embeddings.
      kernels: [L, 2, E, H * D], each layer's key and value projection.
      num_heads: H.

    Returns:
      [C, L, 2, H, D].
    """
    chex.assert_rank([table, kernels], [2, 4])
    projected = jnp.einsum("ce,lsef->clsf", table, kernels)
    return projected.reshape(*projected.shape[:-1], num_heads, -1)


def slide_correction(projected: jax.Array) -> jax.Array:
    """What `slide` adds to the tokens that it keeps: new position minus old position.

    Args:
      projected: [C, L, 2, H, D], from `project`.

    Returns:
      [C - 3, L, 2, H, D]: `projected[0 : C-3] - projected[2 : C-1]`.
    """
    chex.assert_rank(projected, 5)
    full_length = projected.shape[0] - 1
    return projected[: full_length - BLOCK] - projected[BLOCK:full_length]
