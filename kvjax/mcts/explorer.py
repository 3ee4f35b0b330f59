"""One row's searched tree as a page that is stepped through, simulation by simulation.

What the page shows is computed here; `explorer.html` draws it. Values between the first simulation
and the last follow from the finished tree: a simulation made one node, so its path is known, and
what it backed up are that path's rewards and discounts and the new node's value. A simulation that
ended at a limit of depth made none and is told as such.

Shapes: B rows, N nodes, A actions, K tokens of a step, T slots of a stored window.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kvjax.base.values import require

Array = np.ndarray[Any, Any]

_ROOT = 0
_DIGITS = 4
_PLACE, _TITLE = "/*SEARCH*/", "<!--TITLE-->"


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row's tree, on the host; NaN stays NaN."""

    parent: Array  # [N] int
    action: Array  # [N] int
    simulation: Array  # [N] int
    reward: Array  # [N]
    discount: Array  # [N]
    value: Array  # [N]
    prior: Array  # [N, A]
    visits: Array  # [N] int, at the end
    q_values: Array  # [N, A], at the end
    length: Array  # [N] int
    slots: Array  # [N, T] int

    @functools.cached_property
    def q(self) -> Array:
        """Of the edge to each node, at the end: [N] float64."""
        return self.q_values[self.parent, np.maximum(self.action, 0)].astype(np.float64)

    def exists(self, node: int) -> bool:
        return node == _ROOT or self.parent[node] >= 0

    def path(self, node: int) -> list[int]:
        """From the root's child to the node."""
        path = []
        while node != _ROOT:
            path.append(node)
            node = int(self.parent[node])
        return path[::-1]


def page(out: Any, *, row: int, tokens: Sequence[str] | None, title: str, note: str) -> str:
    """The page; arguments are those of `SearchOutput.to_html`.

    Raises:
      ValueError: the output holds no tree or no such row, or a token has no name.
    """
    found = json.dumps(facts(out, row=row, tokens=tokens, title=title, note=note), allow_nan=False)
    template = importlib.resources.files(__package__).joinpath("explorer.html").read_text("utf-8")
    shown = title.replace("&", "&amp;").replace("<", "&lt;")
    return template.replace(_TITLE, shown).replace(_PLACE, found.replace("<", "\\u003c"))


def facts(
    out: Any, *, row: int, tokens: Sequence[str] | None, title: str, note: str
) -> dict[str, Any]:
    """All that the page knows, for JSON: numbers have four digits, and what is no number is None.

    Returns:
      `nodes`, one for each of N, None where there is none: `p` parent, `a` action, `s` simulation,
      `v` value, `r` reward, `d` discount, `P` prior [A], `w` window as runs of slots `[first,
      count]`. `start`: `[node, visits, q]` of edges that were kept. `steps`: the same of the edges
      on each simulation's path, as it left them; None if it made no node. `end`: of all nodes, by
      the search itself.
    """
    tree = _checked(out, row)
    nodes, size = tree.slots.shape[1:]
    has_tokens = bool(jax.tree.leaves(tree.tables))
    block = (jax.tree.leaves(tree.tables)[0].shape[0] - size) // (nodes - 1) if has_tokens else 0
    names = tuple(tokens or ())
    require(
        len(names) in (0, block),
        f"tokens must be the names of the {block} tokens that a step adds, got {list(names)}",
    )
    one = _row(tree, row)
    start, steps = _replay(one)
    return {
        "title": title,
        "note": note,
        "row": row,
        "block": block,
        "size": size if has_tokens else 0,
        "names": list(names),
        "chosen": int(np.asarray(out.action)[row]),
        "visits": np.asarray(out.visit_counts)[row].tolist(),
        "root_value": _short(np.asarray(out.root_value)[row]),
        "nodes": [_node(one, node, has_tokens) for node in range(nodes)],
        "start": start,
        "steps": steps,
        "end": [
            [node, int(one.visits[node]), _short(one.q[node])]
            for node in range(1, nodes)
            if one.exists(node)
        ],
    }


