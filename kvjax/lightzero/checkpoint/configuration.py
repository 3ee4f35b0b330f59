"""A LightZero model's configuration: what the user says, its own configuration, its tensors."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from kvjax.base.values import listed
from kvjax.config import POOLED_SIDES, WorldModelConfig
from kvjax.lightzero.checkpoint import encoder_tensors, shapes
from kvjax.lightzero.checkpoint.described import CLIP, Described
from kvjax.lightzero.checkpoint.tensors import Sorted

SAID, FROM_TENSORS, BY_DEFAULT = "as you said", "from the tensors", "by default"

_ASKED = ("num_heads", "context_length")
"""What LightZero's tensors do not tell."""

_log = logging.getLogger(__name__)


def check_names(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for options that are no fields of `WorldModelConfig`."""
    known = sorted(field.name for field in dataclasses.fields(WorldModelConfig))
    if unknown := options.keys() - set(known):
        raise ValueError(
            f"unknown options {listed(unknown)}; known are {', '.join([*known, CLIP])}"
        )


def configure(
    found: Sorted, said: dict[str, Any], told: Described
) -> tuple[WorldModelConfig, dict[str, str]]:
    """The configuration, and where each of its fields is from.

    Args:
      found: the model's tensors.
      said: the user's options, which win over a configuration.
      told: the model's own configuration.

    Raises:
      ValueError: something is missing, or contradicts the tensors.
    """
    inferred = shapes.inferred_fields(found)
    for name in sorted(inferred.keys() & said.keys()):
        if name != "support" and not _agree(name, said[name], inferred[name]):
            raise ValueError(f"{name}={said[name]!r}, but the tensors say {inferred[name]!r}")
    own = _own_fields(told, said, inferred)
    _warn_of_differences(said, own, told.origin)
    config = _build(inferred | own | said)
    bins = shapes.support_size(found.weights)
    if config.support_size != bins:
        raise ValueError(f"support {config.support} has {config.support_size} bins, not {bins}")
    if warning := shapes.check_positions(config, found):
        _log.warning("%s", warning)
    origins = dict.fromkeys((field.name for field in dataclasses.fields(config)), BY_DEFAULT)
    origins |= dict.fromkeys(inferred.keys() - {"support"}, FROM_TENSORS)
    origins |= dict.fromkeys(own, f"from {told.origin}") | dict.fromkeys(said, SAID)
    _warn_of_a_guessed_side(config, origins)
    return config, origins


def _build(fields: dict[str, Any]) -> WorldModelConfig:
    for name in _ASKED:
        if name not in fields:
            raise ValueError(
                f"{name} is not stored in a LightZero checkpoint: pass {name}=..., or keep the"
                " run's total_config.py beside the file"
            )
    if fields["max_tokens"] is None:
        fields = {"window_mode": "rope_lightzero"} | fields
    return WorldModelConfig(**fields)


def _own_fields(told: Described, said: dict[str, Any], inferred: dict[str, Any]) -> dict[str, Any]:
    """What a model's own configuration adds; nothing where it describes another model."""
    fields = dict(told.fields)
    if "image_shape" not in inferred:
        fields.pop("image_shape", None)  # a state dict without its encoder, or a vector's
    tensors_say = inferred | {"window_mode": "rope" if inferred["max_tokens"] is None else "table"}
    for name in sorted(fields.keys() & tensors_say.keys()):
        if _agree(name, fields[name], tensors_say[name]):
            continue
        problem = f"{told.origin} says {name}={fields[name]!r}, the tensors {tensors_say[name]!r}"
        if not said.keys() >= set(_ASKED):
            raise ValueError(
                f"{problem}: it describes another model; pass {' and '.join(_ASKED)} to leave it"
                " unread"
            )
        _log.warning("%s: it is left unread", problem)
        return {}
    return fields


def _agree(name: str, value: Any, tensors_say: Any) -> bool:
    if name == "window_mode":
        return bool(value.startswith("rope") == (tensors_say == "rope"))
    if name == "support":
        return bool(value[1] - value[0] == tensors_say[1] - tensors_say[0])
    return encoder_tensors.agree(name, value, tensors_say)


def _warn_of_differences(said: dict[str, Any], own: dict[str, Any], origin: str) -> None:
    for name in sorted(said.keys() & own.keys()):
        if said[name] != own[name]:
            text = "%s=%r as you said, though %s says %r"
            _log.warning(text, name, said[name], origin, own[name])


def _warn_of_a_guessed_side(config: WorldModelConfig, origins: Mapping[str, str]) -> None:
    shape = config.image_shape
    if shape and shape[1] in POOLED_SIDES and origins["image_shape"] == FROM_TENSORS:
        text = "images of %s make equal tensors: %d is taken, say image_shape where it is another"
        _log.warning(text, " and ".join(map(str, POOLED_SIDES)), shape[1])
