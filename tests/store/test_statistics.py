"""Counters."""

import jax.numpy as jnp
import numpy as np

from kvjax.store import statistics


def test_counters_go_on_behind_32_bits():
    """A busy store has as many look-ups within hours."""
    counters = statistics.init().at[:, 0].set(2**32 - 2)
    for _ in range(2):
        counters = statistics.add(counters, queries=jnp.ones(3, bool))
        counters = statistics.add(counters, misses=jnp.asarray(1))
    counters = statistics.maximum(counters, largest_pad=jnp.asarray(7))
    counted = statistics.read(counters)
    assert counted == dict.fromkeys(statistics.COUNTERS, 2**32 - 2) | {
        "queries": 2**32 + 4,
        "misses": 2**32,
    }
    assert statistics.read(np.asarray(statistics.init())) == dict.fromkeys(statistics.COUNTERS, 0)
    assert statistics.read(statistics.maximum(statistics.init(), batches=jnp.asarray(7)))["batches"]
