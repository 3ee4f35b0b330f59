"""Checks on the host of what a call brings, before anything is compiled.

Shapes: B rows, E embedding size.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.config import WorldModelConfig, describe, require, require_type
from kvjax.types import Contexts, Params, Store, Window

ArrayLike = jax.Array | np.ndarray[Any, Any]


def validate_model(params: Params, config: WorldModelConfig) -> None:
    """Refuses what are no variables of a world model of this configuration.

    Looks at a few tensors only, since searches are called often: those whose shapes tell one
    configuration from another.

    Raises:
      TypeError: `params` is no dictionary, `config` no `WorldModelConfig`.
      ValueError: `params` is only a part of the variables, or another configuration's.
    """
    require_type("config", config, WorldModelConfig, "kvjax.WorldModelConfig")
    if not isinstance(params, Mapping):
        hint = ": pass its .params" if hasattr(params, "params") else ""
        raise TypeError(
            f'params must be a dictionary of variables, {{"params": ...}}, got {describe(params)}'
            f"{hint}"
        )
    if "params" not in params:
        raise ValueError(
            'params must be all variables, {"params": ..., "batch_stats": ...}, got a dictionary'
            f" of {', '.join(map(str, params)) or 'nothing'}"
        )
    for path, expected in _landmarks(config):
        came = _shape_at(params, path)
        if came != expected:
            wanted = "be absent" if expected is None else f"have shape {expected}"
            raise ValueError(
                f"params are not those of this config: {'/'.join(path)} must {wanted}, got"
                f" {'none' if came is None else came}"
            )


def _shape_at(params: Any, path: tuple[str, ...]) -> tuple[int, ...] | None:
    for name in path:
        params = params.get(name) if isinstance(params, Mapping) else None
    return getattr(params, "shape", None)


@functools.lru_cache
def _landmarks(config: WorldModelConfig) -> list[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    """Names of tensors, and the shapes that they have; None for one that there is not."""
    width, layers, rows = config.embed_dim, config.num_layers, config.max_tokens
    norms = {"layernorm": (width,), "simnorm": None}
    hidden = 4 * width if config.layout == "main" else width
    known: dict[str, Any] = {
        "action_embedding/embedding": (config.num_actions, width),
        "position_embedding/embedding": None if rows is None else (rows, width),
        f"blocks_{layers - 1}/key/bias": (width,),
        f"blocks_{layers}/key/bias": None,
        "value_head/hidden/bias": (hidden,),
        "value_head/output/bias": (config.support_size,),
        "latent_final/norm/bias": norms[config.latent_norm],
    }
    if config.has_encoder:
        known["encoder/final/norm/bias"] = norms[config.encoder_norm]
    if config.image_shape is not None:
        known["encoder/stem/kernel"] = (3, 3, config.image_shape[0], config.image_channels // 2)
        known[f"encoder/blocks_{config.image_blocks}/conv1/kernel"] = None
    elif config.has_encoder:
        known["encoder/input/kernel"] = (config.observation_size, width)
    return [(("params", *name.split("/")), shape) for name, shape in known.items()]


def validate_key(rng: Any) -> None:
    """Refuses what is not one PRNG key: `TypeError`. Raw keys, [2] or [4] uint32, are one."""
    dtype, shape = getattr(rng, "dtype", None), np.shape(rng)
    if dtype is None:
        raise TypeError(f"rng must be a PRNG key, got {describe(rng)}: jax.random.key makes one")
    if not (shape == () if _is_typed_key(dtype) else dtype == np.uint32 and len(shape) == 1):
        raise TypeError(f"rng must be one PRNG key, got {dtype} of shape {shape}")


@functools.lru_cache
def _is_typed_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


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
        dtype = getattr(value, "dtype", type(value).__name__)
        if np.shape(value) != expected or dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 of shape {expected}, got {dtype} {np.shape(value)}"
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
    """Refuses what is no store, one that was moved, or one of another model's windows."""
    stores.require_store(store)
    _validate_raw("entries of the store", store.roots.entries, config)
    held = store.roots.entries.kv
    expected = (config.window.kept_length, *config.window.token_shape)
    if held.shape[1:] != expected or held.dtype != config.dtype:
        raise ValueError(
            f"the store holds windows {held.dtype} {held.shape[1:]}, the model's are"
            f" {config.dtype} {expected}"
        )


def validate_contexts(contexts: Contexts, config: WorldModelConfig) -> None:
    """Refuses what are no contexts, donated ones, and those of another model or window mode."""
    require_type("contexts", contexts, Contexts, "kvjax.init_contexts")
    gone = stores.is_deleted(contexts.timestep)
    require(not gone, "the contexts were donated to an earlier call: use those that came back")
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
