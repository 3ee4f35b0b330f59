"""A window's shape, and what tells window modes apart."""

import dataclasses
from typing import Literal, get_args

from kvjax.base.values import make_plain, require, require_one_of, require_positive

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
