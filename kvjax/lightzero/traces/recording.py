"""Recorded traces: `.npz` archives of a description and of arrays, looked at one by one.

There are three kinds. A world-model trace holds weights and answers (`trace`), a tree trace whole
searches with the network as a table, an episode trace what an agent saw and did (`search_trace`).
"""

import contextlib
import dataclasses
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvjax.base import files
from kvjax.base.values import require
from kvjax.config import WINDOW_MODES, SearchConfig, WindowMode
from kvjax.lightzero.traces.npz import read_arrays

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Kind = Literal["a world model", "trees", "episodes"]

CONFIG, TREES = "config", "meta"
"""Names of the arrays that describe: a JSON object, and a tree trace's list of such."""

_LAST_COUNT = 2**31 - 1
_shown = reprlib.repr


@dataclasses.dataclass(frozen=True)
class Description:
    """A JSON object that describes a trace, or a tree in one.

    Raises:
      ValueError: it is no object; of a method, a field is not what it must be.
    """

    where: str
    fields: dict[str, Any]

    def __post_init__(self) -> None:
        is_object = isinstance(self.fields, dict)
        require(is_object, f"{self.where} must be a JSON object, got {_shown(self.fields)}")

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def require(self, *names: str) -> None:
        """There must be a field of each name."""
        missing = set(names) - self.fields.keys()
        require(not missing, f"{self.where} lacks {', '.join(sorted(missing))}")

    def check(self, name: str, is_fine: bool, expected: str) -> None:
        """Tells a field that is not fine."""
        said = _shown(self.fields.get(name))
        require(is_fine, f"{self.where} says {name} {said}, expected {expected}")

    def count(self, name: str) -> int:
        """A field that must be an integer of at least 1 that 32 bits hold."""
        value: int = self[name]
        is_count = type(value) is int and 1 <= value <= _LAST_COUNT  # True is no count
        self.check(name, is_count, f"an integer in 1 .. {_LAST_COUNT}")
        return value

    def flag(self, name: str) -> bool:
        """A field that is true or false; false where nothing is said."""
        value: bool = self.fields.get(name, False)
        self.check(name, isinstance(value, bool), "true or false")
        return value

    def window_mode(self) -> WindowMode:
        """The window mode: `rope`, `rebuild` or `reset`, or none of them."""
        positions = self.fields.get("rope_positions", "lightzero")
        modes = {"rope": f"rope_{positions}", "rebuild": "rebuild", "reset": "reset"}
        said = [name for name in modes if self.flag(name)]
        require(len(said) <= 1, f"{' and '.join(said)} exclude each other")
        mode = modes[said[0]] if said else "learned"
        if mode not in WINDOW_MODES:
            raise ValueError(f"rope_positions must be lightzero or consistent, got {positions}")
        return mode

    def search(self) -> SearchConfig:
        """How the recorded searches were done."""
        return SearchConfig(self["simulations"], discount=self["discount"])


def kind(path: str | Path, arrays: Arrays) -> Kind:
    """Which kind of trace the arrays are, by what describes them.

    Raises:
      ValueError: nothing describes them.
    """
    if TREES in arrays:
        return "trees"
    if CONFIG not in arrays:
        raise ValueError(f"{path} holds no {CONFIG}: it is no trace")
    with files.naming(path):
        return "episodes" if "seeds" in describe(arrays).fields else "a world model"


@contextlib.contextmanager
def opened(path: str | Path, expected: Kind) -> Iterator[Arrays]:
    """The arrays of a trace of one kind; what a block finds wrong is told with the file's name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, no trace, or one of another kind.
    """
    arrays = read_arrays(path)
    found = kind(path, arrays)
    if found != expected:
        raise ValueError(f"{path} is a trace of {found}, not of {expected}")
    with files.naming(path):
        yield arrays


def describe(arrays: Arrays) -> Description:
    """What a world-model or episode trace says of itself."""
    return Description(CONFIG, _json(arrays, CONFIG))


def describe_trees(arrays: Arrays) -> list[Description]:
    """What a tree trace says of each of its trees."""
    trees = _json(arrays, TREES)
    is_list = isinstance(trees, list) and bool(trees)
    require(is_list, f"{TREES} must be a JSON list of trees, got {_shown(trees)}")
    return [Description(f"{TREES}[{index}]", tree) for index, tree in enumerate(trees)]


def _json(arrays: Arrays, name: str) -> Any:
    try:
        return json.loads(str(arrays[name]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check_numbers(name: str, array: Array) -> None:
    """Raises `ValueError` unless an array holds real numbers."""
    require(array.dtype.kind in "biuf", f"{name} holds {array.dtype}, expected numbers")


def take(arrays: Arrays, name: str, shape: tuple[int, ...]) -> Array:
    """The array of that name, which must be there, of that shape, and finite."""
    array = _take(arrays, name, shape)
    _check_finite(name, array)
    return array


def take_steps(arrays: Arrays, name: str, shape: tuple[int, int]) -> Array:
    """Like `take` for actions [B, A] of numbers, a whole row of which is NaN or finite."""
    array = _take(arrays, name, shape)
    _check_finite(name, array[~np.isnan(array).all(axis=1)])
    return array


def _take(arrays: Arrays, name: str, shape: tuple[int, ...]) -> Array:
    require(name in arrays, f"{name} is missing")
    array = arrays[name]
    require(array.shape == shape, f"{name} has shape {array.shape}, expected {shape}")
    check_numbers(name, array)
    return array


def _check_finite(name: str, array: Array) -> None:
    wrong = int((~np.isfinite(array)).sum())
    require(wrong == 0, f"{name} holds {wrong} NaN or infinity")


def take_indices(
    arrays: Arrays, name: str, shape: tuple[int, ...], first: int, last: int | Array
) -> Array:
    """Like `take` for integers from `first` to `last`, which may differ along the shape."""
    array = take(arrays, name, shape)
    require(array.dtype.kind in "iu", f"{name} holds {array.dtype}, expected integers")
    outside = array[(array < first) | (array > last)]
    less = "" if np.ndim(last) == 0 else ", earlier rows in less"
    require(
        outside.size == 0,
        f"{name} must be in {first} .. {np.max(last)}{less}, got {outside[:1].sum()}",
    )
    return array
