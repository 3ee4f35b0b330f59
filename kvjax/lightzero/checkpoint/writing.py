"""kvjax's weights to LightZero: a checkpoint that its own model and its own policy load.

Which release's, and which of its models, the configuration says: `layout`, and Sampled UniZero
where `num_sampled_actions` are drawn.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.base import files
from kvjax.base.values import is_integer, require
from kvjax.config import BLOCK, WindowMode, WorldModelConfig
from kvjax.lightzero.checkpoint import unread, variables
from kvjax.lightzero.checkpoint.encoding import ENCODER
from kvjax.lightzero.checkpoint.tensors import HEADS, Tensors
from kvjax.lightzero.checkpoint.unread import DECODER, METRIC
from kvjax.model.checkpoint import SUFFIX
from kvjax.model.world_model import Params

COMPILED = "_orig_mod."
"""What `torch.compile` puts before each name."""

_WORLD_MODEL, _TOKENIZER = "world_model.", "tokenizer."
_PLACES = {
    ENCODER: (ENCODER, f"{_TOKENIZER}encoder.", f"{_WORLD_MODEL}{_TOKENIZER}encoder."),
    DECODER: (DECODER, f"{_TOKENIZER}{DECODER}", f"{_WORLD_MODEL}{_TOKENIZER}{DECODER}"),
    METRIC: (f"{_TOKENIZER}{METRIC}", f"{_WORLD_MODEL}{_TOKENIZER}{METRIC}"),
}
"""Where a model of LightZero has what the world model's tokenizer has."""

_POLICY, _POLICY_COPY = "head_policy.head_module.", "fc_policy_head."
_BUFFERS = ("running_mean", "running_var", "scaling_layer.shift", "scaling_layer.scale")
"""Ends of names of what no optimiser moves."""

_UNROLLED = 10
"""`num_unroll_steps` of LightZero's configurations."""

_MAX_SEQ_LEN = 8192
"""`max_seq_len` of 0.2.0's, to twice of which it stores rotations."""

_ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
_DECAY = 1e-4
"""0.2.0's optimiser. Source: `configure_optimizers_nanogpt`, `UniZeroPolicy.config`."""

_MODES: dict[str, tuple[WindowMode, ...]] = {
    "0.2.0": ("learned", "rope_lightzero"),
    "main": ("learned", "rope_lightzero", "rebuild", "reset"),
}
_NORMS = {"simnorm": "SimNorm", "layernorm": "LayerNorm"}

_CHANNELS, _MEMORY = 64, (3, 5, 5)
"""Of LightZero's encoders of images, and MemoryEnv's picture."""

_EXPANSION = 4
"""Hidden width of main's heads, in units of E, but in multi-task models."""

_log = logging.getLogger(__name__)


