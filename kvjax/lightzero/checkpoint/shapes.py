"""What the shapes of LightZero's tensors tell of a model, and what contradicts them."""

import re
from typing import Any

import numpy as np

from kvjax.base.values import require
from kvjax.config import BLOCK, Layout, WorldModelConfig
from kvjax.lightzero.checkpoint import encoder_tensors
from kvjax.lightzero.checkpoint.tensors import MASK, ROTATIONS, Sorted, Tensors

HEADS = {
    "reward_head": "head_rewards",
    "latent_head": "head_observations",
    "policy_head": "head_policy",
    "value_head": "head_value",
}
HEAD_LAYERS = {
    "0.2.0": {"hidden": 0, "output": 2},
    "main": {"input_norm": 0, "hidden": 1, "hidden_norm": 2, "output": 4},
}
POSITIONS = "pos_emb.weight"
FINAL_NORM = "transformer.ln_f.weight"
LATENT_NORM = "head_observations.head_module.5"

_THETA_TOLERANCE = 1e-3


def shape_of(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
      ValueError: there is no such tensor, or it has another number of dimensions.
    """
    if name not in tensors:
        raise ValueError(f"missing tensor {name}: this is not a UniZero world model, or not all")
    shape = tuple(tensors[name].shape)
    require(len(shape) == ndim, f"{name} has shape {shape}, expected {ndim} dimensions")
    return shape


def layout(tensors: Tensors) -> Layout:
    """Which release's heads the tensors are."""
    return "main" if "head_rewards.head_module.4.weight" in tensors else "0.2.0"


def support_size(tensors: Tensors) -> int:
    """Bins of the reward head."""
    output = HEAD_LAYERS[layout(tensors)]["output"]
    return shape_of(tensors, f"head_rewards.head_module.{output}.weight", 2)[0]


def inferred_fields(found: Sorted) -> dict[str, Any]:
    """Fields of `WorldModelConfig` that the tensors tell, `support` only by its size.

    Raises:
      ValueError: a tensor that would tell is missing or has other dimensions.
    """
    tensors = found.weights
    embed_dim = shape_of(tensors, FINAL_NORM, 1)[0]
    is_rotary = POSITIONS not in tensors
    layers = {m[1] for name in tensors if (m := re.match(r"transformer\.blocks\.(\d+)\.", name))}
    bins = support_size(tensors)
    return (
        {
            "embed_dim": embed_dim,
            "num_layers": len(layers),
            "num_actions": shape_of(tensors, "act_embedding_table.weight", 2)[0],
            "max_tokens": None if is_rotary else shape_of(tensors, POSITIONS, 2)[0],
            "support": (-(bins // 2), bins // 2),
            "layout": layout(tensors),
            "latent_norm": "layernorm" if f"{LATENT_NORM}.weight" in tensors else "simnorm",
        }
        | _rotated_heads(found, embed_dim)
        | encoder_tensors.inferred_fields(tensors)
    )


def _rotated_heads(found: Sorted, embed_dim: int) -> dict[str, int]:
    """Release 0.2.0 stores rotations [positions, D / 2], whose width tells the heads."""
    for name, rotations in found.telling.items():
        if name.endswith(ROTATIONS) and len(rotations.shape) == 2:
            head_dim = 2 * rotations.shape[1]
            is_fitting = head_dim > 0 and embed_dim % head_dim == 0
            require(is_fitting, f"{name} rotates heads of {head_dim}, embed_dim is {embed_dim}")
            return {"num_heads": embed_dim // head_dim}
    return {}


def check_positions(config: WorldModelConfig, found: Sorted) -> str | None:
    """Refuses windows that reach beyond what the model has positions for.

    A window of C tokens is full with C - 1; both releases fail at once where the table has fewer
    rows. Rotary models of main extend their mask: for them it is only told.

    Returns:
      What to warn of, or None.

    Raises:
      ValueError: the table, the mask or the rotations contradict the configuration.
    """
    longest, rows = config.window.full_length, config.max_tokens
    length = f"a window of context_length {config.context_length}, with {longest} tokens when full,"
    require(
        rows is None or rows >= longest,
        f"{length} needs {longest} rows of {POSITIONS}, which has {rows}",
    )
    for name, tensor in found.telling.items():
        if name.endswith(ROTATIONS):
            _check_theta(name, tensor, config)
        elif name.endswith(MASK):
            mask = int(tensor.shape[-1]) if len(tensor.shape) else 0
            require(
                rows in (None, mask), f"{name} is for {mask} tokens, {POSITIONS} has {rows} rows"
            )
            if mask < longest:
                text = f"{length} is longer than the {mask} tokens that {name} is for"
                require(config.layout == "main", text)
                return text
    return None


def _check_theta(name: str, rotations: Any, config: WorldModelConfig) -> None:
    """The second position's second pair turns by theta ** (-2 / D)."""
    if min(rotations.shape, default=0) < BLOCK or "complex64" not in str(rotations.dtype):
        return
    stored = np.angle(complex(rotations[1, 1]))
    expected = config.rope_theta ** (-2 / config.window.head_dim)
    require(
        bool(abs(stored - expected) <= _THETA_TOLERANCE * expected),
        f"rope_theta is {config.rope_theta:g}, but {name} turns by {stored:.4g} where that makes"
        f" {expected:.4g}",
    )
