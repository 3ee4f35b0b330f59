"""Every way in which LightZero's policies forget also clears kvjax's entries."""

import types

import numpy as np
import pytest
from torch_models import Driver, make

from kvjax import lightzero
from kvjax.tools.bench import lightzero_020

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROWS, ROOTS, NODES = 4, 4, 9  # three searched nodes repeat others


class OwnPool:
    """Main's pool, as far as anybody clears it."""

    def __init__(self):
        self._key_to_index = {1: 0}

    def clear(self):
        self._key_to_index.clear()


class OwnManager:
    """Main's `KVCacheManager`, as far as anybody clears it."""

    def __init__(self):
        self.init_pools = [OwnPool() for _ in range(ROWS)]
        self.recur_pool = OwnPool()
        self.enable_stats = "kept"

    def clear_all(self):
        for pool in (*self.init_pools, self.recur_pool):
            pool.clear()


def attached(variant):
    model = make()
    wm = model.world_model
    if variant != "0.2.0":  # main has these beside 0.2.0's
        wm.past_token_context_init_infer_envs = [{} for _ in range(ROWS)]
        wm.past_token_context_recurrent_infer = {}
        wm.use_new_cache_manager = variant == "main with its manager"
    if variant == "main with its manager":
        del wm.past_kv_cache_init_infer_envs, wm.past_kv_cache_recurrent_infer
        wm.kv_cache_manager = OwnManager()
    handle = lightzero.attach(wm)
    Driver(model, ROWS).step(3)
    assert stored(handle) == (ROOTS, NODES)
    return wm, handle


def stored(handle):
    stats = handle.stats()
    return stats["roots_stored"], stats["nodes_stored"]


ROUTES = {
    "past_kv_cache_init_infer_envs": (
        lambda wm: wm.past_kv_cache_init_infer_envs[2].clear(),
        (ROOTS - 1, NODES),
    ),
    "past_kv_cache_recurrent_infer": (
        lambda wm: wm.past_kv_cache_recurrent_infer.clear(),
        (ROOTS, 0),
    ),
    "kv_cache_manager.init_pools": (
        lambda wm: wm.kv_cache_manager.init_pools[2].clear(),
        (ROOTS - 1, NODES),
    ),
    "kv_cache_manager.recur_pool": (lambda wm: wm.kv_cache_manager.recur_pool.clear(), (ROOTS, 0)),
    "clear_recur_cache": (lambda wm: wm.kv_cache_manager.clear_recur_cache(), (ROOTS, 0)),
    "clear_init_caches": (lambda wm: wm.kv_cache_manager.clear_init_caches(), (0, NODES)),
    "clear_all": (lambda wm: wm.kv_cache_manager.clear_all(), (0, 0)),
    "past_token_context_init_infer_envs": (
        lambda wm: wm.past_token_context_init_infer_envs[2].clear(),
        (ROOTS - 1, NODES),
    ),
    "past_token_context_recurrent_infer": (
        lambda wm: wm.past_token_context_recurrent_infer.clear(),
        (ROOTS, 0),
    ),
    "clear_caches": (lambda wm: wm.clear_caches(), (0, 0)),
}


@pytest.mark.parametrize("variant", ["0.2.0", "main", "main with its manager"])
@pytest.mark.parametrize("route", ROUTES)
def test_route(route, variant):
    if route.startswith("past_token") and variant == "0.2.0":
        pytest.skip("0.2.0 keeps no tokens")
    clear, left = ROUTES[route]
    wm, handle = attached(variant)
    clear(wm)
    assert stored(handle) == left


def test_keys_values_wm_list():
    """The batch in hand goes; nothing is left to be aligned."""
    wm, handle = attached("0.2.0")
    wm.retrieve_or_generate_kvcache(wm.latent_state.numpy(), ROWS, 0, np.zeros(ROWS, int))
    assert len(wm.keys_values_wm_list) == ROWS
    wm.keys_values_wm_list.clear()
    assert len(wm.keys_values_wm_list) == 0
    assert list(wm.keys_values_wm_list) == []
    with pytest.raises(RuntimeError, match="non-empty"):
        wm.trim_and_pad_kv_cache()
    assert stored(handle) == (ROOTS, NODES)


@pytest.mark.parametrize("variant", ["0.2.0", "main", "main with its manager"])
def test_a_cleared_environment_is_not_found_again(variant):
    wm, handle = attached(variant)
    wm.past_kv_cache_init_infer_envs[1].clear()
    latent = np.zeros((ROWS, 1, 32), np.float32)
    before = handle.stats()["misses"]
    wm.retrieve_or_generate_kvcache(latent, ROWS, 0, np.zeros(ROWS, int))
    assert handle.stats()["misses"] == before + ROWS


def test_lightzeros_own_entries_are_cleared_too():
    wm, handle = attached("main with its manager")
    own = wm.kv_cache_manager.own
    assert wm.kv_cache_manager.enable_stats == "kept"
    assert wm.kv_cache_manager.init_pools[0]._key_to_index == {1: 0}
    wm.kv_cache_manager.init_pools[0].clear()
    wm.past_kv_cache_init_infer_envs[1].clear()
    wm.kv_cache_manager.clear_recur_cache()
    assert [len(pool._key_to_index) for pool in own.init_pools] == [0, 0, 1, 1]
    assert not own.recur_pool._key_to_index
    handle.detach()
    assert wm.kv_cache_manager is own
    assert wm.use_new_cache_manager is True
    assert not hasattr(wm, "past_kv_cache_init_infer_envs")
    wm, handle = attached("0.2.0")
    wm.past_kv_cache_init_infer_envs[0]["key"] = 3
    wm.past_kv_cache_recurrent_infer["key"] = 4
    wm.kv_cache_manager.init_pools[0].clear()
    assert not wm.past_kv_cache_init_infer_envs[0]
    handle.detach()
    assert wm.past_kv_cache_recurrent_infer == {"key": 4}
    assert not hasattr(wm, "kv_cache_manager")
    assert not hasattr(wm, "use_new_cache_manager")


def test_a_policys_reset_reaches_them_all():
    """The three lines of 0.2.0's `_reset_collect`."""
    wm, handle = attached("0.2.0")
    collect = types.SimpleNamespace(world_model=wm)
    for entries in collect.world_model.past_kv_cache_init_infer_envs:
        entries.clear()
    collect.world_model.past_kv_cache_recurrent_infer.clear()
    collect.world_model.keys_values_wm_list.clear()
    assert stored(handle) == (0, 0)
