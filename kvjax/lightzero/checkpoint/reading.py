"""LightZero's torch weights to kvjax: names, shapes, variants.

Reads UniZero models of release 0.2.0 and of the main branch in inference. What a checkpoint's
shapes tell is inferred; what they don't tell (heads, context length) is taken from the options, a
live model's configuration, or LightZero's `total_config.py` beside the file. What contradicts the
tensors is refused.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.base.values import listed, require
from kvjax.config import POOLED_SIDES, EnvironmentConfig, WorldModelConfig
from kvjax.lightzero import module
from kvjax.lightzero.checkpoint import described, encoding, tasks, tensors, torch_file, variables
from kvjax.lightzero.checkpoint.described import CLIP, Described
from kvjax.lightzero.checkpoint.tensors import Sorted
from kvjax.model.world_model import Params

SAID, FROM_TENSORS, BY_DEFAULT = "as you said", "from the tensors", "by default"

ENCODER = "encoder"
"""The option that leaves the encoder out."""

_ASKED = ("num_heads", "context_length")
"""What LightZero's tensors do not tell."""

OWN_OPTIONS = (ENCODER, CLIP, tasks.TASK, tasks.OPTION)
"""Options of `load` that are no fields of `WorldModelConfig`."""

_SAMPLED_ACTIONS = 20
"""Actions that a node of LightZero's search draws where nobody says how many."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A LightZero model in kvjax's terms, where that is from, and what was left out."""

    config: WorldModelConfig
    params: Params
    ignored: tuple[str, ...]  # tensors that inference does not read, as the source names them
    origins: Mapping[str, str]  # fields of the configuration: "as you said", "from ..."
    notes: tuple[str, ...] = ()  # what whoever runs the model should know of it
    environment: EnvironmentConfig | None = None  # that it was trained in, if a run says so


def load(source: Any, **options: Any) -> tuple[WorldModelConfig, Params]:
    """Reads a LightZero UniZero model.

    Args:
      source: path of a `.pth.tar` file (read weights-only), its dictionary, a state dict, or a
        torch `WorldModel` or `UniZeroModel`, whose configuration is then read too. Beside a file,
        or one folder above, LightZero's `total_config.py` is read (and never executed).
      **options: fields of `WorldModelConfig` that shapes do not tell: `num_heads` and
        `context_length` where no configuration does, `simnorm_group`, `rope_theta`, `support` or
        `image_shape` where they differ from LightZero's defaults. They win over a configuration.
        Of continuous actions `fixed_sigma_value` of "fixed" deviations, which of "independent" and
        "happo" a `sigma_type` with parameters is, `bound_type`, and `num_sampled_actions` (20).
        `use_policy_logits_clip="ignore"` reads a model of main whose policy logits are clipped in
        inference, which kvjax does not do: priors, and so searches, differ where logits are large.
        `encoder=None` leaves the encoder's tensors out, as of a text encoder, which kvjax does not
        have: observations are then latents [E].
        `task_id` is the task that is taken out of a multi-task model, `task_embed_option` what its
        embedding is for where no configuration says it: see `kvjax.lightzero.checkpoint.tasks`.

    Returns:
      The configuration and the Flax variables. The log names where the configuration is from and
      the tensors that inference ignores (`tensors.IGNORED` and the tokenizer's copies
      of the encoder); it warns of options that contradict the model's configuration.

    Raises:
      FileNotFoundError: no such file.
      ImportError: a torch file without torch installed.
      ValueError: an unreadable or damaged file, an unsupported variant, a missing, unused,
        misshapen or non-finite tensor or one that is no floating-point number, an option that is
        missing, a task that the model does not have, or an option or a configuration that
        contradicts the tensors: a table or a mask of positions shorter than a window of C - 1
        tokens, another width, other heads.
    """
    imported = read(source, **options)
    _log.info("ignored by inference: %s", ", ".join(imported.ignored) or "nothing")
    for name, origin in imported.origins.items():
        _log.info("%s=%r, %s", name, getattr(imported.config, name), origin)
    return imported.config, imported.params


