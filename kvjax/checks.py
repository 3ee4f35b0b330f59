"""Checks on the host of what a batch of an inference step brings.

Shapes: B rows, E embedding size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.config import WorldModelConfig
from kvjax.types import Contexts, Store, Window

ArrayLike = jax.Array | np.ndarray[Any, Any]


def num_rows(latent: ArrayLike) -> int:
    """B of latents [B, E]; raises `ValueError` for any other shape."""
    shape = np.shape(latent)
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"latent must have shape [B, E] with at least one row, got {shape}")
    return int(shape[0])


def validate_batch(
    store: Store,
    config: WorldModelConfig,
    rows: int,
    latents: dict[str, ArrayLike],
    ids: dict[str, ArrayLike],
) -> None:
    """Refuses latents [B, E], ids [B] or a store that do not fit.

    Raises:
      ValueError: with the argument's name, what was expected and what came.
    """
    validate_store(store, config)
    for name, value in latents.items():
        expected = (rows, config.embed_dim)
        if np.shape(value) != expected or value.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 of shape {expected}, got {value.dtype} {np.shape(value)}"
            )
    for name, value in ids.items():
        is_integer = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)
        if np.shape(value) != (rows,) or not is_integer:
            dtype = getattr(value, "dtype", type(value).__name__)
            raise ValueError(
                f"{name} must be integers of shape {(rows,)}, got {dtype} {np.shape(value)}"
            )
    validate_range("env_id", ids["env_id"], 0, stores.num_envs(store) - 1)


def validate_store(store: Store, config: WorldModelConfig) -> None:
    """Refuses a store of another model's windows."""
    _validate_raw("entries of the store", store.roots.entries, config)
    held = store.roots.entries.kv
    expected = (config.window.kept_length, *config.window.token_shape)
    if held.shape[1:] != expected or held.dtype != config.dtype:
        raise ValueError(
            f"the store holds windows {held.dtype} {held.shape[1:]}, the model's are"
            f" {config.dtype} {expected}"
        )


def validate_contexts(contexts: Contexts, config: WorldModelConfig) -> None:
    """Refuses contexts of another model's windows, or of another window mode."""
    window, rows = contexts.window, contexts.timestep.shape
    _validate_raw("contexts", window, config)
    expected = (*rows, config.context_length, *config.window.token_shape)
    if window.kv.shape != expected or window.kv.dtype != config.dtype:
        raise ValueError(
            f"the contexts hold windows {window.kv.dtype} {window.kv.shape}, the model's are"
            f" {config.dtype} {expected}"
        )


def _validate_raw(owner: str, window: Window, config: WorldModelConfig) -> None:
    keeps = config.window.raw_size is not None
    if (window.raw is not None) != keeps:
        raise ValueError(
            f"the {owner} {'lack' if keeps else 'keep'} raw tokens, which window_mode"
            f' "{config.window_mode}" {"needs" if keeps else "does not have"}'
        )


def validate_range(name: str, value: ArrayLike, first: int, last: int) -> None:
    """Refuses host arrays with values outside; looking into a device array would wait for it."""
    if isinstance(value, np.ndarray) and ((value < first) | (value > last)).any():
        raise ValueError(f"{name} must be in {first} .. {last}, got {value.tolist()}")
