"""What a UniZero model's own configuration tells beside its tensors.

Release 0.2.0 and main write it to a live model, and to a run's `total_config.py`, which is read and
never executed. That file lies in a run's folder, checkpoints in its `ckpt`. It is Python:
`exp_config = {...}`, or `main_config = dict(...)` in its formatted twin. Only literals are taken.
"""

import ast
import dataclasses
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvjax.base import files
from kvjax.base.values import is_integer, is_number, require
from kvjax.config import VIT_HEAD, VIT_PATCH, EnvironmentConfig, WindowMode
from kvjax.lightzero import module
from kvjax.lightzero.checkpoint import played
from kvjax.lightzero.checkpoint.encoding import LEAVE_OUT

CLIP = "use_policy_logits_clip"

NAMES = ("total_config.py", "formatted_total_config.py")

MAX_BYTES = 2**20
"""A larger file is no such configuration: they have about 10 kB."""

_VARIABLES = ("exp_config", "main_config")
_DICTIONARIES = ("dict", "EasyDict")
_ENVIRONMENT = ("env",)
_MODEL = ("policy", "model")
_WORLD_MODEL = "world_model_cfg"

_FIELDS = {
    "embed_dim": "embed_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "action_space_size": "num_actions",
    "context_length": "context_length",
    "group_size": "simnorm_group",
    "num_of_sampled_actions": "num_sampled_actions",
}
"""LightZero's names of counts and the fields of `WorldModelConfig`."""

_GAUSSIAN = ("sigma_type", "fixed_sigma_value", "bound_type")
"""Fields of `WorldModelConfig` that LightZero names alike, of continuous actions."""

_MODES: dict[str, WindowMode] = {
    "rotary_emb": "rope_lightzero",
    "rebuild_kv_window_from_tokens": "rebuild",
    "exact_kv_window_reset": "reset",
}
_FINAL_NORM, _FINAL_NORMS = "final_norm_option_in_encoder", ("simnorm", "layernorm")
_ENCODERS_OWN = {
    "normalize_pixel": False,
    "pool": "cls",
    "patch_size": VIT_PATCH,
    "dim_head": VIT_HEAD,
}
"""Attributes of MemoryEnv's encoder and of vision transformers, as LightZero makes them."""

_RANGES = ("reward_support_range", "value_support_range")


@dataclasses.dataclass(frozen=True)
class Described:
    """Fields of `WorldModelConfig` that a model's configuration says, and where it stands."""

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = ""  # of the configuration, for messages
    clips_logits: bool | None = None  # whether the policy's logits are; None: it does not say
    tasks: int | None = None  # how many
    embedding_use: str | None = None  # `task_embed_option`, "none" where embeddings are not used
    environment: EnvironmentConfig | None = None  # that was played; None: it does not say


def by_file(checkpoint: Path, *, reads_encoder: bool = True) -> Described:
    """What the run's configuration beside a checkpoint says; nothing where there is none.

    Args:
      checkpoint: its folder and the one above are looked through.
      reads_encoder: whether what it says of the encoder matters.

    Raises:
      ValueError: it describes a variant that kvjax does not have.
    """
    folder = checkpoint.absolute().parent
    for path in (place / name for place in (folder, folder.parent) for name in NAMES):
        run = _run_entries(path)
        model = _inside(run, _MODEL)
        entries = dict(_entries(model.get(_WORLD_MODEL)))
        if entries:
            said, of_model = types.SimpleNamespace(**_literals(entries)), _literals(model)
            environment = played.environment(_literals(_inside(run, _ENVIRONMENT)), of_model)
            with files.naming(path):
                fields = _fields(said) | _model_fields(of_model)
                if reads_encoder:
                    _refuse_final_norm(said)
            return dataclasses.replace(_described(fields, str(path), said), environment=environment)
    return Described()


def by_module(source: Any, *, reads_encoder: bool = True) -> Described:
    """What a live torch `WorldModel` or `UniZeroModel` says.

    Raises:
      ValueError: it has no configuration, or is a variant that kvjax does not have.
    """
    world_model = module.unwrap(getattr(source, "world_model", source))
    config = getattr(world_model, "config", None)
    if config is None:
        raise ValueError(f"{type(source).__name__} has no config: expected a LightZero WorldModel")
    encoder: Any = getattr(getattr(source, "tokenizer", None), "encoder", None)
    if type(encoder).__name__ == "ModuleList":  # of tasks, all of one kind
        encoder = next(iter(encoder), None)
    fields = _fields(config) | (_encoder_fields(encoder) if reads_encoder else {})
    return _described(fields, "the model", config)


