"""How kvjax's larger programs are compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class jit_in_order:  # noqa: N801  (used like jax.jit)
    """`jax.jit` for programs of many small operations, which a CPU runs one after the other.

    By default XLA orders operations so that several can run at once, and hands them from thread to
    thread; for small ones that takes longer than the operations do. On other devices, and inside of
    another program, which is compiled as a whole, it is `jax.jit` as it is.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **options)
        self._in_order = jax.jit(function, compiler_options=_IN_ORDER, **options)

    def _program(self, arguments: Any) -> Any:
        """JAX takes compiler options only where it compiles."""
        inside = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return self._plain if inside or jax.default_backend() != "cpu" else self._in_order

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self._program((args, kwargs))(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As of a jitted function."""
        return self._program((args, kwargs)).lower(*args, **kwargs)
