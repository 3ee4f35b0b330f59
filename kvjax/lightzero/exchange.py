"""What torch and jax tell each other between two simulations, in memory that both see.

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
from kvjax.lightzero.caches import views_of


class Exchange:
    """A batch of caches [L, 2, B', H, C, D] and notes about its rows, see `layout.FILED`."""

    def __init__(self, batch_shape: tuple[int, ...], embed_dim: int) -> None:
        rows = batch_shape[2]
        self._batch = dlpack.Shared(jnp.zeros(batch_shape))
        self._notes = dlpack.Shared(jnp.zeros((2, rows, embed_dim + layout.NOTES)))
        self._filed, self._asked = self._notes.tensor.numpy()
        self._embed_dim = embed_dim
        self._views: dict[int, tuple[Any, ...]] = {}

    @property
    def memory(self) -> Any:
        """The batch as a tensor."""
        return self._batch.tensor

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Batch and notes as arrays, for a call that donates them and whose results `renew`."""
        return self._batch.array, self._notes.array

    def renew(self, batch: jax.Array, notes: jax.Array) -> None:
        """Takes back what a call wrote."""
        self._batch.renew(batch)
        self._notes.renew(notes)

    def views(self, rows: int) -> tuple[Any, ...]:
        """`caches.views_of` the batch, made once."""
        if rows not in self._views:
            self._views[rows] = views_of(self.memory, rows)
        return self._views[rows]

    def note_filed(self, latent: np.ndarray[Any, Any], lengths: Sequence[int]) -> None:
        """Says under which latents [B, E] the batch is to be filed, and how long its rows are."""
        self._filed[: len(latent), : self._embed_dim] = latent
        self._filed[: len(latent), self._embed_dim + layout.LENGTH] = lengths

    def note_asked(self, latent: np.ndarray[Any, Any]) -> None:
        """Says which latents [B, E] are looked up next."""
        self._asked[: len(latent), : self._embed_dim] = latent

    def filed(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What `note_filed` was told: latents [B', E] and lengths [B'] int32."""
        lengths = self._filed[:, self._embed_dim + layout.LENGTH]
        return self._filed[:, : self._embed_dim], lengths.astype(np.int32)

    def found(self, rows: int) -> tuple[list[int], list[int]]:
        """How long the first rows are that were found, and where that was."""
        lengths, sources = self._asked[:rows, self._embed_dim :].T.astype(int).tolist()
        return lengths, sources