def read(source: Any, **options: Any) -> Imported:
    """Like `load`, with the names of the ignored tensors and where the configuration is from."""
    said = {name: value for name, value in options.items() if value is not None}
    clip = said.pop(CLIP, None)
    require(clip in (None, "ignore"), f'{CLIP} can only be "ignore", got {clip!r}')
    task, use = (said.pop(name, None) for name in (tasks.TASK, tasks.OPTION))
    reads_encoder = _reads_encoder(options)
    said.pop(ENCODER, None)
    check_names(said)
    told, state = _open(source, reads_encoder)
    one = tasks.select(state, task, told.tasks)
    sorted_out = tensors.sort(one.state, reads_encoder=reads_encoder)
    found = tasks.set_embedding_apart(sorted_out, one.task)
    tensors.refuse_variants(found)
    notes = (*tasks.notes(one), *_clip_notes(found, told, clip))
    config, origins = _configure(found, said, told)
    weights, config = tasks.fold(found, config, use, told.embedding_use)
    if config.task_in_positions:
        origins["task_in_positions"] = SAID if use else f"from {told.origin}"
    params = variables.from_tensors(weights, config)
    environment = _environment(told, config, origins)
    return Imported(config, params, one.ignored + found.ignored, origins, notes, environment)


def _environment(
    told: Described, config: WorldModelConfig, origins: Mapping[str, str]
) -> EnvironmentConfig | None:
    """The run's environment; none of a run of another model, whose configuration is left unread."""
    if told.environment is None or f"from {told.origin}" not in origins.values():
        return None
    try:
        told.environment.require_fits(config)
    except ValueError as error:
        _log.warning("%s: its environment is left unread: %s", told.origin, error)
        return None
    return told.environment


def _reads_encoder(options: Mapping[str, Any]) -> bool:
    encoder = options.get(ENCODER, "own")
    require(encoder in ("own", None), f'{ENCODER} can only be "own" or None, got {encoder!r}')
    return encoder is not None


def _open(source: Any, reads_encoder: bool) -> tuple[Described, Any]:
    """What a source's own configuration says, and its state dict."""
    told = Described()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        source = torch_file.read(path)
        told = described.by_file(path, reads_encoder=reads_encoder)
    source = module.unwrap(source)
    if hasattr(source, "state_dict"):
        told = described.by_module(source, reads_encoder=reads_encoder)
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ValueError(f"expected a path, a state dict or a torch module, got {type(source)}")
    return told, source.get("model", source)


def _clip_notes(found: Sorted, told: Described, clip: str | None) -> tuple[str, ...]:
    """Refuses clipped logits, or says what it means to ignore that they are clipped."""
    bounds = tensors.CLIP_BOUND in found.telling
    if not (bounds if told.clips_logits is None else told.clips_logits):
        return ()
    require(
        clip == "ignore",
        f"unsupported variant: {CLIP} ({told.origin or tensors.CLIP_BOUND} says so): LightZero"
        f' clips the logits of the policy in inference, kvjax does not; {CLIP}="ignore" reads it'
        " all the same",
    )
    note = (
        f"{CLIP} is ignored: logits of the policy are not clipped, searches differ from LightZero's"
    )
    _log.warning("%s", note)
    return (note,)


