"""A search in which a node stores only its own two tokens, whatever the context length.

Tokens of all nodes lie in one table, the roots' contexts first. A node is a list of indices into
it, at most C - 3, so that a window is one gather and a slide is a shift of indices. Keys and values
are stored without what their position adds to them (for learned absolute positions) and get what
their slot adds when they are read: that is the sum of all corrections of the slides in between.

Shapes: B rows, C context_length in tokens, T = C - 3 slots of a stored window, M tokens per row, N
nodes, L layers, E embedding size (H heads of D), A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import fused
from kvjax import tree as trees
from kvjax.config import BLOCK, SearchConfig, WorldModelConfig
from kvjax.fused import Cached, Folded, Fresh
from kvjax.ops import support
from kvjax.tree import Path, Tree
from kvjax.types import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of B trees and each node's window as indices into them."""

    kv: tuple[jax.Array, ...]  # [M, B, E] without positions: keys and values, layer by layer
    slots: jax.Array  # [N, B, T] int32 indices along M
    length: jax.Array  # [N, B] int32


def init_tokens(folded: Folded, window: Window, config: WorldModelConfig, nodes: int) -> Tokens:
    """A table that holds the roots' windows: `window.kv` [B, C, L, 2, H, D]."""
    rows, kept = window.length.shape[0], config.window.kept_length
    valid = jnp.arange(kept) < window.length[:, None]
    bare = window.kv[:, :kept].astype(jnp.float32) - folded.projected[:kept]
    bare = jnp.where(valid[..., None, None, None, None], bare, 0.0)
    shape = (kept + BLOCK * (nodes - 1), rows, config.embed_dim)
    tables = [
        jnp.zeros(shape, config.dtype).at[:kept].set(jnp.moveaxis(part, 0, 1).astype(config.dtype))
        for part in _parts(bare)
    ]
    slots = jnp.zeros((nodes, rows, kept), jnp.int32).at[trees.ROOT].set(jnp.arange(kept))
    return Tokens(
        kv=tuple(tables),
        slots=slots,
        length=jnp.zeros((nodes, rows), jnp.int32).at[trees.ROOT].set(window.length),
    )


def _parts(kv: jax.Array) -> list[jax.Array]:
    """Splits [..., L, 2, H, D] into 2L arrays [..., E]."""
    layers, kinds, heads, head_dim = kv.shape[-4:]
    flat = kv.reshape(*kv.shape[:-4], layers * kinds, heads * head_dim)
    return [flat[..., part, :] for part in range(layers * kinds)]


def read(
    tokens: Tokens, folded: Folded, node: jax.Array
) -> tuple[Cached, jax.Array, jax.Array, jax.Array]:
    """Windows of one node per row, [B] int32, as the model reads them.

    Keys and values of each layer have tables of their own, so that what is gathered is read as it
    lies.

    Returns:
      Keys and values [B, T, E] of each layer, slots [B, T], lengths [B], valid slots [B, T] bool.
    """
    rows, kept = node.shape[0], tokens.slots.shape[-1]
    every_row = jnp.arange(rows)
    slots, length = tokens.slots[node, every_row], tokens.length[node, every_row]
    positions = _parts(folded.projected[:kept])
    read = [
        table[slots, every_row[:, None]].astype(jnp.float32) + position
        for table, position in zip(tokens.kv, positions, strict=True)
    ]
    cached = tuple(zip(read[0::2], read[1::2], strict=True))
    return cached, slots, length, jnp.arange(kept) < length[:, None]


def write(
    tokens: Tokens,
    folded: Folded,
    simulation: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    fresh: tuple[Fresh, Fresh],
) -> Tokens:
    """Adds the node of a simulation: its parent's `slots` [B, T] and `length` [B], and its block.

    The block's two tokens go to the tables; a parent that is full loses its oldest block, which is
    what a slide does.
    """
    kept = slots.shape[1]
    positions = [_parts(folded.projected[length + i]) for i in range(BLOCK)]
    blocks = [
        jnp.stack(
            [
                token[part // 2][:, part % 2] - at[part]
                for token, at in zip(fresh, positions, strict=True)
            ]
        )
        for part in range(len(tokens.kv))
    ]
    first = kept + BLOCK * simulation
    slides = (length == kept)[:, None]
    shifted = jnp.where(slides, jnp.roll(slots, -BLOCK, axis=1), slots)
    start = jnp.where(slides, kept - BLOCK, length[:, None])
    offset = jnp.arange(kept) - start
    extended = jnp.where((offset >= 0) & (offset < BLOCK), first + offset, shifted)
    grown = jnp.where(slides[:, 0], length, length + BLOCK)
    node = simulation + 1
    update = jax.lax.dynamic_update_slice_in_dim
    return Tokens(
        kv=tuple(
            update(table, block.astype(table.dtype), first, 0)
            for table, block in zip(tokens.kv, blocks, strict=True)
        ),
        slots=update(tokens.slots, extended[None].astype(jnp.int32), node, 0),
        length=update(tokens.length, grown[None], node, 0),
    )


def run(
    folded: Folded, prior: jax.Array, window: Window, config: WorldModelConfig, search: SearchConfig
) -> Tree:
    """Searches all rows: prior [B, A] of the roots (see `kvjax.tree.softmax`) and their windows."""
    tree = trees.init(prior, search)
    tokens = init_tokens(folded, window, config, search.num_simulations + 1)

    def simulate(simulation: jax.Array, state: Any) -> Any:
        tree, tokens = state
        path = trees.select(tree, search)
        return _grow(folded, tree, tokens, path, simulation, config, search)

    grown: Tree = jax.lax.fori_loop(0, search.num_simulations, simulate, (tree, tokens))[0]
    return grown


def _grow(
    folded: Folded,
    tree: Tree,
    tokens: Tokens,
    path: Path,
    simulation: jax.Array,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Tree, Tokens]:
    """One simulation: imagines a step from each path's end and backs its value up."""
    parent, action = path.leaf()
    cached, slots, length, valid = read(tokens, folded, parent)
    x = fused.embed_action(folded, action, length)
    x, first = fused.token_step(folded, x, cached, valid)
    reward, latent = fused.at_action(folded, x, config=config)
    x = fused.embed_latent(folded, latent, length + 1)
    x, second = fused.token_step(folded, x, cached, valid, (first,))
    policy, value = fused.at_observation(folded, x)
    tokens = write(tokens, folded, simulation, slots, length, (first, second))
    reward, value = (support.to_scalar(x, config.support, axis=0) for x in (reward, value))
    prior = trees.softmax(policy.T)
    value = jnp.where(jnp.isnan(prior[:, 0]), jnp.nan, value)  # so that the root's value tells
    return trees.expand(tree, path, simulation + 1, reward, value, prior, search), tokens
