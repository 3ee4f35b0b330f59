"""Counters that live in a store's state, and how they print."""

import jax
import jax.numpy as jnp

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
    """All counters at zero: [N] uint32."""
    return jnp.zeros(len(COUNTERS), jnp.uint32)


def add(counters: jax.Array, **amounts: jax.Array) -> jax.Array:
    """Adds amounts [] to the counters of those names."""
    return counters + _vector(amounts)


def maximum(counters: jax.Array, **values: jax.Array) -> jax.Array:
    """Raises the counters of those names to values [] that are larger."""
    return jnp.maximum(counters, _vector(values))


def _vector(values: dict[str, jax.Array]) -> jax.Array:
    zero = jnp.zeros((), jnp.uint32)
    return jnp.stack([values.get(name, zero).astype(jnp.uint32) for name in COUNTERS])


class Statistics(dict[str, int]):
    """Counters by name (`COUNTERS`), and how full the pools are; prints as a table."""

    def __str__(self) -> str:
        queries = max(self["queries"], 1)
        hits = self["root_pool_hits"] + self["node_pool_hits"]
        width = max(map(len, self))
        lines = [f"{name:<{width}}  {value:>12,}" for name, value in self.items()]
        return "\n".join([*lines, f"{'hit rate':<{width}}  {hits / queries:>12.1%}"])
