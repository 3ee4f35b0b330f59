"""Whose memory an attached model's caches are: nobody's but torch's, whatever a caller does."""

import copy

import jax
import numpy as np
import pytest
from conftest import in_full
from test_attach import pair, pytestmark
from torch_models import SMALL, Driver, difference

from kvjax.base import dlpack
from kvjax.lightzero.attach import layout
from kvjax.lightzero.attach import scope as scopes
from kvjax.lightzero.attach.attached import state_of
from kvjax.lightzero.attach.scope import Exchange

__all__ = ["pytestmark"]

TOLERANCE = 1e-5
ROWS = 4


def drivers():
    model, twin, handle = pair()
    ours, theirs = Driver(twin, ROWS), Driver(model, ROWS)
    assert difference(theirs.step(3), ours.step(3)) < TOLERANCE
    return ours, theirs, handle


def caches(driver):
    return [layer._k_cache._cache for layer in driver.model.world_model.keys_values_wm]


def keep_numpy(cache):
    return cache.numpy()


def keep_capsule(cache):
    from torch.utils import dlpack

    return dlpack.from_dlpack(dlpack.to_dlpack(cache))


@pytest.mark.parametrize(
    "keep",
    [lambda x: x, lambda x: x.detach(), lambda x: x[:, :1], keep_numpy, keep_capsule],
    ids=["itself", "detached", "slice", "numpy", "capsule"],
)
def test_caches_that_a_caller_keeps_stay_as_they_are(keep):
    """LightZero aligns every simulation's batch in new tensors."""
    ours, _, _ = drivers()
    kept = [keep(cache) for cache in caches(ours)]
    before = [np.array(cache) for cache in kept]
    wm = ours.model.world_model
    wm.retrieve_or_generate_kvcache(np.zeros((ROWS, 1, 32), np.float32), ROWS, 1, [0] * ROWS)
    ours.step(5)
    for cache, old in zip(kept, before, strict=True):
        np.testing.assert_array_equal(cache, old)


def test_memory_that_nobody_keeps_is_used_again():
    ours, _, _ = drivers()
    wm = ours.model.world_model
    exchange = state_of(wm).bridge.scope.exchanges[ROWS]

    def place():
        return exchange.batch.unsafe_buffer_pointer()

    before = place()
    for _ in range(3):
        for _ in range(3):
            ours.step(5)
            assert place() == before
        cache = caches(ours)[0]
        assert before <= cache.data_ptr() < before + exchange.batch.nbytes
        del cache
    kept = wm.keys_values_wm_list
    wm.retrieve_or_generate_kvcache(np.zeros((ROWS, 1, 32), np.float32), ROWS, 1, [0] * ROWS)
    assert kept
    assert place() != before


@pytest.mark.parametrize("look", ["arrays", "borrow", "share", *in_full("no jit")])
def test_others_may_look_at_memory(look):
    """A report of all arrays, a loan, a queue between processes; and a search without jit."""
    ours, theirs, _ = drivers()
    cache = caches(ours)[0]
    if look == "arrays":
        kept = [np.asarray(x) for x in jax.live_arrays() if not x.is_deleted()]
        assert kept
    elif look == "borrow":
        with dlpack.borrow(cache) as array:
            assert array.shape == cache.shape
    elif look == "share":
        cache.share_memory_()
    else:
        with jax.disable_jit():
            assert difference(theirs.step(2), ours.step(2)) < TOLERANCE
    for _ in range(3):
        assert difference(theirs.step(3), ours.step(3)) < TOLERANCE


def test_an_error_leaves_no_half_of_an_exchange(monkeypatch):
    ours, theirs, handle = drivers()
    take, bridge = Exchange.take, state_of(ours.model.world_model).bridge

    def failed(*args):
        monkeypatch.setattr(Exchange, "take", take)
        raise MemoryError

    monkeypatch.setattr(Exchange, "take", failed)
    assert bridge.scope.exchanges
    with pytest.raises(MemoryError):
        ours.step(3)
    assert not bridge.scope.exchanges
    ours, theirs = Driver(ours.model, ROWS, seed=1), Driver(theirs.model, ROWS, seed=1)
    for _ in range(3):
        assert difference(theirs.step(3), ours.step(3)) < TOLERANCE
    assert handle.stats()["misses"] == 0


