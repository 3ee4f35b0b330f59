"""`kvjax train`: what it reads from its options, and what it shows."""

import argparse
import ast
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.base.values import require
from kvjax.tools.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from kvjax.train import Summary, TrainConfig
    from kvjax.train.curves import Row

_PACKAGES = ("flashbax", "matplotlib", "optax")
"""What training needs besides; nothing else of kvjax imports them."""


def run(args: argparse.Namespace) -> int:
    """Trains as the options say."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'kvjax[train]'")
    from kvjax.train import ENVIRONMENTS, train
    from kvjax.train.run import BEST

    env = ENVIRONMENTS.get(args.env)
    solved_at = getattr(env, "solved_at", None)
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=1.0)

        def show(row: "Row", share: float) -> None:
            bar.update(task, completed=share, description=row_in_words(row))

        summary = train(
            args.env,
            config_of(args.set, env),
            output=args.output,
            seed=args.seed,
            max_env_steps=args.max_env_steps,
            target=solved_at if args.target is None else args.target,
            resume=args.resume,
            progress=show,
        )
    if args.json:
        print_json(dataclasses.asdict(summary))
    else:
        print_table("kvjax train", _as_text(summary) | {"agent": str(Path(args.output) / BEST)})
    return 0


def config_of(settings: Sequence[str], env: Any = None) -> "TrainConfig":
    """An environment's configuration with fields said as NAME=VALUE.

    Raises:
      ValueError: an unknown name, or a value that the field does not take.
    """
    from kvjax.train import TrainConfig

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        known = f"--set takes NAME=VALUE, got {setting!r}: names are {', '.join(names)}"
        require(bool(equals) and name in names, known)
        try:
            changes[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[name] = text
    return TrainConfig.of(env, **changes)


def row_in_words(row: "Row") -> str:
    """An iteration in a line."""
    known = row.played_return if row.mean_return is None else row.mean_return
    score = "" if known is None else f", return {known:.1f}"
    return (
        f"{row.env_steps} steps{score}, loss {row.loss:.3f} (latent {row.latent_loss:.3f}, reward"
        f" {row.reward_loss:.3f}, policy {row.policy_loss:.3f}, value {row.value_loss:.3f}),"
        f" entropy {row.entropy:.2f}, {row.searches_per_second:.0f} searches/s"
    )


def _as_text(summary: "Summary") -> dict[str, str]:
    reached = summary.reached_target_at
    return {
        "returns": " ".join(f"{score:g}" for score in summary.returns),
        "mean return": f"{summary.mean_return:.1f}",
        "environment steps": str(summary.env_steps),
        "target": "not reached" if reached is None else f"reached after {reached} steps",
        "compile time": f"{summary.compile_seconds:.1f} s",
        "whole run": f"{summary.seconds:.1f} s",
    }
