"""A run on disk: one file that holds all it needs to go on, bit for bit.

Written whole or not at all, so that a process may be killed at any time.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.base import files
from kvjax.base.values import listed, require

_ABOUT = "about"
"""The entry that holds what is no array, as JSON."""


def save(path: str | Path, tree: Any, about: dict[str, Any]) -> None:
    """Writes a pytree of arrays, and what JSON can say about it.

    Raises:
      OSError: the file cannot be written; what was there before stays.
    """
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in _named(tree).items()}
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with files.replacing(path) as file:
        np.savez(file, **arrays)


def load(path: str | Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` wrote.

    Args:
      path: the file.
      like: a pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, or holds another pytree.
    """
    arrays = _read(path)
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    expected = _named(like)
    if differing := expected.keys() ^ arrays.keys():
        raise ValueError(f"{path} holds another run: missing or unknown arrays {listed(differing)}")
    for name, leaf in expected.items():
        came, wanted = arrays[name], (leaf.shape, leaf.dtype)
        same = (came.shape, came.dtype) == wanted
        require(same, f"{path}: {name} is {came.dtype} {came.shape}, expected {wanted}")
    leaves = [arrays[name] for name in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), about


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
            require(_ABOUT in found, "no description")
            return found
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no saved run: {error}") from error
