"""A search in which a node stores only its own two tokens, whatever the context length.

Tokens of all nodes lie in one table, the roots' contexts first. A node is a list of indices into
it, at most C - 3, so that a window is one gather and dropping a block is a shift of indices. What
the table holds of a token depends on the window mode:

* "learned", "reset": keys and values without what their position adds to them; they get what their
  slot adds when they are read. That is the sum of all corrections of the slides in between.
* rotary modes: keys and values as they are, since a key keeps its rotation.
* "rebuild": the raw token. Keys and values of a window are computed when it is read; they are those
  of its tokens at positions 0, 1, .. whether or not it has ever overflowed.

Keys and values of each layer have tables of their own, so that what is gathered is read as it lies.

Shapes: B rows, C context_length in tokens, T = C - 3 slots of a stored window, M tokens per row, N
nodes, L layers, E embedding size (H heads of D), A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.config import BLOCK, SearchConfig, WorldModelConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tree import Path, Tree
from kvjax.model import fused, fused_step
from kvjax.model.fused import Cached, Folded, Fresh
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
    kept, keeps_raw = config.window.kept_length, config.window.raw_size is not None
    shape = (kept + BLOCK * (nodes - 1), rows, config.embed_dim)
    dtype = jnp.promote_types(config.dtype, jnp.float32) if keeps_raw else config.dtype
    return Tokens(
        tables=tuple(
            jnp.zeros(shape, dtype) for _ in range(1 if keeps_raw else 2 * config.num_layers)
        ),
        slots=jnp.zeros((nodes, rows, kept), jnp.int32),
        length=jnp.zeros((nodes, rows), jnp.int32),
    )


def init_tokens(folded: Folded, window: Window, config: WorldModelConfig, nodes: int) -> Tokens:
    """Tables that hold the roots' windows: `window.kv` [B, C, L, 2, H, D]."""
    rows, kept = window.length.shape[0], config.window.kept_length
    if window.raw is not None:
        raw = window.raw[:, :kept]
        held = [raw - jnp.mean(raw, axis=-1, keepdims=True)]
    else:
        kv = window.kv[:, :kept].astype(jnp.float32)
        held = _parts(kv if folded.projected is None else kv - folded.projected[None, :kept])
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


def _parts(kv: jax.Array) -> list[jax.Array]:
    """Splits [..., L, 2, H, D] into 2L arrays [..., E]."""
    layers, kinds, heads, head_dim = kv.shape[-4:]
    flat = kv.reshape(*kv.shape[:-4], layers * kinds, heads * head_dim)
    return [flat[..., part, :] for part in range(layers * kinds)]


