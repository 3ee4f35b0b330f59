"""An agent's environment, and what it sees of it."""

import dataclasses
import re
from typing import Any

from kvjax.base.values import is_integer, is_number, make_plain, require, require_positive
from kvjax.config.world_model import WorldModelConfig

COLOURS = 3
"""Channels of a frame in colour."""

ATARI = re.compile(r"ALE/|\w+NoFrameskip-v4$")
"""Identifiers of Atari games, ALE's own and the older ones that LightZero's configurations name."""


def check_stored_env(source: Any, env_id: str, said: str | None = None, hint: str = "") -> None:
    """Refuses an environment out of a file whose name makes Gymnasium import a module.

    Args:
      source: the file, for the message.
      env_id: what the file says; `module:Env` imports that module.
      said: what the user says, who may mean just that.
      hint: how to say it, for the message.

    Raises:
      ValueError: the identifier has a colon and the user has not said it.
    """
    require(
        ":" not in env_id or env_id == said,
        f"{source} names the environment {env_id!r}, for which Gymnasium imports a module{hint}",
    )


@dataclasses.dataclass(frozen=True)
class FramesConfig:
    """What an agent sees of an environment's frames: LightZero's rules for Atari games.

    An action is repeated and the last two frames are pooled (largest value), made gray or not,
    scaled to the side of the model's images and to [0, 1], channels first, and stacked, the oldest
    first; an episode's first frame fills its stack. The side is the model's. Source:
    `wrap_lightzero` and `AtariEnvLightZero` in `zoo/atari/envs` of LightZero, the stack of its
    `MuZeroEvaluator`; the defaults are those of its UniZero configuration when it evaluates. See
    `kvjax.tools.environments`.

    Raises:
      ValueError: a number is not positive (no-ops: not negative), a switch is no truth value, or
        the probability lies outside [0, 1].
    """

    frame_skip: int = 4  # frames that an action is repeated for
    noop_max: int = 30  # a game begins with 1 to as many no-ops; 0: with none
    gray_scale: bool = False
    frame_stack: int = 1
    episode_life: bool = False  # an episode ends with a life, the next goes on with the game
    clip_rewards: bool = False  # to their signs
    max_episode_steps: int = 108_000  # of the agent
    repeat_action_probability: float = 0.0  # ALE's sticky actions, which LightZero turns off
    full_action_space: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        require_positive(self, "frame_skip", "frame_stack", "max_episode_steps")
        noops, sticky = self.noop_max, self.repeat_action_probability
        require(is_integer(noops) and noops >= 0, f"noop_max must be >= 0, got {noops!r}")
        for name in ("gray_scale", "episode_life", "clip_rewards", "full_action_space"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
        require(
            is_number(sticky) and 0.0 <= sticky <= 1.0,
            f"repeat_action_probability must be in [0, 1], got {sticky!r}",
        )

    @property
    def channels(self) -> int:
        """Channels of what the agent sees."""
        return self.frame_stack * (1 if self.gray_scale else COLOURS)

    @classmethod
    def of_channels(cls, channels: int) -> "FramesConfig":
        """A stack of colour frames where three divides the channels, else of gray ones."""
        gray = channels % COLOURS != 0
        return cls(gray_scale=gray, frame_stack=channels if gray else channels // COLOURS)


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """The Gymnasium environment that an agent was trained in, and what it saw of it.

    Raises:
      ValueError: the identifier is no text or empty, the scale is no tuple of finite numbers, or
        frames are no `FramesConfig`.
    """

    env_id: str
    observation_scale: tuple[float, ...] | None = None  # factor per entry; None leaves it as it is
    frames: FramesConfig | None = None  # None leaves observations as they are; see `completed`

    def __post_init__(self) -> None:
        make_plain(self)
        env_id, scale, frames = self.env_id, self.observation_scale, self.frames
        is_name = isinstance(env_id, str) and bool(env_id)
        require(is_name, f"env_id must name a Gymnasium environment, got {env_id!r}")
        is_vector = scale is None or (
            isinstance(scale, tuple) and bool(scale) and all(map(is_number, scale))
        )
        require(is_vector, f"observation_scale must be numbers, finite ones, got {scale!r}")
        known = frames is None or isinstance(frames, FramesConfig)
        require(known, f"frames must be a FramesConfig or None, got {frames!r}")

    @property
    def is_atari(self) -> bool:
        """Whether the identifier is that of an Atari game, ALE's own or LightZero's."""
        return ATARI.match(self.env_id) is not None

    def completed(self, config: WorldModelConfig) -> "EnvironmentConfig":
        """With LightZero's frames, where none are said of an Atari game and a model of images."""
        if self.frames is not None or config.image_shape is None or not self.is_atari:
            return self
        return dataclasses.replace(self, frames=FramesConfig.of_channels(config.image_shape[0]))

    def require_fits(self, config: WorldModelConfig) -> None:
        """Raises `ValueError` unless the scale and the frames are those of the model's input."""
        scale, size, frames = self.observation_scale, config.observation_size, self.frames
        require(
            scale is None or len(scale) == size,
            f"observation_scale needs {size} factors, got {scale}",
        )
        if frames is None:
            return
        shape = config.image_shape
        require(
            shape is not None and frames.channels == shape[0],
            f"frames have {frames.channels} channels (gray_scale {frames.gray_scale}, frame_stack"
            f" {frames.frame_stack}), the model reads {config.observation_shape}",
        )
