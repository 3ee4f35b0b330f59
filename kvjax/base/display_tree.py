"""A search tree as SVG. Shapes: A actions, N nodes."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ROOT = 0
_UNVISITED = -1
_STEP_X, _STEP_Y, _MARGIN = 34.0, 58.0, 26.0
_PATH, _OTHER = "#d9822b", "#3b7dd8"


def tree_svg(children: Array, visits: Array, values: Array, *, max_nodes: int = 128) -> str:
    """Draws a tree: circles grow with visits, numbers are visits, the most visited path stands out.

    Args:
      children: [N, A] node indices, -1 where there is none.
      visits: [N] int.
      values: [N] mean values, told when the mouse points at a node.
      max_nodes: only the most visited nodes are drawn.
    """
    order = np.argsort(-visits, kind="stable")  # parents have no fewer visits, and come first
    shown = {int(node) for node in order[:max_nodes] if visits[node] > 0}
    edges = [
        (parent, action, int(child))
        for parent in sorted(shown)
        for action, child in enumerate(children[parent])
        if child != _UNVISITED and int(child) in shown
    ]
    places = _places(edges)
    best = _most_visited_path(edges, visits)
    width = max(x for x, _ in places.values()) * _STEP_X + 2 * _MARGIN
    height = max(y for _, y in places.values()) * _STEP_Y + 2 * _MARGIN
    at = {n: (_MARGIN + _STEP_X * x, _MARGIN + _STEP_Y * y) for n, (x, y) in places.items()}
    lines = [_edge(at[a], at[b], action, a in best and b in best) for a, action, b in edges]
    circles = [
        _node(at[node], node, int(visits[node]), float(values[node]), node in best, visits.max())
        for node in sorted(places)
    ]
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, *lines, *circles, "</svg>"])


def _places(edges: list[tuple[int, int, int]]) -> dict[int, tuple[float, int]]:
    """Column and row of each node: leaves side by side, parents above the middle of theirs."""
    below: dict[int, list[int]] = {}
    for parent, _, child in edges:
        below.setdefault(parent, []).append(child)
    places: dict[int, tuple[float, int]] = {}
    leaves = 0
    stack = [(_ROOT, 0, False)]
    while stack:
        node, depth, done = stack.pop()
        mine = below.get(node, [])
        if not mine:
            places[node], leaves = (float(leaves), depth), leaves + 1
        elif done:
            places[node] = (places[mine[0]][0] + places[mine[-1]][0]) / 2, depth
        else:
            stack.append((node, depth, True))
            stack += [(child, depth + 1, False) for child in reversed(mine)]
    return places


def _most_visited_path(edges: list[tuple[int, int, int]], visits: Array) -> set[int]:
    node, path = _ROOT, {_ROOT}
    while mine := [child for parent, _, child in edges if parent == node]:
        node = max(mine, key=lambda child: visits[child])
        path.add(node)
    return path


def _edge(a: tuple[float, float], b: tuple[float, float], action: int, best: bool) -> str:
    colour, width = (_PATH, 3) if best else ("#9aa4b1", 1.2)
    aside = 4 if b[0] >= a[0] else -10
    x, y = (a[0] + 2 * b[0]) / 3 + aside, (a[1] + 2 * b[1]) / 3 - 6
    return (
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        f' stroke="{colour}" stroke-width="{width}"/>'
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="9" fill="#7a8594">{action}</text>'
    )


def _node(
    at: tuple[float, float], node: int, count: int, value: float, best: bool, most: int
) -> str:
    radius = 7.0 + 9.0 * float(np.sqrt(count / most))
    label = f'<text x="{at[0]:.1f}" y="{at[1] + 3:.1f}" font-size="9" text-anchor="middle"'
    return (
        f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:.1f}"'
        f' fill="{_PATH if best else _OTHER}"><title>node {node}: {count} visits, value'
        f" {value:.3g}</title></circle>"
        f'{label} fill="#fff">{count}</text>'
    )
