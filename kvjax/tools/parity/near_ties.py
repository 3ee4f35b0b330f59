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
Begin = Callable[[], tuple[trees.Tree, trees.Network]]
"""Begins the same search anew."""

LIMIT = 1e-5
"""Scores that differ by less are a near tie."""


@dataclasses.dataclass(frozen=True)
class NearTie:
    """A choice that explains a difference."""

    margin: float  # by how much the two best scores differ
    root_value: float  # of the search that gives the recorded visits


def find(begin: Begin, ours: Array, theirs: Array) -> NearTie | None:
    """The near tie that makes the difference between visits `ours` [A] and `theirs` [A], if any."""
    plain, margins = _replay(begin, None)
    for index, margin in margins.items():
        turned, _ = _replay(begin, index)
        for mine, other in ((plain, turned), (turned, plain)):
            if _has_visits(mine, ours) and _has_visits(other, theirs):
                return NearTie(margin, trees.root_value(other))
    return None


def _has_visits(tree: trees.Tree, visits: Array) -> bool:
    return np.array_equal(trees.visit_counts(tree), visits)


def _replay(begin: Begin, turned: int | None) -> tuple[trees.Tree, dict[int, float]]:
    """A whole search, with the second best action at choice number `turned`.

    Returns:
      The tree, and the margins of its near ties by the number of the choice.
    """
    tree, network = begin()
    margins: dict[int, float] = {}
    counter = itertools.count()

    def choose(node: int, scores: Array) -> int:
        index = next(counter)
        best, second = _two_best(scores)
        # The scores of a node without children are all equal, and the first is the rule.
        if second is not None and tree.visits[node] > 1:
            margin = float(scores[best] - scores[second])
            if margin < LIMIT:
                margins[index] = margin
        return second if index == turned and second is not None else best

    trees.grow([tree], network, choose)
    return tree, margins


def _two_best(scores: Array) -> tuple[int, int | None]:
    best, *others = (int(action) for action in np.argsort(-scores, kind="stable"))
    second = others[0] if others and scores[others[0]] > -np.inf else None
    return best, second
