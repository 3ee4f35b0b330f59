"""Pictures of states: plain text for a terminal, HTML for a notebook. Knows arrays, not types.

Shapes: B rows, C slots of a window, P segments of S slots of a pool, A actions, N nodes of a tree.
In text a dot is an empty slot, as in the drawings of `kvjax.ops.window`.
"""

import dataclasses
import html
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

Array = np.ndarray[Any, Any]

_MAX_ROWS = 8
_MAX_SLOTS = 32
_KV_RANK = 5  # of one item's window
_BAR = 12
_CELL = (
    "display:inline-block;box-sizing:border-box;min-width:2.6em;height:1.7em;line-height:1.6em;"
    "margin:1px;padding:0 .3em;border-radius:3px;text-align:center;font:.75em monospace;"
)
_STYLES = {
    "token": "background:#3b7dd8;color:#fff",
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
        deleted = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
        if deleted and value.is_deleted():
            return "moved away"
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"{value.dtype}[{','.join(map(str, value.shape))}]"
        return repr(value)

    fields = dataclasses.fields(owner)
    inside = ", ".join(f"{field.name}={named(getattr(owner, field.name))}" for field in fields)
    return f"{type(owner).__name__}({inside})"


def _paragraph(title: str, lines: Iterable[str]) -> str:
    lines = "".join(f"<div>{line}</div>" for line in lines)
    return f'<div style="white-space:nowrap"><div>{html.escape(title)}</div>{lines}</div>'


def _cell(kind: str, label: str = "", shade: float = 1.0) -> str:
    shade_style = f";opacity:{shade:.2f}" if shade < 1.0 else ""
    label = html.escape(label) or "&nbsp;"
    return f'<span class="{kind}" style="{_CELL}{_STYLES[kind]}{shade_style}">{label}</span>'


def _text_row(labels: list[str]) -> str:
    return f"[{' '.join(label or '.' for label in labels)}]"


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
    title = f"{name}: {held} of {shape}"
    firsts = kv[..., 0, 0, 0, 0]
    lines, cells = [], []
    for row in range(min(rows, _MAX_ROWS)):
        labels, kinds = _slots(firsts[row], int(lengths[row]), int(pads[row]))
        lines.append("  " + _text_row(labels))
        cells.append("".join(map(_cell, kinds, labels)))
    more = _more(rows - _MAX_ROWS, "rows")
    return Picture("\n".join([title, *lines, *more]), _paragraph(title, [*cells, *more]))


def _slots(firsts: Array, length: int, pad: int) -> tuple[list[str], list[str]]:
    """What stands in each slot, and what kind of slot it is."""
    shown = min(len(firsts), _MAX_SLOTS)
    labels, kinds = [""] * shown, ["empty"] * shown
    for slot in range(shown):
        if slot < pad:
            kinds[slot] = "pad"
        elif slot < pad + length:
            labels[slot], kinds[slot] = f"{float(firsts[slot]):.2g}", "token"
        elif slot >= len(firsts) - 3:
            kinds[slot] = "free"  # what every slide empties
    if shown < len(firsts):
        labels, kinds = [*labels, "..."], [*kinds, "empty"]
    return labels, kinds


def pool(name: str, live: Any, rank: Any, segments: int, eviction: str) -> Picture:
    """Slots of a pool; what is used shows its place in the order of age, 1 is the oldest.

    Args:
      name: what stands at the top.
      live: [P * S] bool.
      rank: [P * S] uint32, larger is younger (or of higher priority).
      segments: P.
      eviction: the pool's policy.
    """
    live = np.asarray(live).reshape(segments, -1)
    rank = np.asarray(rank).reshape(segments, -1)
    title = f"{name}: {int(live.sum())} of {live.size} slots used, {eviction}"
    title += f", {segments} segments" if segments > 1 else ""
    lines, cells = [], []
    for used, ranks in zip(live[:_MAX_ROWS], rank[:_MAX_ROWS], strict=True):
        order = {int(slot): at for at, slot in enumerate(np.argsort(ranks, kind="stable"), 1)}
        older = {slot: sum(used[s] for s in order if order[s] <= order[slot]) for slot in order}
        shown = range(min(len(used), _MAX_SLOTS))
        labels = [str(older[slot]) if used[slot] else "" for slot in shown]
        total, hidden = max(int(used.sum()), 1), _more(len(used) - _MAX_SLOTS, "slots")
        shades = [1.0 - 0.6 * older[slot] / (total + 1) for slot in shown]  # the oldest is darkest
        lines.append(" ".join(["  " + _text_row(labels), *hidden]))
        cells.append(
            "".join(
                _cell("token", label, shade) if label else _cell("empty")
                for label, shade in zip(labels, shades, strict=True)
            )
        )
        cells[-1] += " ".join(hidden)
    more = _more(segments - _MAX_ROWS, "segments")
    return Picture("\n".join([title, *lines, *more]), _paragraph(title, [*cells, *more]))


def store(pictures: list[Picture | None], epoch: Any, counters: dict[str, int]) -> Picture | None:
    """Root pools and node pool, one below the other, and what was found so far."""
    asked, missed = counters["root_queries"] + counters["queries"], counters["misses"]
    title = f"Store: epoch {int(epoch)}, {asked} look-ups, {missed} misses"
    drawn = [picture for picture in pictures if picture is not None]
    if len(drawn) < len(pictures):
        return None
    texts = "\n".join(picture.text for picture in drawn)
    return Picture(f"{title}\n{texts}", _paragraph(title, [picture.html for picture in drawn]))


def search_output(out: Any) -> Picture | None:
    """Bars of the root's actions: visits, mean values, priors; one table per row.

    Args:
      out: fields of a `SearchOutput`: `visit_counts`, `q_values`, `prior` [B, A]; `action`,
        `root_value`, `network_value`, `mean_depth` [B].
    """
    visits = np.asarray(out.visit_counts)
    if visits.ndim != 2:
        return None
    rows = len(visits)
    title = f"SearchOutput: {rows} rows, {visits.shape[1]} actions"
    lines, tables = [], []
    for row in range(min(rows, _MAX_ROWS)):
        head = (
            f"row {row}: action {int(out.action[row])}, value {float(out.root_value[row]):.3g}"
            f" (network {float(out.network_value[row]):.3g}),"
            f" mean depth {float(out.mean_depth[row]):.3g}"
        )
        table = list(_actions(visits[row], out.q_values[row], out.prior[row]))
        lines += ["  " + head, "    action  visits  bar           q       prior"]
        lines += [
            f"    {action:<6}  {count:<6}  {'#' * round(_BAR * share):<{_BAR}}  {q:<6.3g}  {p:.3f}"
            for action, count, share, q, p in table
        ]
        tables.append(html.escape(head) + _action_table(table, int(out.action[row])))
    more = _more(rows - _MAX_ROWS, "rows")
    return Picture("\n".join([title, *lines, *more]), _paragraph(title, [*tables, *more]))


def _actions(visits: Array, q: Any, prior: Any) -> Iterable[tuple[int, int, float, float, float]]:
    most = max(int(visits.max()), 1)
    for action, count in enumerate(visits):
        yield action, int(count), int(count) / most, float(q[action]), float(prior[action])


def _action_table(table: list[tuple[int, int, float, float, float]], taken: int) -> str:
    def line(action: int, count: int, share: float, q: float, prior: float) -> str:
        colour = "#d9822b" if action == taken else "#3b7dd8"
        bar = f'<div style="background:{colour};height:.8em;width:{10 * share:.2f}em"></div>'
        cells = (action, count, bar, f"{q:.3g}", f"{prior:.3f}")
        return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    names = "".join(f"<th>{name}</th>" for name in ("action", "visits", "", "q", "prior"))
    return f"<table><tr>{names}</tr>{''.join(line(*row) for row in table)}</table>"
