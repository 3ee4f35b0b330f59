"""kvjax's own checkpoints: one safetensors file with weights, configuration and environment.

The file carries a digest of all three. What an earlier version wrote has none, and is read with a
warning.
"""

import contextlib
import dataclasses
import importlib.resources
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax.base import tensor_files
from kvjax.base.tensor_files import DIGEST, METADATA_KEY, Tensors
from kvjax.base.values import listed, require
from kvjax.config import EnvironmentConfig, FramesConfig, WorldModelConfig, check_stored_env
from kvjax.model import world_model
from kvjax.model.world_model import Params

SUFFIX = ".safetensors"

_ENTRIES = {"config", "environment", "notes", DIGEST}
_SEPARATOR = "/"
_SIZES = (
    *("embed_dim", "num_actions", "observation_size", "max_tokens", "support_size"),
    *("head_expansion", "task_size"),
)
_COUNTS = ("num_layers", "image_blocks")
_IMAGE_SIZES = {
    "resnet": ("image_channels",),
    "memory": ("image_channels",),
    "vit": ("image_channels", "image_heads", "image_hidden"),
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A world model, and the environment that it plays if that is known."""

    config: WorldModelConfig  # shapes and variant
    params: Params  # the Flax variables
    environment: EnvironmentConfig | None = None  # that it plays
    notes: tuple[str, ...] = ()  # what whoever runs it should know; told when it is loaded


def shipped() -> dict[str, Path]:
    """Trained agents that come with kvjax, by name."""
    folder = Path(str(importlib.resources.files("kvjax"))) / "model" / "agents"
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes weights plus configuration as a `.safetensors` file, whole or not at all.

    Raises:
      OSError: the file cannot be written; what was there before stays. See `kvjax.base.files`.
      ValueError: the path has another suffix.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a checkpoint's name must end in {SUFFIX}, got {path}")
    flat = flatten_dict(checkpoint.params, sep=_SEPARATOR)
    tensors = {name: np.asarray(value) for name, value in flat.items()}
    environment = checkpoint.environment
    description: dict[str, Any] = {
        "config": dataclasses.asdict(checkpoint.config),
        "environment": None if environment is None else _said_of(environment),
        "notes": checkpoint.notes,
    }
    tensor_files.write(path, tensors, description)


def _said_of(environment: EnvironmentConfig) -> dict[str, Any]:
    """An environment's fields; without frames, those that an earlier kvjax reads."""
    fields = dataclasses.asdict(environment)
    if fields["frames"] is None:
        del fields["frames"]
    return fields


def load(path: str | Path, *, env: str | None = None) -> Checkpoint:
    """Reads what `save` wrote.

    Args:
      path: the file.
      env: the environment that the agent shall play, where that is said. Of the stored ones,
        `module:Env` makes Gymnasium import a module: it is refused unless this is the same.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or damaged, is not kvjax's, its tensors are not those of
        its configuration (missing, unknown, misshapen, non-finite or no floating-point numbers),
        or its environment would import a module.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    metadata, tensors = tensor_files.read(path, tensor_files.FLOATS)
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} holds no kvjax configuration: write it with `kvjax convert`")
    described = _described(path, metadata[METADATA_KEY])
    _check_digest(path, described, tensors)
    checkpoint = _parse(path, described)
    for note in (*checkpoint.notes, *_doubts(checkpoint.config)):
        _log.warning("%s: %s", path, note)
    params = _checked_params(path, checkpoint.config, tensors)
    environment = _environment(path, checkpoint.environment, env)
    return dataclasses.replace(checkpoint, params=params, environment=environment)


def _environment(
    path: Path, stored: EnvironmentConfig | None, said: str | None
) -> EnvironmentConfig | None:
    if stored is None or said not in (None, stored.env_id):
        return None if said is None else EnvironmentConfig(said)
    hint = ": if you trust it, say it yourself (--env)"
    check_stored_env(path, stored.env_id, said, hint)
    return stored


def _doubts(config: WorldModelConfig) -> list[str]:
    rows, longest = config.max_tokens, config.window.full_length
    if rows is None or rows >= longest:
        return []
    return [f"windows of up to {longest} tokens continue a table of {rows} positions linearly"]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration that kvjax cannot read: {error}") from error


def _described(path: Path, text: str) -> dict[str, Any]:
    with _reading(path):
        described: dict[str, Any] = json.loads(text)
        require(isinstance(described, dict) and described.keys() <= _ENTRIES, text[:80])
    return described


def _check_digest(path: Path, described: dict[str, Any], tensors: Tensors) -> None:
    if DIGEST not in described:
        _log.warning("%s carries no digest of its weights: written by an earlier kvjax", path)
        return
    content = {name: value for name, value in described.items() if name != DIGEST}
    is_whole = described[DIGEST] == tensor_files.digest_of(content, tensors)
    require(is_whole, f"{path} is damaged: its digest is another than that of its content")


def _parse(path: Path, described: dict[str, Any]) -> Checkpoint:
    """A checkpoint without its weights."""
    with _reading(path):
        config = WorldModelConfig(**_with_tuples(described["config"]))
        environment = _parsed_environment(described["environment"])
        return Checkpoint(config, {}, environment, tuple(map(str, described.get("notes", ()))))


def _parsed_environment(said: dict[str, Any] | None) -> EnvironmentConfig | None:
    """What an environment's fields say; files from before there were frames have none."""
    if said is None:
        return None
    fields = _with_tuples(said)
    if (frames := fields.pop("frames", None)) is not None:
        fields["frames"] = FramesConfig(**frames)
    return EnvironmentConfig(**fields)


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _checked_params(path: Path, config: WorldModelConfig, tensors: Tensors) -> Params:
    _check_sizes(path, config, tensors)
    expected = flatten_dict(world_model.params_shapes(config), sep=_SEPARATOR)
    if differing := expected.keys() ^ tensors.keys():
        raise ValueError(f"{path}: missing or unknown tensors: {listed(differing)}")
    params = {}
    for name, value in tensors.items():
        leaf = expected[name]
        with np.errstate(over="ignore"):
            value = value.astype(leaf.dtype)
        world_model.check_parameter(f"{path}: {name}", value, leaf.shape)
        params[name] = jnp.asarray(value)
    return unflatten_dict(params, sep=_SEPARATOR)


def _check_sizes(path: Path, config: WorldModelConfig, tensors: Tensors) -> None:
    """Before a model of these sizes is traced: a size is a side of some tensor."""
    longest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    sizes = _SIZES + (_IMAGE_SIZES[config.image_encoder] if config.image_shape else ())
    limits = dict.fromkeys(sizes, longest) | dict.fromkeys(_COUNTS, len(tensors))
    for name, limit in limits.items():
        value = getattr(config, name) or 0
        told = f"{path} says {name} {value}, its tensors allow {limit} at most"
        require(value <= limit, told)
