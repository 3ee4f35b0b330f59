"""Recorded traces as files: `.npz` archives of three kinds.

A world-model trace holds weights and answers (`trace`), a tree trace whole searches with the
network as a table, an episode trace what an agent saw and did (`search_trace` reads both).
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvjax.config import WINDOW_MODES, WindowMode
from kvjax.lightzero.traces.npz import read_arrays as read_arrays

Array = np.ndarray[Any, Any]
Kind = Literal["world model", "trees", "episodes"]

DESCRIPTION = "config"
TREES = "meta"
"""Name of the array that describes a tree trace."""

_LAST_COUNT = 2**31 - 1


def kind(path: str | Path, arrays: dict[str, Array]) -> Kind:
    """Which kind of trace the arrays are, by what describes them.

    Raises:
      ValueError: nothing describes them.
    """
    if TREES in arrays:
        return "trees"
    return "episodes" if "seeds" in read_config(path, arrays) else "world model"


def read_config(path: str | Path, arrays: dict[str, Array]) -> dict[str, Any]:
    """The JSON object that describes a world-model or episode trace."""
    if DESCRIPTION not in arrays:
        raise ValueError(f"{path} holds no config: it is no trace")
    described = read_json(path, arrays, DESCRIPTION)
    if not isinstance(described, dict):
        raise ValueError(f"{path}: config must be a JSON object, got {reprlib.repr(described)}")
    return described


def read_json(path: str | Path, arrays: dict[str, Array], name: str) -> Any:
    """The array of that name, which holds JSON."""
    try:
        return json.loads(str(arrays[name]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {name} is no JSON: {error}") from error


def check_fields(path: str | Path, where: str, described: Any, names: set[str]) -> None:
    """Refuses a description that is no object or lacks one of the names."""
    if not isinstance(described, dict):
        raise ValueError(f"{path}: {where} must be a JSON object, got {reprlib.repr(described)}")
    missing = names - described.keys()
    if missing:
        raise ValueError(f"{path}: {where} lacks {', '.join(sorted(missing))}")


def count(path: str | Path, where: str, described: Mapping[str, Any], name: str) -> int:
    """The field of that name, which must be an integer of at least 1 that 32 bits hold."""
    value = described[name]
    if type(value) is not int or not 1 <= value <= _LAST_COUNT:  # True is no count
        raise ValueError(
            f"{path}: {where} says {name} {reprlib.repr(value)}, expected an integer in"
            f" 1 .. {_LAST_COUNT}"
        )
    return value


def flag(path: str | Path, where: str, described: Mapping[str, Any], name: str) -> bool:
    """The field of that name, true or false; false where nothing is said."""
    value = described.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(
            f"{path}: {where} says {name} {reprlib.repr(value)}, expected true or false"
        )
    return value


def window_mode(path: str | Path, described: dict[str, Any]) -> WindowMode:
    """The window mode that a description says: `rope`, `rebuild` or `reset`, or none of them."""
    positions = described.get("rope_positions", "lightzero")
    modes = {"rope": f"rope_{positions}", "rebuild": "rebuild", "reset": "reset"}
    said = [name for name in modes if flag(path, DESCRIPTION, described, name)]
    if len(said) > 1:
        raise ValueError(f"{path}: {' and '.join(said)} exclude each other")
    mode = modes[said[0]] if said else "learned"
    if mode not in WINDOW_MODES:
        raise ValueError(f"{path}: rope_positions must be lightzero or consistent, got {positions}")
    return mode


def check_array(
    path: str | Path, arrays: dict[str, Array], name: str, shape: tuple[int, ...]
) -> Array:
    """The array of that name, which must be there, of that shape, and finite."""
    if name not in arrays:
        raise ValueError(f"{path}: {name} is missing")
    array = arrays[name]
    if array.shape != shape:
        raise ValueError(f"{path}: {name} has shape {array.shape}, expected {shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name} holds {array.dtype}, expected numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} holds {int((~np.isfinite(array)).sum())} NaN or infinity")
    return array


def check_indices(
    path: str | Path,
    arrays: dict[str, Array],
    name: str,
    shape: tuple[int, ...],
    first: int,
    last: int | Array,
) -> Array:
    """Like `check_array` for integers from `first` to `last`, which may differ along the shape."""
    array = check_array(path, arrays, name, shape)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {name} holds {array.dtype}, expected integers")
    outside = (array < first) | (array > last)
    if outside.any():
        raise ValueError(
            f"{path}: {name} must be in {first} .. {np.max(last)}"
            f"{'' if np.ndim(last) == 0 else ', earlier rows in less'}, got {array[outside][0]}"
        )
    return array