@pytest.mark.parametrize("name", ["file_and_look_up", "file", "look_up"])
def test_an_error_after_a_call_loses_entries_and_nothing_else(monkeypatch, name):
    """What the call was given is gone, what it made never arrived."""
    ours, theirs, handle = drivers()

    def failing(call):
        def failed(*args, **kwargs):
            call(*args, **kwargs)
            monkeypatch.undo()
            raise MemoryError

        return failed

    if name == "file_and_look_up":
        bridge = state_of(ours.model.world_model).bridge
        scope = bridge.scope
        bridge._scopes["default"] = scope._replace(between=failing(scope.between))
    else:
        monkeypatch.setattr(layout, name, failing(getattr(layout, name)))
    with pytest.raises(MemoryError):
        ours.step(3)
    ours, theirs = Driver(ours.model, ROWS, seed=1), Driver(theirs.model, ROWS, seed=1)
    for _ in range(3):
        assert difference(theirs.step(3), ours.step(3)) < TOLERANCE
    assert handle.stats()["misses"] == 0


def test_a_copy_has_an_exchange_of_its_own():
    """What waits in one of two copies is not what waits in the other."""
    ours, theirs, _ = drivers()
    copies = [[copy.deepcopy(d.model) for _ in range(2)] for d in (ours, theirs)]
    outputs = []
    for models in copies:
        searches = [Driver(model, ROWS, seed=seed) for seed, model in enumerate(models)]
        nodes = []
        for search in searches:
            search.step(0)
            nodes.append([search.model.world_model.latent_state.numpy()])
        outputs.append(
            [
                np.array(search.simulate(grown, index, np.zeros(ROWS, int)).latent_state)
                for index in range(4)
                for search, grown in zip(searches, nodes, strict=True)
            ]
        )
    assert difference(*outputs) < TOLERANCE


def test_only_what_was_found_and_grew_by_a_block_may_wait():
    ours, _, _ = drivers()
    wm = ours.model.world_model
    bridge = state_of(wm).bridge
    written, rows = bridge.written(wm.keys_values_wm, ROWS), bridge._rows_of(range(ROWS))
    lengths = list(wm.keys_values_wm_size_list_current)

    def can_wait(written, lengths):
        return scopes.can_file_later(bridge.scope, written, rows, lengths)

    assert can_wait(written, lengths)
    assert not can_wait(written, [lengths[0] - 1, *lengths[1:]])
    assert not can_wait(written._replace(end=written.end + 1), lengths)
    elsewhere = written._replace(place=written.place + 64)
    assert not can_wait(elsewhere, lengths)
    last = wm.keys_values_wm[1]._v_cache  # one of the caches is enough
    last._cache = last._cache.clone()
    assert not can_wait(bridge.written(wm.keys_values_wm, ROWS), lengths)


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(0, 1), lambda x: x.as_strided(x.shape, [0] * 4)]
)
def test_other_strides_are_another_batch(view):
    """Of equal shape and begin: what the cache holds is filed, not the memory behind it."""
    torch = pytest.importorskip("torch")
    ours, _, _ = drivers()
    wm = ours.model.world_model
    assert SMALL["num_heads"] == ROWS  # so that a transposed cache has the same shape
    cache = wm.keys_values_wm[1]._v_cache
    cache._cache = view(cache._cache)
    expected = cache._cache.clone()
    latent = torch.full((ROWS, 1, 32), 0.5) * torch.arange(1, ROWS + 1)[:, None, None]
    wm.keys_values_wm_size_list_current = [3] * ROWS
    size = wm.keys_values_wm.size
    wm.update_cache_context(latent, is_init_infer=False)
    found = state_of(wm).bridge.look_up(latent, range(ROWS), roots_only=False)
    assert found.lengths == [3] * ROWS
    np.testing.assert_array_equal(found.views[-1][:, :, :3], expected[:, :, size - 3 : size])


def test_notes_say_whose_rows_are_filed_and_asked_for():
    exchange = Exchange((1, 2, 1, 4, 2), 2, 3)
    one, other = np.array([[0, 1], [1, 1]], np.int32), np.array([[1, 0], [1, 0]], np.int32)
    latent = np.arange(6, dtype=np.float32).reshape(2, 3)

    def check(filed, asked):
        notes = dlpack.writable_view(exchange.notes)
        for half, rows in ((layout.FILED, filed), (layout.ASKED, asked)):
            np.testing.assert_array_equal(notes[half, :, layout.ROWS], rows.T)

    for filed, asked in ((one, one), (one, other), (other, other), (other, one)):
        exchange.note_filed(latent, filed)
        exchange.note_asked(latent + 1, asked)
        check(filed, asked)
    exchange.note_nothing_filed()
    check(np.zeros((2, 2)), one)
    exchange.note_filed(latent, other)
    check(other, one)
    np.testing.assert_array_equal(exchange.filed()[0], latent)


