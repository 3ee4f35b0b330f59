"""What goes to and fro between two simulations: a batch of caches, and notes about its rows.

Shapes: B' rows, B of them in use, E embedding size, C context_length in tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import dlpack
from kvjax.config import BLOCK
from kvjax.lightzero.attach import layout
from kvjax.lightzero.attach.caches import Batch, Memory, make_batch, memory_of

Array = np.ndarray[Any, Any]


class Exchange:
    """A batch of caches and notes about its rows, see `kvjax.lightzero.attach.layout`.

    Torch has the batch, to write its new tokens into, until the next one takes its place. If a
    tensor still holds it then, XLA leaves that memory as it is and takes other. Notes, and what is
    known of a batch, stay here: numpy reads and writes them in place.
    """

    def __init__(self, cache_shape: tuple[int, ...], rows: int, embed_dim: int) -> None:
        """`cache_shape` is (L, 2, H, C, D)."""
        import torch

        layers, two, heads, self._context_length, size = cache_shape
        shape = layers, two, rows, heads, layout.slots_of_row(self._context_length), size
        self.rows, self.batch, self._shape = rows, _zeros(shape), (layers * two, *shape[2:])
        self.notes = _zeros((2, rows, embed_dim + 2)).block_until_ready()
        self._filed, self._asked = dlpack.writable_view(self.notes)
        with torch.inference_mode(False):  # else only inference mode could write to it
            latents = torch.from_numpy(self._filed[:, None, : layout.ROWS.start])
            self._filed_latents = [latents[:count] for count in range(rows + 1)]
        self._filed_rows = self._asked_rows = np.empty(0)
        self._place = self._known_place = 0
        self._lengths: list[int] = []
        self._hold(_zeros((2, rows), jnp.int32).block_until_ready())

    def _hold(self, known: jax.Array) -> None:
        """Looks at the memory of what is known; it is the old one if that was donated."""
        self._known, place = known, known.unsafe_buffer_pointer()
        if place != self._known_place:
            self._known_place, self._seen = place, dlpack.writable_view(known)

    def note_filed(self, latent: Any, rows: Array) -> None:
        """Says under which latents a batch is to be filed, and whose its rows are.

        Latents are [B, 1, E], in any shape. `rows` [2, B'] is not changed by its owner.
        """
        if isinstance(latent, np.ndarray):
            self._filed[: len(latent), : layout.ROWS.start] = latent.reshape(len(latent), -1)
        else:  # torch copies in half of the time that it takes to show numpy the latents
            latent = latent.detach() if latent.requires_grad else latent
            noted = self._filed_latents[len(latent)]
            noted.copy_(latent if latent.shape == noted.shape else latent.reshape(noted.shape))
        if rows is not self._filed_rows:
            self._filed[:, layout.ROWS], self._filed_rows = rows.T, rows

    def note_nothing_filed(self) -> None:
        """Says that no row of the batch is to be filed."""
        self._filed[:, layout.ROWS], self._filed_rows = 0, np.empty(0)

    def note_asked(self, latent: Array, rows: Array) -> None:
        """Says which latents [B, E] are looked up next, and whose they are."""
        self._asked[: len(latent), : layout.ROWS.start] = latent
        if rows is not self._asked_rows:
            self._asked[:, layout.ROWS], self._asked_rows = rows.T, rows

    def are_filed(self, rows: Array) -> bool:
        """Whether just these rows [2, B'] are to be filed, so that one call can look them up too.

        It looks a row up before it files the next one, so no row may ask for what another files.
        """
        return rows is self._filed_rows

    def filed(self) -> tuple[Array, Array, Array]:
        """What is to be filed: latents [B', E], rows [2, B'] and lengths [B'] int32."""
        latent = self._filed[:, : layout.ROWS.start].copy()
        return latent, self._filed_rows, self._seen[0] + np.int32(BLOCK)

    def is_grown(self, memory: Memory, lengths: list[int]) -> bool:
        """Whether a memory is the batch that torch was given, its rows a block longer."""
        return memory.place == self._place and lengths == [n + BLOCK for n in self._lengths]

    def lend(self) -> tuple[jax.Array, jax.Array]:
        """The batch and memory for what is known of the next one; both are donated."""
        return self.batch, self._known

    def take(self, lent: tuple[jax.Array, jax.Array], rows: int) -> Batch:
        """Gives torch the batch that a call made of what `lend` gave it, with its first rows."""
        self.batch, known = lent
        memory = memory_of(dlpack.share(self.batch), self._shape)
        self._hold(known)
        lengths, sources = self._seen[:, :rows].tolist()
        self._place, self._lengths = memory.place, lengths
        return make_batch(memory, self._context_length, lengths, sources)


def as_argument(memory: Memory) -> Any:
    """A batch's memory as an argument [L, 2, B', H, M, D] of a jitted call that is waited for."""
    # A numpy view is dispatched faster than an imported array, and copied no more.
    flat = memory.flat.numpy() if memory.flat.is_cpu else dlpack.import_shared(memory.flat)
    return flat.reshape(-1, 2, *memory.shape[1:])


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    zeros: jax.Array = jax.device_put(jnp.zeros(shape, dtype))
    return zeros
