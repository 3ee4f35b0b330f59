"""Checks on the host of what a call brings, before anything is compiled.

Shapes: B rows, E embedding size.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.arrays import ArrayLike, validate_range
from kvjax.base.values import describe, require, require_type
from kvjax.config import VIT_HEAD, VIT_PATCH, Norm, WorldModelConfig
from kvjax.model.world_model import Params
from kvjax.ops.window import Window

_FIRST_STEP = -1  # `kvjax.model.step` has its meaning


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
    hidden = config.head_expansion * width if config.layout == "main" else width
    task, encoded = config.task_size, width - config.task_size
    actions, other = ("kernel", "embedding") if config.is_continuous else ("embedding", "kernel")
    is_layer = config.sigma_type == "conditioned"
    is_parameter = config.is_continuous and not (is_layer or config.sigma_type == "fixed")
    known: dict[str, Any] = {
        f"action_embedding/{actions}": (config.num_actions, width),
        f"action_embedding/{other}": None,
        "policy_head/log_sigma/bias": (config.num_actions,) if is_layer else None,
        "policy_head/log_sigma": (1, config.num_actions) if is_parameter else None,
        "position_embedding/embedding": None if rows is None else (rows, width),
        f"blocks_{layers - 1}/key/bias": (width,),
        f"blocks_{layers}/key/bias": None,
        "value_head/hidden/bias": (hidden,),
        "value_head/output/bias": (config.support_size,),
        "latent_final/norm/bias": _bias(config.latent_norm, width),
    }
    if config.has_encoder:
        known["task_embedding/embedding"] = (1, task) if task else None
        known |= _encoder_landmarks(config, encoded)
    return [(("params", *name.split("/")), shape) for name, shape in known.items()]


def _encoder_landmarks(config: WorldModelConfig, width: int) -> dict[str, Any]:
    """Those of an encoder of latents of so many numbers."""
    known: dict[str, Any] = {"encoder/final/norm/bias": _bias(config.encoder_norm, width)}
    if config.image_shape is None:
        is_layer_norm = config.encoder_hidden_norm == "layernorm"
        known["encoder/input/kernel"] = (config.observation_size, width)
        known["encoder/layer_norm/bias"] = (width,) if is_layer_norm else None
        return known
    planes, side, _ = config.image_shape
    channels, blocks = config.image_channels, config.image_blocks
    match config.image_encoder:
        case "resnet":
            known["encoder/stem/kernel"] = (3, 3, planes, channels // 2)
            is_layer_norm = config.encoder_hidden_norm == "layernorm"
            plane = (side // 2, side // 2) if is_layer_norm else ()
            known["encoder/stem_norm/bias"] = (*plane, channels // 2)
            known[f"encoder/blocks_{blocks}/conv1/kernel"] = None
        case "memory":
            known["encoder/convs_0/kernel"] = (3, 3, planes, channels // 4)
        case "vit":
            known["encoder/positions"] = (1, 1 + (side // VIT_PATCH) ** 2, channels)
            known[f"encoder/blocks_{blocks}/expand/bias"] = None
            if blocks:
                known["encoder/blocks_0/expand/bias"] = (config.image_hidden,)
                heads = config.image_heads
                known["encoder/blocks_0/qkv/kernel"] = (channels, 3 * heads * VIT_HEAD)
    return known


def _bias(norm: Norm, width: int) -> tuple[int] | None:
    return (width,) if norm == "layernorm" else None


def validate_actions(
    name: str,
    action: ArrayLike,
    shape: tuple[int, ...],
    config: WorldModelConfig,
    *,
    or_first: bool = True,
) -> None:
    """Refuses what are no actions of such a model, or host arrays with values out of range.

    Args:
      shape: of the batch.
      or_first: whether an action may also mark a first step: -1, or a vector of NaN.

    Raises:
      ValueError: with the argument's name, what was expected and what came.
    """
    expected, came = (*shape, *config.action_shape), np.shape(action)
    require(came == expected, f"{name} must have shape {expected}, got {came}")
    if not config.is_continuous:
        is_integer = jnp.issubdtype(action.dtype, jnp.integer)
        require(is_integer, f"{name} must be integers, got {action.dtype}")
        validate_range(name, action, _FIRST_STEP if or_first else 0, config.num_actions - 1)
        return
    is_float = jnp.issubdtype(action.dtype, jnp.floating)
    require(is_float, f"{name} must be floating-point numbers, got {action.dtype}")
    if isinstance(action, np.ndarray):
        firsts = np.isnan(action).all(axis=-1, keepdims=True) & or_first
        allowed = "finite numbers, or NaN in a whole row, which restarts it"
        require(
            bool((np.isfinite(action) | firsts).all()),
            f"{name} must be {allowed if or_first else 'finite numbers'}, got {action.tolist()}",
        )


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


def validate_raw(owner: str, window: Window, config: WorldModelConfig) -> None:
    """Refuses windows with raw tokens that the mode does not have, and those without."""
    keeps = config.window.raw_size is not None
    if (window.raw is not None) != keeps:
        raise ValueError(
            f"the {owner} {'lack' if keeps else 'keep'} raw tokens, which window_mode"
            f' "{config.window_mode}" {"needs" if keeps else "does not have"}'
        )
