"""Goes on from the subtree of the action that was taken, tokens included.

A search with `kept_nodes` hands its whole tree on. The next one looks up the action that led to its
observation; that action's child becomes the root, and this is what comes along:

* Every node below the child: visits, sums of values, rewards, Q values, priors, its own two tokens.
  The root keeps its visits and its sum, and the tree its smallest and largest Q value. The root's
  prior, noise and legal actions are the new ones; edges that are illegal now are taken back.
* A node's state comes along; the root's is the new one.
* The root's window is the real one. It has as many tokens as the child's imagined window, and each
  token of that window that a kept node reads is replaced by the real one in its place. Positions
  need nothing: slots are the same, and a rotary position counts from the episode's beginning.
* Nodes come in the order in which they were made. Beyond `kept_nodes` the newest are forgotten:
  their edges keep their statistics, and whoever walks there again imagines the node anew.

A row begins anew if its episode did, if its action had no node or led to an end, if its clock or
its window is not what the kept tree expects, or if that tree holds NaN.

The clock counts from an episode's beginning; a search that is not told of one counts its steps.

Shapes: B rows, N nodes, K kept_nodes, T slots of a stored window, M tokens, A actions, F fields.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require
from kvjax.config import SearchConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.protocol import Root, TreeModel
from kvjax.mcts.tokens import Tokens, empty_tokens, first_own
from kvjax.mcts.tree import (
    CHILD,
    DISCOUNT,
    PRIOR,
    ROOT,
    UNVISITED,
    VALUE,
    VISITS,
    Q,
    Rules,
    Tree,
)

_NO_STEP = -2
"""The clock of no tree: no root comes one step after it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a search leaves to the next one.

    Attributes:
      tree: edges [N, B, F, A] and sums of the whole search.
      tokens: keys and values of its nodes, [M, B, E] each.
      timestep: [B] int32, of the roots.
    """

    tree: Tree
    tokens: Tokens
    timestep: jax.Array


@dataclasses.dataclass(frozen=True)
class Past:
    """What an earlier search has kept, and what happened since.

    Attributes:
      last_action: [B] int32, that led from its roots to the new ones; -1 begins a row anew.
      timestep: [B] int32, of the new roots.
    """

    kept: Kept
    last_action: jax.Array
    timestep: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Renumbered:
    """Nodes of one old tree in a new one."""

    number: jax.Array  # [N] int32 of an old node in the new tree, UNVISITED if it does not come
    source: jax.Array  # [K + 1] int32, the old node of a new one
    used: jax.Array  # [K + 1] bool


def begin(model: TreeModel, root: Root, search: SearchConfig, fields: int) -> Kept:
    """Empty trees, in which no row finds its action.

    Args:
      root: whose shapes they have.
      fields: F of an edge.
    """
    rows = root.length.shape[0]
    return Kept(
        tree=trees.init(jnp.zeros(root.policy.shape, jnp.float32), search, fields),
        tokens=empty_tokens(model, root, search.num_nodes),
        timestep=jnp.full((rows,), _NO_STEP, jnp.int32),
    )


def validate(kept: Kept, wanted: Any) -> None:
    """Refuses trees of a search or a model of another configuration.

    Args:
      wanted: a `Kept` of shapes and dtypes.
    """
    expected = jax.tree.leaves_with_path(wanted)
    for (path, shape), came in zip(expected, jax.tree.leaves(kept), strict=False):
        require(
            (shape.shape, shape.dtype) == (came.shape, came.dtype),
            f"kept{jax.tree_util.keystr(path)} must be {shape.dtype} {shape.shape}, got"
            f" {came.dtype} {came.shape}: it comes from another configuration",
        )
    begun, came = (str(jax.tree.structure(x)) for x in (wanted, kept))
    require(begun == came, f"kept must have the structure {begun}, got {came}")


def require_kept_nodes(search: SearchConfig) -> None:
    """Raises `ValueError` unless the search keeps nodes."""
    require(search.kept_nodes > 0, "kept needs a search with kept_nodes above 0, got 0")


def promote(
    past: Past,
    tree: Tree,
    tokens: Tokens,
    legal: jax.Array | None,
    model: TreeModel,
    search: SearchConfig,
    rules: Rules,
) -> tuple[Tree, Tokens]:
    """Fills in what comes along.

    Args:
      tree: that the search would begin with if nothing were kept; it stays so in rows that begin
        anew.
      tokens: as `tree`.
      legal: [B, A] bool of the new roots; None: all actions.
      rules: by which the trees grow.

    Raises:
      ValueError: what was kept comes from another configuration.
    """
    kept, last_action, old = past.kept, past.last_action, past.kept.tree
    validate(kept, Kept(tree, tokens, past.timestep))
    every_row = trees.every(last_action.shape[0])
    legal = jnp.ones(tree.edges[ROOT, :, PRIOR].shape, bool) if legal is None else legal
    taken = old.edges[ROOT, every_row, :, jnp.maximum(last_action, 0)]  # [B, F]
    child = taken[:, CHILD].astype(jnp.int32)
    goes_on = (
        (last_action >= 0)
        & (child != int(UNVISITED))
        & (past.timestep == kept.timestep + 1)
        & jnp.isfinite(old.low + old.high)
    )
    if taken.shape[1] > DISCOUNT:
        goes_on &= taken[:, DISCOUNT] != 0
    if jax.tree.leaves(tokens.tables):
        goes_on &= tokens.length[ROOT] == kept.tokens.length[child, every_row]
    lost = jnp.where(legal[:, None], 0.0, old.edges[child, every_row])  # [B, F, A]
    edges = old.edges.at[child, every_row].set(_without(old.edges[child, every_row], legal))
    nodes = jax.vmap(_renumber, in_axes=(1, 0, 0, None), out_axes=1)(
        edges[:, :, CHILD].astype(jnp.int32), child, goes_on, search.kept_nodes
    )
    by_row = jax.vmap(_take_edges, in_axes=1, out_axes=1)
    moved = by_row(edges, tree.edges, nodes)
    visits = taken[:, VISITS] - jnp.sum(lost[:, VISITS], axis=1)
    value = taken[:, VALUE] * taken[:, VISITS] if rules.running_mean else taken[:, VALUE]
    value = value - jnp.sum(lost[:, VISITS] * lost[:, Q], axis=1)
    value_sum = value / jnp.maximum(visits, 1) if rules.running_mean else value
    grown = Tree(
        edges=moved.at[ROOT, :, PRIOR].set(tree.edges[ROOT, :, PRIOR]),
        root_visits=jnp.where(goes_on, visits, tree.root_visits),
        root_value_sum=jnp.where(goes_on, value_sum, tree.root_value_sum),
        low=jnp.where(goes_on, old.low, tree.low),
        high=jnp.where(goes_on, old.high, tree.high),
        total_depth=tree.total_depth,
    )
    take_tokens = functools.partial(_take_tokens, first=first_own(model), size_of_block=model.block)
    tokens_by_row = jax.vmap(take_tokens, in_axes=(1, 1, 0, 1), out_axes=1)
    return grown, tokens_by_row(kept.tokens, tokens, child, nodes)


def _without(edges: jax.Array, legal: jax.Array) -> jax.Array:
    """Edges [B, F, A] of nodes, untried where not `legal` [B, A]."""
    return jnp.where(legal[:, None], edges, trees.blank(legal.shape, edges.shape[1]))


def _renumber(
    children: jax.Array, root: jax.Array, goes_on: jax.Array, capacity: int
) -> _Renumbered:
    """The first nodes below `root` [], by age, of a tree whose `children` are [N, A]."""
    num_nodes = children.shape[0]
    every_node = jnp.arange(num_nodes, dtype=jnp.int32)
    to = jnp.where(children < 0, num_nodes, children)
    ancestor = jnp.zeros(num_nodes, jnp.int32).at[to].set(every_node[:, None], mode="drop")
    ancestor = ancestor.at[root].set(root)
    for _ in range(num_nodes.bit_length()):  # doubles the distance, and stops at the root
        ancestor = ancestor[ancestor]
    below = (ancestor == root) & (every_node != root)
    rank = jnp.cumsum(below, dtype=jnp.int32)
    number = jnp.where(below & (rank <= capacity), rank, int(UNVISITED)).at[root].set(ROOT)
    to = jnp.where(number < 0, capacity + 1, number)
    return _Renumbered(
        number=number,
        source=jnp.zeros(capacity + 1, jnp.int32).at[to].set(every_node, mode="drop"),
        used=goes_on & (jnp.arange(capacity + 1, dtype=jnp.int32) <= rank[-1]),
    )


def _take_edges(old: jax.Array, new: jax.Array, nodes: _Renumbered) -> jax.Array:
    """Edges [N, F, A] of a new tree with the old one's at the front."""
    taken, count = old[nodes.source], nodes.used.shape[0]
    child = taken[:, CHILD].astype(jnp.int32)
    renumbered = jnp.where(child < 0, int(UNVISITED), nodes.number[child])
    taken = taken.at[:, CHILD].set(renumbered.astype(taken.dtype))
    return new.at[:count].set(jnp.where(nodes.used[:, None, None], taken, new[:count]))


