"""Flax's variables of a world model, and LightZero's tensors that they come from."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax.base.values import listed
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint import encoding
from kvjax.lightzero.checkpoint.encoding import ENCODER
from kvjax.lightzero.checkpoint.tensors import HEAD_OUTPUT, HEADS, LATENT_NORM, Tensors
from kvjax.model import world_model
from kvjax.model.world_model import Params

_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "class_token": "cls_token",
    "positions": "pos_embedding",
    "log_sigma": "log_sigma_param",
}
"""Flax's leaf names and torch's."""

_PLANE_NDIM = 3  # height, width, channels

_TOP = {
    "position_embedding": "pos_emb",
    "action_embedding": "act_embedding_table",
    "final_norm": "transformer.ln_f",
    "latent_final/norm": LATENT_NORM,
    "task_embedding": "task_emb",
}
_BLOCK = {
    "attention_norm": "ln1",
    "feed_forward_norm": "ln2",
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "projection": "attn.proj",
}
_FEED_FORWARD = {"0.2.0": "mlp", "main": "feed_forward"}

_HEADS = dict(zip(("reward_head", "latent_head", "policy_head", "value_head"), HEADS, strict=True))
_GAUSSIAN = {
    "action_embedding": "act_embedding_table.0",
    "policy_head": "head_policy.head_module",
    "policy_head/hidden": "head_policy.head_module.main.0",
    "policy_head/deeper": "head_policy.head_module.main.2",
    "policy_head/mean": "head_policy.head_module.mu",
    "policy_head/log_sigma": "head_policy.head_module.log_sigma_layer",
}
"""Modules of a model of continuous actions that others have not."""

_HEAD_LAYERS = {
    "0.2.0": {"hidden": 0},
    "main": {"input_norm": 0, "hidden": 1, "hidden_norm": 2},
}

"""Paths of Flax's modules, and torch's."""


def from_tensors(weights: Tensors, config: WorldModelConfig) -> Params:
    """Fills the model's variables.

    Raises:
      ValueError: a tensor is missing, of no use, misshapen or not finite.
    """
    remaining = dict(weights)
    params = {}
    for path, leaf, name, axes in _places(config):
        if name not in remaining:
            raise ValueError(f"missing tensor {name}")
        value = remaining.pop(name)
        world_model.check_parameter(name, value, tuple(leaf.shape[axis] for axis in axes))
        value = value.transpose(np.argsort(axes))
        params[path] = jnp.array(value, leaf.dtype)
    if remaining:
        raise ValueError(f"tensors that kvjax does not know: {listed(remaining)}")
    return unflatten_dict(params)


def to_tensors(params: Params, config: WorldModelConfig) -> Tensors:
    """The tensors that `from_tensors` makes these variables of.

    Raises:
      ValueError: a variable is missing, unknown, misshapen or not finite.
    """
    remaining, weights = flatten_dict(params), {}
    for path, leaf, name, axes in _places(config):
        if path not in remaining:
            raise ValueError(f"missing variable {'/'.join(path)}")
        value = np.asarray(remaining.pop(path))
        world_model.check_parameter("/".join(path), value, leaf.shape)
        weights[name] = np.ascontiguousarray(value.transpose(axes), leaf.dtype)
    if remaining:
        unknown = ("/".join(map(str, path)) for path in remaining)
        raise ValueError(f"variables that the configuration does not have: {listed(unknown)}")
    return weights


def _places(
    config: WorldModelConfig,
) -> Iterator[tuple[tuple[str, ...], Any, str, tuple[int, ...]]]:
    """Of each variable its path, its shape, its tensor's name, and its axes in torch's order."""
    modules = _modules(config)
    for path, leaf in flatten_dict(world_model.params_shapes(config)).items():
        name = f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}"
        yield path, leaf, name, _torch_axes(path[-1], len(leaf.shape))


def _torch_axes(leaf: str, ndim: int) -> tuple[int, ...]:
    """Flax's axes in torch's order.

    A kernel [.., in, out] is [out, in, ..]; a LayerNorm of planes [H, W, N] is [N, H, W].
    """
    axes = tuple(range(ndim))
    if leaf == "kernel":
        return axes[-1], axes[-2], *axes[:-2]
    is_plane = leaf in ("scale", "bias") and ndim == _PLANE_NDIM
    return (axes[-1], *axes[:-1]) if is_plane else axes


def _modules(config: WorldModelConfig) -> dict[str, str]:
    """Torch's module of each of Flax's modules."""
    release, feed_forward = config.layout, _FEED_FORWARD[config.layout]
    blocks = {f"blocks_{i}": f"transformer.blocks.{i}" for i in range(config.num_layers)}
    block = _BLOCK | {"expand": f"{feed_forward}.0", "contract": f"{feed_forward}.2"}
    layers = _HEAD_LAYERS[release] | {"output": HEAD_OUTPUT[release]}
    head = {name: f"head_module.{place}" for name, place in layers.items()}
    encoder = {"encoder": ENCODER.removesuffix(".")}
    found = _TOP | encoding.below(blocks, block) | encoding.below(_HEADS, head)
    found |= _GAUSSIAN if config.is_continuous else {}
    return found | encoder | encoding.below(encoder, encoding.names(config))
