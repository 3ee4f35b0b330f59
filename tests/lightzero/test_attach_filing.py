"""When an attached model files and forgets: what waits, where, and what a copy has of it."""

import copy

import numpy as np
import pytest
from test_attach import pair, pytestmark
from torch_models import Driver

from kvjax.lightzero.attach import layout
from kvjax.lightzero.attach.attached import state_of

__all__ = ["pytestmark"]

ROWS = 4


def searched():
    """An attached model with a simulation that waits to be filed."""
    _, twin, handle = pair()
    driver = Driver(twin, ROWS)
    for _ in range(2):
        driver.step(2)
    return twin.world_model, driver, handle


def scope_of(wm):
    return state_of(wm).bridge.scope


def waiting_latents(wm):
    latent, *_ = scope_of(wm).pending[0].filed()
    return latent[:, None].copy()


def look_up(wm, latent):
    return wm.retrieve_or_generate_kvcache(latent, len(latent), 1, np.zeros(len(latent), int))


def fill(number):
    return np.full((ROWS, 1, 32), number, np.float32)


def simulate(wm, parent, child):
    """One simulation: windows are found, grow by two tokens and wait to be filed."""
    torch = pytest.importorskip("torch")
    look_up(wm, parent)
    wm.trim_and_pad_kv_cache(is_init_infer=False)
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, 1, 32)))
    with torch.no_grad():
        for _ in range(2):
            embeddings = {"obs_embeddings": tokens.float()}
            wm.forward(embeddings, past_keys_values=wm.keys_values_wm, start_pos=0)
    wm.keys_values_wm_size_list_current = [n + 2 for n in wm.keys_values_wm_size_list]
    wm.update_cache_context(child, is_init_infer=False)


def found(wm, latent):
    """Keys of the first layer, row by row."""
    look_up(wm, latent)
    return [next(iter(caches)).get()[0].numpy().copy() for caches in wm.keys_values_wm_list]


def test_first_steps_after_a_reset_are_kept():
    """They look nothing up, so filing itself has to forget first."""
    wm, driver, handle = searched()
    wm.clear_caches()
    driver.step(1, first=True)
    hits = handle.stats()["root_hits"]
    driver.step(1)
    assert handle.stats()["root_hits"] == hits + ROWS


def test_nodes_are_forgotten_also_if_roots_are_cleared_after_them():
    wm, _, handle = searched()
    wm.past_kv_cache_recurrent_infer.clear()
    wm.past_kv_cache_init_infer_envs[2].clear()
    assert handle.stats()["nodes_stored"] == 0


def test_what_a_call_may_still_read_is_not_overwritten(monkeypatch):
    """Where jax computes in another thread it reads arguments when it gets to them."""
    wm, _, _ = searched()
    passed, clear = [], layout.clear

    def remember(filed, roots, nodes):
        passed.append((roots, roots.copy()))
        return clear(filed, roots, nodes)

    monkeypatch.setattr(layout, "clear", remember)
    wm.clear_caches()
    look_up(wm, fill(0.3))
    wm.past_kv_cache_init_infer_envs[2].clear()
    look_up(wm, fill(0.3))
    assert [before.tolist() for _, before in passed] == [[True] * 4, [False, False, True, False]]
    for given, before in passed:
        np.testing.assert_array_equal(given, before)


def test_fewer_rows_find_what_waits():
    wm, _, _ = searched()
    hits = wm.hit_count
    look_up(wm, waiting_latents(wm)[:2])
    assert wm.hit_count - hits == 2


@pytest.mark.parametrize(
    ("envs", "order"), [([0, 1, 2, 3], [3, 2, 1, 0]), ([1, 1, 2, 2], [1, 0, 3, 2])]
)
def test_what_waits_is_found_in_any_order(envs, order):
    """By the row before its own too, also where rows share an environment."""
    torch = pytest.importorskip("torch")
    wm, _, _ = searched()
    latent = np.random.default_rng(1).normal(size=(ROWS, 1, 32)).astype(np.float32)
    wm.current_infer_env_ids = envs
    simulate(wm, waiting_latents(wm), torch.from_numpy(latent))
    assert scope_of(wm).pending is not None
    hits, wm.current_infer_env_ids = wm.hit_count, [envs[row] for row in order]
    rows = found(wm, latent[order])
    assert wm.hit_count - hits == ROWS
    wm.current_infer_env_ids = envs
    again = found(wm, latent)
    for row, keys in zip(order, rows, strict=True):
        np.testing.assert_array_equal(keys, again[row])


def test_a_forward_pass_settles_every_scope():
    """Another scope's search may wait in the memory that the model writes to."""
    torch = pytest.importorskip("torch")
    _, twin, handle = pair()
    wm, driver = twin.world_model, Driver(twin, ROWS)
    with handle.scope("collect"):
        driver.step(2)
    bridge = state_of(wm).bridge
    assert bridge._scopes["collect"].pending is not None
    with torch.no_grad():
        tokens = {"obs_embeddings": torch.zeros(ROWS, 1, 32)}
        wm.forward(tokens, past_keys_values=wm.keys_values_wm)
    assert bridge._scopes["collect"].pending is None


def test_a_copy_has_what_waited_when_it_was_made():
    wm, driver, _ = searched()
    latent = waiting_latents(wm)
    twin = copy.deepcopy(driver.model).world_model
    look_up(wm, fill(0.3))  # takes the batch that waited
    hits = twin.hit_count
    assert look_up(twin, latent) == look_up(wm, latent)
    assert twin.hit_count - hits == ROWS
    for ours, theirs in zip(wm.keys_values_wm_list, twin.keys_values_wm_list, strict=True):
        for layer, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(layer.get()[0], other.get()[0])


def test_a_copy_forgets_alone():
    wm, driver, handle = searched()
    twin = copy.deepcopy(driver.model).world_model
    before = handle.stats()["roots_stored"]
    twin.past_kv_cache_init_infer_envs[2].clear()
    wm.past_kv_cache_recurrent_infer.clear()
    assert handle.stats()["roots_stored"] == before


def test_latents_with_gradients_leave_no_graph_behind():
    torch = pytest.importorskip("torch")
    wm, _, _ = searched()
    simulate(wm, fill(0.25), torch.tensor(fill(0.5), requires_grad=True))
    exchange, _ = scope_of(wm).pending
    assert not exchange._filed_latents[ROWS].requires_grad


def test_look_ups_one_after_the_other_use_the_same_memory():
    wm, _, _ = searched()
    exchange = scope_of(wm).exchanges[ROWS]
    place = exchange.batch.unsafe_buffer_pointer()
    for _ in range(3):
        look_up(wm, fill(0.0))
        assert exchange.batch.unsafe_buffer_pointer() == place