def _take_tokens(
    old: Tokens,
    new: Tokens,
    child: jax.Array,
    nodes: _Renumbered,
    *,
    first: int,
    size_of_block: int,
) -> Tokens:
    """One tree's tokens: tables [M, ...], slots [N, T], lengths [N], states [N, ...].

    What the child's window held is the new root's token in that place from now on.
    """
    (num_nodes, size), below = old.slots.shape, nodes.source[1:]
    every_slot, in_block = (jnp.arange(n, dtype=jnp.int32) for n in (size, size_of_block))
    behind_all = size + size_of_block * (num_nodes - 1)
    window = jnp.where(every_slot < old.length[child], old.slots[child], behind_all)
    own = size + size_of_block * (nodes.number[1:, None] - 1) + in_block[None]
    place = jnp.concatenate([jnp.zeros(size, jnp.int32), jnp.maximum(own, 0).reshape(-1)])
    place = place.at[window].set(every_slot, mode="drop")

    def chosen(came: jax.Array, begun: jax.Array) -> jax.Array:
        return jnp.where(nodes.used[1:].reshape(-1, *[1] * (came.ndim - 1)), came, begun)

    def take(kept: jax.Array, begun: jax.Array) -> jax.Array:
        own_tokens = kept[first:].reshape(num_nodes - 1, size_of_block, *kept.shape[1:])
        here = slice(first, first + size_of_block * below.shape[0])
        room = begun[here].reshape(below.shape[0], size_of_block, *kept.shape[1:])
        came = chosen(own_tokens[below - 1], room)
        return begun.at[here].set(came.reshape(begun[here].shape))

    here = slice(1, nodes.used.shape[0])

    def take_node(kept: jax.Array, begun: jax.Array) -> jax.Array:
        return begun.at[here].set(chosen(kept[below], begun[here]))

    return Tokens(
        tables=jax.tree.map(take, old.tables, new.tables),
        slots=new.slots.at[here].set(chosen(place[old.slots[below]], new.slots[here])),
        length=take_node(old.length, new.length),
        state=jax.tree.map(take_node, old.state, new.state),
    )
