"""Jitted inference steps of the store: contexts found, missed, kept apart, and left alone."""

import dataclasses
import functools
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import one_row
import pytest
from conftest import FULL, SMALL, random_params

from kvjax import (
    CacheMissError,
    StepInterrupt,
    StoreFullError,
    init_store,
    initial_inference,
    recurrent_inference,
    stats,
)
from kvjax import store as stores
from kvjax.mcts import inference
from kvjax.mcts.inference import _initial, _recurrent
from kvjax.ops import hashing
from kvjax.ops import window as windows
from kvjax.store import pool as pools
from kvjax.store.pool import NO_SLOT

PARAMS = random_params(SMALL)
ENVS, SIMULATIONS, EMBED = 3, 5, SMALL.embed_dim
ATOL = 1e-5

initial = functools.partial(initial_inference, PARAMS, config=SMALL)
recurrent = functools.partial(recurrent_inference, PARAMS, config=SMALL)
push = functools.partial(one_row.root_step, PARAMS, config=SMALL)
imagine = functools.partial(one_row.recurrent_step, PARAMS, config=SMALL)
check_invariants = jax.jit(pools.check_invariants)


def latents(seed=0, rows=ENVS):
    return np.random.default_rng(seed).normal(size=(rows, EMBED)).astype(np.float32)


def zeros(rows=ENVS):
    return np.zeros(rows, np.int32)


def fresh(**options):
    return init_store(SMALL, ENVS, SIMULATIONS, **options)


def first_step(store, latent, env_id=None):
    rows = len(latent)
    env_id = np.arange(rows) if env_id is None else env_id
    return initial(store, latents(99, rows), zeros(rows) - 1, latent, env_id, zeros(rows))


@jax.jit
def windows_at(store, slot, env_id):
    return stores.take(store, stores.resolve(store, slot, env_id))


def window_of(store, out, env_id):
    return jax.device_get(windows_at(store, out.slot, env_id))


@jax.jit
def found(store, latent):
    env_id = jnp.arange(ENVS)
    return stores.find(store, stores.latent_keys(store, latent, env_id), env_id).hit


