"""Counters that live in a store's state, and how they print.

Counters are 64 bits wide, in two lanes of which the lower comes first: [N, 2] uint32.
"""

import jax
import jax.numpy as jnp
import numpy as np

COUNTERS = (
    "root_queries",
    "root_hits",
    "queries",
    "root_pool_hits",
    "node_pool_hits",
    "misses",
    "rebuilt",
    "false_matches",
    "root_evictions",
    "node_evictions",
    "not_stored",
    "batches",
    "unequal_batches",
    "padded_rows",
    "pad_tokens",
    "largest_pad",
)
"""Names of the counters, in order."""


def init() -> jax.Array:
    """All counters at zero: [N, 2] uint32."""
    return jnp.zeros((len(COUNTERS), 2), jnp.uint32)


def add(counters: jax.Array, **amounts: jax.Array) -> jax.Array:
    """Adds amounts to the counters of those names: [] each, or all [B], which are summed."""
    amount = jnp.sum(_table(amounts).reshape(len(COUNTERS), -1), axis=1, dtype=jnp.uint32)
    low, high = counters[:, 0] + amount, counters[:, 1]
    return jnp.stack([low, high + (low < amount).astype(jnp.uint32)], axis=1)


def maximum(counters: jax.Array, **values: jax.Array) -> jax.Array:
    """Raises the counters of those names, which hold no more than 32 bits, to larger values []."""
    low = _table(values)
    return jnp.maximum(counters, jnp.stack([low, jnp.zeros_like(low)], axis=1))


def read(counters: jax.Array) -> dict[str, int]:
    """The counters by name, on the host."""
    low, high = np.asarray(counters).astype(np.uint64).T
    return dict(zip(COUNTERS, (low | high << np.uint64(32)).tolist(), strict=True))


def _table(values: dict[str, jax.Array]) -> jax.Array:
    """Values [...] in the order of all counters, zeros for those not named: [N, ...] uint32."""
    zero = jnp.zeros_like(next(iter(values.values())), jnp.uint32)
    return jnp.stack([values.get(name, zero).astype(jnp.uint32) for name in COUNTERS])


class Statistics(dict[str, int]):
    """What happened to a store since it was made, and how full its pools are; prints as a table.

    Keys:
      root_queries, root_hits: look-ups of root steps, and those that found their window.
      queries: look-ups of all steps.
      root_pool_hits, node_pool_hits: those that found a root, or a searched node.
      misses: those that found nothing.
      rebuilt: windows that were computed again after a miss.
      false_matches: look-ups that met another key with the same 32 bits, and told it apart.
      root_evictions, node_evictions: entries that went to make room.
      not_stored: windows that found no slot.
      batches, unequal_batches: steps with any window to read, and those of unequal lengths.
      padded_rows, pad_tokens, largest_pad: what aligning those batches would take.
      roots_stored, roots_slots: entries of all root pools, and room for them.
      nodes_stored, nodes_slots: of the node pool.
    """

    def __str__(self) -> str:
        queries = max(self["queries"], 1)
        hits = self["root_pool_hits"] + self["node_pool_hits"]
        width = max(map(len, self))
        lines = [f"{name:<{width}}  {value:>12,}" for name, value in self.items()]
        return "\n".join([*lines, f"{'hit rate':<{width}}  {hits / queries:>12.1%}"])
