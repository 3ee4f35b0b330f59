"""A whole searched tree, for those who want to look at it.

Shapes: B rows, N nodes, A actions, K tokens of a step, T slots of a stored window, M tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import SearchConfig
from kvjax.mcts.protocol import Root, TreeModel
from kvjax.mcts.tokens import Tokens
from kvjax.mcts.tree import CHILD, DISCOUNT, PRIOR, RAW, REWARD, ROOT, VISITS, Q, Tree

NO_NODE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchTree:
    """The trees of a search. Node 0 is the root; a node is made by one simulation, or by none.

    Attributes:
      parent: [B, N] int32, -1 of a root and where there is no node.
      simulation: [B, N] int32, from 0, that made the node, or none where a limit of depth ended it;
        -1 of a root and of nodes that were kept.
      action: [B, N] int32 that leads from the parent to the node, -1 likewise.
      depth: [B, N] int32, edges below the root.
      visits: [B, N] int32, of the edge to the node.
      reward: [B, N], of that edge.
      discount: [B, N], of that edge.
      value: [B, N], the network's of the node.
      prior: [B, N, A], the policy over the node's actions; of a root with its noise.
      q_values: [B, N, A].
      length: [B, N] int32, tokens of the node's window.
      state: pytree of [B, N, ...].
      tables: pytree of [M, B, ...], the tokens of all nodes.
      slots: [B, N, T] int32, each node's window as indices into the tables.
    """

    parent: jax.Array
    simulation: jax.Array
    action: jax.Array
    depth: jax.Array
    visits: jax.Array
    reward: jax.Array
    discount: jax.Array
    value: jax.Array
    prior: jax.Array
    q_values: jax.Array
    length: jax.Array
    state: Any
    tables: Any
    slots: jax.Array

    @property
    def tokens(self) -> Any:
        """Each node's whole window: a pytree of [B, N, T, ...], gathered when it is asked for."""
        gather: Any = jax.vmap(lambda table, slots: table[slots], in_axes=(1, 0))  # on any mesh
        return jax.tree.map(lambda table: gather(table, self.slots), self.tables)


def of(
    tree: Tree,
    tokens: Tokens,
    root: Root,
    discount: jax.Array,
    model: TreeModel,
    search: SearchConfig,
) -> SearchTree:
    """The trees of a search that kept each node's raw value.

    Args:
      discount: [] of a step, where edges have none of their own.
    """
    edges = jnp.moveaxis(tree.edges, 1, 0)  # [B, N, F, A]
    rows, nodes, fields, actions = edges.shape
    own = edges[:, :, DISCOUNT] if fields > DISCOUNT else jnp.full_like(edges[:, :, Q], discount)
    child = edges[:, :, CHILD].astype(jnp.int32).reshape(rows, -1)
    to = jnp.where(child < 0, nodes, child)
    every_row = jnp.arange(rows, dtype=jnp.int32)[:, None]

    def by_child(values: Any, nothing: Any) -> jax.Array:
        filled = jnp.full((rows, nodes), nothing, values.dtype)
        return filled.at[every_row, to].set(values.reshape(rows, -1), mode="drop")

    place = jnp.arange(nodes * actions, dtype=jnp.int32)
    parent = by_child(jnp.broadcast_to(place // actions, child.shape), NO_NODE)
    depth, above = (parent >= 0).astype(jnp.int32), jnp.maximum(parent, ROOT)
    for _ in range(nodes.bit_length()):  # doubles the distance, and stops at the root
        depth = depth + jnp.take_along_axis(depth, above, axis=1)
        above = jnp.take_along_axis(above, above, axis=1)
    prior = edges[:, :, PRIOR]
    prior = jnp.maximum(prior, 0.0) if search.tree == "lightzero" else jax.nn.softmax(prior)
    tables = tokens.tables
    if model.in_place:
        tables = jax.tree.map(
            lambda window, table: jnp.concatenate([window.swapaxes(0, 1), table]),
            root.tokens,
            tables,
        )
    made = jnp.arange(nodes, dtype=jnp.int32) - (1 + search.kept_nodes)
    return SearchTree(
        parent=parent,
        simulation=jnp.broadcast_to(jnp.maximum(made, -1), parent.shape),
        action=by_child(jnp.broadcast_to(place % actions, child.shape), NO_NODE),
        depth=depth,
        visits=by_child(edges[:, :, VISITS].astype(jnp.int32), 0),
        reward=by_child(edges[:, :, REWARD], 0.0),
        discount=by_child(own, 0.0),
        value=by_child(edges[:, :, RAW], 0.0).at[:, ROOT].set(root.value),
        prior=prior,
        q_values=edges[:, :, Q],
        length=tokens.length.T,
        state=jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), tokens.state),
        tables=tables,
        slots=jnp.moveaxis(tokens.slots, 0, 1),
    )
