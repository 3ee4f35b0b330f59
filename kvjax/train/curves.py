"""A run's course: a row for every iteration, as CSV and as a picture."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.base import files


@dataclasses.dataclass(frozen=True)
class Row:
    """An iteration. Where nothing was evaluated, or no episode ended, there is None."""

    env_steps: int
    updates: int
    seconds: float  # of the whole run so far
    mean_return: float | None  # of the evaluation's episodes
    least_return: float | None
    played_return: float | None  # of the episodes that ended while collecting, noise and all
    loss: float
    latent_loss: float
    reward_loss: float
    policy_loss: float
    value_loss: float
    entropy: float  # of the policy
    searches_per_second: float  # of an iteration, its updates included


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes rows with their names, whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    with files.replacing(path) as file:
        file.write(text.getvalue().encode())


def draw(path: str | Path, rows: Sequence[Row], title: str, target: float | None) -> None:
    """Draws returns and losses by environment steps, as PNG.

    Raises:
      ImportError: matplotlib is missing.
      OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    returns, losses = figure.subplots(2, sharex=True)
    for name, color in (("played_return", "silver"), ("mean_return", "tab:blue")):
        _plot(returns, rows, name, color=color, marker="." if name == "mean_return" else None)
    if target is not None:
        returns.axhline(target, color="grey", linewidth=0.5)
    returns.set(ylabel="return", title=title)
    for name in ("latent_loss", "reward_loss", "policy_loss", "value_loss", "entropy"):
        _plot(losses, rows, name)
    losses.set(xlabel="environment steps", ylabel="loss", yscale="log")
    for axes in (returns, losses):
        axes.legend(fontsize="small")
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _plot(axes: Any, rows: Sequence[Row], name: str, **style: Any) -> None:
    known = [row for row in rows if getattr(row, name) is not None]
    steps, values = [row.env_steps for row in known], [getattr(row, name) for row in known]
    axes.plot(steps, values, label=name.replace("_", " "), linewidth=1, **style)
