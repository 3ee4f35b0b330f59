"""Options that say something of a model, and the agent that is found with them."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from kvjax.config import WINDOW_MODES, EnvironmentConfig, FramesConfig, WorldModelConfig
from kvjax.lightzero.checkpoint import described, tasks
from kvjax.lightzero.checkpoint.reading import SAID
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.agent import Found, find_agent
from kvjax.tools.output import warnings_shown

_SCALE, _FRAMES = "observation_scale", "frames"
_OF_FRAMES = [field.name for field in dataclasses.fields(FramesConfig)]


def _parts(
    kind: Callable[[str], Any], expected: str, count: int | None = None
) -> Callable[[str], tuple[Any, ...]]:
    """Reads values between commas."""

    def read(text: str) -> tuple[Any, ...]:
        parts = text.split(",")
        try:
            if count in (None, len(parts)):
                return tuple(map(kind, parts))
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read


def _changes(text: str) -> dict[str, Any]:
    """Reads fields of a `FramesConfig`, as in `frame_skip=4,gray_scale=true`."""
    try:
        said = dict(part.split("=") for part in text.split(","))
        changes = {name: json.loads(value) for name, value in said.items()}
        dataclasses.replace(FramesConfig(), **changes)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE,... of {', '.join(_OF_FRAMES)}, got {text!r}: {error}"
        ) from error
    return changes


_OPTIONS: dict[str, dict[str, Any]] = {
    "num_heads": {"type": int},
    "context_length": {"type": int, "help": "tokens"},
    "window_mode": {
        "choices": WINDOW_MODES,
        "help": "what a full window does, and rotary positions",
    },
    "image_shape": {
        "type": _parts(int, "three integers, as in 3,84,84", 3),
        "metavar": "C,H,W",
        "help": "where sides make equal tensors",
    },
    "simnorm_group": {"type": int, "help": "size of SimNorm's groups (8)"},
    "rope_theta": {"type": float, "help": "base of rotary angles (10000)"},
    "support": {
        "type": _parts(int, "two integers, as in -50,50", 2),
        "metavar": "FIRST,LAST",
        "help": "bins, as in --support=-50,50",
    },
    "use_policy_logits_clip": {
        "choices": ("ignore",),
        "help": "read a model that clips the policy's logits, which kvjax does not do",
    },
    tasks.TASK: {"type": int, "metavar": "N", "help": "which task of a multi-task model"},
    tasks.OPTION: {"choices": tasks.USES, "help": "what the embeddings of tasks are for"},
    "env": {"help": "Gymnasium environment"},
    _SCALE: {
        "type": _parts(float, "numbers, as in 1,0,2.5"),
        "metavar": "X,X,...",
        "help": "factors of the observation",
    },
    _FRAMES: {
        "type": _changes,
        "metavar": "NAME=VALUE,...",
        "help": "what is seen of an environment's frames, where it is not what LightZero's Atari"
        f" agents see: {', '.join(_OF_FRAMES)}",
    },
}

_FLAGS = {tasks.TASK: "task"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a command."""
    group = parser.add_argument_group(
        "the model",
        "what a LightZero file does not tell: heads and context are taken from the run's"
        " total_config.py where that lies beside the file or a folder above; a kvjax file must"
        " agree with what is said",
    )
    for name, options in _OPTIONS.items():
        flag = _FLAGS.get(name, name).replace("_", "-")
        group.add_argument(f"--{flag}", dest=name, **options)


def model_options() -> tuple[str, ...]:
    """Names of the options that `add_model_options` adds, as a parsed command line has them."""
    return tuple(_OPTIONS)


def agent_of(args: argparse.Namespace) -> Found:
    """Reads a shipped, kvjax or LightZero checkpoint; its environment, options first."""
    said = {name: getattr(args, name) for name in _OPTIONS if name not in (_SCALE, _FRAMES)}
    with warnings_shown():
        found = find_agent(args.checkpoint, encoder=getattr(args, "encoder", "own"), **said)
    environment = environment_of(args, found.agent)
    return dataclasses.replace(
        found, agent=dataclasses.replace(found.agent, environment=environment)
    )


def environment_of(args: argparse.Namespace, agent: Checkpoint) -> EnvironmentConfig | None:
    """What the checkpoint says of its environment, options first."""
    stored, scale, changes = agent.environment, args.observation_scale, args.frames
    if args.env is None and stored is None:
        for name in (_SCALE, _FRAMES):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --env")
        return None
    if stored is None or args.env not in (None, stored.env_id):
        stored = EnvironmentConfig(args.env)
    if scale is not None:
        stored = dataclasses.replace(stored, observation_scale=scale)
    environment = _with_frames(stored, changes, agent.config)
    environment.require_fits(agent.config)
    return environment


def _with_frames(
    environment: EnvironmentConfig, changes: dict[str, Any] | None, config: WorldModelConfig
) -> EnvironmentConfig:
    """With what was said of frames; what was not is as stored, or as LightZero has it."""
    environment = environment.completed(config)
    if changes is None:
        return environment
    frames = dataclasses.replace(environment.frames or FramesConfig(), **changes)
    return dataclasses.replace(environment, frames=frames)


def origins(found: Found) -> str:
    """What the model's tensors do not tell, and who said it: a line each."""
    config = found.agent.config
    shown = {
        "num_heads": f"{config.num_heads} heads",
        "context_length": f"context of {config.context_length} tokens",
        "window_mode": f'window mode "{config.window_mode}"',
    }
    for name in ("image_shape", "simnorm_group", "rope_theta", "support"):
        if found.origins[name] == SAID or found.origins[name].endswith(described.NAMES):
            shown[name] = f"{name} {getattr(config, name)}"
    return "\n".join(f"{text}, {found.origins[name]}" for name, text in shown.items())
