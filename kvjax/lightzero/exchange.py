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
    """Two batches of caches [L, 2, B', H, C, D] and notes about rows, see `kvjax.lightzero.layout`.

    Torch has the newest batch, to write its new tokens into; the other one's memory is for the
    next. XLA takes memory back only if no tensor holds it any more, and leaves it otherwise. Notes,
    and what is known of a batch, stay here: numpy reads and writes them in place.
    """

    def __init__(self, batch_shape: tuple[int, ...], embed_dim: int) -> None:
        self.rows = batch_shape[2]
        self._newest, self._other = (_zeros(batch_shape) for _ in range(2))
        self._newest_place = self._known_place = 0
        self._flat_shape = -1, *batch_shape[2:]
        self.notes = _zeros((2, self.rows, embed_dim + 3)).block_until_ready()
        self._filed, self._asked = dlpack.writable_view(self.notes)
        self._filed_rows = self._asked_rows = np.empty(0)
        self._hold(_zeros((2, self.rows), jnp.int32).block_until_ready())

    def _hold(self, known: jax.Array) -> None:
        """Looks at the memory of what is known; it is the old one if that was donated."""
        self._known, place = known, known.unsafe_buffer_pointer()
        if place != self._known_place:
            self._known_place, self._seen = place, dlpack.writable_view(known)

    def note_filed(self, latent: Array, lengths: Sequence[int], rows: Array) -> None:
        """Says under which latents [B, E] a batch is to be filed, how long its rows are, and whose.

        `rows` [2, B'] is not changed by its owner.
        """
        count = len(latent)
        self._filed[:count, : layout.LENGTH] = latent
        self._filed[:count, layout.LENGTH] = lengths
        if rows is not self._filed_rows:
            self._filed[:, layout.ROWS], self._filed_rows = rows.T, rows

    def note_asked(self, latent: Array, rows: Array) -> None:
        """Says which latents [B, E] are looked up next, and whose they are."""
        self._asked[: len(latent), : layout.LENGTH] = latent
        if rows is not self._asked_rows:
            self._asked[:, layout.ROWS], self._asked_rows = rows.T, rows

    def filed(self) -> tuple[Array, Array, Array]:
        """What `note_filed` was told: latents [B', E], rows [2, B'] and lengths [B'] int32."""
        latent, lengths = self._filed[:, : layout.LENGTH], self._filed[:, layout.LENGTH]
        return latent.copy(), self._filed_rows, lengths.astype(np.int32)

    def lend(self) -> tuple[jax.Array, jax.Array]:
        """Memory for a batch, and for what is known of it; both are donated."""
        return self._other, self._known

    def source(self, memory: Any) -> Any:
        """As `as_argument`; the newest batch need not be wrapped."""
        return self._newest if memory.data_ptr() == self._newest_place else as_argument(memory)

    def take(self, lent: tuple[jax.Array, jax.Array], rows: int) -> Batch:
        """Gives torch the batch that a call made of what `lend` gave it, with its first rows."""
        found, known = lent
        memory = dlpack.share(found).view(self._flat_shape)
        self._other, self._newest, self._newest_place = self._newest, found, memory.data_ptr()
        self._hold(known)
        lengths, sources = self._seen[:, :rows].tolist()
        return Batch(memory, views_of(memory, rows), lengths, sources)


def as_argument(memory: Any) -> Any:
    """A batch's memory as an argument [L, 2, B', H, C, D] of a jitted call that is waited for."""
    # A numpy view is dispatched faster than an imported array, and copied no more.
    array = memory.numpy() if memory.is_cpu else dlpack.import_shared(memory)
    return array.reshape(-1, 2, *array.shape[1:])


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    zeros: jax.Array = jax.device_put(jnp.zeros(shape, dtype))
    return zeros
