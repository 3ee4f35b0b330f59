"""A batch of caches in torch's hands: installed in a world model, read back, looked at row by row.

Shapes: B rows, C context_length in tokens, K = C - 3, L layers, H heads, D head size, M slots of a
row. A batch's memory is one tensor [2 L, B', H, M, D] with B' >= B, keys and values of each layer
in turn; all rows end at slot K when they are found. LightZero sees C slots of it, from the first
one of the longest row on: 2 L tensors [B, H, C, D].
"""

import dataclasses
from collections.abc import MutableSequence
from typing import Any

from kvjax.base.values import require
from kvjax.config import BLOCK

_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Float32 memory of a batch. What is rarely looked at is made when somebody does."""

    flat: Any  # tensor [2 L * B' * H * M * D]
    shape: tuple[int, ...]  # (2 L, B', H, M, D)
    place: int  # address

    @property
    def tensor(self) -> Any:
        """As a tensor [2 L, B', H, M, D]."""
        return self.flat.view(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of `shape`, in numbers."""
        _, rows, heads, slots, size = self.shape
        return rows * heads * slots * size, heads * slots * size, slots * size, size, 1


def memory_of(flat: Any, shape: tuple[int, ...]) -> Memory:
    """The memory of a flat tensor."""
    return Memory(flat, shape, flat.data_ptr())


@dataclasses.dataclass(frozen=True)
class Batch:
    """Aligned caches that torch owns alone: the model writes its new tokens into them."""

    memory: Memory
    views: list[Any]  # 2 L tensors [B, H, C, D], keys and values of each layer in turn
    places: list[int]  # their addresses
    lengths: list[int]  # of each row, in tokens
    sources: list[int]  # where each row was found, see `kvjax.lightzero.attach.layout`
    tokens: list[Any] | None = None  # raw ones of each row [length, E], where they are kept

    @property
    def size(self) -> int:
        """Tokens of the longest row, where all rows end."""
        return max(self.lengths)

    @property
    def hits(self) -> int:
        """Rows that were found."""
        return len(self.sources) - self.sources.count(0)

    @property
    def device(self) -> Any:
        """Where the caches are."""
        return self.memory.flat.device


def make_batch(
    memory: Memory, context_length: int, lengths: list[int], sources: list[int]
) -> Batch:
    """A batch of the first rows of a memory, one for each length."""
    caches, _, heads, _, size = memory.shape
    step, *strides = memory.strides
    start = (_found_end(context_length) - max(lengths)) * size
    starts = range(start, start + caches * step, step)
    # One call for each view: to cut them from one, as slices or by unbind, takes longer.
    shape, flat = (len(lengths), heads, context_length, size), memory.flat
    views = [flat.as_strided(shape, strides, first) for first in starts]
    places = [memory.place + _FLOAT_BYTES * first for first in starts]
    return Batch(memory, views, places, lengths, sources)


def _found_end(context_length: int) -> int:
    """K: behind this slot the rows of a batch end that was just found."""
    return context_length - 1 - BLOCK


@dataclasses.dataclass(frozen=True)
class Written:
    """Rows of caches to be filed."""

    memory: Memory
    end: int  # behind this slot all rows end, zeros before them


def written(keys_values: Any, batch: Batch, context_length: int) -> Written:
    """The rows of a `KeysValues` that holds a batch, in that batch's own memory."""
    return Written(batch.memory, _found_end(context_length) - batch.size + _size(keys_values))


def copied(keys_values: Any, capacity: int, context_length: int) -> Written:
    """A copy of the rows that any `KeysValues` holds.

    Raises:
      ValueError: the caches are not float32.
    """
    found_end = _found_end(context_length)
    memory = _stacked(keys_values, capacity, found_end)
    end = found_end + _size(keys_values)
    return Written(memory_of(memory.flatten(), tuple(memory.shape)), end)


def _size(keys_values: Any) -> int:
    size: int = keys_values._keys_values[0]._k_cache._size
    return size


def install(keys_values: Any, batch: Batch, size: int) -> None:
    """Makes a LightZero `KeysValues` hold a batch whose rows end at `size`."""
    views = iter(batch.views)
    for layer in keys_values._keys_values:
        for cache in (layer._k_cache, layer._v_cache):
            cache._cache, cache._size = next(views), size


def release(keys_values: Any) -> None:
    """Lets go of the batch that a `KeysValues` holds, so that its memory can be used again."""
    for layer in keys_values._keys_values:
        layer._k_cache._cache = layer._v_cache._cache = None


def tensors(keys_values: Any) -> list[Any]:
    """The 2 L cache tensors of a `KeysValues`, keys and values of each layer in turn."""
    layers = keys_values._keys_values
    return [c._cache for layer in layers for c in (layer._k_cache, layer._v_cache)]


def holds(keys_values: Any, batch: Batch) -> bool:
    """Whether a `KeysValues` is a batch's own memory; updates make new tensors of it."""
    held, view = tensors(keys_values), batch.views[0]
    if [x.data_ptr() for x in held] != batch.places:
        return False
    shape, strides = view.shape, view.stride()
    return all(x.shape == shape and x.stride() == strides for x in held)


def _stacked(keys_values: Any, capacity: int, before: int) -> Any:
    """What a `KeysValues` holds, behind `before` empty slots: [2 L, capacity, H, M, D]."""
    import torch

    held = tensors(keys_values)
    require(
        held[0].dtype is torch.float32,
        f"expected float32 caches, got {held[0].dtype}: attach supports no half precision",
    )
    memory = torch.stack(held).detach()
    missing = capacity - memory.shape[1]
    return torch.nn.functional.pad(memory, (0, 0, before, 0, 0, 0, 0, missing)).contiguous()


class Rows(MutableSequence[Any]):
    """`keys_values_wm_list` of a batch: one `KeysValues` per row, made when somebody looks.

    Nobody does during a search, where the aligned batch is all that is read.
    """

    def __init__(self, batch: Batch, make_empty: Any) -> None:
        self._batch: Batch | None = batch
        self._make_empty = make_empty
        self._items: list[Any] | None = None

    @property
    def untouched(self) -> Batch | None:
        """The batch, while it is all that this list holds."""
        return self._batch if self._items is None else None

    def _made(self) -> list[Any]:
        if self._items is None:
            batch = self._batch
            self._items = [] if batch is None else self._separate(batch)
            self._batch = None
        return self._items

    def _separate(self, batch: Batch) -> list[Any]:
        rows = []
        for row, length in enumerate(batch.lengths):
            single, first = self._make_empty(), batch.size - length
            for cache, view in zip(tensors(single), batch.views, strict=True):
                cache.zero_()
                cache[0, :, :length] = view[row, :, first : batch.size]
            install_sizes(single, length)
            rows.append(single)
        return rows

    def __len__(self) -> int:
        if self._items is not None:
            return len(self._items)
        return 0 if self._batch is None else len(self._batch.lengths)

    def __getitem__(self, index: Any) -> Any:
        return self._made()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._made()[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._made()[index]

    def insert(self, index: int, value: Any) -> None:
        """Inserts a `KeysValues`."""
        self._made().insert(index, value)

    def clear(self) -> None:
        """Forgets the batch."""
        self._batch, self._items = None, []


def install_sizes(keys_values: Any, size: int) -> None:
    """Says how many tokens a `KeysValues` holds."""
    for layer in keys_values._keys_values:
        layer._k_cache._size = layer._v_cache._size = size
