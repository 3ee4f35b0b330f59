"""A search in which a node stores only its own tokens, whatever the context length.

Tokens of all nodes lie in tables, the roots' contexts first (where windows are read in place they
lie with the model instead). A node is a list of indices into them, so that a window is one gather
and dropping a block is a shift of indices. The search owns tables, slots and trees; what a token
is, how it is read and what positions add is the model's affair.

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
from kvjax.mcts.protocol import Node, Root, Transition, TreeModel
from kvjax.mcts.tree import Rules, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of B trees, and each node's window as indices into them."""

    tables: Any  # pytree of [M, B, ...]; without the roots' T tokens if they are read in place
    slots: jax.Array  # [N, B, T] int32 indices along M, as if the roots' tokens came first
    length: jax.Array  # [N, B] int32
    state: Any = None  # pytree of [N, B, ...]


def empty_tokens(model: TreeModel, root: Root, nodes: int) -> Tokens:
    """Tables of zeros and nodes without a window, for the tokens and states of such roots."""
    rows, size = root.length.shape[0], first_own(model) + model.block * (nodes - 1)

    def tokens(x: jax.Array) -> jax.Array:
        return jnp.zeros((size, rows, *x.shape[2:]), x.dtype)

    def states(x: jax.Array) -> jax.Array:
        return jnp.zeros((nodes, *x.shape), x.dtype)

    return Tokens(
        tables=jax.tree.map(tokens, root.tokens),
        slots=jnp.zeros((nodes, rows, model.size), jnp.int32),
        length=jnp.zeros((nodes, rows), jnp.int32),
        state=jax.tree.map(states, root.state),
    )


def first_own(model: TreeModel) -> int:
    """Where in the tables the first token lies that a step has added."""
    return 0 if model.in_place else model.size


def init_tokens(model: TreeModel, root: Root, nodes: int) -> Tokens:
    """Tables that hold the roots."""
    empty, size = empty_tokens(model, root, nodes), model.size
    tables, valid = empty.tables, _slots(size) < root.length[:, None]

    def put(table: jax.Array, part: jax.Array) -> jax.Array:
        mask = valid.reshape(*valid.shape, *[1] * (part.ndim - 2))
        held = jnp.moveaxis(jnp.where(mask, part, 0), 0, 1)
        return table.at[:size].set(held.astype(table.dtype))

    if not model.in_place:
        tables = jax.tree.map(put, tables, root.tokens)
    return Tokens(
        tables=tables,
        slots=empty.slots.at[trees.ROOT].set(_slots(size)),
        length=empty.length.at[trees.ROOT].set(root.length),
        state=jax.tree.map(lambda x, of: x.at[trees.ROOT].set(of), empty.state, root.state),
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
    state: Any,
    model: TreeModel,
) -> Tokens:
    """Adds node `simulation + 1`: its parent's `slots` [B, T] and `length` [B], and its own tokens.

    Those are `new`, [K, B, ...]; its state is [B, ...].
    """
    size, block = model.size, model.block
    first, full = size + block * simulation, (length + block > size)[:, None]
    if model.carry is None:
        left = jnp.minimum(jnp.maximum(length - block, 0), size - block)
        start = jnp.where(full, left[:, None], length[:, None])
        shifted = jnp.where(full, jnp.roll(slots, -block, axis=1), slots)
    else:
        start, shifted = jnp.where(full, model.carry - block, length[:, None]), slots
    offset = _slots(size) - start
    extended = jnp.where((offset >= 0) & (offset < block), first + offset, shifted)
    node = simulation + 1
    update = jax.lax.dynamic_update_slice_in_dim
    own = first_own(model) + block * simulation
    return Tokens(
        tables=jax.tree.map(
            lambda table, x: update(table, x.astype(table.dtype), own, 0), tokens.tables, new
        ),
        slots=update(tokens.slots, extended[None].astype(jnp.int32), node, 0),
        length=update(tokens.length, (start[:, 0] + block)[None], node, 0),
        state=jax.tree.map(lambda table, x: update(table, x[None], node, 0), tokens.state, state),
    )


