"""Tables and plots of what `kvjax bench all` has measured.

A markdown file takes a table between two lines:

    <!-- kvjax bench: search -->
    <!-- end -->
"""

import importlib
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax.base import files
from kvjax.tools.bench.rows import Row

TABLES, PLOTS = "tables.md", "plots.png"

_MARKED = re.compile(r"(<!-- kvjax bench: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
_CURVES = {
    "kvjax_ms": "kvjax",
    "mctx_ms": "mctx, a window per node",
    "lightzero_ms": "LightZero 0.2.0",
    "floor_ms": "floor",
}
_MEMORY = {"muzero_tree_mib": "kvjax", "mctx_tree_mib": "mctx, a window per node"}
_USUAL = {"embed": 64, "context": 8, "envs": 8, "simulations": 50, "dtype": "float32"}
_PANELS = (
    ("envs", "environments", "time of a search, ms", _CURVES),
    ("context", "context, tokens", "time of a search, ms", _CURVES),
    ("simulations", "simulations", "time of a search, ms", _CURVES),
    ("context", "context, tokens", "memory of the trees, MiB", _MEMORY),
)


def write(result: dict[str, Any], folder: Path, into: Sequence[str]) -> None:
    """Writes tables and plots into a folder, and tables into marked places of files.

    Args:
      result: what `kvjax.tools.bench.everything.run` has measured.
      into: markdown files.

    Raises:
      ValueError: a file has no such place.
      OSError: a file cannot be written.
    """
    known = tables(result)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in known.items())
    _replace(folder / TABLES, f"{_about(result)}\n\n{text}\n".encode())
    if importlib.util.find_spec("matplotlib") and curves(result):
        _replace(folder / PLOTS, plots(result))
    for path in map(Path, into):
        _replace(path, filled(path, known).encode())


def _replace(path: Path, content: bytes) -> None:
    with files.replacing(path) as file:
        file.write(content)


def filled(path: Path, known: dict[str, str]) -> str:
    """A file's text with its marked tables written anew; those that are not known stay."""
    text = path.read_text()
    if not _MARKED.search(text):
        raise ValueError(f"{path} has no place for a table: <!-- kvjax bench: search -->")
    return _MARKED.sub(lambda m: f"{m[1]}{known[m[2]]}\n{m[4]}" if m[2] in known else m[0], text)


def _about(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    cpu = machine.get("cpu", machine["arch"])
    return f"{machine['cpus']} cores of {cpu}; {told}; commit {result['commit']}"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by name, of the parts that were measured."""
    return {
        name: table(rows)
        for name, table in _TABLES.items()
        if (rows := result["parts"].get(name, {}).get("rows"))
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    return f"{value:,.0f} ms" if value >= 20 else f"{value:.1f} ms"


def _ratio(row: Row, name: str) -> str:
    return f"{row[name]:.1f}" if name in row else ""


def _search(rows: Sequence[Row]) -> str:
    sizes = "embed, context, environments, simulations"
    head = [sizes, "matrices", "kvjax", "mctx, a window per node", "floor", "kvjax over floor"]
    head += ["LightZero 0.2.0", "LightZero over kvjax", "tree, MiB: kvjax and mctx"]
    body = []
    for row in rows:
        named = [str(row[name]) for name in ("embed", "context", "envs", "simulations")]
        memory = f"{row['tree_mib']:,.0f} and {row['mctx_tree_mib']:,.0f}"
        times = [_ms(row, f"{name}_ms") for name in ("kvjax", "mctx", "floor")]
        lightzero = [_ms(row, "lightzero_ms"), _ratio(row, "lightzero_ratio")]
        ratio = _ratio(row, "floor_ratio")
        body.append([", ".join(named), row["dtype"], *times, ratio, *lightzero, memory])
    return _table(head, body)


def _bridge(rows: Sequence[Row]) -> str:
    head = ["embed, environments", "caches: LightZero over attached", "search: over attached"]
    head += ["search: LightZero over kvjax.search"]
    body = [
        [
            f"{row['embed']}, {row['envs']}",
            _ratio(row, "cache_ratio"),
            f"{row['search_ratio']:.2f}",
            f"{row['lightzero_ms'] / row['kvjax_ms']:.1f}",
        ]
        for row in rows
    ]
    return _table(head, body)


def _ops(rows: Sequence[Row]) -> str:
    head = ["op", "size", "of memory-copy bandwidth"]
    return _table(head, [[r["op"], r["size"], f"{r['bandwidth_fraction']:.2f}"] for r in rows])


def _weights(rows: Sequence[Row]) -> str:
    head = ["agent", "return, float32", "bfloat16", "same action", "same visits", "visits moved"]
    body = []
    for row in rows:
        returns = [f"{row[name]:.1f}" for name in ("float32_return", "bfloat16_return")]
        shares = [f"{row[k]:.1%}" for k in ("same_action", "same_visits", "visits_moved")]
        body.append([row["agent"], *returns, *shares])
    return _table(head, body)


_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "search": _search,
    "bridge": _bridge,
    "ops": _ops,
    "weights": _weights,
}


def curves(result: dict[str, Any]) -> list[dict[str, list[tuple[float, float]]]]:
    """For each panel the points of its curves, by name; nothing where there is one point only."""
    measured = [result["parts"].get(part, {}).get("rows", []) for part in ("search", "series")]
    rows = [row for part in measured for row in part]
    panels = []
    for over, _, _, names in _PANELS:
        usual = {name: value for name, value in _USUAL.items() if name != over}
        fitting = [row for row in rows if usual.items() <= row.items()]
        fitting.sort(key=lambda row, over=over: row[over])  # type: ignore[misc]
        panels.append(
            {
                label: [(row[over], row[name]) for row in fitting if name in row]
                for name, label in names.items()
            }
        )
    return panels if any(len(x) > 1 for panel in panels for x in panel.values()) else []


def plots(result: dict[str, Any]) -> bytes:
    """Time over environments, context and simulations, and memory over context: a PNG."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 7.5))
    axes = figure.subplots(2, 2).flat
    for ax, (_, x_label, y_label, _), panel in zip(axes, _PANELS, curves(result), strict=True):
        for label, points in panel.items():
            if points:
                ax.loglog(*zip(*points, strict=True), marker="o", label=label)
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False)
    figure.suptitle(_about(result), fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
