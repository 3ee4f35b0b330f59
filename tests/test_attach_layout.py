"""Look-up and filing in LightZero's layout against the ops on single windows, in numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

from kvjax import store as stores
from kvjax.lightzero import layout
from kvjax.ops import window as windows
from kvjax.types import Window

C = SMALL.context_length
K, L, H, D = C - 3, SMALL.num_layers, SMALL.num_heads, SMALL.window.head_dim
ENVS = 5


def describe(lengths, valid=None):
    rows = len(lengths)
    valid = np.ones(rows) if valid is None else np.asarray(valid)
    return np.stack([np.arange(rows), valid]).astype(np.int32)


def random_batch(rng, lengths):
    """Windows [B, C, L, 2, H, D] and the aligned batch of them, garbage behind its end."""
    size = max(lengths)
    kv = rng.normal(size=(len(lengths), C, L, 2, H, D)).astype(np.float32)
    batch = np.full((L, 2, len(lengths), H, C, D), np.nan, np.float32)
    batch[:, :, :, :, :size] = 0
    for row, length in enumerate(lengths):
        kv[row, length:] = 0
        tokens = kv[row, :length].transpose(1, 2, 3, 0, 4)
        batch[:, :, row, :, size - length : size] = tokens
    return kv, batch


@pytest.mark.parametrize("is_root", [True, False])
@pytest.mark.parametrize("lengths", [(3, 1, 5, 1, 3), (7, 3, 5, 7, 1), (7, 7, 7, 7, 7), (1,)])
def test_filed_windows_are_slid_and_come_back_aligned(lengths, is_root):
    rng = np.random.default_rng(0)
    store = stores.init_store(SMALL, ENVS, 4, root_slots=2)
    kv, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(len(lengths), 16)).astype(np.float32)
    correction = rng.normal(size=(K, L, 2, H, D)).astype(np.float32)
    store = layout.file(
        store, batch, latent, describe(lengths), np.int32(lengths), correction, is_root=is_root
    )
    expected = jax.vmap(windows.slide, in_axes=(0, None))(
        Window(jnp.asarray(kv), jnp.asarray(lengths)), jnp.asarray(correction)
    )
    aligned = windows.trim_and_pad(expected)
    _, found, info, _ = layout.look_up(store, latent, describe(lengths), roots_only=False)
    np.testing.assert_array_equal(info[0], expected.length)
    where = layout.IN_ROOTS if is_root else layout.IN_NODES
    np.testing.assert_array_equal(info[1], where)
    np.testing.assert_array_equal(np.transpose(found, (2, 4, 0, 1, 3, 5)), aligned.kv)


def test_rows_that_miss_or_do_not_count():
    """A miss gets one slot of its own; rows that are not valid align nothing and store nothing."""
    rng = np.random.default_rng(0)
    store = stores.init_store(SMALL, ENVS, 4, root_slots=2)
    lengths = (3, 5, 3, 1, 1)
    _, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(5, 16)).astype(np.float32)
    zero = np.zeros((K, L, 2, H, D), np.float32)
    rows = describe(lengths, valid=[1, 0, 1, 1, 1])
    shifted = batch[:, :, :, :, 2:]  # without row 1 the batch ends at 3
    shifted = np.concatenate([shifted, batch[:, :, :, :, :2]], axis=4)
    store = layout.file(store, shifted, latent, rows, np.int32(lengths), zero, is_root=False)
    latent = latent * [[1], [1], [0], [1], [1]]  # the call may still be reading the old one
    counters, found, info, _ = layout.look_up(store, latent, rows, roots_only=False)
    assert np.asarray(info).tolist() == [[3, 1, 1, 1, 1], [2, 0, 0, 2, 2]]
    assert not np.asarray(found)[:, :, 2].any()
    np.testing.assert_array_equal(found[:, :, 3, :, 2], batch[:, :, 3, :, 4])
    assert not np.asarray(found)[:, :, 3, :, :2].any()
    assert stores.stats(layout.with_counters(store, counters))["misses"] == 1
    _, _, roots, _ = layout.look_up(store, latent, rows, roots_only=True)
    assert not np.asarray(roots[1]).any()


def test_of_equal_latents_the_last_one_stays():
    rng = np.random.default_rng(0)
    store = stores.init_store(SMALL, ENVS, 4, root_slots=2)
    lengths = (1, 7, 3)
    kv, batch = random_batch(rng, lengths)
    latent = np.ones((3, 16), np.float32)
    rows = describe(lengths)
    rows[layout.ENV] = 0
    zero = np.zeros((K, L, 2, H, D), np.float32)
    store = layout.file(store, batch, latent, rows, np.int32(lengths), zero, is_root=False)
    _, found, info, _ = layout.look_up(store, latent[:1], rows[:, :1], roots_only=False)
    assert info[0, 0] == 3
    np.testing.assert_array_equal(np.transpose(found[:, :, 0], (3, 0, 1, 2, 4))[:3], kv[2, :3])


def test_more_rows_than_slots():
    """Four nodes fit; of five rows the last four stay."""
    rng = np.random.default_rng(0)
    store = stores.init_store(SMALL, 1, 4, root_slots=2)
    lengths = (3, 5, 1, 7, 5)
    _, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(5, 16)).astype(np.float32)
    rows = describe(lengths)
    rows[layout.ENV] = 0
    zero = np.zeros((K, L, 2, H, D), np.float32)
    store = layout.file(store, batch, latent, rows, np.int32(lengths), zero, is_root=False)
    _, _, info, _ = layout.look_up(store, latent, rows, roots_only=False)
    assert np.asarray(info).tolist() == [[1, 5, 1, 5, 5], [0, 2, 2, 2, 2]]
    stats = stores.stats(store)
    assert (stats["nodes_stored"], stats["not_stored"], stats["node_evictions"]) == (4, 1, 1)


def test_filing_moves_the_store_and_copies_no_table():
    """The tables are updated where they are; what is needed besides is of the batch's size."""
    config = SMALL
    store = stores.init_store(config, 8, 500, root_slots=2)
    batch = np.zeros((L, 2, 8, H, C, D), np.float32)
    latent = np.zeros((8, 16), np.float32)
    zero = np.zeros((K, L, 2, H, D), np.float32)
    compiled = layout.file.lower(
        store, batch, latent, describe([7] * 8), np.int32([7] * 8), zero, is_root=False
    ).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert needed < store.nodes.entries.kv.nbytes / 20
    place = store.nodes.entries.kv.unsafe_buffer_pointer()
    store = jax.device_put(store)
    place = store.nodes.entries.kv.unsafe_buffer_pointer()
    store = layout.file(
        store, batch, latent, describe([7] * 8), np.int32([7] * 8), zero, is_root=False
    )
    assert store.nodes.entries.kv.unsafe_buffer_pointer() == place


