"""A batch of caches in torch's hands: installed in a world model, read back, looked at row by row.

Shapes: B rows, C context_length in tokens, L layers, H heads, D head size. A batch's memory is one
tensor [2 L, B', H, C, D] with B' >= B, keys and values of each layer in turn; LightZero sees views
of it, [B, H, C, D] each.
"""

import dataclasses
from collections.abc import MutableSequence
from typing import Any

from kvjax.config import require


@dataclasses.dataclass(frozen=True)
class Batch:
    """Aligned caches that torch owns alone: the model writes its new tokens into them."""

    memory: Any  # [2 L, B', H, C, D] tensor
    views: tuple[Any, ...]  # 2 L tensors [B, H, C, D], keys and values of each layer in turn
    lengths: list[int]  # of each row, in tokens
    sources: list[int]  # where each row was found, see `kvjax.lightzero.layout`
    tokens: list[Any] | None = None  # raw ones of each row [length, E], where they are kept

    @property
    def size(self) -> int:
        """Tokens of the longest row, where all rows end."""
        return max(self.lengths)

    @property
    def hits(self) -> int:
        """Rows that were found."""
        return len(self.sources) - self.sources.count(0)


def views_of(memory: Any, rows: int) -> tuple[Any, ...]:
    """A batch's memory as the caches of its first rows: 2 L tensors [rows, H, C, D]."""
    views: tuple[Any, ...] = (memory if rows == memory.shape[1] else memory[:, :rows]).unbind()
    return views


def empty_batch(memory: Any, rows: int) -> Batch:
    """Rows of no tokens in zeroed memory."""
    return Batch(memory, views_of(memory, rows), [0] * rows, [0] * rows)


def install(keys_values: Any, batch: Batch, size: int) -> None:
    """Makes a LightZero `KeysValues` hold a batch whose rows end at `size`."""
    views = iter(batch.views)
    for layer in keys_values._keys_values:
        for cache in (layer._k_cache, layer._v_cache):
            cache._cache, cache._size = next(views), size


def tensors(keys_values: Any) -> list[Any]:
    """The 2 L cache tensors of a `KeysValues`, keys and values of each layer in turn."""
    layers = keys_values._keys_values
    return [c._cache for layer in layers for c in (layer._k_cache, layer._v_cache)]


def holds(keys_values: Any, batch: Batch) -> bool:
    """Whether a `KeysValues` is a batch's own memory; updates make new tensors of it."""
    pairs = zip(tensors(keys_values), batch.views, strict=True)
    return all(a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape) for a, b in pairs)


def stacked(keys_values: Any, capacity: int) -> Any:
    """Memory [2 L, capacity, H, C, D] with a copy of what a `KeysValues` holds.

    Raises:
      ValueError: the caches are not float32.
    """
    import torch

    held = tensors(keys_values)

    require(
        held[0].dtype is torch.float32,
        f"expected float32 caches, got {held[0].dtype}: attach supports no half precision",
    )
    memory = torch.stack(held).detach()
    missing = capacity - memory.shape[1]
    return torch.nn.functional.pad(memory, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous()


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
