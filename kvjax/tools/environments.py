"""Gymnasium environments as an agent sees them, Atari games as LightZero's agents do.

Each rule of LightZero's `wrap_lightzero` (`zoo/atari/envs/atari_wrappers.py`) and what has it here:

* `NoopResetWrapper`, `MaxAndSkipWrapper`: Gymnasium's `AtariPreprocessing`, in the screen's own
  size and colours. It differs only in an episode's last observation, which nobody acts upon, and
  in where the number of no-ops is drawn: the environment's generator, so that a seed is an episode.
  Its gray frames and its ends of lives are other ones and not used: ALE's palette in gray, where
  LightZero pools colours first, and a life that ends amid a repeated action, and the game with it.
* `EpisodicLifeWrapper`: `_EpisodicLife`.
* `TimeLimit`, `ClipRewardWrapper`: Gymnasium's `TimeLimit` and the sign.
* `WarpFrame`, `ScaledFloatFrameWrapper` and the channels of `AtariEnvLightZero.observe`: `_warp`.
* The base game repeats no action by itself and has no sticky ones (`_atari_make_kwargs` of main;
  release 0.2.0 makes the `NoFrameskip-v4` games, which are the same).
* The stack of `MuZeroEvaluator`: Gymnasium's `FrameStackObservation`.

Shapes: H, W of the screen, C colours or one gray channel, S frames of a stack.
"""

import functools
import importlib
import importlib.util
import re
import warnings
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces, wrappers

from kvjax.base.values import require
from kvjax.config import ATARI, COLOURS, EnvironmentConfig, FramesConfig, WorldModelConfig

Array = np.ndarray[Any, Any]
Env = gymnasium.Env[Any, Any]

_BRIGHTEST = np.float32(255)
_FRAMES_NEED = "cv2"
_NOOP = 0


class _Family(NamedTuple):
    """Environments that need a package."""

    names: re.Pattern[str]
    packages: tuple[str, ...]  # as they are imported
    extra: str  # of kvjax, that installs them
    registers: str | None = None  # the package that makes them known to Gymnasium


_FAMILIES = (
    _Family(ATARI, ("ale_py", "cv2"), "atari", "ale_py"),
    _Family(re.compile("LunarLander|BipedalWalker|CarRacing"), ("Box2D",), "box2d"),
    _Family(re.compile("dm_control/"), ("dm_control", "shimmy"), "dmc", "shimmy"),
    _Family(re.compile("kvjax/TMaze"), ("flashbax", "optax"), "train", "kvjax.tools.mazes"),
)


def make(environment: EnvironmentConfig, config: WorldModelConfig, *, render: bool) -> Env:
    """Makes an environment whose observations and actions are the model's.

    Args:
      environment: which one, and what is seen of it, see `EnvironmentConfig.completed`.
      config: of the model.
      render: whether it shall draw itself.

    Raises:
      ValueError: it needs a package that is not installed (the message names kvjax's extra), cannot
        be made, or does not fit the model.
    """
    environment = environment.completed(config)
    environment.require_fits(config)
    options = {"render_mode": "rgb_array" if render else None}
    try:
        env = _begin(environment, options)
    except Exception as error:  # of Gymnasium, of an import, of whoever wrote the environment
        why = str(error) or type(error).__name__
        raise ValueError(f"cannot make environment {environment.env_id!r}: {why}") from error
    if environment.frames is not None:
        env = _framed(env, environment, config.observation_shape[-1])
    elif isinstance(env.observation_space, spaces.Dict):
        env = wrappers.FlattenObservation(env)
    _require_fits(environment.env_id, env, config)
    return env


