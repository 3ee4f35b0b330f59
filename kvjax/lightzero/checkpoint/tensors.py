"""LightZero's tensors: which ones inference reads, what their shapes tell, what is refused."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from kvjax.base.values import require
from kvjax.config import BLOCK, Layout, WorldModelConfig
from kvjax.lightzero.checkpoint import encoding
from kvjax.lightzero.checkpoint.encoding import ENCODER
from kvjax.model import world_model

Tensors = dict[str, np.ndarray[Any, Any]]

IGNORED = (
    r"decoder_network\..*",
    r"head_dict\..*",
    r"lpips\..*",
    r".*\.attn\.mask",
    r".*\.freqs_cis",
    r".*\.num_batches_tracked",
    r"policy_logits_running_(max|min)",
)
"""Tensors that a checkpoint holds and inference does not read (patterns of their names)."""

CLIP_BOUND = "policy_logits_running_max"
_MASK, _ROTATIONS = "attn.mask", "freqs_cis"
_TELLING = (_MASK, _ROTATIONS, CLIP_BOUND)
"""Ends of names of ignored tensors that tell something all the same."""

_WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|module)\."  # torch.compile, DistributedDataParallel
_ENCODER_COPY = "tokenizer.encoder."
_POLICY_COPY, _POLICY = "fc_policy_head.", "head_policy.head_module."
_FLOATS = ("float16", "bfloat16", "float32", "float64")

HEADS = ("head_rewards", "head_observations", "head_policy", "head_value")
LATENT_NORM = "head_observations.head_module.5"
HEAD_OUTPUT = {"0.2.0": 2, "main": 4}
"""Place of each head's last layer."""

_FINAL_NORM = "transformer.ln_f.weight"
_POSITIONS = "pos_emb.weight"
_ACTIONS, _VECTOR_ACTIONS = "act_embedding_table.weight", "act_embedding_table.0.weight"
_SIGMA_LAYER, _SIGMAS = f"{_POLICY}log_sigma_layer.weight", f"{_POLICY}log_sigma_param"

_UNSUPPORTED = {
    r"(?!task_emb\.weight$).*task_emb": "multi-task models",
    r"transformer\.blocks\.\d+\.gate[12]\.": "GRU gating",
    r"transformer\.blocks\.\d+\.(experts|feed_forward\.(experts|gate))\.": "mixture of experts",
    r".*\.lora_": "LoRA adapters",
    r"head_\w+\.head_module\.\d+\.(experts|gate|phi)\b": "heads with a mixture of experts",
    r".*register_token": "register tokens",
}
"""Patterns of names, and the variants that have such tensors."""

_THETA_TOLERANCE = 1e-3

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sorted:
    """What inference reads of a state dict, and what it does not."""

    weights: Tensors
    ignored: tuple[str, ...]  # names as the source has them
    telling: dict[str, Any]  # ignored tensors that tell of the configuration, uncopied
    embedding: np.ndarray[Any, Any] | None = None  # of the task that a model is taken for


def sort(state: Any, *, reads_encoder: bool = True) -> Sorted:
    """Strips wrappers, folds copies of a module into one, sets ignored tensors aside.

    Raises:
      ValueError: it is no state dict of a model, the names of its tensors are those of a variant
        that kvjax does not have, or a tensor of it cannot be a weight.
    """
    _require_state_dict(state)
    names = {original: _inner_name(original) for original in state}
    _refuse_names([name for name in names.values() if not _is_ignored(name, reads_encoder)])
    weights: Tensors = {}
    ignored: list[str] = []
    telling: dict[str, Any] = {}
    for original, tensor in state.items():
        name = names[original]
        if _is_ignored(name, reads_encoder):
            ignored.append(original)
            telling |= {name: tensor} if name.endswith(_TELLING) else {}
            continue
        value = _to_numpy(original, tensor)
        if name in weights:
            if not np.array_equal(weights[name], value, equal_nan=True):
                raise ValueError(f"{original} differs from the first copy of {name}")
            ignored.append(original)
        weights.setdefault(name, value)
    return Sorted(weights, tuple(ignored), telling)


