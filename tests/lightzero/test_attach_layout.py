"""Look-up and filing in LightZero's layout against the ops on single windows, in numpy."""

import dataclasses

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

from kvjax import store as stores
from kvjax.config import BLOCK
from kvjax.lightzero.attach import layout
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.store import pool as pools

C = SMALL.context_length
K, L, H, D = C - 3, SMALL.num_layers, SMALL.num_heads, SMALL.window.head_dim
ENVS = 5


def describe(lengths, valid=None):
    rows = len(lengths)
    valid = np.ones(rows) if valid is None else np.asarray(valid)
    return np.stack([np.arange(rows), valid]).astype(np.int32)


def random_batch(rng, lengths, end=C - 1, room=None):
    """Windows [B, C, L, 2, H, D] and the aligned batch of them, garbage behind its end."""
    kv = rng.normal(size=(len(lengths), C, L, 2, H, D)).astype(np.float32)
    shape = L, 2, len(lengths), H, room or layout.slots_of_row(C), D
    batch = np.full(shape, np.nan, np.float32)
    batch[:, :, :, :, :end] = 0
    for row, length in enumerate(lengths):
        kv[row, length:] = 0
        batch[:, :, row, :, end - length : end] = in_layout(kv[row, :length])
    return kv, batch


def in_layout(tokens):
    """Tokens [N, L, 2, H, D] as [L, 2, H, N, D]."""
    return np.transpose(tokens, (1, 2, 3, 0, 4))


NO_CORRECTION = np.zeros((L, 2, H, K, D), np.float32)


def init():
    return layout.init(SMALL, ENVS, 4, root_slots=2)


def file(filed, batch, latent, lengths, rows=None, correction=NO_CORRECTION, **options):
    options = {"end": np.int32(C - 1), "is_root": False} | options
    rows = describe(lengths) if rows is None else rows
    end = options.pop("end")
    return layout.file(filed, batch, end, latent, rows, np.int32(lengths), correction, **options)


@pytest.mark.parametrize("is_root", [True, False])
@pytest.mark.parametrize("lengths", [(3, 1, 5, 1, 3), (7, 3, 5, 7, 1), (7, 7, 7, 7, 7), (1,)])
def test_filed_windows_are_slid_and_come_back_aligned(lengths, is_root):
    rng = np.random.default_rng(0)
    end = max(C - 1, max(lengths))
    kv, batch = random_batch(rng, lengths, end, room=end + 2)
    latent = rng.normal(size=(len(lengths), 16)).astype(np.float32)
    correction = rng.normal(size=(K, L, 2, H, D)).astype(np.float32)
    options = {"correction": in_layout(correction), "end": np.int32(end), "is_root": is_root}
    filed = file(init(), batch, latent, lengths, **options)
    expected = jax.vmap(windows.slide, in_axes=(0, None))(
        Window(jnp.asarray(kv), jnp.asarray(lengths)), jnp.asarray(correction)
    )
    aligned = np.asarray(windows.trim_and_pad(expected).kv)
    _, found, info, _ = layout.look_up(filed, latent, describe(lengths), roots_only=False)
    np.testing.assert_array_equal(info[0], expected.length)
    where = layout.IN_ROOTS if is_root else layout.IN_NODES
    np.testing.assert_array_equal(info[1], where)
    size = int(max(expected.length))
    found = np.transpose(found, (2, 4, 0, 1, 3, 5))
    np.testing.assert_array_equal(found[:, K - size : K], aligned[:, :size])
    assert not found[:, : K - size].any()


@pytest.mark.parametrize("end", [K, K + 1, C + K])
def test_rows_may_end_anywhere_behind_the_first_slots(end):
    rng = np.random.default_rng(0)
    lengths = (3, 1, 5)
    kv, batch = random_batch(rng, lengths, end, room=C + K)
    latent = rng.normal(size=(3, 16)).astype(np.float32)
    filed = file(init(), batch, latent, lengths, end=np.int32(end))
    _, found, info, _ = layout.look_up(filed, latent, describe(lengths), roots_only=False)
    assert np.asarray(info[0]).tolist() == [3, 1, 5]
    for row, length in enumerate(lengths):
        expected = in_layout(kv[row, :length])
        np.testing.assert_array_equal(found[:, :, row, :, K - length : K], expected)


