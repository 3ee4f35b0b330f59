"""`kvjax bench all`: every benchmark, row by row into one file, and tables and plots of it.

It takes an hour or more. What a process has measured before it was ended is in the file, and the
next one goes on from there: a row is measured once for each machine, versions and commit.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax.base import files
from kvjax.base.values import require
from kvjax.tools.bench import bridge, lightzero_020, ops, render, rows, search, weights
from kvjax.tools.bench.rows import KeptRows, Progress, Row
from kvjax.tools.bench.searches import Case

FILE = "bench.json"
DEFAULT_OUTPUT = "kvjax-bench"

SERIES = (
    *(Case(embed=64, envs=envs, repeats=9) for envs in (1, 2, 4, 16, 32, 128)),
    *(Case(embed=64, envs=8, context=context, repeats=7) for context in (16, 32, 64, 128, 256)),
    *(Case(embed=64, envs=8, simulations=count, repeats=7) for count in (10, 25, 100, 200, 400)),
    Case(embed=64, envs=8, simulations=800, repeats=5),
)
"""What plots need beside the rows of `bench search`."""

Run = Callable[..., dict[str, Any]]


def _series(**options: Any) -> dict[str, Any]:
    return search.run(cases=SERIES, **options)


PARTS: dict[str, Run] = {
    "search": search.run,
    "series": _series,
    "weights": weights.run,
    "ops": ops.run,
    "bridge": bridge.run,
}
"""In the order in which they are measured."""


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    rows: list[Row] | None = None,
    output: str | Path = DEFAULT_OUTPUT,
    into: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures what the folder does not have yet, then renders.

    Args:
      only: names of `PARTS` between commas; all by default.
      rows: takes the rows of all parts, once they are measured.
      output: a folder, made if it is missing: `bench.json`, `tables.md`, `plots.png`.
      into: markdown files whose marked tables are written anew, see `kvjax.tools.bench.render`.

    Returns:
      Machine, versions, commit, and the rows of each part.

    Raises:
      ValueError: no part of that name; the folder holds what was measured elsewhere, or of another
        version or commit.
      OSError: a file cannot be written.
    """
    names = [name for name in only.split(",") if name] or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    require(not unknown, f"no part matches {only!r}; parts are {', '.join(PARTS)}")
    if not lightzero_020.available():
        names = [name for name in names if name != "bridge"]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / FILE)
    for index, name in enumerate(names):
        tell = functools.partial(_tell, progress, index, len(names), name)
        found = PARTS[name](only="", progress=tell, rows=kept.rows(name))
        if rows is not None:
            rows.extend({"part": name} | row for row in found["rows"])
    result = kept.result()
    render.write(result, folder, into)
    return result


def _tell(progress: Progress, index: int, count: int, name: str, share: float, text: str) -> None:
    progress((index + share) / count, f"{name}: {text}")


class Kept:
    """A file of rows by part and label."""

    def __init__(self, path: Path) -> None:
        self._path = path
        about = {"machine": rows.machine(), "versions": rows.versions(), "commit": rows.commit()}
        self._content: dict[str, Any] = about | {"parts": {}}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            self._content["parts"] = content["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no measurements: {error}") from error
        for name, here in about.items():
            there = content.get(name)
            told = f"{path} was measured with {name} {there}, here it is {here}: say another folder"
            require(there == here, told)

    def rows(self, part: str) -> KeptRows:
        """Those of a part, which go into the file as they come."""
        return KeptRows(self._content["parts"].setdefault(part, {}), self._keep)

    def result(self) -> dict[str, Any]:
        """Machine, versions, commit; the rows of each part, and what it has besides."""
        parts = {
            name: {"rows": list(found.get("rows", {}).values())} | found.get("extras", {})
            for name, found in self._content["parts"].items()
        }
        return self._content | {"parts": parts}

    def _keep(self) -> None:
        with files.replacing(self._path) as file:
            file.write(json.dumps(self._content, indent=1).encode())
