"""A state dict's tensors by the names that inference knows, checked before they are copied."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from kvjax.base.values import require
from kvjax.lightzero.checkpoint import encoder_tensors
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

MASK, ROTATIONS, CLIP_BOUND = "attn.mask", "freqs_cis", "policy_logits_running_max"
"""Ends of names of ignored tensors that tell something all the same."""

FLOATS = ("float16", "bfloat16", "float32", "float64")

_TELLING = (MASK, ROTATIONS, CLIP_BOUND)
_WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|module)\."  # torch.compile, DistributedDataParallel
_ENCODER_COPY = "tokenizer.encoder."


@dataclasses.dataclass(frozen=True)
class Sorted:
    """What inference reads of a state dict, and what it does not."""

    weights: Tensors
    ignored: tuple[str, ...]  # names as the source has them
    telling: dict[str, Any]  # ignored tensors that tell of the configuration, uncopied


def sort(state: Any) -> Sorted:
    """Strips wrappers, folds the encoder's copies into one, sets ignored tensors aside.

    Raises:
      ValueError: it is no state dict of a model, or a tensor of it cannot be a weight.
    """
    _require_state_dict(state)
    weights: Tensors = {}
    ignored: list[str] = []
    telling: dict[str, Any] = {}
    for original, tensor in state.items():
        name = _inner_name(original)
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
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


def _require_state_dict(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f'"model" is a {type(state).__name__}, expected a state dict')
    require("param_groups" not in state, "this is an optimiser's state, expected a model's")
    for name in state:
        if not isinstance(name, str):
            raise ValueError(f"a tensor is named {name!r}, expected text")


def _inner_name(name: str) -> str:
    name = re.sub(_WRAPPERS, "", name).removeprefix("world_model.")
    if name.startswith(_ENCODER_COPY):
        name = encoder_tensors.PREFIX + name.removeprefix(_ENCODER_COPY)
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
    require(kind in FLOATS, f"{name} holds {kind}, expected floating-point numbers")
    layout = str(tensor.layout).removeprefix("torch.")
    require(layout == "strided", f"{name} is stored as {layout}, expected a dense tensor")
    require(tensor.device.type != "meta", f"{name} has a shape and no values (device meta)")
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    require(needed <= stored, f"{name} claims {needed} bytes, {stored} are stored")
