"""LightZero's `KeysValues`: looked into, packed into words, and built anew from them.

It is known by its attributes alone (`_keys_values`, of each layer `_k_cache` and `_v_cache`, of
each cache `_cache` and `_size`), so every release's own class goes in and comes out. Words are the
tensors' bits: what comes out is equal bit for bit, whatever the dtype, unused slots included, and
shares memory with nothing.

Shapes: L layers, N rows (1 in LightZero's pools), H heads, T slots, D head size, W words.
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from kvjax.base.values import require

KeysValues = Any
"""LightZero's class of that name, of either release."""

Words = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the caches of one pool have in common."""

    num_layers: int  # L
    shape: tuple[int, ...]  # [N, H, T, D] of each layer's keys, and of its values
    dtype: Any  # torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.num_layers} layers of {self.dtype} {self.shape} on {self.device}"


def caches(keys_values: KeysValues) -> list[Any]:
    """Keys and values of each layer in turn: 2 L objects that hold `_cache` and `_size`."""
    return [c for layer in keys_values._keys_values for c in (layer._k_cache, layer._v_cache)]


def layout(keys_values: KeysValues) -> Layout:
    """What a `KeysValues` looks like.

    Raises:
      ValueError: it is none, or its layers differ among each other.
    """
    try:
        found = caches(keys_values)
        valid = bool(found) and all(len(x._cache.shape) == 4 and x._size >= 0 for x in found)
    except (AttributeError, TypeError):
        valid = False
    require(
        valid,
        "expected LightZero's KeysValues (layers of caches with tensors [N, H, T, D]), got"
        f" {type(keys_values).__name__}",
    )
    layouts = {
        Layout(len(found) // 2, tuple(x.shape), x.dtype, str(x.device))
        for x in (cache._cache for cache in found)
    }
    require(len(layouts) == 1, f"layers differ: {', '.join(sorted(map(str, layouts)))}")
    return layouts.pop()


def pack(keys_values: KeysValues) -> tuple[Words, Words]:
    """The bits of all tensors, [W] int32, and the sizes of all caches, [2 L] int32. Copies."""
    import torch

    held = caches(keys_values)
    stacked = torch.stack([cache._cache.detach() for cache in held]).cpu()
    sizes = np.asarray([int(cache._size) for cache in held], np.int32)
    return stacked.reshape(-1).view(torch.int32).numpy(), sizes


def skeleton(keys_values: KeysValues) -> KeysValues:
    """The same objects without tensors: what `unpack` builds on."""
    empty = [None] * len(caches(keys_values))
    return _with_caches(keys_values, empty, [0] * len(empty))


def unpack(bones: KeysValues, shape: Layout, words: Words, sizes: Words) -> KeysValues:
    """A new `KeysValues` of its own memory, from a skeleton and what `pack` made. Copies."""
    import torch

    flat = torch.from_numpy(np.array(words)).view(shape.dtype)
    tensors = flat.reshape(-1, *shape.shape).to(shape.device)
    return _with_caches(bones, list(tensors), sizes.tolist())


def _with_caches(keys_values: KeysValues, tensors: list[Any], sizes: list[int]) -> KeysValues:
    """A copy of the objects, down to the caches, that holds other tensors."""
    built = copy.copy(keys_values)
    built._keys_values = tuple(copy.copy(layer) for layer in keys_values._keys_values)
    for layer in built._keys_values:
        layer._k_cache, layer._v_cache = copy.copy(layer._k_cache), copy.copy(layer._v_cache)
    for cache, tensor, size in zip(caches(built), tensors, sizes, strict=True):
        cache._cache, cache._size = tensor, size
    return built
