"""Positions of tokens: the learned table and what a slide must add; rotations.

Shapes: C context_length in tokens, E embedding size, L layers, H heads, D head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.values import require_shape
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
    require_shape("table", table, ("max_tokens", "E"))
    beyond = length - table.shape[0]
    if beyond <= 0:
        return table[:length]
    if table.shape[0] < BLOCK:
        raise ValueError(f"a position table of {table.shape[0]} row cannot reach {length} rows")
    steps = jnp.arange(1, beyond + 1, dtype=table.dtype)[:, None]
    last = table[-1:]
    return jnp.concatenate([table, last + steps * (last - table[-2:-1])])


def project(table: jax.Array, kernels: jax.Array, num_heads: int) -> jax.Array:
    """What each position adds to a token's keys and values when LayerNorm is left out.

    Args:
      table: [C, E] position embeddings.
      kernels: [L, 2, E, H * D], each layer's key and value projection.
      num_heads: H.

    Returns:
      [C, L, 2, H, D].
    """
    require_shape("table", table, ("C", "E"))
    require_shape("kernels", kernels, ("L", 2, table.shape[1], "H * D"))
    projected = jnp.einsum("ce,lsef->clsf", table, kernels)
    return projected.reshape(*projected.shape[:-1], num_heads, -1)


def slide_correction(projected: jax.Array, *, block: int = BLOCK) -> jax.Array:
    """What `slide` adds to the tokens that it keeps: new position minus old position.

    Args:
      projected: [C, L, 2, H, D], from `project`.

    Returns:
      [C - 3, L, 2, H, D]: `projected[0 : C-3] - projected[2 : C-1]`.
    """
    require_shape("projected", projected, ("C", "L", 2, "H", "D"))
    full_length = projected.shape[0] - 1
    return projected[: full_length - block] - projected[block:full_length]


def rotation(position: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Rotary embedding of a position: cosines and sines of its angles.

    Angle i is `position / theta ** (2 i / D)`, computed from the integer: no table ends anywhere.

    Args:
      position: [] integer, the token's place in the episode.
      head_dim: D, even.

    Returns:
      [2, D / 2] float32: cosines, sines.
    """
    require_shape("position", position, ())
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    angles = position.astype(jnp.float32) * (1.0 / np.float32(theta) ** exponents)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(heads: jax.Array, by: jax.Array) -> jax.Array:
    """Turns each pair (2i, 2i + 1) of a query or key by angle i.

    Args:
      heads: [H, D].
      by: [2, D / 2], from `rotation`.

    Returns:
      [H, D].
    """
    require_shape("heads", heads, ("H", "D"))
    require_shape("by", by, (2, heads.shape[1] // 2))
    even, odd = heads[:, ::2], heads[:, 1::2]
    cos, sin = by.astype(heads.dtype)[:, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(heads.shape)


def observation_position(
    timestep: jax.Array, depth: jax.Array | int = 0, *, gap: int = 0
) -> jax.Array:
    """Where a rotary model places an observation's token: `2 (t + d)`, plus the gap if imagined.

    The action's token that led there comes one before.

    Args:
      timestep: [] integer t of the search's root in its episode.
      depth: [] integer d, edges below that root; 0 is the root itself.
      gap: positions that are left out between a root and what is imagined from it: 2 in LightZero
        (its root observation at step 1 sits at 2, the first imagined action at 5), 0 is consistent.
    """
    return BLOCK * (timestep + depth) + jnp.where(jnp.asarray(depth) > 0, gap, 0)
