"""Goes on from the subtree of the action that was taken, tokens included.

A search with `kept_nodes` hands its whole tree on. The next one looks up the action that led to its
observation; that action's child becomes the root, and this is what comes along:

* Every node below the child: visits, sums of values, rewards, Q values, priors, its own two tokens.
  The root keeps its visits and its sum, and the tree its smallest and largest Q value. The root's
  prior, noise and legal actions are the new ones; edges that are illegal now are taken back.
* The root's window is the real one. It has as many tokens as the child's imagined window, and each
  token of that window that a kept node reads is replaced by the real one in its place. Positions
  need nothing: slots are the same, and a rotary position counts from the episode's beginning.
* Nodes come in the order in which they were made. Beyond `kept_nodes` the newest are forgotten:
  their edges keep their statistics, and whoever walks there again imagines the node anew.

A row begins anew if its episode did, if its action had no node, if its clock or its window is not
what the kept tree expects, or if that tree holds NaN.

Shapes: B rows, N nodes, K kept_nodes, T slots of a stored window, M tokens, A actions, F fields.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require, require_count, require_type
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tokens import Tokens
from kvjax.mcts.tree import CHILD, PRIOR, ROOT, UNVISITED, VALUE_SUM, VISITS, Q, Tree
from kvjax.mcts.unizero_tree import empty_tokens
from kvjax.model import step

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Renumbered:
    """Nodes of one old tree in a new one."""

    number: jax.Array  # [N] int32 of an old node in the new tree, UNVISITED if it does not come
    source: jax.Array  # [K + 1] int32, the old node of a new one
    used: jax.Array  # [K + 1] bool


def init_kept(config: WorldModelConfig, num_envs: int, search: SearchConfig) -> Kept:
    """Empty trees to begin with, where a loop needs something to carry.

    Returns:
      `Kept` with edges [N, B, 6, A], tables [M, B, E] and windows [N, B, T].

    Raises:
      TypeError: an argument of another type.
      ValueError: the search has no `kept_nodes`, or `num_envs` is not a positive integer.
    """
    require_type("config", config, WorldModelConfig, "kvjax.WorldModelConfig")
    require_type("search", search, SearchConfig, "kvjax.SearchConfig")
    num_envs = require_count("num_envs", num_envs)
    _require_kept_nodes(search)
    return Kept(
        tree=trees.init(jnp.zeros((num_envs, config.num_actions), jnp.float32), search),
        tokens=empty_tokens(config, num_envs, search.num_nodes),
        timestep=jnp.full((num_envs,), _NO_STEP, jnp.int32),
    )


def validate(kept: Kept, rows: int, config: WorldModelConfig, search: SearchConfig) -> None:
    """Refuses trees of a search or a model of another configuration."""
    _require_kept_nodes(search)
    for (path, wanted), came in zip(
        _shapes(config, rows, search), jax.tree.leaves(kept), strict=False
    ):
        require(
            (wanted.shape, wanted.dtype) == (came.shape, came.dtype),
            f"kept{jax.tree_util.keystr(path)} must be {wanted.dtype} {wanted.shape}, got"
            f" {came.dtype} {came.shape}: it comes from another configuration",
        )


@functools.lru_cache
def _shapes(config: WorldModelConfig, rows: int, search: SearchConfig) -> list[tuple[Any, Any]]:
    """Paths, and shapes and dtypes, of a `Kept`; cached because tracing takes a millisecond."""
    return jax.tree.leaves_with_path(jax.eval_shape(lambda: init_kept(config, rows, search)))


def _require_kept_nodes(search: SearchConfig) -> None:
    require(search.kept_nodes > 0, "kept needs a search with kept_nodes above 0, got 0")


def promote(
    kept: Kept,
    tree: Tree,
    tokens: Tokens,
    timestep: jax.Array,
    last_action: jax.Array,
    search: SearchConfig,
) -> tuple[Tree, Tokens]:
    """Fills in what comes along.

    Args:
      tree: that the search would begin with if nothing were kept; it stays so in rows that begin
        anew.
      tokens: as `tree`.
      timestep: [B] int32 of the new roots.
      last_action: [B] int32 that led to them.
    """
    every_row, old = jnp.arange(timestep.shape[0], dtype=jnp.int32), kept.tree
    taken = old.edges[ROOT, every_row, :, jnp.maximum(last_action, 0)]  # [B, F]
    child = taken[:, CHILD].astype(jnp.int32)
    goes_on = (
        (last_action != step.FIRST_STEP)
        & (child != int(UNVISITED))
        & (timestep == kept.timestep + 1)
        & (tokens.length[ROOT] == kept.tokens.length[child, every_row])
        & jnp.isfinite(old.low + old.high)
    )
    legal = tree.edges[ROOT, :, PRIOR] >= 0
    lost = jnp.where(legal[:, None], 0.0, old.edges[child, every_row])  # [B, F, A]
    edges = old.edges.at[child, every_row].set(_without(old.edges[child, every_row], legal))
    nodes = jax.vmap(_renumber, in_axes=(1, 0, 0, None), out_axes=1)(
        edges[:, :, CHILD].astype(jnp.int32), child, goes_on, search.kept_nodes
    )
    by_row = jax.vmap(_take_edges, in_axes=1, out_axes=1)
    moved = by_row(edges, tree.edges, nodes)
    visits = taken[:, VISITS] - jnp.sum(lost[:, VISITS], axis=1)
    value_sum = taken[:, VALUE_SUM] - jnp.sum(lost[:, VISITS] * lost[:, Q], axis=1)
    grown = Tree(
        edges=moved.at[ROOT, :, PRIOR].set(tree.edges[ROOT, :, PRIOR]),
        root_visits=jnp.where(goes_on, visits, tree.root_visits),
        root_value_sum=jnp.where(goes_on, value_sum, tree.root_value_sum),
        low=jnp.where(goes_on, old.low, tree.low),
        high=jnp.where(goes_on, old.high, tree.high),
        total_depth=tree.total_depth,
    )
    take_tokens = jax.vmap(_take_tokens, in_axes=(1, 1, 0, 1), out_axes=1)
    return grown, take_tokens(kept.tokens, tokens, child, nodes)


def _without(edges: jax.Array, legal: jax.Array) -> jax.Array:
    """Edges [B, F, A] of nodes, untried where not `legal` [B, A]."""
    return jnp.where(legal[:, None], edges, trees.blank(legal.shape))


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


def _take_tokens(old: Tokens, new: Tokens, child: jax.Array, nodes: _Renumbered) -> Tokens:
    """One tree's tokens: tables [M, E], slots [N, T], lengths [N]; the new root's come first.

    What the child's window held is the root's token in that place from now on.
    """
    (num_nodes, size), below = old.slots.shape, nodes.source[1:]
    size_of_block = (old.tables[0].shape[0] - size) // (num_nodes - 1)
    every_slot, in_block = (jnp.arange(n, dtype=jnp.int32) for n in (size, size_of_block))
    window = jnp.where(every_slot < old.length[child], old.slots[child], old.tables[0].shape[0])
    own = size + size_of_block * (nodes.number[1:, None] - 1) + in_block[None]
    place = jnp.concatenate([jnp.zeros(size, jnp.int32), jnp.maximum(own, 0).reshape(-1)])
    place = place.at[window].set(every_slot, mode="drop")

    def take(kept: jax.Array, begun: jax.Array) -> jax.Array:
        blocks = kept[size:].reshape(num_nodes - 1, size_of_block, -1)[below - 1]
        here = slice(size, size + size_of_block * below.shape[0])
        room = begun[here].reshape(blocks.shape)
        chosen = jnp.where(nodes.used[1:, None, None], blocks, room)
        return begun.at[here].set(chosen.reshape(-1, begun.shape[-1]))

    here, used = slice(1, nodes.used.shape[0]), nodes.used[1:]
    slots = jnp.where(used[:, None], place[old.slots[below]], new.slots[here])
    return Tokens(
        tables=tuple(take(*pair) for pair in zip(old.tables, new.tables, strict=True)),
        slots=new.slots.at[here].set(slots),
        length=new.length.at[here].set(jnp.where(used, old.length[below], new.length[here])),
    )