def test_a_full_window_may_keep_less():
    """As main's exact windows do, which keep the latest latent alone."""
    rng = np.random.default_rng(0)
    lengths = (7, 3)
    kv, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(2, 16)).astype(np.float32)
    filed = file(init(), batch, latent, lengths, keep=1)
    _, found, info, _ = layout.look_up(filed, latent, describe(lengths), roots_only=False)
    assert np.asarray(info[0]).tolist() == [1, 3]
    np.testing.assert_array_equal(found[:, :, 0, :, K - 1], in_layout(kv[0, 6:7])[..., 0, :])
    assert not np.asarray(found)[:, :, 0, :, : K - 1].any()


def test_rows_that_miss_or_do_not_count():
    """A miss gets one slot of its own; rows that are not valid store nothing."""
    rng = np.random.default_rng(0)
    lengths = (3, 5, 3, 1, 1)
    kv, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(5, 16)).astype(np.float32)
    rows = describe(lengths, valid=[1, 0, 1, 1, 1])
    filed = file(init(), batch, latent, lengths, rows)
    latent = latent * [[1], [1], [0], [1], [1]]  # the call may still be reading the old one
    counters, found, info, _ = layout.look_up(filed, latent, rows, roots_only=False)
    assert np.asarray(info).tolist() == [[3, 1, 1, 1, 1], [2, 0, 0, 2, 2]]
    assert not np.asarray(found)[:, :, 1:3].any()
    np.testing.assert_array_equal(found[:, :, 3, :, K - 1], in_layout(kv[3, :1])[..., 0, :])
    assert not np.asarray(found)[:, :, 3, :, : K - 1].any()
    _, _, roots, _ = layout.look_up(filed, latent, rows, roots_only=True)
    assert not np.asarray(roots[1]).any()
    stats = stores.stats(layout.with_counters(filed, counters).store)
    assert (stats["queries"], stats["misses"], stats["node_pool_hits"]) == (4, 1, 3)
    assert (stats["padded_rows"], stats["pad_tokens"], stats["largest_pad"]) == (3, 6, 2)
    assert (stats["batches"], stats["unequal_batches"], stats["not_stored"]) == (1, 1, 0)
    again, *_ = layout.look_up(
        layout.with_counters(filed, counters), latent, rows, roots_only=False
    )
    stats = stores.stats(layout.with_counters(filed, again).store)
    assert (stats["pad_tokens"], stats["largest_pad"]) == (12, 2)


def test_equal_latents_share_a_slot_and_the_last_one_stays():
    rng = np.random.default_rng(0)
    lengths = (3, 5, 3)
    kv, batch = random_batch(rng, lengths)
    latent = np.ones((3, 16), np.float32)
    rows = describe(lengths)
    rows[layout.ENV] = 0
    filed = file(init(), batch, latent, lengths, rows)
    _, found, info, _ = layout.look_up(filed, latent[:1], rows[:, :1], roots_only=False)
    assert info[0, 0] == 3
    np.testing.assert_array_equal(found[:, :, 0, :, K - 3 : K], in_layout(kv[2, :3]))
    assert not np.asarray(found)[:, :, 0, :, : K - 3].any()


def test_more_rows_than_slots():
    """Four nodes fit; of five rows the last four stay."""
    rng = np.random.default_rng(0)
    filed = layout.init(SMALL, 1, 4, root_slots=2)
    lengths = (3, 5, 1, 7, 5)
    kv, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(5, 16)).astype(np.float32)
    rows = describe(lengths)
    rows[layout.ENV] = 0
    filed = file(filed, batch, latent, lengths, rows)
    _, found, info, _ = layout.look_up(filed, latent, rows, roots_only=False)
    assert np.asarray(info).tolist() == [[1, 5, 1, 5, 5], [0, 2, 2, 2, 2]]
    np.testing.assert_array_equal(found[:, :, 1, :, :K], in_layout(kv[1, :5]))
    assert not np.asarray(found)[:, :, 0].any()  # also when every slot is taken
    stats = stores.stats(filed.store)
    assert (stats["nodes_stored"], stats["not_stored"], stats["node_evictions"]) == (4, 1, 1)


