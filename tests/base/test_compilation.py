"""Programs of small operations: compiled with what this XLA knows, the same numbers as always."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.base import compilation
from kvjax.base.compilation import jit_small_operations


def double(x):
    """An example."""
    return 2 * x


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    known = dict(compilation._SMALL_OPERATIONS)
    unknown = {"xla_cpu_no_such_option": "1", "xla_cpu_scheduler_type": "NO_SUCH_SCHEDULER"}
    monkeypatch.setattr(compilation, "_SMALL_OPERATIONS", known | unknown)
    expected = {name: value for name, value in known.items() if name not in unknown}
    assert compilation.known_options.__wrapped__(False) == expected


def test_this_xla_knows_all_options():
    assert compilation.known_options(False) == compilation._SMALL_OPERATIONS
    both = compilation._SMALL_OPERATIONS | compilation._ONE_THREAD
    assert compilation.known_options(True) == both


def partitions(program, x):
    """How many loops of a compiled program are shared by threads."""
    return program.lower(x).compile().as_text().count('outer_dimension_partitions":["')


@pytest.mark.optimised
def test_loops_stay_in_one_thread_where_asked():
    """Unless there is but one core, XLA shares a loop as large as this."""
    x = jnp.zeros((64, 1 << 14))
    shared = partitions(jit_small_operations(double), x)
    assert shared == (os.cpu_count() > 1)
    assert partitions(jit_small_operations(double, one_thread=lambda **_: True), x) == 0


def test_inside_of_another_program_it_is_a_plain_jit():
    program = jit_small_operations(double)
    np.testing.assert_array_equal(jax.jit(program)(jnp.arange(3)), [0, 2, 4])
    assert program._cache_size() == 0
    np.testing.assert_array_equal(program(jnp.arange(3)), [0, 2, 4])
    assert program._cache_size() == 1
