"""LightZero's rules of a tree: its PUCT score, its scaling of Q, its guess for untried actions.

They give the reference's visit counts to the last bit; sums run as its loops do.

Shapes: B rows, A actions, F fields of an edge.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.config import SearchConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.tree import DISCOUNT, PRIOR, ROOT, VISITS, Q, Tree

ILLEGAL = -1.0
"""Prior of an illegal action."""

_MIN_RANGE = 0.01
_UNROLLED = 32
"""Up to so many actions a sum is written out, which is faster; it takes time to compile."""

Exploration = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Rules:
    """LightZero's `trees.Rules`: what a walk knows of a node is its parent's mean Q [B].

    Attributes:
      chance: whether nodes at odd levels are chance nodes.
    """

    config: SearchConfig
    fields: int = Q + 1
    chance: bool = False

    @property
    def running_mean(self) -> bool:
        """VALUE is a sum."""
        return False

    def prior(self, policy: jax.Array, legal: jax.Array | None) -> jax.Array:
        """Probabilities."""
        prior = softmax(policy, legal)
        broken = jnp.any(jnp.isnan(prior), axis=1, keepdims=True)
        return prior if legal is None else jnp.where(broken, jnp.nan, prior)

    def begin(self, tree: Tree, rng: jax.Array) -> jax.Array:
        """No Q."""
        del rng
        return jnp.zeros(tree.low.shape[0], jnp.float32)

    def choose(
        self, tree: Tree, edge: jax.Array, node: jax.Array, level: jax.Array, known: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The action with the largest score, the first on ties."""
        mean, action = _best(tree, edge, node, known, _exploration(self.config))
        if self.chance:
            action = trees.outcome(edge[:, PRIOR], edge[:, VISITS], action, level)
        chosen = edge[trees.every(node.shape[0]), :, action]
        if self.fields > DISCOUNT:  # as the child's player sees it; nothing lies behind the end
            mean = mean * jnp.sign(chosen[:, DISCOUNT])
        return action, chosen, mean


def softmax(logits: jax.Array, legal: jax.Array | None = None) -> jax.Array:
    """Probabilities of logits [B, A], summed in order; ILLEGAL where not `legal` [B, A]."""
    allowed = jnp.ones(logits.shape, bool) if legal is None else legal
    largest = jnp.max(jnp.where(allowed, logits, -jnp.inf), axis=1, keepdims=True)
    exponents = jnp.where(allowed, jnp.exp(logits - largest), 0.0)
    return jnp.where(allowed, exponents / _sum(exponents)[:, None], ILLEGAL)


def _sum(x: jax.Array) -> jax.Array:
    """Sums [B, A] over A from the first to the last, as the reference's loop does."""
    num_actions = x.shape[1]
    total: jax.Array = x[:, 0]
    if num_actions > _UNROLLED:

        def add(action: jax.Array, total: jax.Array) -> jax.Array:
            summand: jax.Array = jax.lax.dynamic_index_in_dim(x, action, axis=1, keepdims=False)
            return total + summand

        summed: jax.Array = loops.fori_loop(1, num_actions, add, total)
        return summed
    for action in range(1, num_actions):
        total = total + x[:, action]
    return total


def _exploration(config: SearchConfig) -> Exploration:
    """MuZero's weight and the square root [B] of the visits of each node's children: [B].

    They are looked up, since numpy's logarithm is the reference's to the last bit. Visits that were
    kept from earlier searches know no bound, and are computed with.
    """
    base, init = np.float32(config.pb_c_base), np.float32(config.pb_c_init)

    def compute(numpy: Any, total: Any) -> tuple[Any, Any]:
        return numpy.log((total + base + np.float32(1)) / base) + init, numpy.sqrt(total)

    if config.kept_nodes > 0:
        return lambda total: compute(jnp, total)
    tables = compute(np, np.arange(config.num_simulations + 1, dtype=np.float32))
    weights, roots = (jnp.asarray(table) for table in tables)

    def look_up(total: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = total.astype(jnp.int32)
        return weights[index], roots[index]

    return look_up


def _best(
    tree: Tree,
    edge: jax.Array,
    node: jax.Array,
    parent_q: jax.Array,
    exploration: Exploration,
) -> tuple[jax.Array, jax.Array]:
    """Each node's mean Q [B] and the action [B] with the largest score, the first on ties."""
    visits = edge[:, VISITS]
    tried = visits > 0
    total_q, count = _sum(jnp.where(tried, edge[:, Q], 0.0)), _sum(tried.astype(jnp.float32))
    at_root = (node == ROOT) & (count > 0)
    divisor = jnp.where(at_root, count, count + 1)
    mean = jnp.where(at_root, total_q, parent_q + total_q) / divisor
    q = jnp.where(tried, edge[:, Q], mean[:, None])
    spread = (tree.high - tree.low)[:, None]
    scaled = (q - tree.low[:, None]) / jnp.maximum(spread, _MIN_RANGE)
    value = jnp.clip(jnp.where(spread > 0, scaled, q), 0.0, 1.0)
    weight, square_root = exploration(_sum(visits))
    bonus = weight[:, None] * (square_root[:, None] / (visits + 1)) * edge[:, PRIOR]
    score = jnp.where(edge[:, PRIOR] < 0, -jnp.inf, bonus + value)
    return mean, jnp.argmax(score, axis=1).astype(jnp.int32)
