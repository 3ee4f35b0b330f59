"""kvjax's own checkpoints: one safetensors file with weights, configuration and environment."""

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax import world_model
from kvjax.config import EnvironmentConfig, WorldModelConfig
from kvjax.types import Params

SUFFIX = ".safetensors"

_METADATA_KEY = "kvjax"
_SEPARATOR = "/"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A world model, and the environment that it plays if that is known."""

    config: WorldModelConfig
    params: Params
    environment: EnvironmentConfig | None = None


def shipped() -> dict[str, Path]:
    """Trained agents that come with kvjax, by name."""
    folder = Path(str(importlib.resources.files("kvjax"))) / "data"
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes weights plus configuration as a `.safetensors` file.

    Raises:
      ValueError: the path has another suffix.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a checkpoint's name must end in {SUFFIX}, got {path}")
    flat = flatten_dict(checkpoint.params, sep=_SEPARATOR)
    environment = checkpoint.environment
    description = {
        "config": dataclasses.asdict(checkpoint.config),
        "environment": None if environment is None else dataclasses.asdict(environment),
    }
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in flat.items()},
        path,
        metadata={_METADATA_KEY: json.dumps(description, sort_keys=True)},
    )


def load(path: str | Path) -> Checkpoint:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated, is not kvjax's, or its tensors are not those of its
        configuration (missing, unknown, misshapen or non-finite).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if _METADATA_KEY not in metadata:
        raise ValueError(f"{path} holds no kvjax configuration: write it with `kvjax convert`")
    config, environment = _parse(path, metadata[_METADATA_KEY])
    return Checkpoint(config, _checked_params(path, config, tensors), environment)


def _parse(path: Path, text: str) -> tuple[WorldModelConfig, EnvironmentConfig | None]:
    try:
        described = json.loads(text)
        config = WorldModelConfig(**_with_tuples(described["config"]))
        environment = described["environment"]
        known = None if environment is None else EnvironmentConfig(**_with_tuples(environment))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a configuration that kvjax cannot read: {error}") from error
    return config, known


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _checked_params(
    path: Path, config: WorldModelConfig, tensors: dict[str, np.ndarray[Any, Any]]
) -> Params:
    expected = flatten_dict(world_model.params_shapes(config), sep=_SEPARATOR)
    if differing := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{path}: missing or unknown tensors: {', '.join(differing)}")
    for name, value in tensors.items():
        world_model.check_parameter(f"{path}: {name}", value, expected[name].shape)
    params = {name: jax.numpy.array(value) for name, value in tensors.items()}
    return unflatten_dict(params, sep=_SEPARATOR)
