"""LightZero's tree search in plain numpy, one tree at a time, in float32.

It is slow and easy to read: it drives searches whose tree lives on the host, and it is what faster
searches are tested against. The rules are those of LightZero's C++ tree in deterministic mode with
one player.

Shapes: A actions, N nodes (the root and one per simulation), T trees.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvjax.base.display_tree import tree_svg
from kvjax.config import SearchConfig

Array = np.ndarray[Any, Any]
Choice = Callable[[int, Array], int]
"""Node and scores [A] of its actions, -inf where illegal, to the action that is taken."""

Network = Callable[[Array, Array, Array], Iterable[Array]]
"""Parents [T], actions [T] and depths [T] of new nodes, one in each of T trees, to their rewards
[T], values [T] and policy logits [T, A]."""

ROOT = 0
UNVISITED = -1

_MIN_RANGE = np.float32(0.01)


@dataclasses.dataclass(repr=False)
class Tree:
    """One search. `select` names the edge to expand, `expand` adds the network's answer for it."""

    config: SearchConfig
    prior: Array  # [N, A]
    reward: Array  # [N] on the edge into the node
    visits: Array  # [N] int
    value_sum: Array  # [N]
    children: Array  # [N, A] node indices
    legal: Array  # [A] bool, at the root
    low: np.float32  # smallest and largest Q value that was backed up
    high: np.float32
    size: int = 1
    path: tuple[int, ...] = ()  # nodes from the root to the parent that `select` chose
    action: int = 0  # the edge below it

    def __repr__(self) -> str:
        counts = ", ".join(map(str, visit_counts(self)))
        return f"Tree: {self.size} nodes, visits of the root's actions {counts}"

    def _repr_html_(self) -> str:
        means = self.value_sum / np.maximum(self.visits, 1)
        return tree_svg(self.children, self.visits, means)


def softmax(logits: Array) -> Array:
    """Probabilities [A] of logits [A]: subtract the largest, sum in order."""
    exponents = np.exp(logits - logits.max(), dtype=np.float32)
    total = np.float32(0)
    for exponent in exponents:
        total += exponent
    probabilities: Array = exponents / total
    return probabilities


def init(logits: Array, legal: Array, config: SearchConfig, noise: Array | None = None) -> Tree:
    """A tree that holds a root.

    Args:
      logits: [A] policy logits of the root.
      legal: [A] bool.
      noise: [A] probabilities over the legal actions, mixed in by `config.noise_fraction`.

    Raises:
      ValueError: no action is legal.
    """
    if not legal.any():
        raise ValueError("the root has no legal action")
    size, num_actions = config.num_simulations + 1, len(logits)
    prior = np.zeros((size, num_actions), np.float32)
    prior[ROOT, legal] = softmax(logits[legal].astype(np.float32))
    if noise is not None:
        fraction = np.float32(config.noise_fraction)
        mixed = prior[ROOT] * (np.float32(1) - fraction) + fraction * noise.astype(np.float32)
        prior[ROOT] = np.where(legal, mixed, 0)
    visits = np.zeros(size, np.int64)
    visits[ROOT] = 1
    return Tree(
        config=config,
        prior=prior,
        reward=np.zeros(size, np.float32),
        visits=visits,
        value_sum=np.zeros(size, np.float32),
        children=np.full((size, num_actions), UNVISITED),
        legal=legal,
        low=np.float32(1e6),
        high=np.float32(-1e6),
    )


def _q(tree: Tree, node: int) -> np.float32:
    """Reward into a visited node plus its discounted mean value."""
    value = tree.value_sum[node] / np.float32(tree.visits[node])
    return np.float32(tree.reward[node] + np.float32(tree.config.discount) * value)


def first_best(node: int, scores: Array) -> int:
    """The action with the largest score, the first on ties."""
    del node
    return int(np.argmax(scores))


def select(tree: Tree, choose: Choice = first_best) -> tuple[int, int]:
    """Walks down from the root to an edge without a node: its parent and its action."""
    node, path, parent_q = ROOT, [ROOT], np.float32(0)
    while True:
        parent_q, scores = _scores(tree, node, parent_q)
        action = choose(node, scores)
        child = int(tree.children[node, action])
        if child == UNVISITED:
            tree.path, tree.action = tuple(path), action
            return node, action
        node = child
        path.append(node)


def _scores(tree: Tree, node: int, parent_q: np.float32) -> tuple[np.float32, Array]:
    """The node's own mean Q and the scores [A] of its actions, -inf where illegal."""
    children = tree.children[node]
    tried = [action for action, child in enumerate(children) if child != UNVISITED]
    q = np.zeros(len(children), np.float32)
    total = np.float32(0)
    for action in tried:
        q[action] = _q(tree, children[action])
        total += q[action]
    if node == ROOT and tried:
        mean = total / np.float32(len(tried))
    else:
        mean = (parent_q + total) / np.float32(len(tried) + 1)
    q = np.where(children == UNVISITED, mean, q)
    spread = np.float32(tree.high - tree.low)
    if spread > 0:
        q = (q - tree.low) / max(spread, _MIN_RANGE)
    score = _exploration(tree, node) + np.clip(q, np.float32(0), np.float32(1))
    if node == ROOT:
        score = np.where(tree.legal, score, -np.inf)
    return mean, score


def _exploration(tree: Tree, node: int) -> Array:
    """MuZero's exploration bonus of each action: [A]."""
    config, base = tree.config, np.float32(tree.config.pb_c_base)
    children = tree.children[node]
    counts = np.where(children == UNVISITED, 0, tree.visits[children]).astype(np.float32)
    total = np.float32(tree.visits[node] - 1)
    weight = np.log((total + base + np.float32(1)) / base) + np.float32(config.pb_c_init)
    bonus: Array = weight * (np.sqrt(total) / (counts + np.float32(1))) * tree.prior[node]
    return bonus


def expand(tree: Tree, reward: float, value: float, logits: Array) -> None:
    """Adds the network's answer for the selected edge and backs its value up to the root.

    Args:
      logits: [A] policy logits of the new node.
    """
    node = tree.size
    tree.size += 1
    tree.children[tree.path[-1], tree.action] = node
    tree.prior[node] = softmax(logits.astype(np.float32))
    tree.reward[node] = reward
    discount, gain = np.float32(tree.config.discount), np.float32(value)
    for visited in (node, *reversed(tree.path)):
        tree.value_sum[visited] += gain
        tree.visits[visited] += 1
        q = _q(tree, visited)
        tree.low, tree.high = min(tree.low, q), max(tree.high, q)
        gain = tree.reward[visited] + discount * gain


def grow(forest: Sequence[Tree], network: Network, choose: Choice = first_best) -> None:
    """Searches trees of as many simulations side by side: select, ask the network, expand."""
    for _ in range(forest[0].config.num_simulations):
        parent, action = np.array([select(tree, choose) for tree in forest]).T
        depth = np.array([len(tree.path) for tree in forest])
        for tree, *answer in zip(forest, *network(parent, action, depth), strict=True):
            expand(tree, *answer)


def visit_counts(tree: Tree) -> Array:
    """Visits of the root's actions: [A] int."""
    children = tree.children[ROOT]
    return np.where(children == UNVISITED, 0, tree.visits[children])


def root_value(tree: Tree) -> float:
    """Mean return of the root; the network's own value of it is not part of it."""
    return float(tree.value_sum[ROOT] / np.float32(tree.visits[ROOT]))
