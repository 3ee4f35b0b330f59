"""States in files: contexts, stores and kept trees, written and read again bit for bit.

A file is safetensors with a digest. It names the configuration that its state was made with; it
holds no weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from kvjax.base import tensor_files
from kvjax.base.tensor_files import DIGEST, METADATA_KEY, Tensors
from kvjax.base.values import require
from kvjax.mcts.serialization import restored

_STATE, _CONFIG = "state", "config"
_SEPARATOR = "/"
_UNSAID = object()


def save_state(path: str | Path, state: Any, *, config: Any) -> None:
    """Writes what environments have come to, so that another process goes on from there.

    Args:
      path: the file; what it held before stays until all is written.
      state: `kvjax.Contexts`, `kvjax.Store`, `kvjax.Kept`, or a tuple or dictionary of these, of
        arrays and of random keys, however they lie on devices: [B, ...] windows, clocks, trees.
      config: the model's configuration, which `load_state` compares; None if the model is none of
        UniZero's.

    Raises:
      OSError: the file cannot be written; what was there before stays.
      TypeError: the state holds something else than arrays.
    """
    tensors, structure = split(state)
    tensor_files.write(path, tensors, {_STATE: structure, _CONFIG: _fields(config)})


def load_state(path: str | Path, like: Any, *, config: Any) -> Any:
    """Reads what `save_state` wrote; bits are the same.

    Weights are not in the file: with others than those that a state was made with, empty it by
    `kvjax.on_params_update`.

    Args:
      path: the file.
      like: a state of the same shapes, as `kvjax.init_contexts`, `kvjax.init_store` and
        `kvjax.init_kept` make it: [B, ...] arrays. What is read lies where its arrays lie, be it on
        one device or over a mesh, whatever the file's did.
      config: the model's configuration.

    Returns:
      A state like `like`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged or holds no state, or one of another configuration, of another
        kind, or of other shapes than `like`.
    """
    description, tensors = read(path)
    require(_STATE in description, f"{path} holds no state: kvjax.save_state writes one")
    _check_config(path, description.get(_CONFIG), config)
    return joined(path, like, description[_STATE], tensors)


def read(path: str | Path) -> tuple[dict[str, Any], Tensors]:
    """A file's description and tensors, whose digest is right.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, or none of kvjax's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    metadata, tensors = tensor_files.read(path, tensor_files.ALL_KINDS)
    try:
        description = json.loads(metadata[METADATA_KEY])
        digest = description.pop(DIGEST)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no file of kvjax's: it carries no description") from error
    is_whole = digest == tensor_files.digest_of(description, tensors)
    require(is_whole, f"{path} is damaged: its digest is another than that of its content")
    return description, tensors


def split(state: Any) -> tuple[Tensors, Any]:
    """A state's arrays by name, and what JSON can say about the rest; `joined` undoes it."""
    tensors: Tensors = {}
    return tensors, _split(serialization.to_state_dict(_plain(state)), (), tensors)


def joined(path: str | Path, like: Any, structure: Any, tensors: Mapping[str, Any]) -> Any:
    """A state like `like` of what `split` gave.

    Raises:
      ValueError: it is another kind of state, or has other shapes; `path` is named.
    """
    try:
        nested = _nested(structure, tensors)
        loaded = restored("state", _plain(like), nested)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} holds another state: {error}") from error
    return jax.tree.map(_placed, loaded, like)


def _plain(state: Any) -> Any:
    """With random keys as their numbers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _split(state: Any, path: tuple[str, ...], tensors: Tensors) -> Any:
    """Puts arrays among the tensors, and a list of their name in their place."""
    if isinstance(state, dict):
        return {key: _split(value, (*path, key), tensors) for key, value in state.items()}
    if isinstance(state, jax.Array | np.ndarray | np.generic):
        name = _SEPARATOR.join(path)
        tensors[name] = np.asarray(state)
        return [name]
    if state is None or isinstance(state, str | bool | int):
        return state
    raise TypeError(
        f"a state is made of arrays, got {type(state).__name__} at {_SEPARATOR.join(path) or 'top'}"
    )


def _nested(structure: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(structure, dict):
        return {key: _nested(value, tensors) for key, value in structure.items()}
    return tensors[structure[0]] if isinstance(structure, list) else structure


def _placed(value: Any, like: Any) -> Any:
    """An array where another lies."""
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    if not isinstance(like, jax.Array):
        return np.asarray(value)
    return jax.device_put(value, like.sharding) if like.committed else value


def _fields(config: Any) -> Any:
    """A configuration's fields as JSON has them."""
    if config is None:
        return None
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"kind": type(config).__name__, **fields}


def _check_config(path: str | Path, stored: Any, config: Any) -> None:
    said = _fields(config)
    stored, said = stored or {"kind": None}, said or {"kind": None}
    for name in said.keys() | stored.keys():
        came, wanted = stored.get(name, _default(config, name)), said.get(name)
        told = f"{path} holds a state made with {name} {came!r}, expected {wanted!r}"
        require(name == "kind" or said["kind"] != stored["kind"] or came == wanted, told)
    same = said["kind"] == stored["kind"]
    require(same, f"{path} holds a state of {stored['kind']}, expected one of {said['kind']}")


def _default(config: Any, name: str) -> Any:
    """Of a field that came to configurations after a file was written."""
    return getattr(type(config), name, None)
