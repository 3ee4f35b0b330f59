"""A search in which a node stores only its own two tokens, whatever the context length.

Tokens of all nodes lie in tables, the roots' contexts first. A node is a list of indices into them,
at most C - 3, so that a window is one gather and dropping a block is a shift of indices. What the
tables hold of a token is the window mode's affair, see `kvjax.model.modes`: keys and values of each
layer in tables of their own, so that what is gathered is read as it lies, or raw tokens.

Shapes: B rows, C context_length in tokens, T = C - 3 slots of a stored window, M tokens per row, N
nodes, L layers, E embedding size (H heads of D), A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tree import Path, Tree
from kvjax.model import modes, unizero
from kvjax.model.unizero import Cached, UniZero
from kvjax.ops import support
from kvjax.ops.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of B trees and each node's window as indices into them."""

    tables: tuple[jax.Array, ...]  # [M, B, E]: keys and values layer by layer, or raw tokens
    slots: jax.Array  # [N, B, T] int32 indices along M
    length: jax.Array  # [N, B] int32


def empty_tokens(config: WorldModelConfig, rows: int, nodes: int) -> Tokens:
    """Tables of zeros and nodes without a window."""
    kept, block = config.window.kept_length, config.window.block
    shape = (kept + block * (nodes - 1), rows, config.embed_dim)
    dtype = modes.table_dtype(config)
    return Tokens(
        tables=tuple(jnp.zeros(shape, dtype) for _ in range(modes.num_tables(config))),
        slots=jnp.zeros((nodes, rows, kept), jnp.int32),
        length=jnp.zeros((nodes, rows), jnp.int32),
    )


def init_tokens(model: UniZero, window: Window, config: WorldModelConfig, nodes: int) -> Tokens:
    """Tables that hold the roots' windows: `window.kv` [B, C, L, 2, H, D]."""
    rows, kept = window.length.shape[0], config.window.kept_length
    held = modes.held(model, window, config)
    valid = (_slots(kept) < window.length[:, None])[..., None]
    empty = empty_tokens(config, rows, nodes)
    return Tokens(
        tables=tuple(
            table.at[:kept].set(jnp.moveaxis(jnp.where(valid, part, 0.0), 0, 1).astype(table.dtype))
            for table, part in zip(empty.tables, held, strict=True)
        ),
        slots=empty.slots.at[trees.ROOT].set(_slots(kept)),
        length=empty.length.at[trees.ROOT].set(window.length),
    )


def _slots(kept: int) -> jax.Array:
    """Numbers of a stored window's slots: [1, T] int32."""
    return jnp.arange(kept, dtype=jnp.int32)[None]


def read(
    tokens: Tokens, model: UniZero, node: jax.Array, *, config: WorldModelConfig
) -> tuple[Cached, jax.Array, jax.Array, jax.Array]:
    """Windows of one node per row, [B] int32, as the model reads them.

    Returns:
      Keys and values [B, T, E] of each layer, slots [B, T], lengths [B], valid slots [B, T] bool.
    """
    rows, kept = node.shape[0], tokens.slots.shape[-1]
    every_row = jnp.arange(rows, dtype=jnp.int32)
    slots, length = tokens.slots[node, every_row], tokens.length[node, every_row]
    held = [table[slots, every_row[:, None]].astype(model.dtype) for table in tokens.tables]
    return modes.as_read(model, held, config), slots, length, _slots(kept) < length[:, None]


def write(
    tokens: Tokens,
    simulation: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    blocks: list[jax.Array],
    *,
    config: WorldModelConfig,
) -> Tokens:
    """Adds node `simulation + 1`: its parent's `slots` [B, T] and `length` [B], and its block.

    The block's tokens [K, B, E] go to each table. A parent that is full loses its oldest block, or
    all but the new block's last tokens.
    """
    kept, block = slots.shape[1], config.window.block
    first = kept + block * simulation
    full, carry = (length == kept)[:, None], config.mode.carry
    if carry is None:
        start = jnp.where(full, kept - block, length[:, None])
        shifted = jnp.where(full, jnp.roll(slots, -block, axis=1), slots)
    else:
        start, shifted = jnp.where(full, carry - block, length[:, None]), slots
    offset = _slots(kept) - start
    extended = jnp.where((offset >= 0) & (offset < block), first + offset, shifted)
    node = simulation + 1
    update = jax.lax.dynamic_update_slice_in_dim
    return Tokens(
        tables=tuple(
            update(table, new.astype(table.dtype), first, 0)
            for table, new in zip(tokens.tables, blocks, strict=True)
        ),
        slots=update(tokens.slots, extended[None].astype(jnp.int32), node, 0),
        length=update(tokens.length, (start[:, 0] + block)[None], node, 0),
    )


def run(
    model: UniZero,
    tree: Tree,
    tokens: Tokens,
    timestep: jax.Array,
    discount: jax.Array,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Tree, Tokens]:
    """Grows all trees by the search's simulations.

    Args:
      timestep: [B] int32 of the roots.
      discount: [] of a step, in place of the search's.
    """

    def simulate(simulation: jax.Array, state: Any) -> Any:
        tree, tokens, path = state
        path = trees.select(tree, search, path)
        grown = _grow(model, tree, tokens, path, simulation, timestep, discount, config)
        return *grown, path

    first, last = search.kept_nodes, search.num_nodes - 1
    start = tree, tokens, trees.nowhere(timestep.shape[0], search)
    tree, tokens, _ = loops.fori_loop(first, last, simulate, start)
    return tree, tokens


def _grow(
    model: UniZero,
    tree: Tree,
    tokens: Tokens,
    path: Path,
    simulation: jax.Array,
    timestep: jax.Array,
    discount: jax.Array,
    config: WorldModelConfig,
) -> tuple[Tree, Tokens]:
    """Makes node `simulation + 1`: imagines a step from each path's end, backs its value up."""
    parent, action = path.leaf()
    cached, slots, length, valid = read(tokens, model, parent, config=config)
    at_action, at_observation = modes.rotations(timestep, path.depth, config)
    acted = unizero.embed_action(model, action)
    x = unizero.place(model, acted, length)
    x, first = unizero.token_step(model, x, cached, valid, (), at_action, config=config)
    reward, latent = unizero.at_action(model, x, config=config)
    observed = unizero.embed_latent(latent)
    x = unizero.place(model, observed, length + 1)
    x, second = unizero.token_step(model, x, cached, valid, (first,), at_observation, config=config)
    policy, value = unizero.at_observation(model, x)
    blocks = modes.block_held(model, (acted, observed), (first, second), length, config)
    tokens = write(tokens, simulation, slots, length, blocks, config=config)
    reward, value = (support.to_scalar(x, config.support, axis=0) for x in (reward, value))
    prior = trees.softmax(policy.T)
    value = jnp.where(jnp.isnan(prior[:, 0]), prior[:, 0], value)  # so that the root's value tells
    return trees.expand(tree, path, simulation + 1, reward, value, prior, discount), tokens
