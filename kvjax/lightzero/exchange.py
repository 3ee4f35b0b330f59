"""Memory that jax writes over and over between two simulations, and what torch copies out of it.

Shapes: B' rows, B of them in use, E embedding size, L layers, H heads, C context_length in tokens,
D head size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.dlpack import memory_of
from kvjax.lightzero import layout

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
        self.arrays: tuple[jax.Array, jax.Array] = jax.device_put((batch, notes))
        self.rows, self._embed_dim = rows, embed_dim
        jax.block_until_ready(self.arrays)

    def note_filed(self, latent: Array, lengths: Sequence[int]) -> None:
        """Says under which latents [B, E] a batch is to be filed, and how long its rows are."""
        filed = self._notes(layout.FILED, len(latent))
        filed[:, : self._embed_dim] = latent
        filed[:, self._embed_dim + layout.LENGTH] = lengths

    def note_asked(self, latent: Array) -> None:
        """Says which latents [B, E] are looked up next."""
        self._notes(layout.ASKED, len(latent))[:, : self._embed_dim] = latent

    def filed(self) -> tuple[Array, Array]:
        """Copies of what `note_filed` was told: latents [B', E] and lengths [B'] int32."""
        filed = self._notes(layout.FILED, self.rows)
        lengths = filed[:, self._embed_dim + layout.LENGTH]
        return filed[:, : self._embed_dim].copy(), lengths.astype(np.int32)

    def take(self, arrays: tuple[jax.Array, jax.Array], rows: int) -> tuple[Any, list[int], Any]:
        """Takes what a call that was given `arrays` made of them.

        Returns:
          The batch as a tensor of its own; how long its first rows are and where they were found.
        """
        import torch

        self.arrays = jax.block_until_ready(arrays)
        memory = torch.from_numpy(memory_of(self.arrays[0])).clone()
        found = self._notes(layout.ASKED, rows)[:, self._embed_dim :]
        lengths, sources = found.T.astype(int).tolist()
        return memory, lengths, sources

    def _notes(self, part: int, rows: int) -> Array:
        return memory_of(self.arrays[1])[part, :rows]
