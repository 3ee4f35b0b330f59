"""Static, hashable, validated configuration. What varies per call is an array."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from kvjax.base.values import (
    is_integer,
    is_number,
    make_plain,
    require,
    require_above_zero,
    require_hashable,
    require_numbers,
    require_one_of,
    require_positive,
)

BLOCK = 2
"""Tokens per environment step: one observation token and one action token."""

MIN_CONTEXT = 2 * BLOCK
"""The smallest context that still holds a block after a slide."""

DTYPES = ("float32", "bfloat16", "float64")


WindowMode = Literal["learned", "rope_lightzero", "rope_consistent", "rebuild", "reset"]
WINDOW_MODES: tuple[WindowMode, ...] = get_args(WindowMode)


@dataclasses.dataclass(frozen=True)
class Mode:
    """What tells a window mode from another; `kvjax.model.modes` has what follows from it."""

    rotary_gap: int | None = None  # positions left out below a root; None: learned ones, no rotary
    corrected: bool = False  # a slide adds what the new positions differ by
    keeps_raw: bool = False  # raw tokens beside keys and values, to compute these again
    carry: int | None = None  # tokens of its newest block that a full window keeps, and no others


MODES: dict[WindowMode, Mode] = {
    "learned": Mode(corrected=True),
    "rope_lightzero": Mode(rotary_gap=2),
    "rope_consistent": Mode(rotary_gap=0),
    "rebuild": Mode(keeps_raw=True),
    "reset": Mode(carry=1),
}

MAX_SIMULATIONS = 2**24 - 1
"""A tree holds no more: its node indices are exact in float32."""

Tree = Literal["lightzero", "muzero", "gumbel"]
TREES = ("lightzero", "muzero", "gumbel")
Q_TRANSFORMS = ("tree", "siblings", "mix_value")
_UNREAD: dict[Tree, tuple[str, ...]] = {
    "lightzero": ("q_transform", "max_considered_actions"),
    "muzero": ("max_considered_actions",),
    "gumbel": ("temperature", "dirichlet_alpha", "pb_c_init", "pb_c_base"),
}
"""Fields of a `SearchConfig` that a tree has no use for, `kept_nodes` left out."""

Layout = Literal["0.2.0", "main"]
Norm = Literal["simnorm", "layernorm"]
HiddenNorm = Literal["batchnorm", "layernorm"]
EncoderKind = Literal["resnet", "memory", "vit"]
SigmaType = Literal["conditioned", "fixed", "independent", "happo"]
SIGMA_TYPES: tuple[SigmaType, ...] = get_args(SigmaType)

POOLED_SIDES = (84, 96)
"""Sides of images that the encoder pools once more than others, to the same feature plane."""

IMAGE_SIDES = (64, *POOLED_SIDES)
"""Sides in pixels of the square images that LightZero's encoder takes."""

VIT_PATCH, VIT_HEAD, VIT_SIMNORM_GROUP = 8, 64, 8
"""Side of a patch, width of a head and SimNorm's group in LightZero's vision transformers."""


@dataclasses.dataclass(frozen=True)
class _Images:
    """What a kind of encoder takes."""

    sides: tuple[int, ...]  # of a picture, in pixels
    described: str  # the sides
    channel_step: int = 1  # what `image_channels` is a multiple of


