"""How kvjax's larger programs are compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_SMALL_OPERATIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
"""One operation after the other; and of XLA's kernel library the matrix products alone.

By default XLA orders operations so that several can run at once, and hands them from thread to
thread; for small ones that takes longer than the operations do. The library's sums, too, are slower
than XLA's own where a few numbers are summed at a time: attention takes half the time without.
"""


class jit_small_operations:  # noqa: N801  (used like jax.jit)
    """`jax.jit` for programs of many small operations on a CPU.

    On other devices, and inside of another program, which is compiled as a whole, it is `jax.jit`
    as it is.
    """

    __wrapped__: Callable[..., Any]

    def __init__(
        self, function: Callable[..., Any], *, nested: bool = True, **options: Any
    ) -> None:
        """As `jax.jit`; `nested=False` promises that no other program contains the call."""
        functools.update_wrapper(self, function)
        self._nested = nested
        self._jit = functools.partial(jax.jit, function, **options)
        self._plain = self._jit()

    @functools.cached_property
    def _tuned(self) -> Any:
        return self._jit(compiler_options=_known_options())

    def _program(self, arguments: Any) -> Any:
        """JAX takes compiler options only where it compiles."""
        return self._tuned if on_cpu() and not self._is_inside(arguments) else self._plain

    def _is_inside(self, arguments: Any) -> bool:
        leaves = jax.tree.leaves(arguments) if self._nested else ()
        return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self._program((args, kwargs))(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As of a jitted function."""
        return self._program((args, kwargs)).lower(*args, **kwargs)


@functools.cache
def on_cpu() -> bool:
    """Whether jax computes on a CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


@functools.cache
def _known_options() -> dict[str, str]:
    """The options that this XLA has: they are no promise of its makers, and only save time."""
    return {name: value for name, value in _SMALL_OPERATIONS.items() if _is_known(name, value)}


def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
