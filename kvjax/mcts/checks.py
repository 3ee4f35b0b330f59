"""Checks of what an inference step brings, before anything is compiled.

Shapes: B rows, E embedding size.
"""

import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.base.arrays import ArrayLike, validate_range
from kvjax.config import WorldModelConfig
from kvjax.model.checks import validate_raw
from kvjax.store import Store


def validate_batch(
    store: Store,
    config: WorldModelConfig,
    rows: int,
    latents: dict[str, ArrayLike],
    action: ArrayLike,
    ids: dict[str, ArrayLike],
) -> None:
    """Refuses latents [B, E], actions, ids [B] or a store that do not fit.

    Raises:
      ValueError: with the argument's name, what was expected and what came.
    """
    validate_store(store, config)
    for name, value in latents.items():
        expected = (rows, config.embed_dim)
        dtype = getattr(value, "dtype", type(value).__name__)
        if np.shape(value) != expected or dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 of shape {expected}, got {dtype} {np.shape(value)}"
            )
    if not config.is_continuous:
        ids = {"action": action} | ids
    elif not hasattr(action, "dtype"):
        raise ValueError(f"action must be an array, got {type(action).__name__}")
    for name, value in ids.items():
        is_integer = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)
        if np.shape(value) != (rows,) or not is_integer:
            dtype = getattr(value, "dtype", type(value).__name__)
            raise ValueError(
                f"{name} must be integers of shape {(rows,)}, got {dtype} {np.shape(value)}"
            )
    validate_range("env_id", ids["env_id"], 0, stores.num_envs(store) - 1)


def validate_store(store: Store, config: WorldModelConfig) -> None:
    """Refuses what is no store, one that was moved, or one of another model's windows."""
    stores.require_store(store)
    validate_raw("entries of the store", store.roots.entries, config)
    held = store.roots.entries.kv
    expected = (config.window.kept_length, *config.window.token_shape)
    if held.shape[1:] != expected or held.dtype != config.dtype:
        raise ValueError(
            f"the store holds windows {held.dtype} {held.shape[1:]}, the model's are"
            f" {config.dtype} {expected}"
        )