_IMAGES: dict[EncoderKind, _Images] = {
    "resnet": _Images(IMAGE_SIDES, f"one of {', '.join(map(str, IMAGE_SIDES))}", channel_step=2),
    "memory": _Images((5,), "5", channel_step=4),
    "vit": _Images(tuple(range(VIT_PATCH, 257, VIT_PATCH)), f"{VIT_PATCH}, {2 * VIT_PATCH} .. 256"),
}

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
class WindowConfig:
    """Shape of one context window of key/value tokens.

    `raw_size` is the width of the raw tokens (before positions and layers) that are kept beside
    keys and values, so that these can be computed again; None keeps none.

    Raises:
      ValueError: a size is not a positive integer, `context_length` is odd or below 4, or the
        dtype is none of `DTYPES`.
    """

    context_length: int  # C, tokens
    num_layers: int  # L
    num_heads: int  # H
    head_dim: int  # D
    dtype: str = "float32"  # of keys and values
    raw_size: int | None = None
    block: int = BLOCK  # K, tokens that a step adds

    def __post_init__(self) -> None:
        make_plain(self)
        require_positive(self, "context_length", "num_layers", "num_heads", "head_dim", "block")
        if self.raw_size is not None:
            require_positive(self, "raw_size")
        length, block = self.context_length, self.block
        is_pair = block == BLOCK
        multiple, other = ("even", "an odd") if is_pair else (f"a multiple of {block}", "another")
        require(
            length % block == 0,
            f"context_length must be {multiple} (blocks of {block} tokens), got {length}: {other}"
            " window loses its newest observation when it slides",
        )
        require(
            length >= 2 * block,
            f"context_length must be at least {2 * block}, got {length}: a shorter window keeps"
            " nothing between steps",
        )
        require_one_of("dtype", self.dtype, DTYPES)

    @property
    def full_length(self) -> int:
        """Length C-1 in tokens at which a window slides."""
        return self.context_length - 1

    @property
    def kept_length(self) -> int:
        """Length C-3 in tokens after a slide: the longest window that is ever stored."""
        return self.full_length - self.block

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        """Shape [L, 2, H, D] of one token's keys and values."""
        return self.num_layers, 2, self.num_heads, self.head_dim


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """Shape and variant of a UniZero world model.

    `observation_size` is for vectors, `image_shape` for images; with neither the model has no
    encoder: observations are latents.
    `layout` names the release whose heads the model has; `encoder_norm` and `latent_norm` say how
    the encoder and the observation head end, `encoder_hidden_norm` what is between the layers of an
    encoder of vectors or a "resnet".

    `image_encoder` is LightZero's `RepresentationNetworkUniZero` ("resnet"), its encoder of
    MemoryEnv ("memory"), or its vision transformer ("vit"), of `image_blocks` blocks whose tokens
    are `image_channels` wide.

    A latent of a model with `task_size` ends in that many numbers that the encoder does not make:
    the embedding of the task that was taken out of a multi-task model.

    With a `sigma_type` actions are continuous, `num_actions` numbers each, and the policy is a
    Gaussian of them before a tanh: "conditioned" reads its deviations off the latent, "fixed" has
    `fixed_sigma_value`, "independent" and "happo" have parameters for them. `bound_type` "tanh"
    bounds the means. Each node of a search draws `num_sampled_actions` actions; None, for discrete
    actions alone, gives it all of them.

    `window_mode` says what positions are and what happens when a window has reached C - 1 tokens:

    * "learned": absolute positions from a table. The oldest block is dropped, and what is kept is
      moved to its new positions by a correction, which is an approximation.
    * "rebuild": the same positions; what is kept is computed again from its raw tokens.
    * "reset": the same positions; only the latest latent is kept.
    * "rope_lightzero", "rope_consistent": rotary positions. The oldest block is dropped, the rest
      stays as it is. LightZero leaves a gap of two positions between a root and what is imagined
      from it; "rope_consistent" leaves none.

    Raises:
      ValueError: a size is not positive, heads do not divide the width, the SimNorm groups do not
        divide the width or the encoder's, a task leaves no width to the encoder, the support is
        empty, the observation is both vector and image or an image of an unknown side, the window
        is invalid (see `WindowConfig`); a rotary model with a position table, an odd head size, or
        a table-bound model without one; continuous actions without a number to draw, or more
        discrete ones to draw than there are.
    """

    embed_dim: int  # E
    num_layers: int  # L
    num_heads: int  # H
    num_actions: int  # A; of continuous actions the numbers of one
    context_length: int  # C, tokens
    max_tokens: int | None  # rows of the learned position table; None for rotary positions
    observation_size: int | None = None
    support: tuple[int, int] = (-50, 50)  # first and last bin, S = last - first + 1 bins
    layout: Layout = "0.2.0"
    encoder_norm: Norm = "simnorm"
    latent_norm: Norm = "simnorm"
    simnorm_group: int = 8  # numbers that one of SimNorm's softmaxes runs over
    dtype: str = "float32"  # of the stored window
    window_mode: WindowMode = "learned"
    rope_theta: float = 10000.0  # base of rotary angles
    image_shape: tuple[int, int, int] | None = None  # channels, height, width
    image_channels: int = 64  # of the image encoder's feature planes
    image_blocks: int = 1  # residual blocks behind the image encoder's last pooling
    image_encoder: EncoderKind = "resnet"
    image_heads: int = 12  # of a vision transformer's attention
    image_hidden: int = 3072  # width of a vision transformer's feed-forward layers
    encoder_hidden_norm: HiddenNorm = "batchnorm"
    head_expansion: int = 4  # hidden width of main's heads, in units of E
    task_size: int = 0
    sigma_type: SigmaType | None = None  # of a Gaussian policy; None: actions are discrete
    fixed_sigma_value: float = 0.5
    bound_type: Literal["tanh"] | None = None  # of a Gaussian policy's means
    num_sampled_actions: int | None = None  # K, drawn at each node of a search

    def __post_init__(self) -> None:
        make_plain(self)
        sizes = ("embed_dim", "num_layers", "num_heads", "num_actions")
        require_positive(self, *sizes, "simnorm_group", "image_channels", "head_expansion")
        require_positive(self, "image_heads", "image_hidden")
        require(
            self.embed_dim % self.num_heads == 0,
            f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}",
        )
        if self.observation_size is not None:
            require_positive(self, "observation_size")
        require_one_of("image_encoder", self.image_encoder, get_args(EncoderKind))
        require_one_of("encoder_hidden_norm", self.encoder_hidden_norm, get_args(HiddenNorm))
        if self.image_shape is not None:
            self._check_image(self.image_shape)
        blocks = self.image_blocks
        require(is_integer(blocks) and blocks >= 0, f"image_blocks must be >= 0, got {blocks!r}")
        support = self.support
        require(
            isinstance(support, tuple)
            and len(support) == 2
            and all(map(is_integer, support))
            and support[0] < support[1],
            f"support must be integers (first, last), first < last, got {support!r}",
        )
        require_one_of("layout", self.layout, ("0.2.0", "main"))
        for name in ("encoder_norm", "latent_norm"):
            require_one_of(name, getattr(self, name), ("simnorm", "layernorm"))
        self._check_actions()
        norms = (self.encoder_norm, self.latent_norm)
        require(
            not ("simnorm" in norms or self.is_continuous)
            or self.embed_dim % self.simnorm_group == 0,
            f"simnorm_group must divide embed_dim {self.embed_dim}, got {self.simnorm_group}",
        )
        self._check_task()
        self._validate_positions()

    def _check_task(self) -> None:
        size, width, group = self.task_size, self.embed_dim, self.simnorm_group
        require(
            is_integer(size) and 0 <= size < width,
            f"task_size must be >= 0 and less than embed_dim {width}, got {size!r}",
        )
        require(
            self.encoder_norm != "simnorm" or (width - size) % group == 0,
            f"simnorm_group must divide the encoder's width {width - size}, got {group}",
        )

    def _check_actions(self) -> None:
        if self.num_sampled_actions is not None:
            require_positive(self, "num_sampled_actions")
        drawn = self.num_sampled_actions
        if self.is_continuous:
            require_one_of("sigma_type", self.sigma_type, SIGMA_TYPES)
            require(
                drawn is not None,
                "continuous actions need num_sampled_actions, how many a node of a search draws",
            )
        else:
            require(
                drawn is None or drawn <= self.num_actions,
                f"num_sampled_actions must be at most num_actions {self.num_actions}, got {drawn}:"
                " discrete actions are drawn without replacement",
            )
        require_above_zero(self, "fixed_sigma_value")
        if self.bound_type is not None:
            require_one_of("bound_type", self.bound_type, ("tanh",))

    def _validate_positions(self) -> None:
        require_above_zero(self, "rope_theta")
        require_one_of("window_mode", self.window_mode, WINDOW_MODES)
        mode, head_dim = self.window_mode, self.window.head_dim
        if not self.is_rotary:
            require(
                self.max_tokens is not None,
                f'window_mode "{mode}" needs a table of learned positions (max_tokens), and this'
                " model has none: its positions are rotary",
            )
            require_positive(self, "max_tokens")
            return
        require(
            self.max_tokens is None,
            f'window_mode "{mode}" excludes learned positions, got max_tokens {self.max_tokens}',
        )
        require(head_dim % 2 == 0, f"rotary positions need an even head size, got {head_dim}")

    @property
    def mode(self) -> Mode:
        """What the window mode says."""
        return MODES[self.window_mode]

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotary instead of learned."""
        return self.mode.rotary_gap is not None

    @property
    def is_continuous(self) -> bool:
        """Whether actions are vectors of numbers."""
        return self.sigma_type is not None

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: [] int32, or [A] float32 where actions are continuous."""
        return (self.num_actions,) if self.is_continuous else ()

    @property
    def policy_size(self) -> int:
        """Numbers that the policy head says: A logits, or means and deviations of a Gaussian."""
        return 2 * self.num_actions if self.is_continuous else self.num_actions

    @property
    def num_edges(self) -> int:
        """Actions that a node of a search has: K drawn ones, or all A."""
        return self.num_sampled_actions or self.num_actions

    def _check_image(self, shape: tuple[int, int, int]) -> None:
        require(
            self.observation_size is None, "observation_size and image_shape exclude each other"
        )
        kind, channels = self.image_encoder, self.image_channels
        images = _IMAGES[kind]
        multiple = "even" if images.channel_step == 2 else f"a multiple of {images.channel_step}"
        require(
            channels % images.channel_step == 0, f"image_channels must be {multiple}: {channels}"
        )
        require(
            isinstance(shape, tuple)
            and len(shape) == 3
            and all(map(is_integer, shape))
            and shape[0] >= 1
            and shape[1] == shape[2]
            and shape[1] in images.sides,
            f"image_shape must be (channels, side, side), side {images.described}, got {shape!r}",
        )
        hidden = self.encoder_hidden_norm
        require(
            kind == "resnet" or hidden == "batchnorm",
            f'encoder_hidden_norm must be batchnorm with image_encoder "{kind}", got {hidden}',
        )
        if kind == "vit" and self.encoder_norm == "simnorm":
            group, width = VIT_SIMNORM_GROUP, self.embed_dim
            require(width % group == 0, f"embed_dim must be a multiple of {group}, got {width}")

    @functools.cached_property
    def window(self) -> WindowConfig:
        """The window that this model reads and extends."""
        head_dim = self.embed_dim // self.num_heads
        raw_size = self.embed_dim if self.mode.keeps_raw else None
        return WindowConfig(
            self.context_length, self.num_layers, self.num_heads, head_dim, self.dtype, raw_size
        )

    @property
    def support_size(self) -> int:
        """Number of bins S of the reward and value supports."""
        return self.support[1] - self.support[0] + 1

    @property
    def latent_shape(self) -> tuple[int]:
        """Shape [E] of one latent state."""
        return (self.embed_dim,)

    @property
    def has_encoder(self) -> bool:
        """Whether observations are encoded; else they are latents."""
        return not (self.observation_size is None and self.image_shape is None)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation: vector, image, or [E] for a model without encoder."""
        return self.image_shape or (self.observation_size or self.embed_dim,)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a search walks and chooses.

    `tree` says by whose rules a tree grows: "lightzero", or mctx's policies "muzero" and "gumbel".
    `temperature` 0 takes the most visited action, the first one on ties ("muzero" draws among them,
    as mctx does); above 0 it samples proportionally to `visits ** (1 / temperature)`.
    `noise_fraction` 0 means no root noise.
    `kept_nodes` is how many nodes below the action that was taken the next search begins with, at
    most; 0, as in LightZero, begins each search anew. See `kvjax.mcts.subtree`.
    `q_transform` says how "muzero" and "gumbel" scale Q values: "siblings" or "mix_value", mctx's
    `qtransform_by_parent_and_siblings` and `qtransform_completed_by_mix_value`, or "tree", by the
    extremes of the whole tree as LightZero does; or it is a function like mctx's, of a tree that
    holds one node. None is "mix_value" for "gumbel"; for "muzero" it is "tree" in `kvjax.search`
    and mctx's own, "siblings", in `kvjax.tree_search`.
    "gumbel" considers `max_considered_actions` at the root, reads of the noise only whether there
    is any, and has no use for `temperature`, `dirichlet_alpha`, `pb_c_init` and `pb_c_base`.
    Searches that differ in temperature and discount alone share one compiled program.

    Raises:
      TypeError: `q_transform` is a function without a hash.
      ValueError: a value lies outside its range, or the tree has no use for it.
    """

    num_simulations: int = 25  # of one search, each of which makes a node
    tree: Tree = "lightzero"
    discount: float = 0.997  # of a step, in (0, 1]
    noise_fraction: float = 0.0
    dirichlet_alpha: float = 0.3  # of the root noise
    temperature: float = 0.0
    pb_c_init: float = 1.25  # weight of the prior in an edge's score
    pb_c_base: float = 19652.0  # visits from which that weight grows
    max_depth: int | None = None  # edges below the root
    kept_nodes: int = 0
    q_transform: str | Callable[..., Any] | None = None
    max_considered_actions: int = 16

    def __post_init__(self) -> None:
        make_plain(self)
        require_positive(self, "num_simulations", "max_considered_actions")
        is_function = callable(self.q_transform) and not isinstance(self.q_transform, type)
        if not (self.q_transform is None or is_function):
            require_one_of("q_transform", self.q_transform, Q_TRANSFORMS)
        require_hashable("q_transform", self.q_transform)
        require_one_of("tree", self.tree, TREES)
        self._check_size()
        if self.max_depth is not None:
            require_positive(self, "max_depth")
        require_numbers(self, "noise_fraction", "temperature", "pb_c_init")
        require_above_zero(self, "dirichlet_alpha", "pb_c_base")
        discount = self.discount
        in_range = is_number(discount) and 0.0 < discount <= 1.0
        require(in_range, f"discount must be in (0, 1], got {discount!r}")
        fraction = self.noise_fraction
        require(0.0 <= fraction <= 1.0, f"noise_fraction must be in [0, 1], got {fraction}")
        temperature = self.temperature
        require(temperature >= 0.0, f"temperature must be at least 0, got {temperature}")
        self._check_unread()

    def _check_size(self) -> None:
        simulations, kept = self.num_simulations, self.kept_nodes
        require(
            simulations <= MAX_SIMULATIONS,
            f"num_simulations must be at most {MAX_SIMULATIONS}, got {simulations}: a tree"
            " holds no more nodes",
        )
        require(
            is_integer(kept) and kept >= 0,
            f"kept_nodes must be an integer, at least 0, got {kept!r}",
        )
        require(
            kept + simulations <= MAX_SIMULATIONS,
            f"kept_nodes must be at most {MAX_SIMULATIONS - simulations} beside {simulations}"
            f" simulations, got {kept}: a tree holds no more nodes",
        )
        require(
            kept == 0 or self.tree != "gumbel",
            f'kept_nodes must be 0 with tree "gumbel", got {kept}: its root halves the actions that'
            " it considers by the visits of one search",
        )

    def _check_unread(self) -> None:
        for name in _UNREAD[self.tree]:
            value, default = getattr(self, name), getattr(SearchConfig, name)
            require(
                value == default,
                f'{name} must be {default} with tree "{self.tree}", which does not read it, got'
                f" {value!r}",
            )

    @property
    def num_nodes(self) -> int:
        """Nodes N that a tree has room for: the root, the kept ones, one per simulation."""
        return 1 + self.kept_nodes + self.num_simulations


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
