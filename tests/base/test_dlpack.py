"""Who owns memory that crosses between torch and jax."""

import gc
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.base import dlpack

torch = pytest.importorskip("torch")

ALIGNMENT = 64


def aligned(*shape, dtype=None):
    tensor = torch.ones(*shape, dtype=dtype)
    assert tensor.data_ptr() % ALIGNMENT == 0
    return tensor


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "bool", "int8", "int32", "uint8", "complex64"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)])
def test_there_and_back(dtype, shape):
    array = jnp.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 5).astype(dtype)
    tensor = kvjax.to_torch({"a": [array]})["a"][0]
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    back = kvjax.to_jax((tensor,))[0]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(back), np.asarray(array))


def awkward():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "misaligned": base.reshape(-1)[1:],
        "expanded": torch.tensor([3.0]).expand(4),
        "needs a gradient": base.clone().requires_grad_() * 2,
        "parameter": torch.nn.Parameter(base.clone()),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "float64": base.double() / 4,
        "int64": torch.tensor([-5, 2**31 - 1]),
        "bool": base > 3,
        "bfloat16": base.bfloat16(),
        "zero size": base[:0],
        "inference": torch.inference_mode()(lambda: base + 1)(),
    }


@pytest.mark.parametrize("name", awkward())
def test_what_torch_hands_over(name):
    tensor = awkward()[name]
    expected = tensor.detach().resolve_conj().resolve_neg()
    expected = expected.float() if expected.dtype is torch.bfloat16 else expected
    array = kvjax.to_jax(tensor)
    np.testing.assert_array_equal(np.asarray(array).astype(expected.numpy().dtype), expected)
    with dlpack.borrow(tensor) as borrowed:
        np.testing.assert_array_equal(np.asarray(borrowed + 0), np.asarray(array))


def test_numpy_read_only_foreign_byte_order_and_scalars():
    values = np.arange(6, dtype=">f4").reshape(2, 3)[:, ::-1]
    values.flags.writeable = False
    tensor = kvjax.to_torch(values)
    tensor.add_(1)
    np.testing.assert_array_equal(tensor.numpy(), values + 1)
    assert values[0, 0] == 2
    assert kvjax.to_torch(np.float32(3)).item() == 3
    assert kvjax.to_jax(np.int64(3)).dtype == jnp.int32


def test_torch_gets_memory_of_its_own():
    array = jnp.ones(1000)
    kvjax.to_torch(array).zero_()
    assert float(array.sum()) == 1000
    # What the copy protects from: an exported array is a writable alias.
    torch.from_dlpack(array).zero_()
    assert float(array.sum()) == 0


@pytest.mark.parametrize("make", [aligned, lambda n: np.ones(n, np.float32)])
def test_jax_gets_memory_of_its_own_even_where_dlpack_says_copy_and_does_not(make):
    source = make(1000)
    array = kvjax.to_jax(source)
    source[:] = 0
    assert float(array.sum()) == 1000


def test_dlpack_copies_that_do_not_copy_are_why():
    tensor = aligned(1000)
    alias = jax.dlpack.from_dlpack(tensor, copy=True)
    assert alias.unsafe_buffer_pointer() == tensor.data_ptr()
    assert kvjax.to_jax(tensor).unsafe_buffer_pointer() != tensor.data_ptr()


def test_donation_of_what_jax_got_works():
    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    owned = kvjax.to_jax(aligned(100_000))
    place = owned.unsafe_buffer_pointer()
    assert donate(owned).unsafe_buffer_pointer() == place
    # An import that shares memory is donated in name only.
    shared = dlpack.import_shared(aligned(100_000))
    place = shared.unsafe_buffer_pointer()
    assert donate(shared).unsafe_buffer_pointer() != place


SLOW = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x / x.shape[0], x).sum())


def test_a_copy_is_complete_before_torch_writes_again():
    for _ in range(5):
        tensor = aligned(3000, 3000)
        array = kvjax.to_jax(tensor)
        tensor.zero_()
        assert float(array.min()) == 1


