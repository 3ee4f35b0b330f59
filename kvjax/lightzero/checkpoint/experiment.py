"""What LightZero wrote of a run beside its checkpoints: `total_config.py`, read and never executed.

The file lies in a run's folder, checkpoints in its `ckpt`. It is Python: `exp_config = {...}`, or
`main_config = dict(...)` in its formatted twin. Only literals are taken from it.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("total_config.py", "formatted_total_config.py")

MAX_BYTES = 2**20
"""A larger file is no such configuration: they have about 10 kB."""

_VARIABLES = ("exp_config", "main_config")
_DICTIONARIES = ("dict", "EasyDict")
_PATH = ("policy", "model")
_WORLD_MODEL = "world_model_cfg"

Literals = dict[str, Any]


def find(checkpoint: Path) -> tuple[Path, Literals, Literals] | None:
    """The nearest configuration of a run: its path, and what it says literally.

    Args:
      checkpoint: path of the checkpoint; its folder and the one above are looked through.

    Returns:
      The path, the entries of `policy.model.world_model_cfg` and those of `policy.model`; None
      where no file has them, whatever else it is.
    """
    folder = checkpoint.absolute().parent
    for path in (place / name for place in (folder, folder.parent) for name in NAMES):
        model = _model_entries(path)
        world_model = dict(_entries(model.get(_WORLD_MODEL)))
        if world_model:
            return path, _literals(world_model), _literals(model)
    return None


def _model_entries(path: Path) -> dict[str, ast.expr]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in somebody's texts
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and _is_configuration(statement.targets):
            entries = dict(_entries(statement.value))
            for name in _PATH:
                entries = dict(_entries(entries.get(name)))
            return entries
    return {}


def _is_configuration(targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Name) and target.id in _VARIABLES for target in targets)


def _entries(node: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of a dictionary, written with braces or as a call."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in _DICTIONARIES:
        for argument in node.args:
            yield from _entries(argument)
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield keyword.arg, keyword.value


def _literals(entries: dict[str, ast.expr]) -> Literals:
    found = {}
    for name, node in entries.items():
        try:
            found[name] = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue  # an object's picture, a call, a number too large: not said
    return found
