"""A batch of caches in torch's hands: installed in a world model, read back, looked at row by row.

Shapes: B rows, C context_length in tokens, K = C - 3, L layers, H heads, D head size, E embedding
size, M slots of a row, T new tokens, S tokens before and with them. A batch's memory is one tensor
[2 L, B', H, M, D] with B' >= B, keys and values of each layer in turn; all rows end at slot K when
they are found. LightZero sees C slots of it, from the first one of the longest row on: 2 L tensors
[B, H, C, D].
"""

import contextlib
from collections.abc import Iterator, MutableSequence
from typing import Any, NamedTuple

import numpy as np

from kvjax.base import dlpack
from kvjax.base.values import require
from kvjax.lightzero import keys_values as kv
from kvjax.lightzero.keys_values import KeysValues

_FLOAT_BYTES = 4


class Memory(NamedTuple):
    """Float32 memory of a batch. What is rarely looked at is made when somebody does."""

    flat: Any  # tensor [2 L * B' * H * M * D]
    shape: tuple[int, ...]  # (2 L, B', H, M, D)
    end: int  # behind this slot all rows end, zeros before them
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

    def as_argument(self) -> Any:
        """As an argument [L, 2, B', H, M, D] of a jitted call that is waited for."""
        # A numpy view is dispatched faster than an imported array, and copied no more.
        flat = self.flat.numpy() if self.flat.is_cpu else dlpack.import_shared(self.flat)
        return flat.reshape(-1, 2, *self.shape[1:])


def memory_of(flat: Any, shape: tuple[int, ...], end: int) -> Memory:
    """The memory of a flat tensor."""
    return Memory(flat, shape, end, flat.data_ptr())


class Batch(NamedTuple):
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
    def pads(self) -> list[int]:
        """Empty slots before each row's first token."""
        size = self.size
        return [size - length for length in self.lengths]

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
    start = (memory.end - max(lengths)) * size
    starts = range(start, start + caches * step, step)
    # One call for each view: to cut them from one, as slices or by unbind, takes longer.
    shape, flat = (len(lengths), heads, context_length, size), memory.flat
    views = [flat.as_strided(shape, strides, first) for first in starts]
    places = [memory.place + _FLOAT_BYTES * first for first in starts]
    return Batch(memory, views, places, lengths, sources)


def written(keys_values: KeysValues, batch: Batch) -> Memory:
    """The rows of a `KeysValues` that holds a batch, in that batch's own memory."""
    memory = batch.memory
    end = memory.end - batch.size + _size(keys_values)
    return Memory(memory.flat, memory.shape, end, memory.place)


def copied(keys_values: KeysValues, capacity: int, before: int) -> Memory:
    """A copy of what any `KeysValues` holds, of `capacity` rows and behind `before` empty slots.

    Raises:
      ValueError: the caches are not float32.
    """
    import torch

    held = tensors(keys_values)
    require(
        held[0].dtype is torch.float32,
        f"expected float32 caches, got {held[0].dtype}: attach supports no half precision",
    )
    stacked = torch.stack(held).detach()
    padding = 0, 0, before, 0, 0, 0, 0, capacity - stacked.shape[1]
    memory = torch.nn.functional.pad(stacked, padding).contiguous()
    return memory_of(memory.flatten(), tuple(memory.shape), before + _size(keys_values))


def _size(keys_values: KeysValues) -> int:
    size: int = keys_values._keys_values[0]._k_cache._size
    return size


def tensors(keys_values: KeysValues) -> list[Any]:
    """The 2 L cache tensors of a `KeysValues`, keys and values of each layer in turn."""
    # As `keys_values.caches`, without a list of them: every simulation looks.
    layers = keys_values._keys_values
    return [c._cache for layer in layers for c in (layer._k_cache, layer._v_cache)]


def install(keys_values: KeysValues, batch: Batch, size: int) -> None:
    """Makes a LightZero `KeysValues` hold a batch whose rows end at `size`."""
    views = iter(batch.views)
    for layer in keys_values._keys_values:
        for cache in (layer._k_cache, layer._v_cache):
            cache._cache, cache._size = next(views), size


def holds(keys_values: KeysValues, batch: Batch) -> bool:
    """Whether a `KeysValues` is a batch's own memory; updates make new tensors of it."""
    held, view = tensors(keys_values), batch.views[0]
    if [x.data_ptr() for x in held] != batch.places:
        return False
    shape, strides = view.shape, view.stride()
    return all(x.shape == shape and x.stride() == strides for x in held)


