"""A batch of search trees in fixed-shape arrays. Knows no model, and no rule of choosing.

Statistics of an edge live at its parent, so that one read per level is all that selection takes.
Selection only reads them, and notes what it saw along its path; backup only writes them. XLA then
updates the table in place.

Shapes: B rows (one tree each), A actions, N nodes (the root is 0, what was kept comes next, and
simulation s makes node kept_nodes + s + 1), V levels of the deepest path, F fields of an edge.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.config import SearchConfig

ROOT = 0
UNVISITED = -1.0

# Fields of an edge. The last two are there only where somebody reads them.
PRIOR = 0  # as the rules keep it
CHILD = 1  # node index, exact in float32 up to 2**24
VISITS = 2
VALUE = 3  # of the child: the sum of its values, or their mean
REWARD = 4
Q = 5
RAW = 6  # what the network said of the child
DISCOUNT = 7  # of this edge
_NUM_FIELDS = 6

# Fields of a step of a path: where it went, and the edge's fields from CHILD on as they were.
_NODE, _ACTION, _EDGE = 0, 1, 2

_LOW, _HIGH = 1e6, -1e6  # extremes of no value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """B trees."""

    edges: jax.Array  # [N, B, F, A] float32
    root_visits: jax.Array  # [B] float32; begins at 1
    root_value_sum: jax.Array  # [B], or the mean
    low: jax.Array  # [B] smallest value that was backed up
    high: jax.Array  # [B] largest
    total_depth: jax.Array  # [B] float32, edges walked so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """Ways from the roots to the edges that are to be expanded."""

    steps: jax.Array  # [V, B, F + 1] float32
    depth: jax.Array  # [B] int32, edges on the path

    def leaf(self) -> tuple[jax.Array, jax.Array]:
        """Parent node and action of the edge to expand: [B] int32 each."""
        rows = every(self.depth.shape[0])
        step = self.steps[self.depth - 1, rows]
        return step[:, _NODE].astype(jnp.int32), step[:, _ACTION].astype(jnp.int32)


class Rules(Protocol):
    """How a tree is walked. Static."""

    @property
    def fields(self) -> int:
        """F of an edge."""

    @property
    def running_mean(self) -> bool:
        """Whether VALUE is a mean that moves with each value, as mctx has it, and not their sum."""

    def prior(self, policy: jax.Array, legal: jax.Array | None) -> jax.Array:
        """What an edge keeps of policy logits [B, A]; NaN everywhere if the policy is broken."""

    def begin(self, tree: Tree, rng: jax.Array) -> Any:
        """What the walk knows of the roots: a pytree."""

    def choose(
        self, tree: Tree, edge: jax.Array, node: jax.Array, level: jax.Array, known: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """An action [B] of the nodes [B] that have the edges [B, F, A], all on one level [].

        Returns:
          The action, its edge [B, F], and what the walk knows of the node behind it.
        """


def outcome(probability: jax.Array, visits: jax.Array, action: jax.Array, level: Any) -> jax.Array:
    """At odd levels [] the outcome [B] that is due, of chance nodes; at others the action [B].

    Args:
      probability: [B, A], below 0 where there is none.
      visits: [B, A].
    """
    due = jnp.argmax(probability / (visits + 1), axis=1).astype(jnp.int32)
    return jnp.where(level % 2 == 1, due, action)


def every(rows: int) -> jax.Array:
    """Numbers of rows: [B] int32."""
    return jnp.arange(rows, dtype=jnp.int32)


def blank(shape: tuple[int, ...], fields: int = _NUM_FIELDS) -> jax.Array:
    """Edges [..., F, A] of nodes [..., A] without a prior, which lead nowhere."""
    values = np.zeros(fields, np.float32)
    values[CHILD] = UNVISITED
    return jnp.broadcast_to(values[:, None], (*shape[:-1], fields, shape[-1]))


def init(
    prior: jax.Array,
    config: SearchConfig,
    fields: int = _NUM_FIELDS,
    value: jax.Array | None = None,
) -> Tree:
    """Trees that hold their roots.

    Args:
      prior: [B, A] of the rules, perhaps with noise.
      value: [B], the network's of the roots where it counts as a visit.
    """
    rows, num_actions = prior.shape
    shape = (config.num_nodes, rows, num_actions)
    return Tree(
        edges=blank(shape, fields).at[ROOT, :, PRIOR].set(prior),
        root_visits=jnp.ones(rows, jnp.float32),
        root_value_sum=jnp.zeros(rows, jnp.float32) if value is None else value,
        low=jnp.full(rows, _LOW, jnp.float32),
        high=jnp.full(rows, _HIGH, jnp.float32),
        total_depth=jnp.zeros(rows, jnp.float32),
    )


def nowhere(rows: int, config: SearchConfig, fields: int = _NUM_FIELDS) -> Path:
    """Room for the longest paths."""
    steps = jnp.zeros((_max_depth(config), rows, _EDGE + fields - CHILD), jnp.float32)
    return Path(steps, jnp.zeros(rows, jnp.int32))


def _max_depth(config: SearchConfig) -> int:
    deepest = config.num_nodes - 1
    return min(config.max_depth or deepest, deepest)


def select(tree: Tree, rules: Rules, room: Path, rng: jax.Array) -> Path:
    """Walks all rows down together until each stands at an edge without a node.

    Args:
      room: a path to write over, whatever it holds: a new one for each simulation takes time where
        there are many.
      rng: for rules that draw.
    """
    levels, rows = room.steps.shape[:2]
    every_row = every(rows)

    def goes_on(state: Any) -> jax.Array:
        return jnp.any(state[1])

    def descend(state: Any) -> Any:
        level, active, node, known, path = state
        edge = tree.edges[node, every_row]
        action, chosen, known = rules.choose(tree, edge, node, level, known)
        where = jnp.stack([node.astype(jnp.float32), action.astype(jnp.float32)], axis=1)
        taken = jnp.concatenate([where, chosen[:, CHILD:]], axis=1)
        path = Path(
            steps=jax.lax.dynamic_update_index_in_dim(path.steps, taken, level, 0),
            depth=path.depth + active.astype(jnp.int32),
        )
        child = chosen[:, CHILD].astype(jnp.int32)
        active = active & (child >= 0) & (level + 1 < levels)
        return level + 1, active, jnp.where(active, child, node), known, path

    empty = Path(room.steps, jnp.zeros(rows, jnp.int32))
    at_root = jnp.full(rows, ROOT, jnp.int32)
    start = 0, jnp.ones(rows, bool), at_root, rules.begin(tree, rng), empty
    path: Path = loops.while_loop(goes_on, descend, start)[-1]
    return path


def expand(
    tree: Tree,
    path: Path,
    node: jax.Array,
    reward: jax.Array,
    value: jax.Array,
    prior: jax.Array,
    discount: jax.Array | float,
    *,
    running_mean: bool = False,
    of_edge: jax.Array | None = None,
) -> Tree:
    """Adds one node to each tree and backs its value up to the root.

    Args:
      node: [] int32, the new node's index, the same in all rows.
      reward: [B] on the new edges.
      value: [B] of the new nodes.
      prior: [B, A] of the new nodes.
      discount: [] of a step; also what the root's own value is scaled by among its extremes.
      running_mean: as of the rules. At the depth limit, where a node is imagined again, its last
        reward, discount and value are kept then, as mctx has it; else the first and the sum.
      of_edge: [B], of the new edges, where each has its own. What lies behind an edge of 0 reaches
        nobody above it, NaN neither.
    """
    rows, fields = tree.low.shape[0], tree.edges.shape[2]
    fresh = blank(prior.shape, fields).at[:, PRIOR].set(prior)
    edges = jax.lax.dynamic_update_index_in_dim(tree.edges, fresh, node, 0)
    every_row, discount = every(rows), jnp.asarray(discount, jnp.float32)
    behind = None if of_edge is None else _behind_an_end(path)

    def discounted(received: jax.Array, factor: jax.Array, value: jax.Array) -> jax.Array:
        total = received + factor * value
        return total if of_edge is None else jnp.where(factor == 0, received, total)

    def back_up(state: Any) -> Any:
        level, edges, gain, low, high = state
        step = path.steps[level]
        on_path, is_leaf = level < path.depth, level == path.depth - 1
        old = {field: step[:, _EDGE + field - CHILD] for field in range(CHILD, fields)}
        is_new = is_leaf & (old[CHILD] < 0)
        tells = is_leaf if running_mean else is_new
        child = jnp.where(is_new, jnp.asarray(node).astype(jnp.float32), old[CHILD])
        received = jnp.where(tells, reward, old[REWARD])
        factor = discount if of_edge is None else jnp.where(tells, of_edge, old[DISCOUNT])
        visits = old[VISITS] + 1
        if running_mean:
            moved = (old[VALUE] * old[VISITS] + gain) / visits
            kept = mean = jnp.where(is_leaf & ~is_new, gain, moved)
        else:
            kept = old[VALUE] + gain
            mean = kept / visits
        q = discounted(received, factor, mean)
        parent = jnp.where(on_path, step[:, _NODE].astype(jnp.int32), edges.shape[0])
        action = step[:, _ACTION].astype(jnp.int32)
        written = [child, visits, kept, received, q]
        if fields > RAW:
            written.append(jnp.where(is_new, value, old[RAW]))
        if fields > DISCOUNT:
            written.append(jnp.broadcast_to(factor, q.shape))
        update = jnp.stack(written, axis=1)
        edges = edges.at[parent, every_row, CHILD:, action].set(update, mode="drop")
        counts = on_path if behind is None else on_path & ~behind[level]
        low = jnp.where(counts, jnp.minimum(low, q), low)
        high = jnp.where(counts, jnp.maximum(high, q), high)
        gain = jnp.where(on_path, discounted(received, factor, gain), gain)
        return level - 1, edges, gain, low, high

    deepest = jnp.max(path.depth) - 1
    start = deepest, edges, value, tree.low, tree.high
    _, edges, gain, low, high = loops.while_loop(lambda s: s[0] >= 0, back_up, start)
    visits = tree.root_visits + 1
    if running_mean:
        value_sum = root_mean = (tree.root_value_sum * tree.root_visits + gain) / visits
    else:
        value_sum = tree.root_value_sum + gain
        root_mean = value_sum / visits
    root_q = discount * root_mean
    return Tree(
        edges=edges,
        root_visits=visits,
        root_value_sum=value_sum,
        low=jnp.minimum(low, root_q),
        high=jnp.maximum(high, root_q),
        total_depth=tree.total_depth + path.depth.astype(jnp.float32),
    )


def _behind_an_end(path: Path) -> jax.Array:
    """Which edges of paths lie behind one whose discount is 0: [V, B] bool."""
    tried = path.steps[:, :, _EDGE + VISITS - CHILD] > 0
    ends = tried & (path.steps[:, :, _EDGE + DISCOUNT - CHILD] == 0)
    before = jnp.cumsum(ends, axis=0, dtype=jnp.int32) - ends
    return before > 0


def visit_counts(tree: Tree) -> jax.Array:
    """Visits of the roots' actions: [B, A] int32."""
    return tree.edges[ROOT, :, VISITS].astype(jnp.int32)


def q_values(tree: Tree) -> jax.Array:
    """Q values of the roots' actions: [B, A], 0 where never tried."""
    return tree.edges[ROOT, :, Q]


def root_value(tree: Tree, *, running_mean: bool = False) -> jax.Array:
    """Mean return of the roots [B], the network's own value included where the tree began with it.

    Args:
      running_mean: as of the rules.
    """
    return tree.root_value_sum if running_mean else tree.root_value_sum / tree.root_visits
