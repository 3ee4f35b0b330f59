"""What `kvjax train` reads from its options, and how it shows an iteration."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from kvjax.base.values import require
from kvjax.train.config import TrainConfig
from kvjax.train.curves import Row
from kvjax.train.environments import ENVIRONMENTS


def config_of(settings: Sequence[str]) -> TrainConfig:
    """The configuration with fields said as NAME=VALUE.

    Raises:
      ValueError: an unknown name, or a value that the field does not take.
    """
    changes: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for setting in settings:
        name, equals, text = setting.partition("=")
        known = f"--set takes NAME=VALUE, got {setting!r}: names are {', '.join(names)}"
        require(bool(equals) and name in names, known)
        try:
            changes[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[name] = text
    return TrainConfig(**changes)


def target_of(env: str) -> float | None:
    """The mean return at which an environment counts as solved, if it has one."""
    return getattr(ENVIRONMENTS.get(env), "solved_at", None)


def show_row(row: Row) -> str:
    """An iteration in a line."""
    known = row.mean_return if row.mean_return is not None else row.played_return
    score = "" if known is None else f", return {known:.1f}"
    return (
        f"{row.env_steps} steps{score}, loss {row.loss:.3f} (latent {row.latent_loss:.3f}, reward"
        f" {row.reward_loss:.3f}, policy {row.policy_loss:.3f}, value {row.value_loss:.3f}),"
        f" entropy {row.entropy:.2f}, {row.searches_per_second:.0f} searches/s"
    )
