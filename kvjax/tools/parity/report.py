"""What a replay found, as JSON and as text; and how searches are compared.

Shapes: A actions.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.tools.parity.near_ties import Begin, NearTie, find
from kvjax.tools.routes import Answer


@dataclasses.dataclass(frozen=True)
class Report:
    """What a replay found."""

    trace: str
    route: str
    found: Mapping[str, Any]  # by name, see who makes the report
    ok: bool

    def as_json(self) -> dict[str, Any]:
        """Fields for `--json`; an infinite error is null."""
        fields = dataclasses.asdict(self)
        found = _finite(fields.pop("found"))
        return {"trace": fields.pop("trace"), "route": fields.pop("route"), **found, **fields}

    def as_text(self) -> dict[str, str]:
        """Rows of a table, by name; nested fields have a row each."""
        fields = self.as_json()
        del fields["trace"], fields["ok"]
        verdict = "within tolerance" if self.ok else "NOT within tolerance"
        return dict(_flat("", fields)) | {"verdict": verdict}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}, {key}" if name else key.replace("_", " "), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(f"{name} {index}", inner)
    else:
        yield name, f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A search that was done again, beside the recorded one."""

    where: str
    ours: Answer  # of one row, without its axis
    recorded: Answer
    tie: NearTie | None  # explains other visits

    @property
    def same_visits(self) -> bool:
        """Whether all visits are the recorded ones."""
        return np.array_equal(self.ours.visits, self.recorded.visits)

    @property
    def same_action(self) -> bool:
        """Whether the action is the recorded one."""
        return bool(self.ours.action == self.recorded.action)

    @property
    def error(self) -> float:
        """Relative error of the root value; infinite where it is not finite."""
        ours = self.tie.root_value if self.tie else float(self.ours.root_value)
        theirs = float(self.recorded.root_value)
        if not math.isfinite(ours):
            return math.inf
        return abs(ours - theirs) / abs(theirs) if theirs else abs(ours)


def compare(where: str, ours: Answer, recorded: Answer, begin: Begin) -> Compared:
    """Compares a search; `begin` begins it again by the host's tree, should visits differ."""
    compared = Compared(where, ours, recorded, None)
    if compared.same_visits or not math.isfinite(ours.root_value):
        return compared
    return dataclasses.replace(compared, tie=find(begin, ours.visits, recorded.visits))


def differences(searches: Sequence[Compared]) -> dict[str, Any]:
    """What reports of searches have in common.

    Returns:
      `near_ties`, the number of differences that one explains; `max_root_value_error`, relative;
      and `differences`: where, the visits, the recorded ones, and the margin of the near tie.
    """
    found = tuple(
        {
            "where": one.where,
            "visits": one.ours.visits.tolist(),
            "recorded": one.recorded.visits.tolist(),
            "margin": one.tie and one.tie.margin,
        }
        for one in searches
        if not one.same_visits
    )
    return {
        "near_ties": sum(one.tie is not None for one in searches),
        "max_root_value_error": max(one.error for one in searches),
        "differences": found,
    }
