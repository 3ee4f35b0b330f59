"""Batches over the devices of a mesh: what belongs to a row is computed where the row lies.

Shapes: B rows of a batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.base.values import require, require_type


def spec(*axes: Any) -> PartitionSpec:
    """A `PartitionSpec`."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def specs(values: Any, rows: Any, axis: int = 0) -> Any:
    """A `PartitionSpec` for each array of a pytree whose rows lie along `axis`.

    An array of one axis has its rows there.
    """

    def spec_of(x: jax.Array) -> PartitionSpec:
        return spec(*[None] * min(axis, x.ndim - 1), rows)

    return jax.tree.map(spec_of, values)


def over(mesh: Any, name: str, rows: int) -> NamedSharding:
    """How rows lie over all devices of a mesh, as many on each.

    Args:
      mesh: the mesh.
      name: of the number of rows, for the message.
      rows: their number.
    """
    require_type("mesh", mesh, Mesh, "jax.make_mesh")
    devices = mesh.size
    fits = rows % devices == 0
    require(fits, f"{name} must be a multiple of the mesh's {devices} devices, got {rows}")
    return NamedSharding(mesh, spec(mesh.axis_names))


def replicated(values: Any, mesh: Mesh | None) -> Any:
    """The same arrays on every device of a mesh; as they are without one."""
    return values if mesh is None else jax.device_put(values, NamedSharding(mesh, spec()))


def rows_of(x: Any) -> NamedSharding | None:
    """How the rows of an array [B, ...] lie on a mesh; None: on no mesh, or nobody can tell.

    While a program is traced explicit axes tell, and automatic ones do not.
    """
    of = x.sharding if is_here(x) else jax.typeof(x).sharding
    if not isinstance(of, NamedSharding) or AxisType.Manual in of.mesh.axis_types:
        return None
    axes = of.spec[0] if len(of.spec) else None
    return None if axes is None else NamedSharding(of.mesh, spec(axes))


def axes_of(rows: NamedSharding | None, x: jax.Array) -> Any:
    """The axes over which rows lie, for a `PartitionSpec`; else a traced array's explicit ones."""
    of: Any = jax.typeof(x).sharding if rows is None else rows
    return of.spec[0] if len(of.spec) else None


def is_here(x: Any) -> bool:
    """Whether an array is on devices and not traced."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of a batch a program is about: all, or those of one device.

    Attributes:
      axes: over which the batch lies; None: all rows are here.
    """

    axes: Any = None

    @classmethod
    def of(cls, rows: NamedSharding | None) -> "Share":
        """Of a program that `run` runs."""
        return cls(None if rows is None else rows.spec[0])

    def drawn(self, draw: Callable[[int], Any], rows: int) -> Any:
        """Random numbers of the `rows` that are here, the same on however many devices.

        Args:
          draw: the number of rows to what they draw, a pytree of [rows, ...].
          rows: how many are here.
        """
        if self.axes is None:
            return draw(rows)
        first = jax.lax.axis_index(self.axes) * rows
        everywhere = draw(rows * jax.lax.axis_size(self.axes))
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, rows), everywhere)


ALL = Share()


def run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rows: NamedSharding | None,
    how: tuple[Any, ...],
    results: Any,
) -> Any:
    """Calls a function on each device with the rows that lie there; nothing moves between devices.

    Args:
      function: takes the arguments.
      arguments: any pytrees; what lies elsewhere is brought first.
      rows: how the rows of the batch lie, see `rows_of`; None: XLA places what is computed.
      how: how each argument lies, a `PartitionSpec` for each, or for all that a part of it holds.
      results: the same of the results.
    """
    if rows is None:
        return run_automatic(function, arguments, results)
    mesh = rows.mesh
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=how, out_specs=results, check_vma=False
    )  # JAX's account of what differs between devices takes twice the time to trace
    if AxisType.Explicit not in mesh.axis_types:
        return mapped(*arguments)
    with jax.sharding.use_abstract_mesh(_abstract(mesh)):
        return mapped(*(_placed(x, of, mesh) for x, of in zip(arguments, how, strict=True)))


_reshard: Any = jax.sharding.reshard


def _abstract(mesh: Any) -> Any:
    return getattr(mesh, "abstract_mesh", mesh)


def _placed(values: Any, how: Any, mesh: Any) -> Any:
    """Arrays as they are to lie, where JAX keeps account of it."""

    def placed(of: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda x: _reshard(x, NamedSharding(mesh, of)), part)

    return jax.tree.map(placed, how, values, is_leaf=lambda x: isinstance(x, PartitionSpec))


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
