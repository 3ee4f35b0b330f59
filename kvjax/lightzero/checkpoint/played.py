"""The environment that a run of LightZero played, from its configuration."""

import logging
import re
from typing import Any

from kvjax.config import EnvironmentConfig, FramesConfig, check_stored_env

_GYMNASIUM = ("bipedalwalker", "cartpole_lightzero", "lunarlander")
"""LightZero's types of environments that are Gymnasium's of that name, seen as they are."""

_ATARI = "atari_lightzero"
_FRAMES = {
    "frame_skip": "frame_skip",
    "gray_scale": "gray_scale",
    "eval_max_episode_steps": "max_episode_steps",
    "full_action_space": "full_action_space",
}
"""Names of `AtariEnvLightZero.config` and the fields of `FramesConfig`."""

_OWN = {
    "gray_scale": True,
    "channel_last": False,
    "scale": True,
    "transform2string": False,
    "warp_frame": True,
}
"""What `AtariEnvLightZero` does where nothing is said; only the first may be otherwise here."""

_LEGACY = re.compile(r"^(\w+)NoFrameskip-v4$")
"""The same games as ALE's own version 5, once these repeat no action and have none that stick."""

_log = logging.getLogger(__name__)


def environment(env: dict[str, Any], model: dict[str, Any]) -> EnvironmentConfig | None:
    """The environment as the run's agent is evaluated in it, or None where kvjax has none like it.

    LightZero evaluates with whole games and unclipped rewards, whatever the run says
    (`AtariEnvLightZero.create_evaluator_env_cfg`).

    Args:
      env: what the run's configuration says under `env`.
      model: and under `policy.model`.
    """
    try:
        return _environment(env, model)
    except ValueError as error:
        _log.warning("the run's environment is left unread: %s", error)
        return None


def _environment(env: dict[str, Any], model: dict[str, Any]) -> EnvironmentConfig | None:
    kind, env_id = env.get("type"), env.get("env_id")
    if env_id is None or kind not in (*_GYMNASIUM, _ATARI):
        return None
    played = EnvironmentConfig(env_id)
    check_stored_env("LightZero's configuration", env_id)
    if kind != _ATARI:
        return played
    said = _OWN | env
    for name in _OWN.keys() - {"gray_scale"}:
        if said[name] != _OWN[name]:
            raise ValueError(f"{name} must be {_OWN[name]}, got {said[name]!r}")
    fields = {field: said[name] for name, field in _FRAMES.items() if name in said}
    fields["frame_stack"] = model.get("frame_stack_num", 1)
    return EnvironmentConfig(_LEGACY.sub(r"ALE/\1-v5", env_id), frames=FramesConfig(**fields))
