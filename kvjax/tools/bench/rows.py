"""What all benchmarks share: cases that are chosen by their labels and measured row by row."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
Progress = Callable[[float, str], None]
"""Is told the share that is done, and what is measured next."""

_PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "mctx", "numpy", "torch", "LightZero")


class KeptRows(list[Row]):
    """Rows, of which those that were measured before are not measured again.

    Attributes:
      kept: `rows` by label, and `extras` by name.
      keep: is called after each that is new.
    """

    def __init__(self, kept: dict[str, dict[str, Any]], keep: Callable[[], None]) -> None:
        super().__init__()
        self.kept, self.keep = kept, keep

    def once(self, kind: str, label: str, measure: Callable[[], T]) -> T:
        """What was measured under this label, now or before."""
        known = self.kept.setdefault(kind, {})
        if label not in known:
            known[label] = measure()
            self.keep()
        found: T = known[label]
        return found


def _once(rows: list[Row], kind: str, label: str, measure: Callable[[], T]) -> T:
    return rows.once(kind, label, measure) if isinstance(rows, KeptRows) else measure()


def choose(
    cases: Mapping[str, T],
    only: str,
    *,
    otherwise: str,
    fits: Callable[[str, str], bool] = lambda part, label: part in label.split(","),
    besides: Sequence[str] = (),
) -> dict[str, T]:
    """Cases whose label has all comma-separated parts of `only`; none if `only` is in `besides`.

    Args:
      otherwise: what is said if nothing fits, with `only` for "{}".
      fits: whether a part fits a label; by default it is one of the label's own parts.

    Raises:
      ValueError: nothing fits.
    """
    parts = [part for part in only.split(",") if part]
    chosen = {k: case for k, case in cases.items() if all(fits(part, k) for part in parts)}
    if not chosen and only not in besides:
        raise ValueError(otherwise.format(repr(only)))
    return chosen


def measured(
    cases: Mapping[str, T],
    row: Callable[[T, Progress], Row],
    *,
    progress: Progress,
    rows: list[Row] | None,
    **extras: Callable[[], Any],
) -> dict[str, Any]:
    """Measures each case, and then what there is besides.

    Args:
      cases: by label.
      row: measures one; is given a `Progress` of that row.
      rows: where rows are added as they are measured; if they are `KeptRows`, those that it has are
        not measured.

    Returns:
      The fields of `--json`: machine, versions, rows, and the extras by name.
    """
    rows = [] if rows is None else rows
    total = len(cases) + len(extras)
    for index, (label, case) in enumerate(cases.items()):

        def tell(share: float, text: str, index: int = index, label: str = label) -> None:
            progress((index + share) / total, f"{label}: {text}")

        tell(0.0, "building")
        rows.append(_once(rows, "rows", label, functools.partial(row, case, tell)))
    result = {"machine": machine(), "versions": versions(), "rows": rows}
    for index, (name, measure) in enumerate(extras.items(), len(cases)):
        progress(index / total, name)
        result[name] = _once(rows, "extras", name, measure)
    progress(1.0, "done")
    return result


def machine() -> dict[str, Any]:
    """The hardware as far as it matters to a ratio."""
    about = {"platform": platform.platform(), "cpus": os.cpu_count(), "arch": platform.machine()}
    info = Path("/proc/cpuinfo")
    told = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return about | ({"cpu": told[1]} if told else {})


def commit() -> str | None:
    """The commit of kvjax's own repository, with "-dirty" behind one that was changed."""
    folder = Path(__file__).parent
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of what was measured; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