def _begin(environment: EnvironmentConfig, options: dict[str, Any]) -> Env:
    _install(environment)
    if environment.is_atari and (frames := environment.frames) is not None:
        for name in ("repeat_action_probability", "full_action_space"):
            options[name] = getattr(frames, name)
        options["frameskip"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # CartPole-v0 is meant
        return gymnasium.make(environment.env_id, **options)


def _install(environment: EnvironmentConfig) -> None:
    """Makes Gymnasium know an environment; says which of kvjax's extras has what is missing."""
    families = [family for family in _FAMILIES if family.names.match(environment.env_id)]
    if environment.frames is not None:
        families.append(_Family(re.compile(""), (_FRAMES_NEED,), "atari"))
    for family in families:
        missing = [name for name in family.packages if not importlib.util.find_spec(name)]
        needs = f"it needs {' and '.join(missing)}: pip install 'kvjax[{family.extra}]'"
        require(not missing, needs)
        if family.registers is not None:
            _register(family.registers)


def _register(package: str) -> None:
    """Imports a package, which makes its environments known; ALE greets nobody then."""
    module = importlib.import_module(package)
    if (ale := getattr(module, "ALEInterface", None)) is not None:
        ale.setLoggerMode(module.LoggerMode.Error)


def _require_fits(env_id: str, env: Env, config: WorldModelConfig) -> None:
    observed, wanted = env.observation_space.shape, config.observation_shape
    require(observed == wanted, f"{env_id} observes {observed}, the model reads {wanted}")
    space = env.action_space
    if config.is_continuous:
        is_box = isinstance(space, spaces.Box) and space.is_bounded()
        fits, kind = is_box and space.shape == config.action_shape, "numbers to an action"
    else:
        fits, kind = getattr(space, "n", None) == config.num_actions, "discrete actions"
    require(fits, f"{env_id} takes {space}, the model has {config.num_actions} {kind}")


def _framed(env: Env, environment: EnvironmentConfig, side: int) -> Env:
    """An environment of frames [H, W, 3] uint8 with observations [channels, side, side] float32."""
    frames, screen = environment.frames or FramesConfig(), env.observation_space.shape
    is_image = isinstance(screen, tuple) and len(screen) == 3 and screen[2] == COLOURS
    is_bytes = env.observation_space.dtype == np.uint8
    require(
        is_image and is_bytes,
        f"frames are made of images (height, width, {COLOURS}) in uint8, {environment.env_id}"
        f" observes {env.observation_space}",
    )
    env = _atari(env, frames) if environment.is_atari else _skipping(env, environment)
    env = wrappers.TimeLimit(env, frames.max_episode_steps)
    if frames.clip_rewards:
        env = wrappers.TransformReward(env, lambda reward: np.sign(float(reward)))
    warp = functools.partial(_warp, side=side, gray=frames.gray_scale)
    shape = (1 if frames.gray_scale else COLOURS, side, side)
    env = wrappers.TransformObservation(env, warp, _floats(shape))
    return env if frames.frame_stack == 1 else _stacked(env, frames, side)


def _atari(env: Env, frames: FramesConfig) -> Env:
    height, width, _ = env.observation_space.shape or ()
    env = wrappers.AtariPreprocessing(
        env,
        noop_max=frames.noop_max,
        frame_skip=frames.frame_skip,
        screen_size=(width, height),
        grayscale_obs=False,
    )
    return _EpisodicLife(env) if frames.episode_life else env


def _skipping(env: Env, environment: EnvironmentConfig) -> Env:
    """Any other environment: it has no no-ops, no lives and no sticky actions."""
    frames = environment.frames or FramesConfig()
    for name, none in (
        ("noop_max", 0),
        ("episode_life", False),
        ("repeat_action_probability", 0.0),
        ("full_action_space", False),
    ):
        value = getattr(frames, name)
        require(
            value == none,
            f"{name} must be {none} for {environment.env_id}, which is no Atari game, got {value}",
        )
    skip = frames.frame_skip
    return env if skip == 1 else wrappers.MaxAndSkipObservation(env, skip=skip)


def _warp(frame: Array, *, side: int, gray: bool) -> Array:
    """A frame [H, W, 3] uint8 as [C, side, side] float32 in [0, 1]; gray before it shrinks."""
    cv2 = importlib.import_module("cv2")
    seen = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if gray else frame
    seen = cv2.resize(seen, (side, side), interpolation=cv2.INTER_AREA)
    return np.moveaxis(np.atleast_3d(seen), -1, 0).astype(np.float32, order="C") / _BRIGHTEST


def _stacked(env: Env, frames: FramesConfig, side: int) -> Env:
    """The last frames, the oldest first: [S, C, side, side] as [S * C, side, side]."""
    shape = (frames.channels, side, side)
    env = wrappers.FrameStackObservation(env, frames.frame_stack, padding_type="reset")
    return wrappers.TransformObservation(env, lambda seen: seen.reshape(shape), _floats(shape))


def _floats(shape: tuple[int, ...]) -> spaces.Box:
    return spaces.Box(0.0, 1.0, shape, np.float32)


class _EpisodicLife(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Ends an episode with a life; the next one goes on with the game, a no-op later.

    Its seed has no effect then. No life left is no end by itself: the game says when it is over.
    Source: `EpisodicLifeWrapper` of DI-engine's `ding/envs/env_wrappers`. LightZero's collector,
    which alone uses it, seeds the emulator before each reset, whereupon the game begins anew.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self._lives, self._is_over = 0, True

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._is_over = terminated or truncated
        before, self._lives = self._lives, info["lives"]
        return observation, reward, terminated or 0 < self._lives < before, truncated, info

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        if self._is_over:
            observation, info = self.env.reset(**options)
        else:
            observation, _, _, _, info = self.env.step(_NOOP)
        self._lives = info["lives"]
        return observation, info