def _is_ignored(name: str, reads_encoder: bool) -> bool:
    if name.startswith(ENCODER) and not reads_encoder:
        return True
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def _refuse_names(names: list[str]) -> None:
    """Before a tensor is looked at: text encoders, for example, hold integers."""
    for variants, hint in ((_UNSUPPORTED, ""), (encoding.UNSUPPORTED, encoding.LEAVE_OUT)):
        for pattern, variant in variants.items():
            for name in names:
                if re.match(pattern, name):
                    raise ValueError(f"unsupported variant: {variant} (tensor {name}){hint}")


def _require_state_dict(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f'"model" is a {type(state).__name__}, expected a state dict')
    require("param_groups" not in state, "this is an optimiser's state, expected a model's")
    for name in state:
        require(isinstance(name, str), f"a tensor is named {name!r}, expected text")


def _inner_name(name: str) -> str:
    name = re.sub(_WRAPPERS, "", name).removeprefix("world_model.")
    if name.startswith(_ENCODER_COPY):
        name = ENCODER + name.removeprefix(_ENCODER_COPY)
    if name.startswith(_POLICY_COPY):
        name = _POLICY + name.removeprefix(_POLICY_COPY)
    return name.removeprefix("tokenizer.")


def _to_numpy(name: str, tensor: Any) -> np.ndarray[Any, Any]:
    if isinstance(tensor, np.ndarray | jax.Array):
        world_model.check_kind(name, tensor.dtype)
        return np.asarray(tensor)
    if not hasattr(tensor, "untyped_storage"):
        raise ValueError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    try:
        _require_dense_floats(name, tensor)
        return cast("np.ndarray[Any, Any]", tensor.detach().cpu().float().numpy().copy())
    except (RuntimeError, TypeError) as error:  # a tensor of tensors, on a device that is not there
        raise ValueError(f"{name} cannot be read: {error}") from error


def _require_dense_floats(name: str, tensor: Any) -> None:
    """A torch tensor says a size that its memory need not have."""
    kind = str(tensor.dtype).removeprefix("torch.")
    require(kind in _FLOATS, f"{name} holds {kind}, expected floating-point numbers")
    layout = str(tensor.layout).removeprefix("torch.")
    require(layout == "strided", f"{name} is stored as {layout}, expected a dense tensor")
    require(tensor.device.type != "meta", f"{name} has a shape and no values (device meta)")
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    require(needed <= stored, f"{name} claims {needed} bytes, {stored} are stored")


def refuse_variants(found: Sorted) -> None:
    """Raises `ValueError` that names the variant which shapes tell, and a tensor of it."""
    weights = found.weights
    has_rotations = any(name.endswith(_ROTATIONS) for name in found.telling)
    is_early = layout(weights) == "0.2.0" and not has_rotations  # else it saves them
    if is_early and _FINAL_NORM in weights:
        _shape(weights, _POSITIONS, 2)


def layout(weights: Tensors) -> Layout:
    """Which release's heads the tensors are."""
    return "main" if "head_rewards.head_module.4.weight" in weights else "0.2.0"


def support_size(weights: Tensors) -> int:
    """Bins of the reward head."""
    return _shape(weights, f"head_rewards.head_module.{HEAD_OUTPUT[layout(weights)]}.weight", 2)[0]