def check_names(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for options that are no fields of `WorldModelConfig`."""
    known = sorted(field.name for field in dataclasses.fields(WorldModelConfig))
    if unknown := options.keys() - set(known):
        raise ValueError(
            f"unknown options {listed(unknown)}; known are {', '.join([*known, *OWN_OPTIONS])}"
        )


def _configure(
    found: Sorted, said: dict[str, Any], told: Described
) -> tuple[WorldModelConfig, dict[str, str]]:
    """The configuration, and where each of its fields is from: options win over what is told."""
    inferred = tensors.inferred_fields(found)
    for name in sorted(inferred.keys() & said.keys()):
        if name != "support" and not _agree(name, said[name], inferred):
            raise ValueError(f"{name}={said[name]!r}, but the tensors say {inferred[name]!r}")
    own = _own_fields(told, said, inferred)
    _warn_of_differences(said, own, told.origin)
    config = _build(inferred | own | said)
    bins = tensors.support_size(found.weights)
    if config.support_size != bins:
        raise ValueError(f"support {config.support} has {config.support_size} bins, not {bins}")
    tensors.check_positions(config, found)
    origins = dict.fromkeys((field.name for field in dataclasses.fields(config)), BY_DEFAULT)
    origins |= dict.fromkeys(inferred.keys() - {"support"}, FROM_TENSORS)
    origins |= dict.fromkeys(own, f"from {told.origin}") | dict.fromkeys(said, SAID)
    _warn_of_a_guessed_side(config, inferred, origins)
    return config, origins


def _build(fields: dict[str, Any]) -> WorldModelConfig:
    for name in _asked(fields):
        if name not in fields:
            raise ValueError(
                f"{name} is not stored in a LightZero checkpoint: pass {name}=..., or keep the"
                " run's total_config.py beside the file"
            )
    if fields["sigma_type"] is not None:
        fields = {"num_sampled_actions": _SAMPLED_ACTIONS} | fields
    if fields["max_tokens"] is None:
        fields = {"window_mode": "rope_lightzero"} | fields
    return WorldModelConfig(**fields)


def _asked(fields: dict[str, Any]) -> tuple[str, ...]:
    """What the tensors of such a model do not tell."""
    sigma = ("fixed_sigma_value",) if fields.get("sigma_type") == "fixed" else ("sigma_type",)
    return _ASKED + sigma


def _own_fields(told: Described, said: dict[str, Any], inferred: dict[str, Any]) -> dict[str, Any]:
    """What a model's own configuration adds; nothing where it describes another model."""
    fields = dict(told.fields)
    if "image_shape" not in inferred:
        fields.pop("image_shape", None)  # a state dict without its encoder, or a vector's
    tensors_say = inferred | {"window_mode": "rope" if inferred["max_tokens"] is None else "table"}
    for name in sorted(fields.keys() & tensors_say.keys()):
        if _agree(name, fields[name], tensors_say):
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


def _agree(name: str, value: Any, inferred: dict[str, Any]) -> bool:
    """Whether a field may be what is said; images of sides that are pooled alike are alike."""
    tensors_say = inferred[name]
    if name == "window_mode":
        return bool(value.startswith("rope") == (tensors_say == "rope"))
    if name == "support":
        return bool(value[1] - value[0] == tensors_say[1] - tensors_say[0])
    if name == "image_shape" and isinstance(value, tuple | list):
        planes, side, _ = tensors_say
        sides = (side,) if encoding.tells_side(inferred) else POOLED_SIDES
        return tuple(value) in {(planes, side, side) for side in sides}
    return bool(value == tensors_say)


def _warn_of_differences(said: dict[str, Any], own: dict[str, Any], origin: str) -> None:
    for name in sorted(said.keys() & own.keys()):
        if said[name] != own[name]:
            text = "%s=%r as you said, though %s says %r"
            _log.warning(text, name, said[name], origin, own[name])


def _warn_of_a_guessed_side(
    config: WorldModelConfig, inferred: dict[str, Any], origins: Mapping[str, str]
) -> None:
    if not encoding.tells_side(inferred) and origins["image_shape"] == FROM_TENSORS:
        _, side, _ = config.observation_shape
        text = "images of %s make equal tensors: %d is taken, say image_shape where it is another"
        _log.warning(text, " and ".join(map(str, POOLED_SIDES)), side)