def row(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_sound(store):
    for pool in (store.roots, store.nodes):
        assert all(bool(holds) for holds in check_invariants(pool).values())


def play_by_store(steps, actions, observed, *, store, **options):
    """Real steps through the store; yields the store and each result."""
    for t in range(steps):
        store, out = initial(
            store,
            observed[t - 1] if t else latents(99),
            actions[t - 1] if t else zeros() - 1,
            observed[t],
            np.arange(ENVS),
            zeros() + t,
            **options,
        )
        yield store, out


def test_an_episode_with_mixed_restarts_equals_carried_windows():
    """Rows restart at different steps; each step is followed by a search two levels deep."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, size=(8, ENVS)).astype(np.int32)
    actions[0], actions[3, 1], actions[5, [0, 2]] = -1, -1, -1
    observed = [latents(t) for t in range(8)]
    store, carried = fresh(), [windows.init(SMALL.window)] * ENVS
    for t in range(8):
        last = observed[t - 1]
        store, out = initial(store, last, actions[t], observed[t], np.arange(ENVS), zeros() + t)
        assert out.hit.tolist() == (actions[t] >= 0).tolist()
        kept, out = window_of(store, out, np.arange(ENVS)), jax.device_get(out)
        nodes = []
        for b in range(ENVS):
            carried[b], policy, value = push(
                carried[b], jnp.int32(actions[t, b]), observed[t][b], t
            )
            np.testing.assert_allclose(out.policy[b], policy, atol=ATOL)
            np.testing.assert_allclose(out.value[b], value, atol=ATOL)
            chex.assert_trees_all_close(row(kept, b), carried[b], atol=ATOL)
            nodes.append(carried[b])
        latent = observed[t]
        for depth in (1, 2):
            action = rng.integers(0, 3, size=ENVS).astype(np.int32)
            store, out = recurrent(
                store, latent, action, np.arange(ENVS), zeros() + depth, zeros() + t
            )
            out = jax.device_get(out)
            assert out.hit.all()
            for b in range(ENVS):
                nodes[b], expected = imagine(nodes[b], jnp.int32(action[b]), depth, t)
                for name in ("latent", "reward", "policy", "value"):
                    np.testing.assert_allclose(
                        getattr(out, name)[b], getattr(expected, name), atol=ATOL
                    )
            latent = np.asarray(out.latent)
        assert_sound(store)
    assert stats(store)["misses"] == 0


def test_rows_name_their_environments_in_any_order():
    order = np.array([2, 0, 1])
    store, _ = first_step(fresh(), latents(0))
    store, _ = first_step(store, latents(1), env_id=order)
    one_action = np.array([1], np.int32)
    store, out = initial(store, latents(1), np.ones(3, int), latents(5), order, zeros())
    assert out.hit.all()
    store, _ = first_step(store, latents(1), env_id=order)
    for b, env in enumerate(order):
        store, alone = initial(
            store, latents(1)[[b]], one_action, latents(5)[[b]], np.array([env]), zeros(1)
        )
        assert alone.hit.all()
        np.testing.assert_allclose(alone.policy[0], out.policy[b], atol=ATOL)


def test_another_environment_or_epoch_does_not_find_it():
    store, _ = first_step(fresh(), latents(0))
    swapped = np.array([1, 2, 0])
    store, out = recurrent(store, latents(0), zeros(), swapped, zeros() + 1, zeros())
    assert not out.hit.any()
    store, out = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert out.hit.all()
    store = stores.new_epoch(store)
    store, out = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert not out.hit.any()


def test_a_miss_continues_from_the_last_observation_alone():
    store, out = recurrent(fresh(), latents(0), zeros() + 2, np.arange(ENVS), zeros() + 1, zeros())
    assert not out.hit.any()
    assert out.valid.all()
    for b in range(ENVS):
        alone, _, _ = push(windows.init(SMALL.window), jnp.int32(-1), latents(0)[b], 0)
        window, expected = imagine(alone, jnp.int32(2), 1, 0)
        np.testing.assert_allclose(out.value[b], expected.value, atol=ATOL)
        chex.assert_trees_all_close(
            row(window_of(store, out, np.arange(ENVS)), b), window, atol=ATOL
        )
    counted = stats(store)
    assert (counted["queries"], counted["misses"]) == (3, 3)


def test_some_rows_miss_and_the_others_do_not_notice():
    store, _ = first_step(fresh(), latents(0))
    mixed = latents(0)
    mixed[1] = latents(7)[1]
    store, out = recurrent(store, mixed, zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert out.hit.tolist() == [True, False, True]
    store, _ = first_step(fresh(), latents(0))
    store, clean = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    for b in (0, 2):
        np.testing.assert_array_equal(out.value[b], clean.value[b])


@pytest.mark.parametrize("step_name", ["initial", "recurrent"])
def test_error_policy_raises_and_stores_nothing(step_name):
    store, _ = first_step(fresh(eviction="lru"), latents(0))
    store, _ = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    before = jax.tree.map(np.array, store)
    wrong = latents(0)
    wrong[2] = 0.0
    ids = np.arange(ENVS), zeros()
    take_step = {
        "initial": lambda: initial(store, wrong, zeros(), latents(1), *ids, miss_policy="error"),
        "recurrent": lambda: recurrent(store, wrong, zeros(), *ids, zeros(), miss_policy="error"),
    }[step_name]
    with pytest.raises(CacheMissError, match=r"no window stored for rows \[2\]") as raised:
        take_step()
    assert raised.value.rows == [2]
    after = raised.value.store
    assert stats(after)["misses"] == 1
    for name in ("roots", "nodes"):
        ours, theirs = getattr(after, name), getattr(before, name)
        sentinel = pools.total_slots(ours)
        np.testing.assert_array_equal(ours.records[:sentinel], theirs.records[:sentinel])
        np.testing.assert_array_equal(ours.segments, theirs.segments)
        chex.assert_trees_all_equal(ours.entries, theirs.entries)
    after, out = recurrent(
        after, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros(), miss_policy="error"
    )
    assert out.hit.all()


def test_first_steps_are_no_misses():
    first_step_out = initial(
        fresh(eviction="lru"),
        latents(9),
        zeros() - 1,
        latents(0),
        np.arange(ENVS),
        zeros(),
        miss_policy="error",
    )[1]
    assert not first_step_out.hit.any()


def test_reanalysis_looks_nothing_up_and_stores_nothing():
    store, _ = first_step(fresh(), latents(0))
    before = stats(store)
    for _ in range(2):
        store, out = recurrent(
            store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros(), reanalysis=True
        )
        assert not out.hit.any()
        assert (np.asarray(out.slot) == NO_SLOT).all()
        store, root = initial(
            store, latents(0), zeros(), latents(1), np.arange(ENVS), zeros(), reanalysis=True
        )
        assert not root.hit.any()
    after = stats(store)
    for name in ("queries", "roots_stored", "nodes_stored"):
        assert after[name] == before[name]
    alone = windows.init(SMALL.window)
    alone, _, _ = push(alone, jnp.int32(-1), latents(0)[1], 0)
    np.testing.assert_allclose(out.value[1], imagine(alone, jnp.int32(0), 1, 0)[1].value, atol=ATOL)


def test_equal_latents_of_two_histories_are_kept_apart_by_handle():
    """A zero observation head gives every node the same latent, as before training."""
    params = jax.tree.map(lambda x: x, PARAMS)
    for name, leaf in params["params"]["latent_head"]["output"].items():
        params["params"]["latent_head"]["output"][name] = jnp.zeros_like(leaf)
    exact = functools.partial(one_row.recurrent_step, params, config=SMALL)
    by_slot = functools.partial(recurrent_inference, params, config=SMALL)
    store, root = first_step(fresh(root_slots=1), latents(0))
    parent_windows = window_of(store, root, np.arange(ENVS))
    children = {}
    for action in (0, 1):
        store, children[action] = by_slot(
            store,
            latents(0),
            zeros() + action,
            np.arange(ENVS),
            zeros() + 1,
            zeros(),
            slot=root.slot,
        )
    np.testing.assert_array_equal(children[0].latent, children[1].latent)
    assert not set(children[0].slot.tolist()) & set(children[1].slot.tolist())
    for action, child in children.items():
        store, out = by_slot(
            store, child.latent, zeros() + 2, np.arange(ENVS), zeros() + 2, zeros(), slot=child.slot
        )
        assert out.hit.all()
        for b in range(ENVS):
            window, _ = exact(row(parent_windows, b), jnp.int32(action), 1, 0)
            _, expected = exact(window, jnp.int32(2), 2, 0)
            np.testing.assert_allclose(out.value[b], expected.value, atol=ATOL)


def test_stale_and_foreign_handles_miss():
    store, root = first_step(fresh(root_slots=1), latents(0))
    handle = np.asarray(root.slot)
    args = (latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    store, out = recurrent(store, *args, slot=handle)
    assert out.hit.all()
    store, swapped = recurrent(store, *args, slot=handle[[1, 2, 0]])
    assert not swapped.hit.any()
    for nonsense in (-1, -5, 2**31 - 1, 10**6):
        store, out = recurrent(store, *args, slot=np.full(ENVS, nonsense, np.int32))
        assert not out.hit.any()
    store, newer = first_step(store, latents(5))  # takes the same, only slots
    store, out = recurrent(store, *args, slot=handle)
    assert not out.hit.any()
    store, out = recurrent(store, *args, slot=newer.slot)
    assert out.hit.all()
    store, out = recurrent(stores.new_epoch(store), *args, slot=newer.slot)
    assert not out.hit.any()


def test_a_root_step_forgets_searched_nodes_and_keeps_roots():
    store, _ = first_step(fresh(), latents(0))
    store, out = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    node = np.asarray(out.latent)
    assert stats(store)["nodes_stored"] == 3
    store, _ = initial(store, latents(0), zeros(), latents(1), np.arange(ENVS), zeros() + 1)
    counted = stats(store)
    assert (counted["nodes_stored"], counted["roots_stored"]) == (0, 6)
    store, out = recurrent(store, node, zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert not out.hit.any()


def test_clearing():
    store, _ = first_step(fresh(), latents(0))
    store, out = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    store = stores.clear_environment(store, 1)
    assert_sound(store)
    args = (zeros(), np.arange(ENVS), zeros() + 1, zeros())
    copy = jax.tree.map(jnp.array, store)
    assert recurrent(copy, latents(0), *args)[1].hit.tolist() == [True, False, True]
    copy = jax.tree.map(jnp.array, store)
    assert recurrent(copy, np.asarray(out.latent), *args)[1].hit.tolist() == [True, False, True]
    store = stores.clear(store)
    assert stats(store)["roots_stored"] == stats(store)["nodes_stored"] == 0
    assert stats(store)["queries"] == 3
    assert_sound(store)


def test_statistics():
    store, _ = first_step(fresh(), latents(0))
    lengths = []
    for t in (1, 2):
        last, now = latents(t - 1), latents(t)
        store, _ = initial(store, last, np.array([0, -1, 0]), now, np.arange(ENVS), zeros() + t)
        lengths.append(window_of(store, _, np.arange(ENVS)).length.tolist())
    assert lengths == [[3, 1, 3], [5, 1, 5]]
    store, _ = recurrent(store, latents(2), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    counted = stats(store)
    expected = {
        "root_queries": 4, "root_hits": 4, "queries": 7, "root_pool_hits": 7, "node_pool_hits": 0,
        "misses": 0, "rebuilt": 0, "false_matches": 0,
        "root_evictions": 0, "node_evictions": 0, "not_stored": 0,
        "batches": 3, "unequal_batches": 1, "padded_rows": 1, "pad_tokens": 4, "largest_pad": 4,
        "roots_stored": 9, "roots_slots": 768, "nodes_stored": 3, "nodes_slots": 15,
    }  # fmt: skip
    assert dict(counted) == expected
    assert "hit rate" in str(counted)
    assert "100.0%" in str(counted)


def test_evictions_are_counted_and_an_evicted_row_has_no_slot():
    store, out = first_step(fresh(root_slots=1), latents(0), env_id=np.array([1, 1, 2]))
    assert (out.slot == NO_SLOT).tolist() == [True, False, False]
    assert (stats(store)["root_evictions"], stats(store)["not_stored"]) == (1, 1)


def test_a_search_larger_than_the_store_is_refused_and_loses_nothing():
    """It used to lose the nodes that it was about to go on from."""
    store, out = first_step(fresh(), latents(0))
    filed = []
    for depth in range(1, SIMULATIONS + 1):
        filed.append(np.asarray(out.latent))
        store, out = recurrent(store, filed[-1], zeros(), np.arange(ENVS), zeros() + depth, zeros())
    too_deep = zeros() + SIMULATIONS + 1
    with pytest.raises(StoreFullError, match="more than 5 num_simulations") as error:
        recurrent(store, out.latent, zeros(), np.arange(ENVS), too_deep, zeros())
    assert error.value.rows == [0, 1, 2]
    store = error.value.store
    assert stats(store)["node_evictions"] == 0
    for latent in [*filed, np.asarray(out.latent)]:
        assert found(store, latent).all()
    # What is known already needs no slot.
    store, again = recurrent(store, filed[0], zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert again.hit.all()
    assert not again.full.any()
    options = {"full_policy": "evict"}
    store, _ = recurrent(store, out.latent, zeros(), np.arange(ENVS), too_deep, zeros(), **options)
    assert stats(store)["node_evictions"] == ENVS
    assert_sound(store)


def test_an_interrupted_step_brings_its_store(monkeypatch):
    def interrupted(*args, **options):
        moved = _recurrent(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return moved

    store, root = first_step(fresh(), latents(0))
    monkeypatch.setattr(inference, "_recurrent", interrupted)
    ids = zeros(), np.arange(ENVS), zeros() + 1, zeros()
    with pytest.raises(StepInterrupt) as error:
        recurrent(store, root.latent, *ids)
    assert isinstance(error.value, KeyboardInterrupt)
    monkeypatch.undo()
    _, out = recurrent(error.value.store, np.asarray(error.value.out.latent), *ids)
    assert out.hit.all()


def test_no_interrupt_loses_a_store():
    """Whenever it comes: while a step is prepared, computed or waited for."""
    store, root = first_step(fresh(), latents(0))
    ids = zeros(), np.arange(ENVS), zeros() + 1, zeros()
    store, out = recurrent(store, root.latent, *ids)
    interrupts = 0
    for attempt in range(60):
        timer = threading.Timer(0.002 * attempt / 60, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            while timer.is_alive():
                store, out = recurrent(store, root.latent, *ids)
        except KeyboardInterrupt as interrupt:
            store = getattr(interrupt, "store", store)
            interrupts += 1
        timer.join()
    assert interrupts > 30  # Python drops one that comes in a callback of its garbage collector
    store, again = recurrent(store, np.asarray(out.latent), *ids)
    assert again.hit.all()


def test_verified_keys_survive_a_broken_digest(monkeypatch):
    """With a digest that is always the same, only the stored latent tells rows apart."""
    monkeypatch.setattr(hashing, "digest", lambda bits: jnp.zeros(4, jnp.uint32))
    config = dataclasses.replace(SMALL, max_tokens=13)  # no other test has programs for it
    params, env_id = random_params(config), np.arange(ENVS)

    def look_up(seed, verify):
        store = init_store(config, ENVS, SIMULATIONS, verify_keys=verify)
        rows = latents(99), zeros() - 1, latents(0), env_id, zeros()
        store, _ = initial_inference(params, store, *rows, config=config)
        rows = latents(seed), zeros(), env_id, zeros() + 1, zeros()
        return recurrent_inference(params, store, *rows, config=config)

    for verify, hits in ((True, [False] * 3), (False, [True] * 3)):
        store, out = look_up(1, verify)
        assert out.hit.tolist() == hits
        assert stats(store)["false_matches"] == (3 if verify else 0)
        assert_sound(store)
    assert look_up(0, verify=True)[1].hit.all()


@pytest.mark.parametrize("eviction", ["lru", "priority"])
def test_every_policy_serves_a_search(eviction):
    store, out = first_step(fresh(eviction=eviction), latents(0))
    latent = latents(0)
    for depth in range(1, SIMULATIONS + 1):
        store, out = recurrent(store, latent, zeros(), np.arange(ENVS), zeros() + depth, zeros())
        assert out.hit.all()
        latent = np.asarray(out.latent)
    assert_sound(store)
    assert stats(store)["node_evictions"] == 0


def test_bfloat16_entries():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    store = init_store(config, ENVS, SIMULATIONS)
    store, _root = initial_inference(
        PARAMS, store, latents(9), zeros() - 1, latents(0), np.arange(ENVS), zeros(), config=config
    )
    args = (latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    store, out = recurrent_inference(PARAMS, store, *args, config=config)
    assert out.hit.all()
    chex.assert_type(store.nodes.entries.kv, jnp.bfloat16)
    exact, _ = first_step(fresh(), latents(0))
    error = np.abs(out.value - recurrent(exact, *args)[1].value).max()
    assert 0 < error < 0.05


def lowered(node_slots):
    store = init_store(SMALL, ENVS, SIMULATIONS, node_slots=node_slots)
    how = inference._How(SMALL, "context_free", reanalysis=False)
    ids = latents(), zeros(), zeros(), zeros()
    searched = inference._Rows(*ids, depth=zeros())
    yield store, _recurrent.lower(PARAMS, store, searched, how)
    observed = inference._Rows(*ids, last_latent=latents())
    yield store, _initial.lower(PARAMS, store, observed, how)


@pytest.mark.optimised
@pytest.mark.parametrize("node_slots", [4000, 40_000] if FULL else [40_000])
def test_no_step_copies_a_pool(node_slots):
    for store, step_of_store in lowered(node_slots):
        pool = sum(leaf.nbytes for leaf in jax.tree.leaves(store.nodes))
        analysis = step_of_store.compile().memory_analysis()
        assert analysis.temp_size_in_bytes < pool / 20
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(store))
        assert analysis.alias_size_in_bytes >= 0.99 * total  # the store is moved


def test_the_store_is_moved():
    store, _ = first_step(fresh(), latents(0))
    recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert store.nodes.entries.kv.is_deleted()


def test_one_compilation_for_a_whole_run():
    store, _ = first_step(fresh(), latents(0))
    store, _ = recurrent(store, latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    before = _initial._cache_size(), _recurrent._cache_size()
    for t in range(1, 6):
        action = np.where(np.arange(ENVS) == t % ENVS, -1, 1)
        store, _ = initial(store, latents(t - 1), action, latents(t), np.arange(ENVS), zeros() + t)
        store, _out = recurrent(store, latents(t), zeros(), np.arange(ENVS), zeros() + 1, zeros())
    assert (_initial._cache_size(), _recurrent._cache_size()) == before


def test_inside_a_jit_of_ones_own():
    @jax.jit
    def two_levels(store):
        store, out = recurrent(store, jnp.asarray(latents(0)), *ids)
        store, out = recurrent(store, out.latent, *ids)
        return out.value, out.hit

    ids = (jnp.zeros(ENVS, int), jnp.arange(ENVS), jnp.ones(ENVS, int), jnp.zeros(ENVS, int))
    store, _ = first_step(fresh(), latents(0))
    value, hit = two_levels(store)
    assert hit.all()
    store, out = recurrent(store, latents(0), *ids)
    store, out = recurrent(store, out.latent, *ids)
    np.testing.assert_allclose(value, out.value, atol=ATOL)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"env_id": [0, 7, 2]}, [True, False, True]),
        ({"env_id": [0, 1, -1]}, [True, True, False]),
        ({"action": [3, 0, -1]}, [False, True, False]),
    ],
)
def test_ids_out_of_range_on_the_device_are_told_and_change_nothing(change, rows):
    store, _ = first_step(fresh(), latents(0))
    clean = recurrent(
        jax.tree.map(jnp.array, store), latents(0), zeros(), np.arange(ENVS), zeros() + 1, zeros()
    )[1]
    ids = {"action": zeros(), "env_id": np.arange(ENVS)}
    ids = {name: jnp.asarray(value) for name, value in (ids | change).items()}
    store, out = recurrent(store, latents(0), ids["action"], ids["env_id"], zeros() + 1, zeros())
    assert out.valid.tolist() == rows
    for b, valid in enumerate(rows):
        if valid:
            np.testing.assert_array_equal(out.value[b], clean.value[b])
            assert out.slot[b] != NO_SLOT
        else:
            assert np.isnan(out.value[b]).all()
            assert np.isnan(out.latent[b]).all()
            assert out.slot[b] == NO_SLOT
    assert stats(store)["nodes_stored"] == sum(rows)
    assert_sound(store)


GOOD = {
    "latent": latents(0),
    "action": zeros(),
    "env_id": np.arange(ENVS),
    "depth": zeros() + 1,
    "timestep": zeros(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": latents(0)[0]}, r"latent must have shape \[B, E\] with at least one row"),
        ({"latent": latents(0)[:0]}, r"with at least one row, got \(0, 16\)"),
        ({"latent": latents(0)[:, :5]}, r"latent must be float32 of shape \(3, 16\)"),
        ({"latent": latents(0).astype(np.float64)}, "latent must be float32 .*, got float64"),
        ({"latent": latents(0).astype(np.float16)}, "latent must be float32 .*, got float16"),
        ({"action": zeros(2)}, r"action must be integers of shape \(3,\), got int32 \(2,\)"),
        ({"action": np.zeros(3)}, r"action must be integers of shape \(3,\), got float64"),
        ({"action": [0, 0, 0]}, r"action must be integers of shape \(3,\), got list"),
        ({"action": np.array([0, 3, 0])}, r"action must be in 0 .. 2, got \[0, 3, 0\]"),
        ({"action": np.array([0, -1, 0])}, r"action must be in 0 .. 2, got \[0, -1, 0\]"),
        ({"env_id": np.array([0, 1, 3])}, r"env_id must be in 0 .. 2, got \[0, 1, 3\]"),
        ({"env_id": np.array([0, 1, -1])}, r"env_id must be in 0 .. 2, got \[0, 1, -1\]"),
        ({"depth": np.zeros(3)}, "depth must be integers"),
        ({"timestep": zeros(1)}, "timestep must be integers"),
        ({"slot": np.zeros(3)}, "slot must be integers"),
        ({"miss_policy": "rebuild"}, "miss_policy must be one of context_free, error, got"),
        ({"priority": np.zeros(2)}, r"priority must have shape \[3\], got \[2\]"),
        ({"priority": np.zeros(3)}, 'a store with eviction "priority", got one with "fifo"'),
        (
            {name: np.tile(v, (6, 1) if v.ndim == 2 else 6) for name, v in GOOD.items()},
            "18 rows do not fit into 15 node slots",
        ),
    ],
)
def test_bad_batches(change, message):
    store = fresh()
    with pytest.raises(ValueError, match=message):
        recurrent(store, **(GOOD | change))
    assert not store.nodes.entries.kv.is_deleted()


def test_a_store_of_another_model():
    other = dataclasses.replace(SMALL, context_length=10)
    with pytest.raises(ValueError, match=r"the store holds windows float32 \(7, .*the model's are"):
        recurrent(init_store(other, ENVS, SIMULATIONS), **GOOD)
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    with pytest.raises(ValueError, match="the store holds windows bfloat16 .* float32"):
        recurrent(init_store(half, ENVS, SIMULATIONS), **GOOD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be a positive integer, got 0"),
        ({"num_simulations": 0}, "num_simulations must be a positive integer, got 0"),
        ({"node_slots": 14}, "node_slots 14 cannot hold a search of 3 environments and 5 simul"),
        ({"root_slots": 0}, "root_slots must be a positive integer, got 0"),
        ({"eviction": "mru"}, "eviction must be one of fifo, lru, priority, got 'mru'"),
    ],
)
def test_bad_stores(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_store(SMALL, **({"num_envs": ENVS, "num_simulations": SIMULATIONS} | arguments))


@pytest.mark.parametrize(
    ("simulations", "options", "expected"),
    [(5, {}, (256, 15)), (200, {}, (400, 600)), (4000, {}, (5000, 12_000))],
)
def test_sizes_follow_the_reference(simulations, options, expected):
    config = dataclasses.replace(SMALL, embed_dim=8, num_heads=1, num_layers=1, context_length=4)
    store = init_store(config, ENVS, simulations, **options)
    assert (pools.num_slots(store.roots), pools.num_slots(store.nodes)) == expected
