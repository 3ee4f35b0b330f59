"""Memory that jax writes over and over between two simulations, and what torch copies out of it.

Shapes: B' rows, B of them in use, E embedding size, L layers, H heads, C context_length in tokens,
D head size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.dlpack import writable_view
from kvjax.lightzero import layout
from kvjax.lightzero.caches import Batch
from kvjax.lightzero.recycling import Buffers

Array = np.ndarray[Any, Any]


class Exchange:
    """A batch of caches [L, 2, B', H, C, D] and notes about its rows, see `layout.FILED`.

    Nobody else holds these arrays: what comes in is written into their memory, and what goes out is
    copied, which takes less time than to make an array for each.
    """

    def __init__(self, batch_shape: tuple[int, ...], embed_dim: int) -> None:
        rows = batch_shape[2]
        batch = jnp.zeros(batch_shape, jnp.float32)
        notes = jnp.zeros((2, rows, embed_dim + layout.NOTES), jnp.float32)
        self.rows, self._embed_dim = rows, embed_dim
        self._places: tuple[int, ...] = ()
        self._buffers = Buffers(batch_shape)
        self._hold(jax.device_put((batch, notes)))

    def _hold(self, arrays: tuple[jax.Array, jax.Array]) -> None:
        """Waits for arrays and looks at their memory; it is the old one if they were donated."""
        self.arrays = arrays
        places = tuple(x.block_until_ready().unsafe_buffer_pointer() for x in arrays)
        if places != self._places:
            import torch

            batch, notes = map(writable_view, arrays)
            self._places, self._batch = places, torch.from_numpy(batch)
            self._filed, self._asked = notes

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

    def take(self, arrays: tuple[jax.Array, jax.Array], rows: int) -> Batch:
        """Takes what a call that was given `arrays` made of them: copies out its first rows."""
        self._hold(arrays)
        lengths, sources = self._asked[:rows, self._embed_dim :].T.astype(int).tolist()
        buffer = self._buffers.get(rows)
        buffer.memory.copy_(self._batch)
        return Batch(buffer.memory, buffer.views, lengths, sources)
