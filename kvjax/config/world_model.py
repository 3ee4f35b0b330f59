"""Shape and variant of a UniZero world model."""

import dataclasses
import functools
from typing import Literal, get_args

from kvjax.base.values import (
    is_integer,
    make_plain,
    require,
    require_above_zero,
    require_one_of,
    require_positive,
)
from kvjax.config.window import MODES, WINDOW_MODES, Mode, WindowConfig, WindowMode

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
    the embedding of the task that was taken out of a multi-task model. With `task_in_positions` the
    position table's even rows have that embedding in them, which window mode "reset" excludes.

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
        a table-bound model without one; a task in positions that are rotary or of mode "reset";
        continuous actions without a number to draw, or more discrete ones to draw than there are.
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
    task_in_positions: bool = False
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
        self._check_task_in_positions()
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

    def _check_task_in_positions(self) -> None:
        added, mode = self.task_in_positions, self.window_mode
        require(isinstance(added, bool), f"task_in_positions must be True or False, got {added!r}")
        require(
            not added or mode in ("learned", "rebuild"),
            f'task_in_positions excludes window_mode "{mode}": in "reset" LightZero forgets the'
            " embedding of an imagined latent, and rotary positions have no table to hold it",
        )

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
