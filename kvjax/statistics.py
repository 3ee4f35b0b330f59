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
    """Adds amounts to the counters of those names: [] each, or all [B], which are summed."""
    return counters + jnp.sum(_table(amounts).reshape(len(COUNTERS), -1), axis=1, dtype=jnp.uint32)


def maximum(counters: jax.Array, **values: jax.Array) -> jax.Array:
    """Raises the counters of those names to values [] that are larger."""
    return jnp.maximum(counters, _table(values))


def _table(values: dict[str, jax.Array]) -> jax.Array:
    """Values [...] in the order of all counters, zeros for those not named: [N, ...] uint32."""
    zero = jnp.zeros_like(next(iter(values.values())), jnp.uint32)
    return jnp.stack([values.get(name, zero).astype(jnp.uint32) for name in COUNTERS])


class Statistics(dict[str, int]):
    """Counters by name (`COUNTERS`), and how full the pools are; prints as a table."""

    def __str__(self) -> str:
        queries = max(self["queries"], 1)
        hits = self["root_pool_hits"] + self["node_pool_hits"]
        width = max(map(len, self))
        lines = [f"{name:<{width}}  {value:>12,}" for name, value in self.items()]
        return "\n".join([*lines, f"{'hit rate':<{width}}  {hits / queries:>12.1%}"])