def save(
    params: Params,
    config: WorldModelConfig,
    path: str | Path,
    *,
    max_tokens: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Writes a checkpoint that LightZero loads with strict names, whole or not at all.

    "model" and "target_model" hold the weights. `config.layout` says which release's names they
    have; of 0.2.0 the optimiser's state is there too, before its first step, without which its
    policy loads nothing. Decoders, which kvjax does not have, are as training begins with them.

    Args:
      params: the Flax variables.
      config: their configuration.
      path: a file's, named `*.pth.tar` by custom.
      max_tokens: twice LightZero's `max_blocks`, for which a model with rotary positions has masks;
        20 by default, or the context's length if that is more. Others have a table of that length.
      compiled: whether names begin with `_orig_mod.`, as those of models behind `torch.compile` do.
        0.2.0's policy always puts its models there: `eval_muzero` and `train_unizero` need this,
        `UniZeroModel.load_state_dict` needs it left out. Main's policy compiles on request.

    Returns:
      What LightZero's model is made with, as `policy.model` of its configuration names it.

    Raises:
      ImportError: torch is not installed.
      OSError: the file cannot be written; what was there before stays. See `kvjax.base.files`.
      ValueError: LightZero has no such model, or the variables are not those of the configuration.
    """
    require(Path(path).suffix != SUFFIX, f"a LightZero checkpoint is no {SUFFIX} file, got {path}")
    torch = _torch(path)
    state = state_dict(params, config, max_tokens=max_tokens)
    made = {id(value): torch.from_numpy(np.array(value)) for value in state.values()}
    prefix = COMPILED if compiled else ""
    model = {prefix + name: made[id(value)] for name, value in state.items()}
    content = {"model": model, "target_model": model, "last_iter": 0, "last_step": 0}
    if config.layout == "0.2.0":
        content["optimizer_world_model"] = _optimiser(params, config)
    with files.replacing(path) as file:
        torch.save(content, file)
    if config.window_mode not in _MODES[config.layout]:
        text = 'LightZero %s has no window_mode "%s": it plays %s as "%s"'
        same = "rope_lightzero" if config.is_rotary else "learned"
        _log.warning(text, config.layout, config.window_mode, path, same)
    return settings(config, max_tokens=max_tokens)


def _torch(path: str | Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"writing the torch file {path} needs torch (pip install torch)"
        ) from error
    return torch


def state_dict(
    params: Params, config: WorldModelConfig, *, max_tokens: int | None = None
) -> dict[str, Any]:
    """A state dict of LightZero's model in numpy; copies of a tensor are one array.

    See `save` for arguments and errors.
    """
    _refuse(config)
    rows = _rows(config, max_tokens)
    own = variables.to_tensors(params, config) | unread.tensors(config)
    own |= {
        f"{name.removesuffix('running_mean')}num_batches_tracked": np.zeros((), np.int64)
        for name in own
        if name.endswith("running_mean")
    }
    mask, turns = np.tril(np.ones((rows, rows), np.float32)), _rotations(config)
    own |= {f"transformer.blocks.{i}.attn.mask": mask for i in range(config.num_layers)}
    own |= {} if turns is None else {"transformer.freqs_cis": turns}
    return {place: value for name, value in own.items() for place in _places(name, config)}


def _places(name: str, config: WorldModelConfig) -> list[str]:
    """All names that a tensor has in LightZero's model."""
    for begin, places in _PLACES.items():
        if name.startswith(begin):
            return [place + name.removeprefix(begin) for place in places]
    found = [_WORLD_MODEL + name]
    if config.is_continuous and name.startswith(_POLICY):
        found.append(f"{_WORLD_MODEL}{_POLICY_COPY}{name.removeprefix(_POLICY)}")
    if config.layout == "main" and name.startswith(HEADS):
        found.append(f"{_WORLD_MODEL}head_dict.{name}")
    return found


def _rows(config: WorldModelConfig, max_tokens: int | None) -> int:
    """Tokens that LightZero's masks are for."""
    rows = config.max_tokens
    if rows is None:
        rows = max(BLOCK * _UNROLLED, config.context_length) if max_tokens is None else max_tokens
    else:
        require(
            max_tokens in (None, rows),
            f"max_tokens must be the {rows} rows of the table of positions, got {max_tokens!r}",
        )
    least = config.window.full_length
    require(
        is_integer(rows) and rows >= least and rows % BLOCK == 0,
        f"max_tokens must be a multiple of {BLOCK}, at least {least}, got {rows!r}",
    )
    return rows


def _rotations(config: WorldModelConfig) -> Any:
    """What 0.2.0 stores of rotary positions, [positions, D / 2]; main stores nothing.

    Source: `precompute_freqs_cis`.
    """
    if not config.is_rotary or config.layout == "main":
        return None
    size = config.window.head_dim
    powers = np.arange(0, size, 2, dtype=np.float32)[: size // 2] / np.float32(size)
    speeds = np.float32(1) / np.power(np.float32(config.rope_theta), powers)
    angles = np.outer(np.arange(2 * _MAX_SEQ_LEN, dtype=np.float32), speeds)
    return np.exp(1j * angles.astype(np.float64)).astype(np.complex64)


def _optimiser(params: Params, config: WorldModelConfig) -> dict[str, Any]:
    """AdamW before its first step: matrices decay, vectors do not."""
    own: Tensors = variables.to_tensors(params, config) | unread.tensors(config)
    moved = [value.ndim >= 2 for name, value in own.items() if not name.endswith(_BUFFERS)]
    matrices = sum(moved)
    groups = [
        _ADAMW | {"weight_decay": _DECAY, "params": list(range(matrices))},
        _ADAMW | {"weight_decay": 0.0, "params": list(range(matrices, len(moved)))},
    ]
    return {"state": {}, "param_groups": groups}


def _refuse(config: WorldModelConfig) -> None:
    """Raises `ValueError` that names what no model of LightZero's has."""
    release, image = config.layout, config.image_shape
    is_sampled = config.num_sampled_actions is not None
    is_memory = image is not None and config.image_encoder == "memory"
    is_vit = image is not None and config.image_encoder == "vit"
    first, last = config.support
    problems = {
        "models without an encoder": not config.has_encoder,
        "one task of a multi-task model": config.task_size > 0,
        f"0.2.0's {_ends(config)} that end in LayerNorm": release == "0.2.0" and _ends(config),
        "vision transformers of 0.2.0": release == "0.2.0" and is_vit,
        "vision transformers of Sampled UniZero": is_sampled and is_vit,
        "main's Sampled UniZero of images, whose metric has weights of VGG": (
            release == "main" and is_sampled and image is not None and not is_vit
        ),
        f"main's heads of head_expansion {config.head_expansion}, expected {_EXPANSION} (others are"
        " multi-task models')": release == "main" and config.head_expansion != _EXPANSION,
        "encoders of vectors with LayerNorm between the layers, but of Sampled UniZero": (
            image is None and config.encoder_hidden_norm != "batchnorm" and not is_sampled
        ),
        f"encoders of images with {config.image_channels} channels, expected {_CHANNELS}": (
            config.image_channels != _CHANNELS
            and (is_memory or (image is not None and release == "0.2.0"))
        ),
        f"encoders of MemoryEnv's pictures {image}, expected {_MEMORY}": (
            is_memory and image != _MEMORY
        ),
        f"support {config.support}, expected one around 0": first != -last,
    }
    for what, is_so in problems.items():
        require(not is_so, f"LightZero has no such model: {what}")


def _ends(config: WorldModelConfig) -> str:
    norms = {"encoders": config.encoder_norm, "latent heads": config.latent_norm}
    return " and ".join(name for name, norm in norms.items() if norm == "layernorm")


def settings(config: WorldModelConfig, *, max_tokens: int | None = None) -> dict[str, Any]:
    """What LightZero's model is made with, as `policy.model` of its configuration names it."""
    image, rows = config.image_shape, _rows(config, max_tokens)
    kinds = {"resnet": "image", "vit": "image", "memory": "image_memory"}
    world_model: dict[str, Any] = {
        "obs_type": "vector" if image is None else kinds[config.image_encoder],
        "embed_dim": config.embed_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "action_space_size": config.num_actions,
        "context_length": config.context_length,
        "max_tokens": rows,
        "max_blocks": rows // BLOCK,
        "tokens_per_block": BLOCK,
        "group_size": config.simnorm_group,
        "support_size": config.support_size,
        "rotary_emb": config.is_rotary,
        "rope_theta": config.rope_theta,
        "max_seq_len": _MAX_SEQ_LEN,
        "continuous_action_space": config.is_continuous,
    }
    if config.num_sampled_actions is not None:
        world_model["num_of_sampled_actions"] = config.num_sampled_actions
    if config.is_continuous:
        for name in ("sigma_type", "fixed_sigma_value", "bound_type"):
            world_model[name] = getattr(config, name)
    if config.layout == "main":
        world_model |= {
            "encoder_type": config.image_encoder,
            "final_norm_option_in_encoder": _NORMS[config.encoder_norm],
            "final_norm_option_in_obs_head": _NORMS[config.latent_norm],
            "rebuild_kv_window_from_tokens": config.window_mode == "rebuild",
            "exact_kv_window_reset": config.window_mode == "reset",
        }
    return {
        "observation_shape": config.observation_size if image is None else list(image),
        "action_space_size": config.num_actions,
        "num_res_blocks": config.image_blocks,
        "num_channels": config.image_channels,
        "norm_type": "BN" if config.encoder_hidden_norm == "batchnorm" else "LN",
        "support_scale": config.support[1],
        "world_model_cfg": world_model,
    }
