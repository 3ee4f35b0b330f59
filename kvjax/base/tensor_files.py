"""Safetensors files with a description in JSON and a digest of both."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kvjax.base import files

METADATA_KEY = "kvjax"
"""Under which the description stands."""

DIGEST = "digest"
"""Its entry that holds the digest of all others and of the tensors."""

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Safetensors' names of what weights may be, and numpy's."""

ALL_KINDS = FLOATS | {"BOOL": "bool"}
ALL_KINDS |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
ALL_KINDS |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}

_HEADER_SIZE = struct.Struct("<Q")

Tensors = dict[str, np.ndarray[Any, Any]]


def digest_of(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 of the description and of all tensors: names, kinds, shapes, bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def write(
    path: str | Path,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    description: Mapping[str, Any],
) -> None:
    """Writes a file whole or not at all.

    Raises:
      OSError: it cannot be written; what was there before stays. See `kvjax.base.files`.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    for name, value in arrays.items():
        arrays[name] = value.reshape(tensors[name].shape)  # a scalar stays one
    told = {**description, DIGEST: digest_of(description, arrays)}
    metadata = {METADATA_KEY: json.dumps(told, sort_keys=True)}
    with files.replacing(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata=metadata))


def read(path: Path, kinds: Mapping[str, str]) -> tuple[dict[str, str], Tensors]:
    """The metadata and tensors of a safetensors file; digests are the caller's to look at.

    Args:
      path: the file.
      kinds: which its tensors may be of, by safetensors' names.

    Raises:
      ValueError: the file is no safetensors file, or holds a tensor of another kind.
    """
    content = path.read_bytes()
    try:
        entries = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    tensors = {}
    for name, entry in entries:
        kind = entry["dtype"]
        if kind not in kinds:
            raise ValueError(f"{path}: {name} holds {kind}, expected one of {', '.join(kinds)}")
        flat = np.frombuffer(entry["data"], jnp.dtype(kinds[kind]))
        tensors[name] = flat.reshape(entry["shape"])
    (size,) = _HEADER_SIZE.unpack_from(content)
    header = json.loads(content[_HEADER_SIZE.size : _HEADER_SIZE.size + size])
    return header.get("__metadata__") or {}, tensors
