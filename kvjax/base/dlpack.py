"""Torch tensors to jax arrays and back, with an ownership contract.

* `to_torch` and `to_jax` copy. Neither side ever sees the other's later writes: torch may write
  into what it got, jax may donate what it got.
* `borrow` lends a tensor's memory to jax for the length of a `with` block and takes it back.
* `hand_over` moves a fresh array to torch without a copy; the array is gone afterwards.
* `share` lets torch, and `writable_view` numpy, write into an array that nobody else holds.

DLPack alone promises none of this: an exported array is a writable alias of immutable memory, an
import with `copy=True` may still alias, and work that was dispatched on borrowed memory may read it
after the next write. Torch is imported on first use.
"""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.values import require

_PLATFORMS = {"cpu": "cpu", "cuda": "gpu"}
"""Torch's device types and jax's platforms that share memory."""

_PAUSE_S, _PATIENCE_S = 1e-3, 0.25


def to_torch(tree: Any) -> Any:
    """Copies every array of a pytree into a torch tensor of its own, on the CPU.

    Args:
      tree: a pytree of jax or numpy arrays [...] (read-only ones too); shapes and dtypes stay.

    Returns:
      The same tree of contiguous, writable tensors.

    Raises:
      ValueError: None instead of a tree; a leaf is no array, is being traced, or has a dtype that
        torch does not know.
    """
    require(tree is not None, "expected a tree of jax or numpy arrays, got None")
    return jax.tree.map(_to_tensor, tree)


def to_jax(tree: Any) -> Any:
    """Copies every tensor of a pytree into a jax array of its own.

    Strides, offsets, gradients and conjugate views are resolved. While 64-bit types are off in jax,
    float64 is rounded to float32 and int64 must fit into int32.

    Args:
      tree: a pytree of torch tensors or numpy arrays [...].

    Returns:
      The same tree of jax arrays, ready and owned by jax.

    Raises:
      ValueError: None instead of a tree; a leaf is no dense array, lies on a device that jax does
        not have, or holds integers that would not survive.
    """
    require(tree is not None, "expected a tree of torch tensors, got None")
    return jax.tree.map(_to_array, tree)


@contextlib.contextmanager
def borrow(tensor: Any) -> Iterator[jax.Array]:
    """Lends a tensor to jax for the length of a `with` block, without a copy where possible.

    A compact, aligned tensor on a CPU, of a dtype that jax and numpy have, is shared; any other one
    is copied. When the block ends the array is deleted, so that using it later is an error, and
    whatever computes with it, in any thread, is waited for. Do not write to the tensor inside the
    block. A view of the array that is kept longer (of numpy, or by DLPack) sees later writes; the
    end of the block then waits for all that jax is computing.

    Args:
      tensor: a torch tensor on a device that jax has.

    Raises:
      ValueError: as `to_jax`.
    """
    array, returned = _lend(tensor)
    try:
        yield array
    finally:
        array.delete()
        _wait_for(returned)


def hand_over(array: jax.Array) -> Any:
    """Moves a fresh array to torch without a copy; the array is deleted.

    The caller must be the only one who holds the array's memory: the output of a jitted call that
    nobody kept, not one of its inputs, no slice of it, no numpy view.

    Returns:
      A tensor that may be written to, since nobody can read the array any more.
    """
    # The capsule itself: of an array torch asks for devices and versions, which takes a third more.
    tensor = _torch().from_dlpack(array.block_until_ready().__dlpack__())
    array.delete()
    return tensor


def share(array: jax.Array) -> Any:
    """A flat tensor of an array's own memory on a CPU, for whoever holds the array alone.

    Torch may write to it whenever no computation reads the array. While a tensor or a view holds
    the memory, donating the array copies it: XLA sees who holds it, so nothing changes under them.

    Args:
      array: [...] float32, not empty; waited for.

    Returns:
      A tensor [N] of all entries in order.

    Raises:
      ValueError: the array has another dtype.
    """
    # As DLPack, for which jax takes three times as long. The view, unlike the array, holds memory.
    view = memoryview(array)
    if view.format not in ("f", "=f"):
        raise ValueError(f"expected a float32 array, got {array.dtype}")
    return _float32_frombuffer()(view)


@functools.cache
def _float32_frombuffer() -> Any:
    frombuffer = _torch().frombuffer
    with warnings.catch_warnings(action="ignore"):
        frombuffer(b"read-only", dtype=_torch().uint8)  # torch warns of the first one
    return functools.partial(frombuffer, dtype=_torch().float32)


@functools.cache
def _torch() -> Any:
    import torch

    return torch


def writable_view(array: jax.Array) -> np.ndarray[Any, Any]:
    """A writable numpy view of an array's memory, which does not keep the array from being donated.

    For whoever holds the array alone, on a CPU, and to be used at once: after the array was donated
    the view is of memory that may be anybody's. (`numpy.asarray` makes a view that may be kept, and
    that turns every later donation into a copy.)

    Args:
      array: computed, of a dtype that numpy has.

    Raises:
      ValueError: the array is not on a CPU.
    """
    platform = array.platform()
    require(platform == "cpu", f"expected an array on a CPU, got one on a {platform}")
    return np.asarray(_Memory(array))


