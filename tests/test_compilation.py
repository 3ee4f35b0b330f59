"""Programs of small operations: compiled with what this XLA knows, the same numbers as always."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import compilation
from kvjax.compilation import jit_small_operations


def double(x):
    """An example."""
    return 2 * x


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    known = dict(compilation._SMALL_OPERATIONS)
    unknown = {"xla_cpu_no_such_option": "1", "xla_cpu_scheduler_type": "NO_SUCH_SCHEDULER"}
    monkeypatch.setattr(compilation, "_SMALL_OPERATIONS", known | unknown)
    expected = {name: value for name, value in known.items() if name not in unknown}
    assert compilation._known_options.__wrapped__() == expected


def test_this_xla_knows_all_options():
    assert compilation._known_options() == compilation._SMALL_OPERATIONS


def test_inside_of_another_program_it_is_a_plain_jit():
    program = jit_small_operations(double)
    np.testing.assert_array_equal(jax.jit(program)(jnp.arange(3)), [0, 2, 4])
    assert program._tuned._cache_size() == 0
    np.testing.assert_array_equal(program(jnp.arange(3)), [0, 2, 4])
    assert program._tuned._cache_size() == 1
