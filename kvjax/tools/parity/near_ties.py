"""Whether two searches differ only because two actions scored almost the same.

log and exp may differ in the last bit between libraries, and so may the order of a sum. Where the
two best scores of a node are that close, either may be taken, and the rest of the search differs. A
difference is put down to that only if it is shown: the search is repeated with the other choice at
each such place, and both answers must come out.

Shapes: A actions.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from kvjax.tools.parity import reference_tree as trees

Array = np.ndarray[Any, Any]
Network = Callable[[int, int], tuple[float, float, Array]]
"""Parent node and action to reward, value and policy logits [A] of the new node."""
Start = Callable[[], tuple[trees.Tree, Network]]
"""Begins the same search anew."""

LIMIT = 1e-5
"""Scores that differ by less are a near tie."""


@dataclasses.dataclass(frozen=True)
class NearTie:
    """A choice that explains a difference."""

    simulation: int
    node: int
    margin: float  # by how much the two best scores differ
    root_value: float  # of the search that gives the recorded visits


@dataclasses.dataclass(frozen=True)
class _Decision:
    """A choice between two actions whose scores are close."""

    index: int  # counts all choices of a search
    simulation: int
    node: int
    margin: float


def find(start: Start, ours: Array, theirs: Array) -> NearTie | None:
    """The near tie that makes the difference between visits `ours` [A] and `theirs` [A], if any."""
    plain, decisions = _replay(start, None)
    for decision in decisions:
        turned, _ = _replay(start, decision.index)
        for mine, other in ((plain, turned), (turned, plain)):
            if _has_visits(mine, ours) and _has_visits(other, theirs):
                value = trees.root_value(other)
                return NearTie(decision.simulation, decision.node, decision.margin, value)
    return None


def _has_visits(tree: trees.Tree, visits: Array) -> bool:
    return np.array_equal(trees.visit_counts(tree), visits)


def _replay(start: Start, turned: int | None) -> tuple[trees.Tree, list[_Decision]]:
    """A whole search, with the second best action at choice number `turned`; and its near ties."""
    tree, network = start()
    found: list[_Decision] = []
    counter = itertools.count()

    def choose(node: int, scores: Array) -> int:
        index = next(counter)
        best, second = _two_best(scores)
        # The scores of a node without children are all equal, and the first is the rule.
        if second is not None and tree.visits[node] > 1:
            margin = float(scores[best] - scores[second])
            if margin < LIMIT:
                found.append(_Decision(index, tree.size - 1, node, margin))
        return second if index == turned and second is not None else best

    for _ in range(tree.config.num_simulations):
        parent, action = trees.select(tree, choose)
        trees.expand(tree, *network(parent, action))
    return tree, found


def _two_best(scores: Array) -> tuple[int, int | None]:
    best, *others = (int(action) for action in np.argsort(-scores, kind="stable"))
    second = others[0] if others and scores[others[0]] > -np.inf else None
    return best, second