def test_fewer_latents_than_the_batch_has_rows():
    ours, _, handle = drivers()
    wm = ours.model.world_model
    wm.keys_values_wm_size_list_current = wm.keys_values_wm_size_list_current[:2]
    latent = np.full((2, 1, 32), 0.5, np.float32) * [[[1]], [[2]]]
    wm.update_cache_context(latent, is_init_infer=False)
    hits = wm.hit_count
    wm.retrieve_or_generate_kvcache(latent, 2, 1, [0, 0])
    assert wm.hit_count - hits == 2
    assert handle.stats()["misses"] == 0


def test_caches_with_gradients_are_filed():
    torch = pytest.importorskip("torch")
    ours, _, handle = drivers()
    wm = ours.model.world_model
    latent = torch.full((ROWS, 1, 32), 0.5)
    empty = wm.transformer.generate_empty_keys_values(n=ROWS, max_tokens=wm.context_length)
    wm.keys_values_wm = empty
    wm.forward({"obs_embeddings": latent}, past_keys_values=empty, is_init_infer=True, start_pos=0)
    wm.keys_values_wm_size_list_current = [1] * ROWS
    assert caches(ours)[0].requires_grad
    stored = handle.stats()["nodes_stored"]
    wm.update_cache_context(latent, is_init_infer=False)
    assert handle.stats()["nodes_stored"] == stored + ROWS
    ours.step(3)


def test_a_copy_made_inside_of_a_scope_starts_outside_of_it():
    ours, _, handle = drivers()
    with handle.scope("collect"):
        twin = copy.deepcopy(ours.model)
        assert state_of(ours.model.world_model).bridge._active == "collect"
    assert state_of(twin.world_model).bridge._active is None


def test_searches_in_and_out_of_inference_mode_share_an_exchange():
    torch = pytest.importorskip("torch")
    model, twin, _ = pair()
    ours, theirs = Driver(twin, ROWS), Driver(model, ROWS)
    with torch.inference_mode():
        mine = ours.step(3)
    assert difference(theirs.step(3), mine) < TOLERANCE
    for _ in range(2):
        assert difference(theirs.step(3), ours.step(3)) < TOLERANCE


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((ROWS, 32), "float32"),
        ((ROWS, 1, 1, 32), "float16"),
        ((ROWS, 4, 8), "bfloat16"),
        ((ROWS, 1, 32), "float64"),
    ],
)
def test_latents_of_any_shape_and_dtype_are_filed(shape, dtype, waits):
    """All become float32 in the same way, wherever they are filed and looked up."""
    torch = pytest.importorskip("torch")
    ours, _, _ = drivers()
    wm = ours.model.world_model
    latent = torch.tensor(np.random.default_rng(0).normal(size=shape)).to(getattr(torch, dtype))
    if not waits:
        wm.keys_values_wm[0]._k_cache._cache = wm.keys_values_wm[0]._k_cache._cache.clone()
    wm.update_cache_context(latent, is_init_infer=False)
    assert (state_of(wm).bridge.scope.pending is not None) is waits
    for asked in (latent, latent.float(), latent.float().numpy()):
        hits = wm.hit_count
        wm.retrieve_or_generate_kvcache(asked.reshape(ROWS, 1, 32), ROWS, 1, [0] * ROWS)
        assert wm.hit_count - hits == ROWS


@pytest.mark.parametrize(("rows", "size"), [(ROWS, 5), (ROWS + 1, 32)])
def test_a_refused_look_up_loses_nothing(rows, size):
    ours, _, _ = drivers()
    wm = ours.model.world_model
    latent = wm.latent_state.numpy().copy()
    with pytest.raises(
        ValueError, match=r"expected latents of 32 numbers, got 5|5 rows do not fit"
    ):
        wm.retrieve_or_generate_kvcache(np.zeros((rows, 1, size), np.float32), rows, 1, [0] * rows)
    hits = wm.hit_count
    wm.retrieve_or_generate_kvcache(latent, ROWS, 1, [0] * ROWS)
    assert wm.hit_count - hits == ROWS
