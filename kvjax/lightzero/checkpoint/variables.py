"""Flax's variables of a world model, and LightZero's tensors that they come from."""

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax.base.values import listed
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint.tensors import ENCODER, HEAD_OUTPUT, HEADS, LATENT_NORM, Tensors
from kvjax.model import world_model
from kvjax.model.world_model import Params

_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""Flax's leaf names and torch's."""

_TOP = {
    "position_embedding": "pos_emb",
    "action_embedding": "act_embedding_table",
    "final_norm": "transformer.ln_f",
    "latent_final/norm": LATENT_NORM,
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
_HEAD_LAYERS = {
    "0.2.0": {"hidden": 0},
    "main": {"input_norm": 0, "hidden": 1, "hidden_norm": 2},
}

_VECTOR_ENCODER = {
    "input": "fc_representation.0",
    "batch_norm": "fc_representation.1",
    "output": "fc_representation.3",
    "final/norm": "norm",
}
_IMAGE_ENCODER = {
    "stem": "downsample_net.conv1",
    "stem_norm": "downsample_net.norm1",
    "output": "last_linear",
    "final/norm": "final_norm",
}
_STAGES = {
    "stage1": "downsample_net.resblocks1.0",
    "downsample": "downsample_net.downsample_block",
    "stage2": "downsample_net.resblocks2.0",
    "stage3": "downsample_net.resblocks3.0",
}
_STAGE = {
    "conv1": "conv1.0",
    "norm1": "conv1.1",
    "conv2": "conv2.0",
    "norm2": "conv2.1",
    "shortcut": "conv3.0",
}
"""Paths of Flax's modules, and torch's."""


def from_tensors(weights: Tensors, config: WorldModelConfig) -> Params:
    """Fills the model's variables.

    Raises:
      ValueError: a tensor is missing, of no use, misshapen or not finite.
    """
    modules = _modules(config)
    expected = flatten_dict(world_model.params_shapes(config))
    remaining = dict(weights)
    params = {}
    for path, leaf in expected.items():
        name = f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}"
        if name not in remaining:
            raise ValueError(f"missing tensor {name}")
        value, shape = remaining.pop(name), leaf.shape
        is_kernel = path[-1] == "kernel"  # flax keeps [.., in, out], torch [out, in, ..]
        if is_kernel:
            shape = (shape[-1], shape[-2], *shape[:-2])
        world_model.check_parameter(name, value, shape)
        value = np.moveaxis(value, (1, 0), (-2, -1)) if is_kernel else value
        params[path] = jnp.array(value, leaf.dtype)
    if remaining:
        raise ValueError(f"tensors that kvjax does not know: {listed(remaining)}")
    return unflatten_dict(params)


def _modules(config: WorldModelConfig) -> dict[str, str]:
    """Torch's module of each of Flax's modules."""
    release, feed_forward = config.layout, _FEED_FORWARD[config.layout]
    blocks = {f"blocks_{i}": f"transformer.blocks.{i}" for i in range(config.num_layers)}
    stages = _STAGES | {f"blocks_{i}": f"resblocks.{i}" for i in range(config.image_blocks)}
    encoder = _VECTOR_ENCODER if config.image_shape is None else _IMAGE_ENCODER
    encoder = encoder | _below(stages, _STAGE)
    block = _BLOCK | {"expand": f"{feed_forward}.0", "contract": f"{feed_forward}.2"}
    layers = _HEAD_LAYERS[release] | {"output": HEAD_OUTPUT[release]}
    head = {name: f"head_module.{place}" for name, place in layers.items()}
    found = _TOP | _below(blocks, block) | _below(_HEADS, head)
    return found | _below({"encoder": ENCODER.removesuffix(".")}, encoder)


def _below(outer: dict[str, str], inner: dict[str, str]) -> dict[str, str]:
    """Each of the inner modules in each of the outer ones."""
    return {f"{a}/{b}": f"{outer[a]}.{inner[b]}" for a in outer for b in inner}