def run(
    model: TreeModel,
    params: Any,
    rng: jax.Array,
    rules: Rules,
    tree: Tree,
    tokens: Tokens,
    data: Any,
    discount: jax.Array,
    search: SearchConfig,
) -> tuple[Tree, Tokens]:
    """Grows all trees by the search's simulations.

    Args:
      params: what the model's step is given.
      data: pytree of [B, ...], what it is told of the roots.
      discount: [] of a step, in place of the search's.
    """
    rows = tokens.length.shape[1]
    every_row = trees.every(rows)

    def simulate(simulation: jax.Array, state: Any) -> Any:
        tree, tokens, path, rng = state
        rng, walk_rng, step_rng = jax.random.split(rng, 3)  # as mctx does
        path = trees.select(tree, rules, path, walk_rng)
        parent, action = path.leaf()
        slots, length = tokens.slots[parent, every_row], tokens.length[parent, every_row]
        above = jax.tree.map(lambda table: table[parent, every_row], tokens.state)

        def step(count: int | None) -> Any:
            read, valid, at_root = _read(tokens.tables, slots, length, count)
            number = simulation + 1
            node = Node(read, valid, length, above, path.depth - 1, data, at_root, number)
            return model.step(params, step_rng, node, action)

        new, state, imagined = _shortest(step, model, slots, length, search)
        tokens = _write(tokens, simulation, slots, length, new, state, model)
        prior, value = _judged(rules, imagined)
        tree = trees.expand(
            tree,
            path,
            simulation + 1,
            imagined.reward,
            value,
            prior,
            discount,
            running_mean=rules.running_mean,
            of_edge=imagined.discount,
        )
        return tree, tokens, path, rng

    first, last = search.kept_nodes, search.num_nodes - 1
    start = tree, tokens, trees.nowhere(rows, search, rules.fields), rng
    tree, tokens, *_ = loops.fori_loop(first, last, simulate, start)
    return tree, tokens


def _read(
    tables: Any, slots: jax.Array, length: jax.Array, count: int | None
) -> tuple[Any, jax.Array, jax.Array]:
    """Tokens of windows [B, T], which of these slots hold one, and how many are the root's [B].

    Args:
      count: of how many slots to read that part that was added below the root, from its beginning;
        None: the whole window.
    """
    size, rows = slots.shape[1], trees.every(slots.shape[0])
    at_root = jnp.sum((_slots(size) < length[:, None]) & (slots < size), axis=1, dtype=jnp.int32)
    first = jnp.zeros_like(length) if count is None else at_root
    place = first[:, None] + _slots(size if count is None else count)
    if count is not None:
        slots = jnp.take_along_axis(slots, jnp.minimum(place, size - 1), axis=1)
        slots = jnp.maximum(slots - size, 0)
    held = jax.tree.map(lambda table: table[slots, rows[:, None]], tables)
    return held, place < length[:, None], at_root


_SHORT = 16
"""Steps below the root up to which a window that is read in place is read by a smaller program."""


def _shortest(
    step: Callable[[int | None], Any],
    model: TreeModel,
    slots: jax.Array,
    length: jax.Array,
    search: SearchConfig,
) -> Any:
    """A model's step with as few of its windows' slots as all rows can do with."""
    if not model.in_place:
        return step(None)
    size, block = model.size, model.block
    deepest = search.num_nodes - 1 if search.max_depth is None else search.max_depth
    most = min(size, block * max(deepest - 1, 1))
    short = min(block * _SHORT, most)
    if short == most:
        return step(most)
    below = jnp.sum((_slots(size) < length[:, None]) & (slots >= size), axis=1)
    return loops.cond(jnp.max(below) <= short, lambda: step(short), lambda: step(most))


def _judged(rules: Rules, imagined: Transition) -> tuple[jax.Array, jax.Array]:
    """Prior [B, A] and value [B] of new nodes.

    The value is NaN, so that the root's value tells, where the policy is NaN, or where no action is
    legal although the episode goes on.
    """
    prior = rules.prior(imagined.policy, imagined.legal)
    broken, value = jnp.isnan(prior[:, 0]), imagined.value
    value = jnp.where(broken, prior[:, 0], value)
    if imagined.legal is None:
        return prior, value
    stuck = ~jnp.any(imagined.legal, axis=1)
    if imagined.discount is not None:
        stuck = stuck & (imagined.discount != 0)
    return prior, jnp.where(stuck, jnp.nan, value)
