"""What goes to and fro between two simulations: a batch of caches, and notes about its rows.

Shapes: B' rows, B of them in use, E embedding size, L layers, H heads, C context_length in tokens,
D head size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import dlpack
from kvjax.lightzero import layout
from kvjax.lightzero.caches import Batch, views_of

Array = np.ndarray[Any, Any]


class Exchange:
    """Two batches of caches [L, 2, B', H, C, D] and notes about rows, see `layout.FILED`.

    Torch has the newest batch, to write its new tokens into; the other one is the memory of the next
    one. Jax takes memory back only if no tensor holds it any more, and leaves it otherwise. Of the
    notes nobody else knows: numpy writes them in place.
    """

    def __init__(self, batch_shape: tuple[int, ...], embed_dim: int) -> None:
        self.rows, self._embed_dim = batch_shape[2], embed_dim
        self._newest, self._other = (_zeros(batch_shape) for _ in range(2))
        self._newest_place = self._notes_place = 0
        self._hold(_zeros((2, self.rows, embed_dim + layout.NOTES)))

    def _hold(self, notes: jax.Array) -> None:
        """Looks at the memory of computed notes; it is the old one if that was donated."""
        self._notes, place = notes, notes.unsafe_buffer_pointer()
        if place != self._notes_place:
            self._notes_place = place
            self._filed, self._asked = dlpack.writable_view(notes)

    def note_filed(self, latent: Array, lengths: Sequence[int]) -> None:
        """Says under which latents [B, E] a batch is to be filed, and how long its rows are."""
        self._filed[: len(latent), : self._embed_dim] = latent
        self._filed[: len(latent), self._embed_dim + layout.LENGTH] = lengths

    def note_asked(self, latent: Array) -> None:
        """Says which latents [B, E] are looked up next."""
        self._asked[: len(latent), : self._embed_dim] = latent

    def filed(self) -> tuple[Array, Array]:
        """Copies of what `note_filed` was told: latents [B', E] and lengths [B'] int32."""
        lengths = self._filed[:, self._embed_dim + layout.LENGTH]
        return self._filed[:, : self._embed_dim].copy(), lengths.astype(np.int32)

    def lend(self) -> tuple[jax.Array, jax.Array]:
        """Memory for a batch, and the notes; both are donated."""
        other = self._other
        return _zeros(other.shape) if other.is_deleted() else other, self._notes

    def source(self, memory: Any) -> Any:
        """As `as_argument`; the newest batch need not be wrapped."""
        newest = self._newest
        is_newest = memory.data_ptr() == self._newest_place and not newest.is_deleted()
        return newest if is_newest else as_argument(memory)

    def take(self, lent: tuple[jax.Array, jax.Array], rows: int) -> Batch:
        """Gives torch the batch that a call made of what `lend` gave it, with its first rows."""
        found, notes = lent
        memory = dlpack.share(found)
        self._other, self._newest, self._newest_place = self._newest, found, memory.data_ptr()
        self._hold(notes)
        lengths, sources = self._asked[:rows, self._embed_dim :].T.astype(int).tolist()
        return Batch(memory, views_of(memory, rows), lengths, sources)


def as_argument(memory: Any) -> Any:
    """A batch's memory as an argument of a jitted call that its caller waits for."""
    # A numpy view is dispatched faster than an imported array, and copied no more.
    return memory.numpy() if memory.is_cpu else dlpack.import_shared(memory)


def _zeros(shape: tuple[int, ...]) -> jax.Array:
    return jax.device_put(jnp.zeros(shape, jnp.float32))