@pytest.mark.optimised
def test_filing_moves_what_is_filed_and_copies_no_table():
    """The tables are updated where they are; what is needed besides is of the batch's size."""
    filed = jax.device_put(layout.init(SMALL, 8, 500, root_slots=2))
    batch = np.zeros((L, 2, 8, H, layout.slots_of_row(C), D), np.float32)
    latent, lengths = np.zeros((8, 16), np.float32), np.int32([7] * 8)
    filing = batch, np.int32(C - 1), latent, describe(lengths), lengths, NO_CORRECTION
    compiled = layout.file.lower(filed, *filing, is_root=False).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert needed < filed.kv.nbytes / 20
    place = filed.kv.unsafe_buffer_pointer()
    filed = layout.file(filed, *filing, is_root=False)
    assert filed.kv.unsafe_buffer_pointer() == place


@pytest.mark.optimised
def test_between_simulations_neither_the_batch_nor_a_table_is_copied():
    filed = jax.device_put(layout.init(SMALL, 8, 500, root_slots=2))
    batch = jnp.zeros((L, 2, 8, H, layout.slots_of_row(C), D))
    arrays, structure = layout.take_apart(filed)
    notes = np.zeros((2, 8, 16 + 2), np.float32)
    known = jnp.zeros((2, 8), jnp.int32)
    between = layout.file_and_look_up(structure)
    compiled = between.lower(batch, known, *arrays, NO_CORRECTION, None, notes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch.nbytes / 4


def test_filing_and_looking_up_in_one_call_is_one_after_the_other():
    rng = np.random.default_rng(0)
    known, fresh = (rng.normal(size=(4, 16)).astype(np.float32) for _ in range(2))
    asked = np.concatenate([fresh[:3], known[3:]])
    results, outputs = [], []
    for together in (False, True):
        rng = np.random.default_rng(1)
        _, roots = random_batch(rng, (5, 1, 1, 7))
        filed = file(init(), roots, known, (5, 1, 1, 7), is_root=True)
        lengths = (7, 3, 3, 5)
        _, batch = random_batch(rng, lengths)
        of_rows, rows = describe(lengths, valid=[1, 1, 0, 1]), describe(lengths)
        of_rows[layout.ENV] = rows[layout.ENV] = [1, 0, 2, 3]
        correction = rng.normal(size=NO_CORRECTION.shape).astype(np.float32)
        if together:
            notes = np.zeros((2, 4, 16 + 2), np.float32)
            notes[:, :, :16] = fresh, asked
            notes[:, :, layout.ROWS] = of_rows.T, rows.T
            were_found = jnp.array([np.int32(lengths) - 2, [99] * 4])
            arrays, structure = layout.take_apart(filed)
            (found, info, *changed), raw = layout.file_and_look_up(structure)(
                jnp.asarray(batch), were_found, *arrays, correction, None, notes
            )
            assert len(changed) == structure.children()[0].num_leaves < len(arrays)
            filed = layout.put_together([*changed, *arrays[len(changed) :]], structure)
            out = [found, info, raw]
        else:
            filed = file(filed, batch, fresh, lengths, of_rows, correction)
            counters, *out = layout.look_up(filed, asked, rows, roots_only=False)
            filed = layout.with_counters(filed, counters)
        out[0] = out[0][..., :K, :]  # behind the rows is what was there before
        results.append(filed)
        outputs.append(out)
    assert np.asarray(outputs[1][1]).tolist() == [[5, 3, 1, 5], [2, 2, 0, 1]]
    chex.assert_trees_all_equal(*outputs)
    # The last window is nobody's.
    results = [dataclasses.replace(x, kv=x.kv[: layout.UNREAD]) for x in results]
    chex.assert_trees_all_equal(*results)


def test_more_node_slots_keep_what_is_filed_and_its_age():
    """Of four slots that went around, and of a pool that is half empty."""
    rng = np.random.default_rng(0)
    lengths = (3, 5, 1, 7, 5, 3)
    kv, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(6, 16)).astype(np.float32)

    def rows_of(*chosen):
        rows = describe(lengths, valid=np.isin(np.arange(6), chosen))
        rows[layout.ENV] = 0
        return rows

    for filing, kept, survivors in (((0, 1, 2, 3, 4), 4, [2, 3, 4]), ((0, 1), 2, [0, 1])):
        filed = layout.init(SMALL, 1, 4, root_slots=2)
        filed = file(filed, batch, latent, lengths, rows_of(5), is_root=True)
        filed = file(filed, batch, latent, lengths, rows_of(*filing))
        before = stores.stats(filed.store)
        assert before["nodes_stored"] == kept
        filed = layout.with_node_slots(filed, node_slots=6)
        assert stores.stats(filed.store) == before | {"nodes_slots": 6}
        assert all(pools.check_invariants(filed.store.nodes).values())
        asked = rows_of(*range(6))
        _, found, info, _ = layout.look_up(filed, latent, asked, roots_only=False)
        nodes = np.flatnonzero(np.equal(info[1], layout.IN_NODES)).tolist()
        assert nodes == list(filing[-kept:])
        assert info[1, 5] == layout.IN_ROOTS
        for row in nodes[:2]:  # whose windows did not slide
            length = int(info[0, row])
            expected = in_layout(kv[row, lengths[row] - length : lengths[row]])
            np.testing.assert_array_equal(found[:, :, row, :, K - length : K], expected)
        filed = file(filed, batch, latent + 1, lengths, rows_of(0, 1, 2))
        _, _, info, _ = layout.look_up(filed, latent, asked, roots_only=False)
        assert np.flatnonzero(np.equal(info[1], layout.IN_NODES)).tolist() == survivors


