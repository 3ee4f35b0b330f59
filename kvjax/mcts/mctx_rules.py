"""MuZero's and Gumbel MuZero's rules of a tree, which are mctx's: it is shown one node at a time.

Visits, values and logits are kept as mctx keeps them, and actions are chosen by its own functions,
so that a search grows the tree that mctx would.

Shapes: B rows, A actions, F fields of an edge.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np

from kvjax.base import loops
from kvjax.base.meshes import ALL, Share
from kvjax.config import SearchConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tree import CHILD, PRIOR, RAW, VALUE, VISITS, Q, Tree

NEVER = float(np.finfo(np.float32).min)
"""Logit of an illegal action."""

_MIN_RANGE = 0.01
"""Q values closer together than this are not blown up to a range of 1 (LightZero's constant)."""

_ONLY = 0
"""Index of the one node that mctx is shown."""

Known = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Of a walk: visits, value and raw value [B] of its nodes, and a key for each row."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """`trees.Rules` by mctx.

    Attributes:
      value: [B], the network's of the roots.
      legal: [B, A] bool of the roots, if any action is not.
      gumbel: [B, A], the roots' noise of "gumbel".
      masked: whether nodes below the roots have illegal actions.
      chance: whether nodes at odd levels are chance nodes.
      share: which rows of a batch these are.
    """

    config: SearchConfig
    value: jax.Array
    legal: jax.Array | None
    gumbel: jax.Array | None = None
    fields: int = RAW + 1
    masked: bool = False
    chance: bool = False
    share: Share = ALL

    @property
    def running_mean(self) -> bool:
        """VALUE is a mean."""
        return True

    def prior(self, policy: jax.Array, legal: jax.Array | None) -> jax.Array:
        """Logits."""
        largest = jnp.max(policy, axis=1, keepdims=True)
        broken = jnp.isnan(largest) | jnp.isposinf(largest)
        allowed = policy if legal is None else jnp.where(legal, policy, NEVER)
        return jnp.where(broken, jnp.nan, jnp.maximum(allowed, NEVER))

    def begin(self, tree: Tree, rng: jax.Array) -> Known:
        """Of the roots."""
        split = functools.partial(jax.random.split, rng)
        keys = self.share.drawn(split, self.value.shape[0])
        return tree.root_visits, tree.root_value_sum, self.value, keys

    def choose(
        self, tree: Tree, edge: jax.Array, node: jax.Array, level: jax.Array, known: Known
    ) -> tuple[jax.Array, jax.Array, Known]:
        """What mctx chooses."""
        del node
        keys: Any = jax.vmap(lambda key: jax.random.split(key))(known[-1])
        shown = self._shown(tree, edge, level, known)
        with _usual_promotion():
            action = self._action(shown, keys[:, 1], level)
        if self.chance:
            probability = jax.nn.softmax(edge[:, PRIOR])
            action = trees.outcome(probability, edge[:, VISITS], action, level)
        chosen = edge[trees.every(action.shape[0]), :, action]
        return action, chosen, (chosen[:, VISITS], chosen[:, VALUE], chosen[:, RAW], keys[:, 0])

    def _shown(self, tree: Tree, edge: jax.Array, level: jax.Array, known: Known) -> mctx.Tree:
        """Each row's node as a tree of mctx that has no other."""
        visits, value, raw, _ = known
        illegal = jnp.zeros(edge[:, PRIOR].shape, bool)
        if self.masked:
            illegal = edge[:, PRIOR] <= NEVER
        if self.legal is not None or self.masked:
            of_roots = jnp.zeros_like(illegal) if self.legal is None else ~self.legal
            illegal = jnp.where(level == 0, of_roots, illegal)
        return shown(
            edge, (visits, value, raw), (tree.low, tree.high, level == 0), illegal, self.gumbel
        )

    def transformed(self, tree: Tree) -> jax.Array:
        """The roots' Q values as they are scaled: [B, A]."""
        edge, level = tree.edges[trees.ROOT], jnp.zeros((), jnp.int32)
        known = tree.root_visits, tree.root_value_sum, self.value, jnp.zeros(())
        transform = q_transform(self.config)
        by_row = jax.vmap(lambda row: transform(row, _ONLY))
        with _usual_promotion():
            scaled: jax.Array = by_row(self._shown(tree, edge, level, known))  # type: ignore[no-untyped-call]
        return scaled

    def _action(self, shown: mctx.Tree, keys: jax.Array, level: jax.Array) -> jax.Array:
        if self.config.tree == "muzero":
            choose = functools.partial(
                mctx.muzero_action_selection,
                pb_c_init=self.config.pb_c_init,
                pb_c_base=self.config.pb_c_base,
                qtransform=q_transform(self.config),
            )
            action: jax.Array = jax.vmap(lambda key, row: choose(key, row, _ONLY, 0))(keys, shown)
            return action
        at_root = functools.partial(
            mctx.gumbel_muzero_root_action_selection,
            num_simulations=self.config.num_simulations,
            max_num_considered_actions=self.config.max_considered_actions,
            qtransform=q_transform(self.config),
        )
        inside = functools.partial(
            mctx.gumbel_muzero_interior_action_selection, qtransform=q_transform(self.config)
        )
        chosen: jax.Array = loops.cond(
            level == 0,
            jax.vmap(lambda key, row: at_root(key, row, _ONLY)),
            jax.vmap(lambda key, row: inside(key, row, _ONLY, 1)),
            keys,
            shown,
        )
        return chosen


def shown(
    edge: jax.Array,
    known: tuple[jax.Array, jax.Array, jax.Array],
    extremes: tuple[jax.Array, jax.Array, jax.Array],
    illegal: jax.Array,
    gumbel: jax.Array | None,
) -> mctx.Tree:
    """Nodes [B] with edges [B, F, A] as trees of mctx that have no others.

    Args:
      known: visits, value and raw value [B] of the nodes.
      extremes: of the whole trees: smallest and largest value [B]; whether the nodes are roots [].
      illegal: [B, A] bool.
      gumbel: [B, A].
    """
    rows = edge.shape[0]
    alone: dict[str, Any] = {
        "node_visits": known[0].astype(jnp.int32),
        "node_values": known[1],
        "raw_values": known[2],
        "children_index": edge[:, CHILD].astype(jnp.int32),
        "children_prior_logits": edge[:, PRIOR],
        "children_visits": edge[:, VISITS].astype(jnp.int32),
        "children_rewards": edge[:, Q],  # a reward and nothing behind it: the Q value itself
        "children_discounts": jnp.zeros_like(edge[:, Q]),
        "children_values": jnp.zeros_like(edge[:, Q]),
        "parents": jnp.zeros(rows, jnp.int32),
        "action_from_parent": jnp.zeros(rows, jnp.int32),
    }
    low, high, is_root = extremes
    return mctx.Tree(
        **{name: value[:, None] for name, value in alone.items()},
        embeddings=(low, high, jnp.broadcast_to(is_root, low.shape)),
        root_invalid_actions=illegal,
        extra_data=None if gumbel is None else mctx.GumbelMuZeroExtraData(root_gumbel=gumbel),
    )


@contextlib.contextmanager
def _usual_promotion() -> Iterator[None]:
    """For mctx's functions, which add integers to floats and rows to tables."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def q_transform(config: SearchConfig) -> Callable[[mctx.Tree, Any], jax.Array]:
    """How the search scales its Q values, as a function of mctx."""
    named: dict[Any, Any] = {
        "tree": _normalise_over_tree,
        "siblings": mctx.qtransform_by_parent_and_siblings,
        "mix_value": mctx.qtransform_completed_by_mix_value,
        None: mctx.qtransform_completed_by_mix_value,
    }
    transform: Any = named.get(config.q_transform, config.q_transform)
    return transform  # type: ignore[no-any-return]


def _normalise_over_tree(tree: mctx.Tree, node: Any) -> jax.Array:
    """Q values [A] of the one node that is shown, scaled to [0, 1] by its whole tree's extremes.

    That is LightZero's rule. mctx's own scales by a node's siblings, which blows up the small
    differences of a long task: with it the masked CartPole agent reaches 159 instead of 200.
    An action that was never tried counts as the mean of its node and its tried siblings (at the
    root: of the siblings alone).

    Args:
      tree: unbatched, from `shown`.
      node: [] int32.
    """
    low, high, is_root = tree.embeddings
    q, tried = tree.qvalues(node), tree.children_visits[node] > 0
    total, count = jnp.sum(q, where=tried), jnp.sum(tried)
    mean = jnp.where(
        is_root & (count > 0), total / count, (tree.node_values[node] + total) / (count + 1)
    )
    q = jnp.where(tried, q, mean)
    return jnp.clip((q - low) / jnp.maximum(high - low, _MIN_RANGE), 0.0, 1.0)