def test_a_borrow_ends_when_its_results_are_complete():
    tensor = aligned(500, 500)
    SLOW(jnp.zeros((500, 500))).block_until_ready()
    with dlpack.borrow(tensor) as array:
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        total = SLOW(array)
    tensor.zero_()
    assert float(total) == pytest.approx(250_000)


def test_without_synchronisation_the_next_write_would_win(monkeypatch):
    monkeypatch.setattr(dlpack, "_wait_for", lambda _: None)
    tensor = aligned(500, 500)
    SLOW(jnp.zeros((500, 500))).block_until_ready()
    with dlpack.borrow(tensor) as array:
        total = SLOW(array)
    tensor.zero_()
    assert float(total) != pytest.approx(250_000)


@pytest.mark.parametrize("keep", [np.asarray, torch.from_dlpack, jax.dlpack.from_dlpack])
def test_a_borrow_of_which_a_view_is_kept_ends_when_its_results_are_complete(keep):
    tensor = aligned(500, 500)
    with dlpack.borrow(tensor) as array:
        kept = keep(array)
        total = SLOW(array)
    tensor.zero_()
    assert float(total) == pytest.approx(250_000)
    assert float(kept.sum()) == 0


def test_a_borrow_waits_for_its_own_computations_alone():
    dlpack.to_jax(aligned(500, 500))
    with dlpack.borrow(aligned(100)):
        other = SLOW(jnp.ones((500, 500)))
    assert not other.is_ready()


@pytest.mark.parametrize("is_same", [True, False])
def test_threads_borrow_at_once(is_same):
    """Also one and the same tensor: each loan is its own."""
    tensors = [aligned(1000) for _ in range(3)]
    errors = []

    def work(tensor):
        try:
            for number in range(1, 100):
                with dlpack.borrow(tensor) as array:
                    total = (array * number).sum()
                assert float(total) == 1000 * number
                assert float((jnp.ones(1000) * number).sum()) == 1000 * number
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(tensors[0] if is_same else tensor,))
        for tensor in tensors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_loan_inside_of_a_loan():
    tensor = aligned(1000)
    with dlpack.borrow(tensor) as outer:
        with dlpack.borrow(tensor) as inner:
            total = inner.sum()
        assert inner.is_deleted()
        assert float(outer.sum()) == float(total) == 1000


def test_after_a_borrow_no_view_is_left():
    tensor = aligned(100)
    with dlpack.borrow(tensor) as array:
        views = [array, jnp.asarray(array), jax.device_put(array, jax.devices()[0]), array[:]]
        result = array + 1
    assert all(view.is_deleted() for view in views)
    assert float(result.sum()) == 200
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        views[0].sum()


def test_a_borrow_ends_on_errors_too():
    tensor = aligned(100)
    with pytest.raises(KeyError), dlpack.borrow(tensor) as array:
        raise KeyError
    assert array.is_deleted()


@pytest.mark.parametrize("is_kept", [True, False])
def test_borrowing_what_jax_owns_leaves_it_alone(is_kept):
    """An exported array that is deleted ends the process when torch is done with its memory."""
    array = jax.jit(lambda: jnp.arange(100.0))()
    tensor = torch.from_dlpack(array)
    kept = array if is_kept else None
    del array
    with dlpack.borrow(tensor) as lent:
        assert lent.unsafe_buffer_pointer() == tensor.data_ptr()
        total, another = lent.sum(), jax.dlpack.from_dlpack(tensor)
    assert lent.is_deleted()
    assert kept is None or float(kept.sum()) == float(total)
    assert float(another.sum()) == float(total)
    del tensor, another
    gc.collect()


def test_a_loan_that_was_exported_again_ends():
    tensor = aligned(100)
    with dlpack.borrow(tensor) as array:
        kept = torch.from_dlpack(array)
    assert array.is_deleted()
    del tensor
    gc.collect()
    assert float(kept.sum()) == 100


def test_donating_a_borrowed_array_leaves_the_tensor_alone():
    tensor = aligned(1000)
    with dlpack.borrow(tensor) as array:
        jax.jit(lambda x: x * 0, donate_argnums=0)(array)
    assert float(tensor.sum()) == 1000


