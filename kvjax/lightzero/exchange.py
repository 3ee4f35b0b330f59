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
        self.notes = _zeros((2, self.rows, embed_dim + 1)).block_until_ready()
        filed, asked = dlpack.writable_view(self.notes)
        self._filed, self._lengths, self._asked = filed[:, :-1], filed[:, -1], asked[:, :-1]
        self._hold(_zeros((2, self.rows), jnp.int32).block_until_ready())

    def _hold(self, known: jax.Array) -> None:
        """Looks at the memory of what is known; it is the old one if that was donated."""
        self._known, place = known, known.unsafe_buffer_pointer()
        if place != self._known_place:
            self._known_place, self._seen = place, dlpack.writable_view(known)

    def note_filed(self, latent: Array, lengths: Sequence[int]) -> None:
        """Says under which latents [B, E] a batch is to be filed, and how long its rows are."""
        self._filed[: len(latent)] = latent
        self._lengths[: len(latent)] = lengths

    def note_asked(self, latent: Array) -> None:
        """Says which latents [B, E] are looked up next."""
        self._asked[: len(latent)] = latent

    def filed(self) -> tuple[Array, Array]:
        """Copies of what `note_filed` was told: latents [B', E] and lengths [B'] int32."""
        return self._filed.copy(), self._lengths.astype(np.int32)

    def lend(self) -> tuple[jax.Array, jax.Array]:
        """Memory for a batch, and for what is known of it; both are donated."""
        return self._other, self._known

    def source(self, memory: Any) -> Any:
        """As `as_argument`; the newest batch need not be wrapped."""
        return self._newest if memory.data_ptr() == self._newest_place else as_argument(memory)

    def take(self, lent: tuple[jax.Array, jax.Array], rows: int) -> Batch:
        """Gives torch the batch that a call made of what `lend` gave it, with its first rows."""
        found, known = lent
        memory = dlpack.share(found)
        self._other, self._newest, self._newest_place = self._newest, found, memory.data_ptr()
        self._hold(known)
        lengths, sources = self._seen[:, :rows].tolist()
        return Batch(memory, views_of(memory, rows), lengths, sources)


def as_argument(memory: Any) -> Any:
    """A batch's memory as an argument of a jitted call that its caller waits for."""
    # A numpy view is dispatched faster than an imported array, and copied no more.
    return memory.numpy() if memory.is_cpu else dlpack.import_shared(memory)


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    zeros: jax.Array = jax.device_put(jnp.zeros(shape, dtype))
    return zeros