def _described(fields: dict[str, Any], origin: str, said: Any) -> Described:
    """With what is no field of `WorldModelConfig`."""
    tasks, use = getattr(said, "task_num", None), getattr(said, "task_embed_option", None)
    if use == "add_task_embed" and not getattr(said, "use_task_embed", True):
        use = "none"  # zeros are added
    return Described(
        fields,
        origin,
        clips_logits=bool(getattr(said, CLIP, False)),
        tasks=tasks if _is_count(tasks) else None,
        embedding_use=use if isinstance(use, str) else None,
    )


def _fields(config: Any) -> dict[str, Any]:
    said = {field: getattr(config, name, None) for name, field in _FIELDS.items()}
    fields: dict[str, Any] = {name: value for name, value in said.items() if _is_count(value)}
    if getattr(config, "continuous_action_space", False):
        fields |= {name: getattr(config, name) for name in _GAUSSIAN if hasattr(config, name)}
    modes = [name for name in _MODES if getattr(config, name, False)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} exclude each other")
    if modes or hasattr(config, "rotary_emb"):
        fields["window_mode"] = _MODES[modes[0]] if modes else "learned"
    theta: Any = getattr(config, "rope_theta", None)
    if getattr(config, "rotary_emb", False) and is_number(theta):
        fields["rope_theta"] = float(theta)
    return fields


def _is_count(value: Any) -> bool:
    return is_integer(value) and value > 0


def _encoder_fields(encoder: Any) -> dict[str, Any]:
    """What a live encoder tells, or {}; refuses another norm, activation or way."""
    _refuse_final_norm(encoder)
    activation = getattr(encoder, "activation", None)
    if activation is not None and getattr(activation, "approximate", None) != "tanh":
        raise ValueError(f"unsupported variant: image encoders with activation {activation}")
    for owner in (encoder, getattr(encoder, "config", None)):
        for name, expected in _ENCODERS_OWN.items():
            said = getattr(owner, name, expected)
            require(
                said == expected,
                f"unsupported variant: encoders with {name} {said}, expected {expected}",
            )
    shape = getattr(encoder, "observation_shape", None)
    return {"image_shape": tuple(map(int, shape))} if isinstance(shape, tuple | list) else {}


def _refuse_final_norm(owner: Any) -> None:
    """Main has norms that leave no trace in the tensors."""
    norm = getattr(owner, _FINAL_NORM, _FINAL_NORMS[0])
    if str(norm).lower() not in _FINAL_NORMS:
        raise ValueError(f"unsupported variant: encoders that end in {norm}{LEAVE_OUT}")


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
    if not (isinstance(said, tuple | list) and len(said) == 3 and all(map(is_number, said))):
        return None
    start, stop, step = map(float, said)
    if step != 1.0 or not (start.is_integer() and stop.is_integer()):
        return None
    return int(start), int(stop) - 1


def _run_entries(path: Path) -> dict[str, ast.expr]:
    """The entries of a configuration, not evaluated; none where the file is no configuration."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in somebody's texts
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and _is_configuration(statement.targets):
            return dict(_entries(statement.value))
    return {}


def _inside(entries: dict[str, ast.expr], path: tuple[str, ...]) -> dict[str, ast.expr]:
    """The entries of a dictionary inside."""
    for name in path:
        entries = dict(_entries(entries.get(name)))
    return entries


def _is_configuration(targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Name) and target.id in _VARIABLES for target in targets)


def _entries(node: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of a dictionary, written with braces or as a call."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in _DICTIONARIES:
        for argument in node.args:
            yield from _entries(argument)
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield keyword.arg, keyword.value


def _literals(entries: dict[str, ast.expr]) -> dict[str, Any]:
    found = {}
    for name, node in entries.items():
        try:
            found[name] = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue  # an object's picture, a call, a number too large: not said
    return found