@st.composite
def shapes(draw):
    return 8 * draw(st.integers(1, 128)), draw(st.integers(1, 9))


@hypothesis.settings(max_examples=3, deadline=None, phases=[hypothesis.Phase.generate])
@hypothesis.given(shapes(), st.integers(0, 2**32 - 1))
def test_what_was_filed_is_found_bit_for_bit(shape, seed):
    """By both ways of filing and of looking up, whatever the width and the batch."""
    width, count = shape
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(SMALL, embed_dim=width, num_heads=1, num_layers=1)
    filed = jax.device_put(layout.init(config, count, 4, root_slots=2))
    stored, batch_shape = K, (1, 2, count, 1, layout.slots_of_row(C), width)
    batch = rng.normal(size=batch_shape).astype(np.float32)
    batch[..., :K, :] = 0  # rows of two tokens: behind K, where they grew
    correction = np.zeros((1, 2, 1, stored, width), np.float32)
    rows, lengths = describe([BLOCK] * count), np.full(count, BLOCK, np.int32)
    nodes, later = rng.normal(size=(2, count, width)).astype(np.float32)
    filing = batch, np.int32(C - 1), nodes, rows, lengths, correction
    filed = layout.file(filed, *filing, is_root=False)
    notes = np.zeros((2, count, width + 2), np.float32)
    notes[layout.FILED, :, :width], notes[layout.ASKED, :, :width] = later, nodes
    notes[:, :, layout.ROWS] = rows.T
    known = jnp.asarray(np.stack([lengths - BLOCK, lengths]))
    arrays, structure = layout.take_apart(filed)
    between = layout.file_and_look_up(structure)
    (found, info, *changed), _ = between(
        jnp.asarray(batch), known, *arrays, correction, None, notes
    )
    filed = layout.put_together([*changed, *arrays[len(changed) :]], structure)
    _, *again, _ = layout.look_up(filed, later, rows, roots_only=False)
    tokens = batch[..., C - 1 - BLOCK : C - 1, :]
    for windows_found, where in ((found, info), again):
        assert np.asarray(where).tolist() == [[BLOCK] * count, [layout.IN_NODES] * count]
        np.testing.assert_array_equal(windows_found[..., K - BLOCK : K, :], tokens)


def test_clearing():
    rng = np.random.default_rng(0)
    filed, lengths = init(), (1, 1, 1)
    _, batch = random_batch(rng, lengths)
    latent = rng.normal(size=(3, 16)).astype(np.float32)
    for is_root in (True, False):
        filed = file(filed, batch, latent, lengths, is_root=is_root)

    def counts(filed):
        stats = stores.stats(filed.store)
        return stats["roots_stored"], stats["nodes_stored"]

    none, second = np.zeros(ENVS, bool), np.arange(ENVS) == 1
    assert counts(filed) == (3, 3)
    filed = layout.clear(filed, second, np.bool_(False))
    assert counts(filed) == (2, 3)
    filed = layout.clear(filed, none, np.bool_(True))
    assert counts(filed) == (2, 0)
    assert counts(layout.new_epoch(filed)) == (0, 0)
