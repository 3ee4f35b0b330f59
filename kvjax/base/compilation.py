"""How kvjax's larger programs are compiled."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

_SMALL_OPERATIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
"""One operation after the other; and of XLA's kernel library the matrix products alone.

By default XLA orders operations so that several can run at once, and hands them from thread to
thread; for small ones that takes longer than the operations do. The library's sums, too, are slower
than XLA's own where a few numbers are summed at a time: attention takes half the time without.
"""

_ONE_THREAD = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""No loop is shared by threads; products still are.

To wake a thread takes some 30 us, more than most loops of a narrow model.
"""


class jit_small_operations:  # noqa: N801  (used like jax.jit)
    """`jax.jit` for programs of many small operations on a CPU.

    On other devices, and inside of another program, which is compiled as a whole, it is `jax.jit`
    as it is.
    """

    __wrapped__: Callable[..., Any]

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        nested: bool = True,
        one_thread: Callable[..., bool] = lambda **_: False,
        **options: Any,
    ) -> None:
        """As `jax.jit`.

        Args:
          function: what to compile.
          nested: False promises that no other program contains the call.
          one_thread: says for a call's keyword arguments whether its loops stay in one thread.
          **options: of `jax.jit`.
        """
        functools.update_wrapper(self, function)
        self._nested, self._one_thread = nested, one_thread
        self._jit = functools.partial(jax.jit, function, **options)
        self._plain = self._jit()
        self._tuned: dict[bool, Any] = {}

    def _program(self, kwargs: Any) -> Any:
        """JAX takes compiler options only where it compiles."""
        if not on_cpu() or (self._nested and is_traced()):
            return self._plain
        one_thread = self._one_thread(**kwargs)
        if one_thread not in self._tuned:
            self._tuned[one_thread] = self._jit(compiler_options=known_options(one_thread))
        return self._tuned[one_thread]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self._program(kwargs)(*args, **kwargs)

    def _cache_size(self) -> int:
        """As of a jitted function; what was compiled as a part of other programs does not count."""
        return sum(program._cache_size() for program in self._tuned.values())

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As of a jitted function."""
        return self._program(kwargs).lower(*args, **kwargs)


def is_traced() -> bool:
    """Whether jax follows what is computed now, as a part of a larger program or a transformation.

    The arguments do not tell: a function may close over all that it reads.
    """
    return bool(get_opaque_trace_state() != _untraced())  # type: ignore[no-untyped-call]


@functools.cache
def _untraced() -> Any:
    """The state of a thread in which nothing is followed, whatever happens in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(get_opaque_trace_state).result()


@functools.cache
def on_cpu() -> bool:
    """Whether jax computes on a CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


@functools.cache
def known_options(one_thread: bool) -> dict[str, str]:
    """For programs of many small operations on a CPU, the options of `jax.jit` that this XLA has.

    They are no promise of its makers, and only save time.

    Args:
      one_thread: whether loops stay in one thread.
    """
    options = _SMALL_OPERATIONS | _ONE_THREAD if one_thread else _SMALL_OPERATIONS
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """The same numbers, with the same bits for all who read them.

    XLA computes what is cheap again for each reader, and may round differently. A number that one
    program both hands out and files, or files something under, must go through this. (On a CPU
    `jax.lax.optimization_barrier` does not help: it is gone before operations are merged.)

    Args:
      x: [...] floating point, not empty.
    """
    # The result of a loop is computed by nobody else. This one never runs, which XLA cannot know.
    first = x.reshape(-1)[0]
    never = jnp.isnan(first) & (first > 0)
    _, same = jax.lax.while_loop(
        lambda state: state[0], lambda state: (~state[0], -state[1]), (never, x)
    )
    return same


@computed_once.defjvp
def _computed_once_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return computed_once(*primals), tangents[0]