class Rows(MutableSequence[Any]):
    """`keys_values_wm_list` of a batch: one `KeysValues` per row, made when somebody looks.

    Nobody does during a search, where the aligned batch is all that is read.
    """

    def __init__(self, batch: Batch, make_empty: Any) -> None:
        self._batch: Batch | None = batch
        self._make_empty = make_empty
        self._items: list[Any] = []

    @property
    def untouched(self) -> Batch | None:
        """The batch, while it is all that this list holds."""
        return self._batch

    def _made(self) -> list[Any]:
        if self._batch is not None:
            self._items, self._batch = self._separate(self._batch), None
        return self._items

    def _separate(self, batch: Batch) -> list[Any]:
        rows = []
        for row, length in enumerate(batch.lengths):
            single, first = self._make_empty(), batch.size - length
            for cache, view in zip(kv.caches(single), batch.views, strict=True):
                cache._cache.zero_()
                cache._cache[0, :, :length] = view[row, :, first : batch.size]
                cache._size = length
            rows.append(single)
        return rows

    def __len__(self) -> int:
        return len(self._items if self._batch is None else self._batch.lengths)

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


def hold(wm: Any, batch: Batch) -> None:
    """Makes a batch a world model's list of caches."""

    def make_empty() -> Any:
        return wm.transformer.generate_empty_keys_values(n=1, max_tokens=wm.context_length)

    state = vars(wm)  # past the module's own setter, as neither is a parameter
    state["keys_values_wm_list"] = Rows(batch, make_empty)
    state["keys_values_wm_size_list"] = list(batch.lengths)
    if batch.tokens is not None:
        wm.keys_values_wm_token_context_list = [x.to(batch.device) for x in batch.tokens]


def let_go(wm: Any) -> None:
    """Undoes `hold` and `install`, so that the memory of the batch can be used again."""
    vars(wm)["keys_values_wm_list"] = []
    for layer in wm.keys_values_wm._keys_values:
        layer._k_cache._cache = layer._v_cache._cache = None


def fill_missed(wm: Any, batch: Batch, latent: Any, start_pos: Any) -> None:
    """Gives rows that were not found a context of one token, their latent's.

    Args:
      wm: the world model.
      batch: the rows.
      latent: [B, 1, E] tensor or array.
      start_pos: B timesteps or one number, read by rotary models.
    """
    if batch.hits == len(batch.sources):
        return
    import torch

    missed = [row for row, source in enumerate(batch.sources) if not source]
    embeddings = torch.as_tensor(np.asarray(latent) if not hasattr(latent, "to") else latent)
    embeddings = embeddings[missed].reshape(len(missed), 1, -1).to(batch.device)
    positions = np.asarray(start_pos).reshape(-1)
    positions = positions[missed] if len(positions) > 1 else positions.repeat(len(missed))
    alone = wm.transformer.generate_empty_keys_values(n=len(missed), max_tokens=wm.context_length)
    with torch.no_grad():
        wm.forward(
            {"obs_embeddings": embeddings},
            past_keys_values=alone,
            is_init_infer=True,
            start_pos=[int(position) for position in positions],
        )
        for view, cache in zip(batch.views, tensors(alone), strict=True):
            view[missed, :, batch.size - 1] = cache[:, :, 0]
    if batch.tokens is not None:
        for row, embedding in zip(missed, embeddings, strict=True):
            batch.tokens[row] = embedding


class PadMask:
    """Stands for a causal mask [N, N]: sliced like it, it yields a mask [B, 1, T, S]."""

    def __init__(self, mask: Any, pads: Any) -> None:
        self._mask, self._pads = mask, pads

    def __getitem__(self, key: Any) -> Any:
        import torch

        causal = self._mask[key]
        token = torch.arange(causal.shape[-1], device=causal.device)
        return causal * (token >= self._pads[:, None])[:, None, None]


@contextlib.contextmanager
def masked(wm: Any, pads: list[int]) -> Iterator[None]:
    """No row of a batch attends to its first `pads` slots inside of the block.

    Release 0.2.0 has nothing for rows of unequal length: a pad acts as a key with score 0. So each
    layer's causal mask is replaced by one that knows the pads.
    """
    import torch

    attention = [block.attn for block in wm.transformer.blocks] if any(pads) else []
    for layer in attention:
        # Before the buffer of that name, which state_dict() still finds.
        layer.__dict__["mask"] = PadMask(layer.mask, torch.tensor(pads, device=layer.mask.device))
    try:
        yield
    finally:
        for layer in attention:
            del layer.__dict__["mask"]
