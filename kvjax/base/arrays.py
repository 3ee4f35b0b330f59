"""What a call brings, looked at on the host before anything is compiled."""

from typing import Any

import jax
import numpy as np

ArrayLike = jax.Array | np.ndarray[Any, Any]


def is_deleted(array: Any) -> bool:
    """Whether an array was donated, so that it cannot be read any more."""
    is_array = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    return is_array and array.is_deleted()


def num_rows(latent: ArrayLike) -> int:
    """B of latents [B, E]; raises `ValueError` for any other shape."""
    shape = np.shape(latent)
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"latent must have shape [B, E] with at least one row, got {shape}")
    return int(shape[0])


def validate_legal(legal: ArrayLike, of: str = "") -> None:
    """Refuses host arrays [B, A] with rows in which no action is legal.

    Args:
      of: whose rows, for the message.
    """
    if isinstance(legal, np.ndarray) and not legal.any(axis=-1).all():
        rows = np.flatnonzero(~legal.any(axis=-1)).tolist()
        raise ValueError(f"every row{of} needs a legal action, rows {rows} have none")


def validate_range(name: str, value: ArrayLike, first: int, last: int) -> None:
    """Refuses host arrays with values outside; looking into a device array would wait for it."""
    if isinstance(value, np.ndarray) and ((value < first) | (value > last)).any():
        raise ValueError(f"{name} must be in {first} .. {last}, got {value.tolist()}")
