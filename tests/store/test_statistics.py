"""Counters."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.store import statistics
from kvjax.store.statistics import Statistics

SEEN = Statistics({metric.name: 10 + i for i, metric in enumerate(statistics.METRICS)})


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


def test_a_flat_dictionary_for_loggers():
    told = SEEN.as_dict("cache/")
    hits = SEEN["root_pool_hits"] + SEEN["node_pool_hits"]
    assert told.pop("cache/hit_rate") == SEEN.hit_rate == hits / SEEN["queries"]
    assert told == {f"cache/{name}": value for name, value in SEEN.items()}
    assert next(iter(SEEN.as_dict())) == "kvjax/root_queries"
    assert Statistics(dict.fromkeys(SEEN, 0)).hit_rate == 0.0


def samples(text):
    """What Prometheus reads: names with labels and values, each name described just before."""
    told, kinds = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP"):
            name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\d+)", line).groups()
            assert name == list(kinds)[-1]
            told[name, labels] = int(value)
    return told, kinds


def test_the_text_that_prometheus_reads():
    told, kinds = samples(SEEN.as_prometheus())
    assert told["kvjax_misses_total", None] == SEEN["misses"]
    assert told["kvjax_largest_pad", None] == SEEN["largest_pad"]
    assert list(told.values()) == list(SEEN.values())
    assert {name for name, kind in kinds.items() if kind == "counter"} == {
        name for name in kinds if name.endswith("_total")
    }
    labels = {"run": 'a "b"\n\\', "scope": "eval"}
    two = [(labels, SEEN), ({"scope": "train"}, Statistics(dict.fromkeys(SEEN, 0)))]
    told, _ = samples(statistics.prometheus(two, "c_"))
    assert len(told) == 2 * len(SEEN)
    assert told["c_queries_total", r'run="a \"b\"\n\\",scope="eval"'] == SEEN["queries"]
    assert told["c_queries_total", 'scope="train"'] == 0
    for bad in ({"labels": {"a-b": "c"}}, {"prefix": "1"}):
        with pytest.raises(ValueError, match="names must be letters"):
            SEEN.as_prometheus(**bad)
