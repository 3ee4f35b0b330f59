"""Pictures of states: plain text for a terminal, HTML for a notebook. Knows arrays, not types.

Shapes: B rows, C slots of a window, P segments of S slots of a pool, A actions, N nodes of a tree.
In text a dot is an empty slot, as in the drawings of `kvjax.ops.window`.
"""

import dataclasses
import html
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from kvjax.base.arrays import is_deleted

Array = np.ndarray[Any, Any]

_MAX_ROWS = 8
_MAX_SLOTS = 32
_KV_RANK = 5  # of one item's window
_BAR = 12
_SLOT = (
    "display:inline-block;box-sizing:border-box;min-width:2.6em;height:1.7em;line-height:1.6em;"
    "margin:1px;padding:0 .3em;border-radius:3px;text-align:center;font:.75em monospace;"
)
_STYLES = {
    "token": "background:#2a66b8;color:#fff",
    "empty": "border:1px solid #9aa4b1",
    "pad": "border:1px dashed #d9822b",
    "free": "border:1px dotted #9aa4b1",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One state, drawn twice."""

    text: str
    html: str


class Drawn:
    """Draws itself by `_picture`; by names and shapes alone where the arrays hold no numbers."""

    def _picture(self) -> Picture | None:
        raise NotImplementedError

    def _drawn(self) -> Picture:
        leaves = jax.tree.leaves(self)
        drawn = self._picture() if leaves and all(map(_is_concrete, leaves)) else None
        if drawn is None:
            text = _shapes(self)
            return Picture(text, f"<code>{html.escape(text)}</code>")
        return drawn

    def __repr__(self) -> str:
        return self._drawn().text

    def _repr_html_(self) -> str:
        return self._drawn().html


def _is_concrete(leaf: Any) -> bool:
    """Whether numbers can be read: no tracer, no mere shape, no array that was moved away."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return not leaf.is_deleted() and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray | np.generic | int | float)


def _shapes(owner: Any) -> str:
    def named(value: Any) -> str:
        if is_deleted(value):
            return "moved away"
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"{value.dtype}[{','.join(map(str, value.shape))}]"
        return repr(value)

    fields = dataclasses.fields(owner)
    inside = ", ".join(f"{field.name}={named(getattr(owner, field.name))}" for field in fields)
    return f"{type(owner).__name__}({inside})"


@dataclasses.dataclass(frozen=True)
class _Slot:
    kind: str  # of `_STYLES`
    label: str = ""
    shade: float | None = None  # of its colour alone, so that its label is read, light or dark

    def html(self) -> str:
        style = _STYLES[self.kind]
        if self.shade is not None:
            style = f"background:rgba(59,125,216,{self.shade:.2f})"
        style = _SLOT + style
        label = html.escape(self.label) or "&nbsp;"
        return f'<span class="{self.kind}" style="{style}">{label}</span>'


def _row(slots: Iterable[_Slot], *more: str) -> Picture:
    """Slots side by side."""
    slots = list(slots)
    labels = " ".join(slot.label or "." for slot in slots)
    drawn = "".join(slot.html() for slot in slots)
    return Picture(" ".join([f"  [{labels}]", *more]), drawn + " ".join(more))


def _stacked(title: str, parts: Iterable[Picture], *more: str) -> Picture:
    """Pictures one below the other."""
    parts = [*parts, *(Picture(line, line) for line in more)]
    text = "\n".join([title, *(part.text for part in parts)])
    lines = "".join(f"<div>{part.html}</div>" for part in parts)
    title = html.escape(title)
    return Picture(text, f'<div style="white-space:nowrap"><div>{title}</div>{lines}</div>')


def _more(hidden: int, what: str) -> list[str]:
    return [f"... and {hidden} more {what}"] if hidden > 0 else []


def window(name: str, kv: Any, length: Any, pad: Any = 0) -> Picture | None:
    """Slots of one window or of a batch; each token shows its first number.

    Args:
      name: what stands at the top.
      kv: [C, L, 2, H, D] or [B, C, L, 2, H, D].
      length: [] or [B] int32.
      pad: [] or [B] int32, empty slots before the first token.
    """
    kv = np.asarray(kv)
    if kv.ndim not in (_KV_RANK, 1 + _KV_RANK):
        return None
    kv = kv if kv.ndim > _KV_RANK else kv[None]
    lengths, pads = (np.broadcast_to(np.asarray(x), kv.shape[:1]) for x in (length, pad))
    rows, capacity, layers, _, heads, size = kv.shape
    shape = f"{capacity} slots, {layers} layers, {heads} heads of {size}, {kv.dtype}"
    held = ", ".join(map(str, lengths[:_MAX_ROWS])) + (", ..." if rows > _MAX_ROWS else "")
    firsts = kv[:_MAX_ROWS, ..., 0, 0, 0, 0]
    drawn = [
        _row(_slots(*row)) for row in zip(firsts, lengths.tolist(), pads.tolist(), strict=False)
    ]
    return _stacked(f"{name}: {held} of {shape}", drawn, *_more(rows - _MAX_ROWS, "rows"))


def _slots(firsts: Array, length: int, pad: int) -> Iterator[_Slot]:
    """What stands in each slot, and what kind of slot it is."""
    capacity = len(firsts)
    for slot, first in enumerate(firsts[:_MAX_SLOTS].tolist()):
        if slot < pad:
            yield _Slot("pad")
        elif slot < pad + length:
            yield _Slot("token", f"{first:.2g}")
        else:
            yield _Slot("free" if slot >= capacity - 3 else "empty")  # what every slide empties
    if capacity > _MAX_SLOTS:
        yield _Slot("empty", "...")


def pool(name: str, live: Any, rank: Any, segments: int, eviction: str) -> Picture:
    """Slots of a pool; what is used shows its place in the order of age, 1 is the oldest.

    Args:
      name: what stands at the top.
      live: [P * S] bool.
      rank: [P * S] uint32, larger is younger (or of higher priority).
      segments: P.
      eviction: the pool's policy.
    """
    live, rank = (np.asarray(x).reshape(segments, -1) for x in (live, rank))
    title = f"{name}: {int(live.sum())} of {live.size} slots used, {eviction}"
    title += f", {segments} segments" if segments > 1 else ""
    hidden = _more(live.shape[1] - _MAX_SLOTS, "slots")
    drawn = [_row(_aged(*row), *hidden) for row in zip(live[:_MAX_ROWS], rank, strict=False)]
    return _stacked(title, drawn, *_more(segments - _MAX_ROWS, "segments"))


def _aged(used: Array, rank: Array) -> list[_Slot]:
    """Slots of a segment; the oldest is darkest."""
    order = np.argsort(rank, kind="stable")
    place = np.empty(len(used), int)
    place[order] = np.cumsum(used[order])
    total = 1 + max(int(used.sum()), 1)
    return [
        _Slot("token", str(at), 0.55 - 0.35 * at / total) if is_used else _Slot("empty")
        for is_used, at in zip(used[:_MAX_SLOTS], place.tolist(), strict=False)
    ]


def store(pictures: list[Picture | None], epoch: Any, counters: dict[str, int]) -> Picture | None:
    """Root pools and node pool, one below the other, and what was found so far."""
    asked, missed = counters["root_queries"] + counters["queries"], counters["misses"]
    title = f"Store: epoch {int(epoch)}, {asked} look-ups, {missed} misses"
    drawn = [picture for picture in pictures if picture is not None]
    return _stacked(title, drawn) if len(drawn) == len(pictures) else None


def search_output(out: Any) -> Picture | None:
    """Bars of the root's actions: visits, mean values, priors; one table per row.

    Args:
      out: fields of a `SearchOutput`: `visit_counts`, `q_values`, `prior` [B, A]; `action`,
        `root_value`, `network_value`, `mean_depth` [B]; perhaps `sampled_actions` [B, A, ...].
    """
    visits = np.asarray(out.visit_counts)
    if visits.ndim != 2:
        return None
    rows, actions = visits.shape
    drawn = [_searched(out, row, visits[row]) for row in range(min(rows, _MAX_ROWS))]
    title = f"SearchOutput: {rows} rows, {actions} actions"
    return _stacked(title, drawn, *_more(rows - _MAX_ROWS, "rows"))


def _searched(out: Any, row: int, visits: Array) -> Picture:
    taken, drawn = _label(out.action[row]), out.sampled_actions
    actions = range(len(visits)) if drawn is None else drawn[row]
    head = (
        f"row {row}: action {taken}, value {float(out.root_value[row]):.3g}"
        f" (network {float(out.network_value[row]):.3g}),"
        f" mean depth {float(out.mean_depth[row]):.3g}"
    )
    most, columns = max(int(visits.max()), 1), (visits, out.q_values[row], out.prior[row])
    table = [
        (_label(action), int(count), int(count) / most, float(q), float(prior))
        for action, count, q, prior in zip(actions, *columns, strict=True)
    ]
    lines = [
        f"    {action:<6}  {count:<6}  {'#' * round(_BAR * share):<{_BAR}}  {q:<6.3g}  {p:.3f}"
        for action, count, share, q, p in table
    ]
    text = "\n".join(["  " + head, "    action  visits  bar           q       prior", *lines])
    return Picture(text, html.escape(head) + _action_table(table, taken))


def _label(action: Any) -> str:
    """An action's number, or its numbers."""
    values = np.asarray(action)
    return " ".join(f"{x:.2f}" for x in values) if values.ndim else str(int(values))


def _action_table(table: list[tuple[str, int, float, float, float]], taken: str) -> str:
    def line(action: str, count: int, share: float, q: float, prior: float) -> str:
        colour = "#d9822b" if action == taken else "#3b7dd8"
        bar = f'<div style="background:{colour};height:.8em;width:{10 * share:.2f}em"></div>'
        cells = (action, count, bar, f"{q:.3g}", f"{prior:.3f}")
        return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    names = "".join(f"<th>{name}</th>" for name in ("action", "visits", "", "q", "prior"))
    return f"<table><tr>{names}</tr>{''.join(line(*row) for row in table)}</table>"