def _checked(out: Any, row: int) -> Any:
    tree = out.tree
    require(tree is not None, "to_html needs the whole tree: search with return_tree=True")
    shape = tree.parent.shape
    require(len(shape) == 2, f"to_html draws one search: parents must be [B, N], got {shape}")
    is_row = isinstance(row, int | np.integer) and 0 <= row < shape[0]
    require(is_row, f"row must be an integer in 0 .. {shape[0] - 1}, got {row!r}")
    return tree


def _row(tree: Any, row: int) -> _Row:
    names = [field.name for field in dataclasses.fields(_Row)]
    return _Row(*(np.asarray(getattr(tree, name))[row] for name in names))


def _replay(row: _Row) -> tuple[list[list[Any]], list[list[list[Any]] | None]]:
    """Visits and Q values of edges before the first simulation, and as each one left them."""
    made = {int(s): node for node, s in enumerate(row.simulation) if s >= 0}
    gains = {s: _gains(row, node) for s, node in made.items() if row.exists(node)}
    visits, sums = row.visits.copy(), _sums(row)
    for backed_up in gains.values():
        for node, gain in backed_up:
            visits[node] -= 1
            sums[node] -= gain
    start = [
        [node, int(visits[node]), _short(_q(row, node, visits, sums))]
        for node in np.flatnonzero(visits > 0).tolist()
    ]
    sums[visits == 0] = 0.0  # what is left there is rounding
    steps: list[list[list[Any]] | None] = []
    for simulation in range(len(made)):
        if simulation not in gains:
            steps.append(None)
            continue
        for node, gain in gains[simulation]:
            visits[node] += 1
            sums[node] += gain
        path = [node for node, _ in gains[simulation]][::-1]
        steps.append([[n, int(visits[n]), _short(_q(row, n, visits, sums))] for n in path])
    return start, steps


def _gains(row: _Row, node: int) -> list[tuple[int, float]]:
    """What the simulation that made a node added to the sum of each node above, itself first."""
    gain, gains = float(row.value[node]), []
    for above in reversed(row.path(node)):
        gains.append((above, gain))
        gain = _behind(row, above, gain)
    return gains


def _behind(row: _Row, node: int, value: float) -> float:
    """What a value counts for the parent; behind an edge of 0 nothing does, NaN neither."""
    discount, reward = float(row.discount[node]), float(row.reward[node])
    return reward if discount == 0 else reward + discount * value


def _sums(row: _Row) -> Array:
    """Sums of values at the end, out of the Q values: [N]."""
    factor = np.where(row.discount == 0, 1.0, row.discount)
    sums = (row.q - row.reward) / factor * row.visits
    exists = np.array([node != _ROOT and row.exists(node) for node in range(len(sums))])
    return np.where(exists & (row.discount != 0), sums, 0.0)


def _q(row: _Row, node: int, visits: Array, sums: Array) -> float:
    return _behind(row, node, float(sums[node]) / max(int(visits[node]), 1))


def _node(row: _Row, node: int, has_tokens: bool) -> dict[str, Any] | None:
    if not row.exists(node):
        return None
    told: dict[str, Any] = {
        "v": _short(row.value[node]),
        "P": [_short(prior) for prior in row.prior[node]],
        "w": _runs(row.slots[node][: int(row.length[node])]) if has_tokens else [],
    }
    if node == _ROOT:
        return told | {"Q": [_short(q) for q in row.q_values[node]]}
    return told | {
        "p": int(row.parent[node]),
        "a": int(row.action[node]),
        "s": int(row.simulation[node]),
        "r": _short(row.reward[node]),
        "d": _short(row.discount[node]),
    }


def _runs(slots: Array) -> list[list[int]]:
    """Slots that follow one another, as their first and their number."""
    runs: list[list[int]] = []
    for slot in slots.tolist():
        if runs and slot == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([slot, 1])
    return runs


def _short(number: Any) -> float | None:
    """Four digits; None for what is no number."""
    value = float(number)
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