def test_filing_and_looking_up_in_one_call_is_one_after_the_other():
    rng = np.random.default_rng(0)
    zero = np.zeros((K, L, 2, H, D), np.float32)
    known, fresh = (rng.normal(size=(4, 16)).astype(np.float32) for _ in range(2))
    asked = np.concatenate([fresh[[1, 0]], known[3:] + 1, known[3:]])
    stores_, outputs = [], []
    for together in (False, True):
        rng = np.random.default_rng(1)
        store = stores.init_store(SMALL, ENVS, 4, root_slots=2)
        filings = []
        for latent, lengths in ((known, (5, 1, 1, 7)), (fresh, (7, 3, 3, 1))):
            filing = latent, describe(lengths), np.int32(lengths), zero
            filings.append((random_batch(rng, lengths)[1], filing))
        (roots, filing), (batch, later) = filings
        later[1][layout.ENV] = [1, 0, 2, 3]  # not the rows' environments of the look-up
        store = layout.file(store, roots, *filing, is_root=True)
        rows = describe((0, 0, 0, 0))
        if together:
            latent, of_rows, length, correction = later
            notes = np.zeros((2, 4, 16 + 3), np.float32)
            notes[:, :, :16] = latent, asked
            notes[layout.FILED, :, layout.LENGTH] = length
            notes[:, :, layout.ROWS] = of_rows.T, rows.T
            lent = jnp.full_like(batch, np.nan), jnp.full((2, 4), 99, jnp.int32)
            arrays, structure = layout.take_apart(store)
            (found, known, *changed), raw = layout.file_and_look_up(structure)(
                *lent, *arrays, batch, correction, None, notes
            )
            assert len(changed) == layout.changing(structure) < len(arrays)
            store = layout.put_together([*changed, *arrays[len(changed) :]], structure)
            out = [found, known, raw]
        else:
            store = layout.file(store, batch, *later, is_root=False)
            counters, *out = layout.look_up(store, asked, rows, roots_only=False)
            store = layout.with_counters(store, counters)
        stores_.append(store)
        out[0] = out[0][..., :5, :]  # behind the longest row is what was there before
        outputs.append(out)
    assert np.asarray(outputs[1][1]).tolist() == [[3, 5, 1, 5], [2, 2, 0, 1]]
    chex.assert_trees_all_equal(*outputs)
    chex.assert_trees_all_equal(*stores_)


def test_clearing():
    rng = np.random.default_rng(0)
    store = stores.init_store(SMALL, ENVS, 4, root_slots=2)
    lengths = (1, 1, 1)
    _, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(3, 16)).astype(np.float32)
    zero = np.zeros((K, L, 2, H, D), np.float32)
    for is_root in (True, False):
        store = layout.file(
            store, batch, latent, describe(lengths), np.int32(lengths), zero, is_root=is_root
        )

    def counts(store):
        stats = stores.stats(store)
        return stats["roots_stored"], stats["nodes_stored"]

    none, second = np.zeros(ENVS, bool), np.arange(ENVS) == 1
    assert counts(store) == (3, 3)
    store = layout.clear(store, second, np.bool_(False))
    assert counts(store) == (2, 3)
    store = layout.clear(store, none, np.bool_(True))
    assert counts(store) == (2, 0)
    assert counts(layout.new_epoch(store)) == (0, 0)
