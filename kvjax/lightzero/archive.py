"""Recorded traces as files: `.npz` archives of three kinds.

A world-model trace holds weights and answers (`kvjax.lightzero.trace`), a tree trace whole searches
with the network as a table, an episode trace what an agent saw and did
(`kvjax.lightzero.search_trace` reads both).
"""

import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvjax.config import WINDOW_MODES, WindowMode

Array = np.ndarray[Any, Any]
Kind = Literal["world model", "trees", "episodes"]

DESCRIPTION = "config"
TREES = "meta"
"""Name of the array that describes a tree trace."""


def read_arrays(path: str | Path) -> dict[str, Array]:
    """All arrays of an archive by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no readable archive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such trace: {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a readable .npz trace: no zip archive, or truncated")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz trace: {error}") from error


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
        raise ValueError(f"{path}: config must be a JSON object, got {described!r}")
    return described


def read_json(path: str | Path, arrays: dict[str, Array], name: str) -> Any:
    """The array of that name, which holds JSON."""
    try:
        return json.loads(str(arrays[name]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {name} is no JSON: {error}") from error


def check_fields(path: str | Path, where: str, described: Any, names: set[str]) -> None:
    """Refuses a description that is no object or lacks one of the names."""
    if not isinstance(described, dict):
        raise ValueError(f"{path}: {where} must be a JSON object, got {described!r}")
    missing = names - described.keys()
    if missing:
        raise ValueError(f"{path}: {where} lacks {', '.join(sorted(missing))}")


def window_mode(path: str | Path, described: dict[str, Any]) -> WindowMode:
    """The window mode that a description says: `rope`, `rebuild` or `reset`, or none of them."""
    positions = described.get("rope_positions", "lightzero")
    modes = {"rope": f"rope_{positions}", "rebuild": "rebuild", "reset": "reset"}
    said = [name for name in modes if described.get(name)]
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
