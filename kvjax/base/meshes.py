"""Meshes with explicit axes, where JAX asks of each gather how its result lies."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def rows_of(x: jax.Array) -> Any:
    """The axes of devices over which the first axis of an array lies, for a `PartitionSpec`."""
    spec = jax.typeof(x).sharding.spec
    return spec[0] if len(spec) else None


def spec(*axes: Any) -> PartitionSpec:
    """A `PartitionSpec`."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def run_automatic(function: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> Any:
    """Calls a function of arrays so that XLA places what is computed inside.

    Args:
      function: takes the arguments.
      arguments: any pytrees.
      results: how results lie if an argument lies on explicit axes: a `PartitionSpec` for each, or
        for all that a part of the result holds.
    """
    for leaf in jax.tree.leaves(arguments):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            with jax.sharding.use_abstract_mesh(mesh):
                return jax.sharding.auto_axes(function, out_sharding=results)(*arguments)
    return function(*arguments)


def specs(values: Any, rows: Any, axis: int = 0) -> Any:
    """A `PartitionSpec` for each array of a pytree whose rows lie along `axis`.

    An array of one axis has its rows there.
    """

    def spec_of(x: jax.Array) -> PartitionSpec:
        return spec(*[None] * min(axis, x.ndim - 1), rows)

    return jax.tree.map(spec_of, values)
