"""Loops and branches of `jax.lax` that also run over the rows that `shard_map` gives a device.

There JAX keeps account of which values differ between devices. What a loop carries, and what two
branches hand back, must not change in that; but a loop begins with constants, which are the same
everywhere. Here those are declared to differ wherever the loop makes them differ. Outside of
`shard_map` these are the functions of `jax.lax`.
"""

from collections.abc import Callable
from typing import Any

import jax


def while_loop(goes_on: Callable[[Any], Any], body: Callable[[Any], Any], start: Any) -> Any:
    """As `jax.lax.while_loop`."""
    return jax.lax.while_loop(goes_on, body, _settled(body, start))


def fori_loop(first: Any, last: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """As `jax.lax.fori_loop`."""
    start = _settled(lambda state: body(first, state), start)
    return jax.lax.fori_loop(first, last, body, start)


def scan(body: Callable[[Any, Any], Any], start: Any, inputs: Any) -> Any:
    """As `jax.lax.scan`."""
    start = _settled(lambda state: body(state, jax.tree.map(lambda x: x[0], inputs))[0], start)
    return jax.lax.scan(body, start, inputs)


def cond(
    which: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], *operands: Any
) -> Any:
    """As `jax.lax.cond`."""
    if not _keeps_account():
        return jax.lax.cond(which, if_true, if_false, *operands)
    shapes = [jax.eval_shape(branch, *operands) for branch in (if_true, if_false)]
    branches = [
        lambda *args, branch=branch, other=other: _varying(branch(*args), other)
        for branch, other in zip((if_true, if_false), reversed(shapes), strict=True)
    ]
    return jax.lax.cond(which, *branches, *operands)


def varies(values: Any) -> bool:
    """Whether any array of a pytree is known to differ between devices."""
    return any(_axes(values))


def _settled(body: Callable[[Any], Any], start: Any) -> Any:
    """A loop's start, declared to differ between devices wherever the body's result does."""
    if not _keeps_account():
        return start
    while True:
        varying = _varying(start, jax.eval_shape(body, start))
        if _axes(varying) == _axes(start):
            return start
        start = varying


def _keeps_account() -> bool:
    """Whether JAX does so here: not outside of `shard_map`, and not with `check_vma=False`."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return any(_varies(jax.lax.axis_index(axis)) for axis in axes)


def _varying(values: Any, like: Any) -> Any:
    """Values that differ along their own axes of devices and along those of `like`."""

    def cast(value: Any, other: Any) -> Any:
        missing = _varies(other) - _varies(value)
        return jax.lax.pcast(value, tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, values, like)


def _axes(values: Any) -> list[frozenset[str]]:
    return [_varies(value) for value in jax.tree.leaves(values)]


def _varies(value: Any) -> frozenset[str]:
    """Axes of devices along which a value differs."""
    kind = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    axes: Any = getattr(kind, "manual_axis_type", None)
    return frozenset() if axes is None else frozenset(axes.varying)