class _Memory:
    def __init__(self, array: jax.Array) -> None:
        self._array = array
        dtype, place = np.dtype(array.dtype), array.unsafe_buffer_pointer()
        fields = {"version": 3, "shape": array.shape, "typestr": dtype.str, "data": (place, False)}
        self.__array_interface__ = fields


def import_shared(tensor: Any) -> jax.Array:
    """A jax view of a tensor that the caller knows to be plain: dense, detached, float32.

    For hot paths that block on their results before torch writes again; else see `borrow`.
    """
    array: jax.Array = jax.dlpack.from_dlpack(tensor)
    return array


def require_shared_device(device: Any) -> None:
    """Raises `ValueError` unless jax has the kind of device that a torch device is."""
    platform = _PLATFORMS.get(device.type)
    try:
        available = platform is not None and bool(jax.devices(platform))
    except RuntimeError:
        available = False
    if not available:
        have = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ValueError(
            f"expected a tensor on a device that jax has ({have}), got one on {device}: move it"
            " with .cpu() or install jax for that device"
        )


def _to_tensor(leaf: Any) -> Any:
    torch = _torch()
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError("to_torch was called on a traced value: call it outside of jit")
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(f"torch has no dtype {leaf.dtype}: pass jax.random.key_data(key)")
        leaf = np.asarray(leaf)
    if not isinstance(leaf, np.ndarray | np.generic):
        raise ValueError(f"expected a jax or numpy array, got {type(leaf).__name__}")
    owned = np.array(leaf, dtype=leaf.dtype.newbyteorder("="), order="C")
    try:
        if owned.dtype == jnp.bfloat16:  # numpy's own types do not include it
            return torch.from_numpy(owned.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(owned)
    except TypeError as error:
        raise ValueError(f"torch has no dtype {leaf.dtype}") from error


def _to_array(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return jnp.array(leaf, copy=True)
    if isinstance(leaf, np.ndarray | np.generic):
        _require_surviving_integers(leaf)
        return jnp.array(leaf, copy=True).block_until_ready()
    shared = import_shared(_plain(leaf)).block_until_ready()
    # A copy that jax owns, so that donating it works; done before torch can write again.
    return jnp.array(shared, copy=True).block_until_ready()


def _plain(tensor: Any) -> Any:
    """A tensor's values in a form that jax can view: the tensor's own memory or a copy."""
    torch = _torch()
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected a torch tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"expected a dense tensor, got layout {tensor.layout}, {tensor.dtype}")
    require_shared_device(tensor.device)
    plain = tensor.detach().resolve_conj().resolve_neg()
    if jax.dtypes.canonicalize_dtype("int64") != "int64":
        plain = _narrow(plain)
    return plain.contiguous()


def _narrow(tensor: Any) -> Any:
    """Replaces 64-bit numbers by the 32-bit ones that jax keeps."""
    torch = _torch()
    narrower = {
        torch.float64: torch.float32,
        torch.complex128: torch.complex64,
        torch.int64: torch.int32,
        torch.uint64: torch.uint32,
    }
    if tensor.dtype in (torch.int64, torch.uint64):
        _require_surviving_integers(tensor.cpu().numpy())
    return tensor.to(narrower.get(tensor.dtype, tensor.dtype))


def _require_surviving_integers(values: Any) -> None:
    kept = np.dtype(jax.dtypes.canonicalize_dtype(values.dtype))
    if kept == values.dtype or kept.kind not in "iu" or values.size == 0:
        return
    limits = np.iinfo(kept)
    if values.min() < limits.min or values.max() > limits.max:
        raise ValueError(
            f"{values.dtype} values from {values.min()} to {values.max()} do not fit into {kept},"
            " which is what jax keeps of them: enable jax_enable_x64"
        )


def _lend(tensor: Any) -> tuple[jax.Array, threading.Event]:
    """An array on a tensor's memory, if it can be, and what is set when jax is done with that.

    XLA lets go of imported memory when its array is deleted and nothing computes with it any more.
    """
    plain, returned = _plain(tensor), threading.Event()
    try:
        lent = plain.numpy()
    except TypeError:  # elsewhere than on a CPU, or a dtype that numpy does not have
        returned.set()
        return _to_array(plain), returned
    weakref.finalize(lent, returned.set)
    return import_shared(lent), returned


def _wait_for(returned: threading.Event) -> None:
    """Waits for memory to be returned; if somebody keeps a view of it, for all computations."""
    # Looking at what other threads compute is not safe in jax, so that is the last resort.
    computing = [] if returned.wait(_PATIENCE_S) else jax.live_arrays()  # type: ignore[no-untyped-call]
    for array in computing:
        while not (_is_done(array) or returned.wait(_PAUSE_S)):
            pass


def _is_done(array: jax.Array) -> bool:
    try:
        done: bool = array.is_ready()  # type: ignore[attr-defined]
        return done
    except RuntimeError:  # deleted, perhaps just now and by another thread
        return True
