"""A batch of search trees with LightZero's rules, in fixed-shape arrays. Knows no model.

Statistics of an edge live at its parent, so that one read per level is all that selection takes.
Selection only reads them, and notes what it saw along its path; backup only writes them. XLA then
updates the table in place.

Shapes: B rows (one tree each), A actions, N nodes (the root is 0, what was kept comes next, and
simulation s makes node kept_nodes + s + 1), V levels of the deepest path.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.config import SearchConfig

ROOT = 0
UNVISITED = -1.0

# Fields of an edge.
PRIOR = 0  # negative where the action is illegal
CHILD = 1  # node index, exact in float32 up to 2**24
VISITS = 2
VALUE_SUM = 3
REWARD = 4
Q = 5
_NUM_FIELDS = 6
_UPDATED = slice(CHILD, _NUM_FIELDS)

# Fields of a step of a path: where it went, and the edge's fields from CHILD on as they were.
_NODE, _ACTION, _EDGE = 0, 1, 2
_NUM_STEPS = _EDGE + _NUM_FIELDS - CHILD

ILLEGAL = -1.0
_MIN_RANGE = 0.01
_LOW, _HIGH = 1e6, -1e6  # extremes of no value
_UNROLLED = 32
"""Up to so many actions a sum is written out, which is faster; it takes time to compile."""

Exploration = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """B trees."""

    edges: jax.Array  # [N, B, 6, A] float32
    root_visits: jax.Array  # [B] float32; begins at 1
    root_value_sum: jax.Array  # [B]
    low: jax.Array  # [B] smallest value that was backed up
    high: jax.Array  # [B] largest
    total_depth: jax.Array  # [B] float32, edges walked so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """Ways from the roots to the edges that are to be expanded."""

    steps: jax.Array  # [V, B, 7] float32
    depth: jax.Array  # [B] int32, edges on the path

    def leaf(self) -> tuple[jax.Array, jax.Array]:
        """Parent node and action of the edge to expand: [B] int32 each."""
        rows = _every(self.depth.shape[0])
        step = self.steps[self.depth - 1, rows]
        return step[:, _NODE].astype(jnp.int32), step[:, _ACTION].astype(jnp.int32)


def _every(rows: int) -> jax.Array:
    return jnp.arange(rows, dtype=jnp.int32)


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


def blank(shape: tuple[int, ...]) -> jax.Array:
    """Edges [..., 6, A] of nodes [..., A] without a prior, which lead nowhere."""
    fields = np.zeros(_NUM_FIELDS, np.float32)
    fields[CHILD] = UNVISITED
    return jnp.broadcast_to(fields[:, None], (*shape[:-1], _NUM_FIELDS, shape[-1]))


def init(prior: jax.Array, config: SearchConfig) -> Tree:
    """Trees that hold their roots: prior [B, A] from `softmax`, perhaps with noise."""
    rows, num_actions = prior.shape
    shape = (config.num_nodes, rows, num_actions)
    return Tree(
        edges=blank(shape).at[ROOT, :, PRIOR].set(prior),
        root_visits=jnp.ones(rows, jnp.float32),
        root_value_sum=jnp.zeros(rows, jnp.float32),
        low=jnp.full(rows, _LOW, jnp.float32),
        high=jnp.full(rows, _HIGH, jnp.float32),
        total_depth=jnp.zeros(rows, jnp.float32),
    )


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


def nowhere(rows: int, config: SearchConfig) -> Path:
    """Room for the longest paths."""
    steps = jnp.zeros((_max_depth(config), rows, _NUM_STEPS), jnp.float32)
    return Path(steps, jnp.zeros(rows, jnp.int32))


def select(tree: Tree, config: SearchConfig, room: Path | None = None) -> Path:
    """Walks all rows down together until each stands at an edge without a node.

    Args:
      room: a path to write over, whatever it holds: a new one for each simulation takes time where
        there are many.
    """
    room = nowhere(tree.low.shape[0], config) if room is None else room
    levels, rows = room.steps.shape[:2]
    exploration = _exploration(config)
    every_row = _every(rows)

    def goes_on(state: Any) -> jax.Array:
        return jnp.any(state[1])

    def descend(state: Any) -> Any:
        level, active, node, parent_q, path = state
        edge = tree.edges[node, every_row]
        mean, action = _best(tree, edge, node, parent_q, exploration)
        chosen = edge[every_row, :, action]
        where = jnp.stack([node.astype(jnp.float32), action.astype(jnp.float32)], axis=1)
        taken = jnp.concatenate([where, chosen[:, _UPDATED]], axis=1)
        path = Path(
            steps=jax.lax.dynamic_update_index_in_dim(path.steps, taken, level, 0),
            depth=path.depth + active.astype(jnp.int32),
        )
        child = chosen[:, CHILD].astype(jnp.int32)
        active = active & (child >= 0) & (level + 1 < levels)
        return level + 1, active, jnp.where(active, child, node), mean, path

    empty = Path(room.steps, jnp.zeros(rows, jnp.int32))
    at_root, no_q = jnp.full(rows, ROOT, jnp.int32), jnp.zeros(rows, jnp.float32)
    start = 0, jnp.ones(rows, bool), at_root, no_q, empty
    path: Path = loops.while_loop(goes_on, descend, start)[-1]
    return path


def _max_depth(config: SearchConfig) -> int:
    deepest = config.num_nodes - 1
    return min(config.max_depth or deepest, deepest)


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


def expand(
    tree: Tree,
    path: Path,
    node: jax.Array,
    reward: jax.Array,
    value: jax.Array,
    prior: jax.Array,
    discount: jax.Array | float,
) -> Tree:
    """Adds one node to each tree and backs its value up to the root.

    Args:
      node: [] int32, the new node's index, the same in all rows.
      reward: [B] on the new edges.
      value: [B] of the new nodes.
      prior: [B, A] of the new nodes.
      discount: [] of a step.
    """
    rows = tree.low.shape[0]
    fresh = blank(prior.shape).at[:, PRIOR].set(prior)
    edges = jax.lax.dynamic_update_index_in_dim(tree.edges, fresh, node, 0)
    every_row, discount = _every(rows), jnp.asarray(discount, jnp.float32)

    def back_up(state: Any) -> Any:
        level, edges, gain, low, high = state
        step = path.steps[level]
        on_path, is_leaf = level < path.depth, level == path.depth - 1
        child, old_visits, old_sum, old_reward = (
            step[:, _EDGE + field - CHILD] for field in (CHILD, VISITS, VALUE_SUM, REWARD)
        )
        is_new = is_leaf & (child < 0)
        child = jnp.where(is_new, jnp.asarray(node).astype(jnp.float32), child)
        received = jnp.where(is_new, reward, old_reward)
        visits, value_sum = old_visits + 1, old_sum + gain
        q = received + discount * (value_sum / visits)
        parent = jnp.where(on_path, step[:, _NODE].astype(jnp.int32), edges.shape[0])
        action = step[:, _ACTION].astype(jnp.int32)
        update = jnp.stack([child, visits, value_sum, received, q], axis=1)
        edges = edges.at[parent, every_row, _UPDATED, action].set(update, mode="drop")
        low = jnp.where(on_path, jnp.minimum(low, q), low)
        high = jnp.where(on_path, jnp.maximum(high, q), high)
        return level - 1, edges, jnp.where(on_path, received + discount * gain, gain), low, high

    deepest = jnp.max(path.depth) - 1
    start = deepest, edges, value, tree.low, tree.high
    _, edges, gain, low, high = loops.while_loop(lambda s: s[0] >= 0, back_up, start)
    visits, value_sum = tree.root_visits + 1, tree.root_value_sum + gain
    root_q = discount * (value_sum / visits)
    return Tree(
        edges=edges,
        root_visits=visits,
        root_value_sum=value_sum,
        low=jnp.minimum(low, root_q),
        high=jnp.maximum(high, root_q),
        total_depth=tree.total_depth + path.depth.astype(jnp.float32),
    )


def visit_counts(tree: Tree) -> jax.Array:
    """Visits of the roots' actions: [B, A] int32."""
    return tree.edges[ROOT, :, VISITS].astype(jnp.int32)


def q_values(tree: Tree) -> jax.Array:
    """Q values of the roots' actions: [B, A], 0 where never tried."""
    return tree.edges[ROOT, :, Q]


def root_value(tree: Tree) -> jax.Array:
    """Mean return of the roots [B]; the network's own value of them is not part of it."""
    return tree.root_value_sum / tree.root_visits
