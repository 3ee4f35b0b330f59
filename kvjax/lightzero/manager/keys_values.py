"""LightZero's `KeysValues` at the edge of kvjax: packed into words, and built anew from them.

A `KeysValues` is known by its attributes alone (`_keys_values`, of each layer `_k_cache` and
`_v_cache`, of each cache `_cache` and `_size`), so every release's own class goes in and comes out.
Words are the tensors' bits: what comes out is equal bit for bit, whatever the dtype, unused slots
included, and shares memory with nothing.

Shapes: L layers, N rows (1 in LightZero's pools), H heads, T slots, D head size, W words.
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

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


def _caches(keys_values: KeysValues) -> list[Any]:
    """Keys and values of each layer in turn: 2 L objects that hold `_cache` and `_size`."""
    try:
        layers = keys_values._keys_values
        found = [cache for layer in layers for cache in (layer._k_cache, layer._v_cache)]
        if found and all(len(x._cache.shape) == 4 and x._size >= 0 for x in found):
            return found
    except (AttributeError, TypeError):
        pass
    raise ValueError(
        "expected LightZero's KeysValues (layers of caches with tensors [N, H, T, D]), got"
        f" {type(keys_values).__name__}"
    )


def layout(keys_values: KeysValues) -> Layout:
    """What a `KeysValues` looks like.

    Raises:
      ValueError: it is none, or its layers differ among each other.
    """
    caches = _caches(keys_values)
    layouts = {
        Layout(len(caches) // 2, tuple(x.shape), x.dtype, str(x.device))
        for x in (cache._cache for cache in caches)
    }
    if len(layouts) > 1:
        raise ValueError(f"layers differ: {', '.join(sorted(map(str, layouts)))}")
    return layouts.pop()


def pack(keys_values: KeysValues) -> tuple[Words, Words]:
    """The bits of all tensors, [W] int32, and the sizes of all caches, [2 L] int32. Copies."""
    import torch

    caches = _caches(keys_values)
    stacked = torch.stack([cache._cache.detach() for cache in caches]).cpu()
    sizes = np.asarray([int(cache._size) for cache in caches], np.int32)
    return stacked.reshape(-1).view(torch.int32).numpy(), sizes


def skeleton(keys_values: KeysValues) -> KeysValues:
    """The same objects without tensors: what `unpack` builds on."""
    empty = [None] * len(_caches(keys_values))
    return _with_caches(keys_values, empty, [0] * len(empty))


def unpack(bones: KeysValues, shape: Layout, words: Words, sizes: Words) -> KeysValues:
    """A new `KeysValues` of its own memory, from a skeleton and what `pack` made. Copies."""
    import torch

    flat = torch.from_numpy(np.array(words)).view(shape.dtype)
    tensors = flat.reshape(-1, *shape.shape).to(shape.device)
    return _with_caches(bones, list(tensors), sizes.tolist())


def _with_caches(keys_values: KeysValues, tensors: list[Any], sizes: list[int]) -> KeysValues:
    """A copy of the objects, down to the caches, that holds other tensors."""
    built, contents = copy.copy(keys_values), iter(zip(tensors, sizes, strict=True))
    layers = [copy.copy(layer) for layer in keys_values._keys_values]
    for layer in layers:
        for name in ("_k_cache", "_v_cache"):
            cache = copy.copy(getattr(layer, name))
            cache._cache, cache._size = next(contents)
            setattr(layer, name, cache)
    built._keys_values = tuple(layers)
    return built
