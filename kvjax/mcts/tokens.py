"""A search in which a node stores only its own tokens, whatever the context length.

Tokens of all nodes lie in tables, the roots' contexts first. A node is a list of indices into them,
so that a window is one gather and dropping a block is a shift of indices. The search owns tables,
slots and trees; what a token is, how it is read and what positions add is the model's affair.

Shapes: B rows, K tokens that a step adds, T slots of a stored window, M tokens per row, N nodes, A
actions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.config import SearchConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """One node of each row, as a model sees it.

    Attributes:
      tokens: pytree of [B, T, ...], the node's window out of the tables.
      valid: [B, T] bool, which slots hold a token; they are the first ones.
      length: [B] int32, tokens.
      depth: [B] int32, edges below the root.
      root: pytree of [B, ...], what the search was given of the roots.
    """

    tokens: Any
    valid: jax.Array
    length: jax.Array
    depth: jax.Array
    root: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """What a step from a node brings: reward [B], value [B], policy logits [B, A]."""

    reward: jax.Array
    value: jax.Array
    policy: jax.Array


@dataclasses.dataclass(frozen=True)
class TreeModel:
    """What a search needs of a model. Static.

    Attributes:
      block: K, tokens that a step adds.
      size: T, tokens of the longest window that is stored.
      step: `(params, node, action [B]) -> (tokens, Transition)`, a pure function; the tokens are
        those of the new node, a pytree of [K, B, ...] like the tables.
      carry: of a full window the newest block's last `carry` tokens are kept and no others; None:
        it loses its oldest block.
    """

    block: int
    size: int
    step: Callable[[Any, Node, jax.Array], tuple[Any, Transition]]
    carry: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of B trees and each node's window as indices into them."""

    tables: Any  # pytree of [M, B, ...]
    slots: jax.Array  # [N, B, T] int32 indices along M
    length: jax.Array  # [N, B] int32


def empty_tokens(model: TreeModel, like: Any, rows: int, nodes: int) -> Tokens:
    """Tables of zeros and nodes without a window.

    Args:
      like: pytree of arrays [...], of one token.
    """
    size = model.size + model.block * (nodes - 1)
    return Tokens(
        tables=jax.tree.map(lambda x: jnp.zeros((size, rows, *x.shape), x.dtype), like),
        slots=jnp.zeros((nodes, rows, model.size), jnp.int32),
        length=jnp.zeros((nodes, rows), jnp.int32),
    )


def with_roots(empty: Tokens, tokens: Any, length: jax.Array) -> Tokens:
    """Tables that hold the roots' windows: pytree of [B, T, ...], of lengths [B]."""
    size = empty.slots.shape[-1]
    valid = _slots(size) < length[:, None]

    def put(table: jax.Array, part: jax.Array) -> jax.Array:
        mask = valid.reshape(*valid.shape, *[1] * (part.ndim - 2))
        held = jnp.moveaxis(jnp.where(mask, part, 0), 0, 1)
        return table.at[:size].set(held.astype(table.dtype))

    return Tokens(
        tables=jax.tree.map(put, empty.tables, tokens),
        slots=empty.slots.at[trees.ROOT].set(_slots(size)),
        length=empty.length.at[trees.ROOT].set(length),
    )


def _slots(size: int) -> jax.Array:
    """Numbers of a stored window's slots: [1, T] int32."""
    return jnp.arange(size, dtype=jnp.int32)[None]


def _write(
    tokens: Tokens,
    simulation: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    new: Any,
    model: TreeModel,
) -> Tokens:
    """Adds node `simulation + 1`: its parent's `slots` [B, T] and `length` [B], and its own tokens.

    Those are `new`, [K, B, ...].
    """
    size, block = model.size, model.block
    first, full = size + block * simulation, (length == size)[:, None]
    if model.carry is None:
        start = jnp.where(full, size - block, length[:, None])
        shifted = jnp.where(full, jnp.roll(slots, -block, axis=1), slots)
    else:
        start, shifted = jnp.where(full, model.carry - block, length[:, None]), slots
    offset = _slots(size) - start
    extended = jnp.where((offset >= 0) & (offset < block), first + offset, shifted)
    node = simulation + 1
    update = jax.lax.dynamic_update_slice_in_dim
    return Tokens(
        tables=jax.tree.map(
            lambda table, x: update(table, x.astype(table.dtype), first, 0), tokens.tables, new
        ),
        slots=update(tokens.slots, extended[None].astype(jnp.int32), node, 0),
        length=update(tokens.length, (start[:, 0] + block)[None], node, 0),
    )


def run(
    model: TreeModel,
    params: Any,
    tree: Tree,
    tokens: Tokens,
    root: Any,
    discount: jax.Array,
    search: SearchConfig,
) -> tuple[Tree, Tokens]:
    """Grows all trees by the search's simulations.

    Args:
      params: what the model's step is given.
      root: pytree of [B, ...], what it is told of the roots.
      discount: [] of a step, in place of the search's.
    """
    rows = tokens.length.shape[1]
    every_row = jnp.arange(rows, dtype=jnp.int32)

    def simulate(simulation: jax.Array, state: Any) -> Any:
        tree, tokens, path = state
        path = trees.select(tree, search, path)
        parent, action = path.leaf()
        slots, length = tokens.slots[parent, every_row], tokens.length[parent, every_row]
        held = jax.tree.map(lambda table: table[slots, every_row[:, None]], tokens.tables)
        valid = _slots(model.size) < length[:, None]
        node = Node(held, valid, length, path.depth - 1, root)
        new, imagined = model.step(params, node, action)
        tokens = _write(tokens, simulation, slots, length, new, model)
        prior = trees.softmax(imagined.policy)
        broken = jnp.isnan(prior[:, 0])
        value = jnp.where(broken, prior[:, 0], imagined.value)  # so that the root's value tells
        tree = trees.expand(tree, path, simulation + 1, imagined.reward, value, prior, discount)
        return tree, tokens, path

    first, last = search.kept_nodes, search.num_nodes - 1
    start = tree, tokens, trees.nowhere(rows, search)
    tree, tokens, _ = loops.fori_loop(first, last, simulate, start)
    return tree, tokens