def test_handing_over_moves():
    array = jax.jit(lambda x: x + 1)(jnp.zeros(1000))
    place = array.unsafe_buffer_pointer()
    tensor = dlpack.hand_over(array)
    assert tensor.data_ptr() == place
    assert array.is_deleted()
    tensor.zero_()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        array.sum()


double = jax.jit(lambda x: 2 * x, donate_argnums=0)


def test_memory_is_written_to_and_still_donated():
    array = jax.jit(lambda: jnp.arange(1000.0))()
    place = array.unsafe_buffer_pointer()
    for expected in ([2, 4, 6], [6, 10, 14]):
        view = dlpack.writable_view(array)
        view += 1
        array = double(array).block_until_ready()
        assert dlpack.writable_view(array)[:3].tolist() == expected
    assert array.unsafe_buffer_pointer() == place


def test_a_view_of_memory_keeps_its_array():
    array = jnp.arange(1000.0)
    view, alive = dlpack.writable_view(array)[1:3], weakref.ref(array)
    del array
    gc.collect()
    assert alive() is not None
    assert view.tolist() == [1, 2]
    del view
    gc.collect()
    assert alive() is None


def test_memory_is_shared_with_torch_and_donated_when_torch_is_done():
    array = jax.jit(lambda: jnp.arange(1000.0))()
    place = array.unsafe_buffer_pointer()
    tensor = dlpack.share(array)
    assert tensor.data_ptr() == place
    tensor += 1
    kept = tensor[:3]
    del tensor
    moved = double(array)
    assert moved.unsafe_buffer_pointer() != place
    assert kept.tolist() == [1, 2, 3]
    assert moved[:3].tolist() == [2, 4, 6]
    del kept
    again = double(array)
    assert again.unsafe_buffer_pointer() == place
    assert again[:3].tolist() == [2, 4, 6]


def test_other_dtypes_are_not_shared():
    with pytest.raises(ValueError, match="expected a float32 array, got int32"):
        dlpack.share(jnp.arange(3))


def test_sharing_waits_and_warns_nobody():
    program = (
        "import warnings, jax, jax.numpy as jnp; from kvjax.base import dlpack;"
        "warnings.simplefilter('error');"
        "slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, y: y @ x, x));"
        "print(dlpack.share(slow(jnp.eye(300)))[:2].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[1.0, 0.0]\n", "")


def test_memory_of_a_gpu_is_not_seen():
    class OnGpu:
        def platform(self):
            return "gpu"

    with pytest.raises(ValueError, match="expected an array on a CPU, got one on a gpu"):
        dlpack.writable_view(OnGpu())


def cuda_tensor():
    """A tensor that says it is on a GPU, with no GPU behind it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(3, device="cuda")


@pytest.mark.parametrize("cross", [kvjax.to_jax, lambda x: dlpack.borrow(x).__enter__()])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cuda_tensor, "device that jax has.*cuda:0"),
        (lambda: torch.empty(3, device="meta"), "device that jax has.*meta"),
        (lambda: torch.eye(3).to_sparse(), "dense"),
        (lambda: torch.tensor([2**31]), "2147483648.*do not fit into int32"),
        (lambda: [1.0][0], "torch tensor, got float"),
    ],
)
def test_clear_errors_to_jax(make, message, cross):
    with pytest.raises(ValueError, match=message):
        cross(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jax.random.key(0), "key_data"),
        (lambda: np.array(["text"]), "no dtype <U4"),
        (lambda: jnp.ones(2, jnp.int4), "no dtype int4"),
        (lambda: 3.0, "array, got float"),
    ],
)
def test_clear_errors_to_torch(make, message):
    with pytest.raises(ValueError, match=message):
        kvjax.to_torch(make())


def test_not_inside_a_jit():
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda x: kvjax.to_torch(x))(jnp.ones(3))
    with pytest.raises(ValueError, match="do not fit"):
        kvjax.to_jax(np.array([2**40]))


def test_importing_kvjax_imports_no_torch():
    code = "import sys, kvjax; assert 'torch' not in sys.modules; kvjax.to_torch"
    subprocess.run([sys.executable, "-c", code], check=True)
