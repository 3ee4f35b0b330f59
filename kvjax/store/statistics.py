"""Counters that live in a store's state, and how they print.

Counters are 64 bits wide, in two lanes of which the lower comes first: [N, 2] uint32.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.values import require


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of a store, as a monitor needs it described."""

    name: str
    kind: Literal["counter", "gauge"]  # grows for ever, or is what it is now
    unit: str
    meaning: str


_COUNTED = (
    Metric("root_queries", "counter", "rows", "look-ups of root steps"),
    Metric("root_hits", "counter", "rows", "look-ups of root steps that found their window"),
    Metric("queries", "counter", "rows", "look-ups of all steps"),
    Metric("root_pool_hits", "counter", "rows", "look-ups that found a root"),
    Metric("node_pool_hits", "counter", "rows", "look-ups that found a searched node"),
    Metric("misses", "counter", "rows", "look-ups that found nothing"),
    Metric("rebuilt", "counter", "rows", "windows that were computed again after a miss"),
    Metric("false_matches", "counter", "rows", "look-ups that met another key of the same bits"),
    Metric("root_evictions", "counter", "entries", "roots that went to make room"),
    Metric("node_evictions", "counter", "entries", "nodes that went to make room"),
    Metric("not_stored", "counter", "windows", "windows that found no slot"),
    Metric("batches", "counter", "steps", "steps with any window to read"),
    Metric("unequal_batches", "counter", "steps", "steps whose windows had unequal lengths"),
    Metric("padded_rows", "counter", "rows", "rows that aligning these windows would pad"),
    Metric("pad_tokens", "counter", "tokens", "padding that aligning them would take"),
    Metric("largest_pad", "gauge", "tokens", "largest padding of one row so far"),
)
_POOLS = (
    Metric("roots_stored", "gauge", "entries", "entries of all root pools"),
    Metric("roots_slots", "gauge", "entries", "room of all root pools"),
    Metric("nodes_stored", "gauge", "entries", "entries of the node pool"),
    Metric("nodes_slots", "gauge", "entries", "room of the node pool"),
)
METRICS = _COUNTED + _POOLS
"""All that `Statistics` holds, in order."""

COUNTERS = tuple(metric.name for metric in _COUNTED)
"""Names of what a store's state counts, in order."""

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


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

    @property
    def hit_rate(self) -> float:
        """Share of all look-ups that found a window; 0 before the first."""
        return (self["root_pool_hits"] + self["node_pool_hits"]) / max(self["queries"], 1)

    def as_dict(self, prefix: str = "kvjax/") -> dict[str, float]:
        """All numbers and the hit rate by name, flat, as wandb and TensorBoard take them.

        Args:
          prefix: of all names.
        """
        return {
            f"{prefix}{name}": value for name, value in (self | {"hit_rate": self.hit_rate}).items()
        }

    def as_prometheus(self, labels: Mapping[str, str] | None = None, prefix: str = "kvjax_") -> str:
        """The numbers in Prometheus' text format: for an endpoint, or a file that is collected.

        Args:
          labels: of every number. For several stores see `kvjax.store.statistics.prometheus`.
          prefix: of all names.

        Raises:
          ValueError: a label or the prefix is no name of Prometheus'.
        """
        return prometheus([(labels or {}, self)], prefix)

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{name:<{width}}  {value:>12,}" for name, value in self.items()]
        return "\n".join([*lines, f"{'hit rate':<{width}}  {self.hit_rate:>12.1%}"])


def prometheus(
    stores: Iterable[tuple[Mapping[str, str], Mapping[str, int]]], prefix: str = "kvjax_"
) -> str:
    """Statistics of several stores in Prometheus' text format, each described once.

    Args:
      stores: labels that tell a store from the others, and its statistics.
      prefix: of all names.

    Raises:
      ValueError: a label or the prefix is no name of Prometheus'.
    """
    stores = list(stores)
    for name in [prefix, *(name for labels, _ in stores for name in labels)]:
        is_name = _NAME.fullmatch(name) is not None
        require(is_name, f"names must be letters, digits and underscores, got {name!r}")
    lines = []
    for metric in METRICS:
        name = f"{prefix}{metric.name}" + ("_total" if metric.kind == "counter" else "")
        lines += [
            f"# HELP {name} {metric.meaning} ({metric.unit})",
            f"# TYPE {name} {metric.kind}",
            *(f"{name}{_labels(labels)} {values[metric.name]}" for labels, values in stores),
        ]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    pairs = (f'{name}="{str(value).translate(_ESCAPED)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""