def inferred_fields(found: Sorted) -> dict[str, Any]:
    """Fields of `WorldModelConfig` that the tensors tell, `support` only by its size.

    Raises:
      ValueError: a tensor that would tell is missing or has other dimensions.
    """
    weights = found.weights
    embed_dim = _shape(weights, _FINAL_NORM, 1)[0]
    layers = {m[1] for name in weights if (m := re.match(r"transformer\.blocks\.(\d+)\.", name))}
    bins = support_size(weights)
    fields = {
        "embed_dim": embed_dim,
        "num_layers": len(layers),
        "max_tokens": _shape(weights, _POSITIONS, 2)[0] if _POSITIONS in weights else None,
        "support": (-(bins // 2), bins // 2),
        "layout": layout(weights),
        "latent_norm": _norm(f"{LATENT_NORM}.weight" in weights),
    }
    fields |= _action_fields(weights) | _head_fields(weights) | _task_fields(found, embed_dim)
    return fields | _rotated_heads(found, embed_dim) | encoding.fields(weights)


def _head_fields(weights: Tensors) -> dict[str, int]:
    """How much wider than the model main's heads are: 4, in multi-task models 1."""
    if layout(weights) != "main":
        return {}
    name = f"{HEADS[0]}.head_module.1.weight"
    hidden, width = _shape(weights, name, 2)
    require(
        width > 0 and hidden > 0 and hidden % width == 0,
        f"{name} has shape {hidden, width}, expected a multiple of {width} rows",
    )
    return {"head_expansion": hidden // width}


def _task_fields(found: Sorted, embed_dim: int) -> dict[str, int]:
    """What a task's embedding leaves of the width to tokens of actions."""
    if found.embedding is None or _ACTIONS not in found.weights:
        return {}
    return {"task_size": embed_dim - _shape(found.weights, _ACTIONS, 2)[1]}


def _action_fields(weights: Tensors) -> dict[str, Any]:
    """Which actions there are; parameters of deviations do not tell what is made of them."""
    if _VECTOR_ACTIONS not in weights:
        return {"num_actions": _shape(weights, _ACTIONS, 2)[0], "sigma_type": None}
    fields: dict[str, Any] = {"num_actions": _shape(weights, _VECTOR_ACTIONS, 2)[1]}
    if _SIGMAS in weights:
        return fields
    return fields | {"sigma_type": "conditioned" if _SIGMA_LAYER in weights else "fixed"}


def _norm(has_weight: bool) -> str:
    return "layernorm" if has_weight else "simnorm"


def _shape(weights: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    """A tensor's shape, which must be there and have so many dimensions."""
    if name not in weights:
        raise ValueError(f"missing tensor {name}: this is not a UniZero world model, or not all")
    shape = tuple(weights[name].shape)
    require(len(shape) == ndim, f"{name} has shape {shape}, expected {ndim} dimensions")
    return shape


def _rotated_heads(found: Sorted, embed_dim: int) -> dict[str, int]:
    """Release 0.2.0 stores rotations [positions, D / 2], whose width tells the heads."""
    for name, rotations in found.telling.items():
        if name.endswith(_ROTATIONS) and len(rotations.shape) == 2:
            head_dim = 2 * rotations.shape[1]
            is_fitting = head_dim > 0 and embed_dim % head_dim == 0
            require(is_fitting, f"{name} rotates heads of {head_dim}, embed_dim is {embed_dim}")
            return {"num_heads": embed_dim // head_dim}
    return {}


def check_positions(config: WorldModelConfig, found: Sorted) -> None:
    """Refuses windows that reach beyond what the model has positions for.

    A window of C tokens is full with C - 1; both releases fail at once where the table has fewer
    rows. Rotary models of main extend their mask: for them a warning tells it.

    Raises:
      ValueError: the table, the mask or the rotations contradict the configuration.
    """
    longest, rows = config.window.full_length, config.max_tokens
    length = f"a window of context_length {config.context_length}, with {longest} tokens when full,"
    require(
        rows is None or rows >= longest,
        f"{length} needs {longest} rows of {_POSITIONS}, which has {rows}",
    )
    for name, tensor in found.telling.items():
        if name.endswith(_ROTATIONS):
            _check_theta(name, tensor, config)
        elif name.endswith(_MASK):
            mask = int(tensor.shape[-1]) if len(tensor.shape) else 0
            require(
                rows in (None, mask), f"{name} is for {mask} tokens, {_POSITIONS} has {rows} rows"
            )
            if mask < longest:
                text = f"{length} is longer than the {mask} tokens that {name} is for"
                require(config.layout == "main", text)
                _log.warning("%s", text)
                return


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
