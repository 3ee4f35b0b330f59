"""Memory for batches that torch owns, used again once nobody else holds it.

To take new memory for every simulation costs more than to fill it: its pages come from the system.

Shapes: see `kvjax.lightzero.caches`.
"""

import sys
from typing import Any

from kvjax.lightzero.caches import views_of

_MOST = 2  # one is filed while the other one is filled


class Buffer:
    """A batch's memory and the views of its first rows."""

    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        import torch

        with torch.inference_mode(False):  # whose tensors could not be used again outside of it
            self.memory = torch.empty(shape)
            self.views = views_of(self.memory, rows)
        self._use_count = getattr(torch._C, "_storage_Use_Count", None)
        self._storage = self.memory.untyped_storage()._cdata
        self._alone = self._holders()

    def _holders(self) -> Any:
        """How many hold the memory: tensors that share it, and whoever has one of ours."""
        if self._use_count is None:  # not a promise of torch's makers
            return object()
        references = sys.getrefcount(self.memory), *map(sys.getrefcount, self.views)
        return self._use_count(self._storage), references

    def is_free(self) -> bool:
        """Whether nobody but this object holds the memory."""
        return bool(self._holders() == self._alone)


class Buffers:
    """Buffers of one shape, for the number of rows that was asked for last."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._rows = shape, 0
        self._buffers: list[Buffer] = []

    def get(self, rows: int) -> Buffer:
        """A buffer that nobody holds; what is in it is left from before."""
        if rows != self._rows:
            self._rows, self._buffers = rows, []
        for buffer in self._buffers:
            if buffer.is_free():
                return buffer
        # Whoever holds the oldest one keeps it.
        self._buffers = [*self._buffers, Buffer(self._shape, rows)][-_MOST:]
        return self._buffers[-1]