def read(
    tokens: Tokens, folded: Folded, node: jax.Array, *, config: WorldModelConfig
) -> tuple[Cached, jax.Array, jax.Array, jax.Array]:
    """Windows of one node per row, [B] int32, as the model reads them.

    Returns:
      Keys and values [B, T, E] of each layer, slots [B, T], lengths [B], valid slots [B, T] bool.
    """
    rows, kept = node.shape[0], tokens.slots.shape[-1]
    every_row = jnp.arange(rows, dtype=jnp.int32)
    slots, length = tokens.slots[node, every_row], tokens.length[node, every_row]
    held = [table[slots, every_row[:, None]].astype(jnp.float32) for table in tokens.tables]
    valid = _slots(kept) < length[:, None]
    if config.window_mode == "rebuild":
        cached = fused.sequence(folded, jnp.moveaxis(held[0], -1, 0), config=config)
        return cached, slots, length, valid
    if folded.projected is not None:
        added = _parts(folded.projected[:kept])
        held = [part + at[None] for part, at in zip(held, added, strict=True)]
    return tuple(zip(held[0::2], held[1::2], strict=True)), slots, length, valid


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

    The block's two tokens [2, B, E] go to each table. A parent that is full loses its oldest block,
    or all but the block's last token (window mode "reset").
    """
    kept = slots.shape[1]
    first = kept + BLOCK * simulation
    overflows = (length == kept)[:, None]
    if config.window_mode == "reset":
        start = jnp.where(overflows, 1 - BLOCK, length[:, None])
        shifted = slots
    else:
        start = jnp.where(overflows, kept - BLOCK, length[:, None])
        shifted = jnp.where(overflows, jnp.roll(slots, -BLOCK, axis=1), slots)
    offset = _slots(kept) - start
    extended = jnp.where((offset >= 0) & (offset < BLOCK), first + offset, shifted)
    node = simulation + 1
    update = jax.lax.dynamic_update_slice_in_dim
    return Tokens(
        tables=tuple(
            update(table, block.astype(table.dtype), first, 0)
            for table, block in zip(tokens.tables, blocks, strict=True)
        ),
        slots=update(tokens.slots, extended[None].astype(jnp.int32), node, 0),
        length=update(tokens.length, (start[:, 0] + BLOCK)[None], node, 0),
    )


def run(
    folded: Folded,
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
        grown = _grow(folded, tree, tokens, path, simulation, timestep, discount, config)
        return *grown, path

    first, last = search.kept_nodes, search.num_nodes - 1
    start = tree, tokens, trees.nowhere(timestep.shape[0], search)
    tree, tokens, _ = loops.fori_loop(first, last, simulate, start)
    return tree, tokens


def _grow(
    folded: Folded,
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
    cached, slots, length, valid = read(tokens, folded, parent, config=config)
    at_action, at_observation = fused_step.rotations(timestep, path.depth, config)
    acted = fused.embed_action(folded, action)
    x = fused.place(folded, acted, length)
    x, first = fused.token_step(folded, x, cached, valid, (), at_action, config=config)
    reward, latent = fused.at_action(folded, x, config=config)
    observed = fused.embed_latent(latent)
    x = fused.place(folded, observed, length + 1)
    x, second = fused.token_step(folded, x, cached, valid, (first,), at_observation, config=config)
    policy, value = fused.at_observation(folded, x)
    if config.window_mode == "rebuild":
        blocks = [jnp.stack([acted.T, observed.T])]
    else:
        blocks = _bare_blocks(folded, observed, length, (first, second), config)
    tokens = write(tokens, simulation, slots, length, blocks, config=config)
    reward, value = (support.to_scalar(x, config.support, axis=0) for x in (reward, value))
    prior = trees.softmax(policy.T)
    value = jnp.where(jnp.isnan(prior[:, 0]), jnp.nan, value)  # so that the root's value tells
    return trees.expand(tree, path, simulation + 1, reward, value, prior, discount), tokens


def _bare_blocks(
    folded: Folded,
    observed: jax.Array,
    length: jax.Array,
    pushed: tuple[Fresh, Fresh],
    config: WorldModelConfig,
) -> list[jax.Array]:
    """A node's tokens as each table holds them: [2, B, E]."""
    first, second = ([part[:, i] for part in token for i in range(2)] for token in pushed)
    slot = length + 1
    if config.window_mode == "reset":
        overflows = length == config.window.kept_length
        second = loops.cond(
            jnp.any(overflows),
            lambda: [
                jnp.where(overflows[:, None], alone, part)
                for alone, part in zip(_alone(folded, observed, config), second, strict=True)
            ],
            lambda: second,
        )
        slot = jnp.where(overflows, 0, slot)
    if folded.projected is not None:
        first, second = (
            [part - at for part, at in zip(token, _parts(folded.projected[place]), strict=True)]
            for token, place in ((first, length), (second, slot))
        )
    return [jnp.stack(parts) for parts in zip(first, second, strict=True)]


def _alone(folded: Folded, observed: jax.Array, config: WorldModelConfig) -> list[jax.Array]:
    """Keys and values [B, E], layer by layer, of latents [E, B] without a context."""
    layers = fused.sequence(folded, observed[..., None], config=config)
    return [part[:, 0] for layer in layers for part in layer]
