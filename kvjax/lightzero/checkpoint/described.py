"""What a UniZero model's own configuration tells beside its tensors.

Release 0.2.0 and main write it to a live model and into a run's `total_config.py`.
"""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

from kvjax.config import WindowMode
from kvjax.lightzero import module
from kvjax.lightzero.checkpoint import encoder_tensors, experiment

CLIP = "use_policy_logits_clip"

_FIELDS = {
    "embed_dim": "embed_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "action_space_size": "num_actions",
    "context_length": "context_length",
    "group_size": "simnorm_group",
}
"""LightZero's names of counts and the fields of `WorldModelConfig`."""

_MODES: dict[str, WindowMode] = {
    "rotary_emb": "rope_lightzero",
    "rebuild_kv_window_from_tokens": "rebuild",
    "exact_kv_window_reset": "reset",
}
_RANGES = ("reward_support_range", "value_support_range")


@dataclasses.dataclass(frozen=True)
class Described:
    """Fields of `WorldModelConfig` that a model's configuration says, and where it stands."""

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = ""  # of the configuration, for messages
    clips_logits: bool | None = None  # whether the policy's logits are; None: it does not say


def by_file(checkpoint: Path) -> Described:
    """What the run's configuration beside a checkpoint says; nothing where there is none.

    Raises:
      ValueError: it describes a variant that kvjax does not have.
    """
    found = experiment.find(checkpoint)
    if found is None:
        return Described()
    path, world_model, model = found
    try:
        fields = _fields(types.SimpleNamespace(**world_model)) | _model_fields(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Described(fields, str(path), bool(world_model.get(CLIP, False)))


def by_module(source: Any) -> Described:
    """What a live torch `WorldModel` or `UniZeroModel` says.

    Raises:
      ValueError: it has no configuration, or is a variant that kvjax does not have.
    """
    world_model = module.unwrap(getattr(source, "world_model", source))
    config = getattr(world_model, "config", None)
    if config is None:
        raise ValueError(f"{type(source).__name__} has no config: expected a LightZero WorldModel")
    encoder = getattr(getattr(source, "tokenizer", None), "encoder", None)
    fields = _fields(config) | encoder_tensors.module_options(encoder)
    return Described(fields, "the model", bool(getattr(config, CLIP, False)))


def _fields(config: Any) -> dict[str, Any]:
    said = {field: getattr(config, name, None) for name, field in _FIELDS.items()}
    fields: dict[str, Any] = {name: value for name, value in said.items() if _is_count(value)}
    modes = [name for name in _MODES if getattr(config, name, False)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} exclude each other")
    if modes or hasattr(config, "rotary_emb"):
        fields["window_mode"] = _MODES[modes[0]] if modes else "learned"
    theta = getattr(config, "rope_theta", None)
    if getattr(config, "rotary_emb", False) and theta is not None and _is_number(theta):
        fields["rope_theta"] = float(theta)
    return fields


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < sys.maxsize


def _model_fields(model: dict[str, Any]) -> dict[str, Any]:
    """What stands outside the world model's part: the support, the size of images."""
    fields: dict[str, Any] = {}
    shape = model.get("observation_shape")
    if isinstance(shape, tuple | list) and len(shape) == 3 and all(map(_is_count, shape)):
        fields["image_shape"] = tuple(shape)
    ranges = [_bins(model[name]) for name in _RANGES if name in model]
    if len(set(ranges)) > 1:
        raise ValueError(f"unsupported variant: {' and '.join(_RANGES)} differ")
    if ranges and ranges[0] is not None:
        fields["support"] = ranges[0]
    elif not ranges and _is_count(model.get("support_scale")):
        fields["support"] = (-model["support_scale"], model["support_scale"])
    return fields


def _bins(said: Any) -> tuple[int, int] | None:
    """First and last bin of `(start, stop, step)`, or None where a step is not 1."""
    if not (isinstance(said, tuple | list) and len(said) == 3 and all(map(_is_number, said))):
        return None
    start, stop, step = map(float, said)
    if step != 1.0 or not (start.is_integer() and stop.is_integer()):
        return None
    return int(start), int(stop) - 1
