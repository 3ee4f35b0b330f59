"""A real LightZero 0.2.0 world model with its caches kept by kvjax."""

import copy
import gc
import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import DATA, in_full
from torch_models import SMALL, Driver, difference, make

from kvjax import lightzero
from kvjax.lightzero.attach.attached import state_of
from kvjax.tools.bench import lightzero_020

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = 1e-5


def pair(**changes):
    """A model and its attached twin."""
    model, twin = make(**changes), make(**changes)
    return model, twin, lightzero.attach(twin.world_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 24, "num_layers": 1, "num_heads": 3, "context_length": 4, "num_envs": 1},
        {"embed_dim": 48, "num_layers": 3, "num_heads": 2, "context_length": 14, "num_envs": 5},
        *in_full({}),
    ],
)
def test_all_outputs_are_the_originals(changes):
    """Twelve steps: windows grow, slide and, in a batch, differ in length."""
    model, twin, handle = pair(**changes)
    rows = model.world_model.env_num
    ours, theirs = Driver(twin, rows), Driver(model, rows)
    for step in range(12):
        first = step in (0, 9)
        assert difference(theirs.step(first=first), ours.step(first=first)) < TOLERANCE
    wm, wm_twin = model.world_model, twin.world_model
    for counter in ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt"):
        assert getattr(wm, counter) == getattr(wm_twin, counter), counter
    stats = handle.stats()
    assert stats["queries"] - stats["root_queries"] == wm.total_query_count == 12 * 6 * rows
    assert stats["root_hits"] == wm.root_hit_cnt == 10 * rows
    assert stats["misses"] == 0
    if rows > 1:
        assert stats["unequal_batches"] > 0


def test_a_part_of_the_environments():
    model, twin, _ = pair(num_envs=7)
    for rows in (3, 5):
        ours, theirs = Driver(twin, rows), Driver(model, rows)
        for _ in range(3):
            assert difference(theirs.step(3), ours.step(3)) < TOLERANCE


def test_retrieve_or_generate_kvcache():
    """By itself: what it returns and what it leaves in the module, against the original."""
    model, twin, _ = pair()
    for m in (model, twin):
        Driver(m, 4).step(0)
    latents = [m.world_model.latent_state.numpy() for m in (model, twin)]
    unknown = np.full_like(latents[0][:1], 0.5)
    lists = []
    for m, latent in zip((model, twin), latents, strict=True):
        wm = m.world_model
        wm.keys_values_wm_list, wm.keys_values_wm_size_list = [], []
        sizes = wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int))
        assert sizes == wm.keys_values_wm_size_list == [1, 1, 1, 1]
        lists.append(wm.keys_values_wm_list)
    assert len(lists[0]) == len(lists[1]) == 4
    for old, new in zip(*lists, strict=True):
        assert (old.size, len(old)) == (new.size, len(new))
        for layer in range(len(old)):
            for a, b in zip(old[layer].get(), new[layer].get(), strict=True):
                np.testing.assert_allclose(a, b, atol=TOLERANCE)
    # A miss continues without context where 0.2.0 fails.
    wm = twin.world_model
    known = wm.hit_count
    latent = np.concatenate([unknown, latents[1][1:]])
    assert wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int)) == [1, 1, 1, 1]
    assert wm.hit_count == known + 3
    torch = pytest.importorskip("torch")
    alone = wm.transformer.generate_empty_keys_values(n=1, max_tokens=8)
    with torch.no_grad():
        wm.forward({"obs_embeddings": torch.from_numpy(unknown)}, past_keys_values=alone)
    np.testing.assert_allclose(
        wm.keys_values_wm_list[0][1].get()[0], alone[1].get()[0], atol=TOLERANCE
    )
    # Beside longer rows its token stands at the end, where all rows end.
    driver = Driver(twin, 4)
    driver.step(0)
    driver.step(0)
    latent = np.concatenate([unknown, wm.latent_state.numpy()[1:]])
    assert wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int)) == [1, 3, 3, 3]
    np.testing.assert_allclose(
        wm.keys_values_wm_list[0][1].get()[0], alone[1].get()[0], atol=TOLERANCE
    )


def test_update_cache_context_stores_what_the_module_holds():
    """By itself, with caches that kvjax did not make: un-aligned, slid, found again."""
    torch = pytest.importorskip("torch")
    model, twin, _ = pair()
    generator = torch.Generator().manual_seed(0)
    latent = torch.rand(4, 1, 32, generator=generator)
    size, lengths = 7, [7, 3, 5, 7]
    data = torch.rand(4, 4, 4, 8, 8, generator=generator)  # 2 L caches [B, H, C, D]
    windows = []
    for m in (model, twin):
        wm = m.world_model
        caches = iter(data.clone())
        for layer in wm.keys_values_wm:
            for cache in (layer._k_cache, layer._v_cache):
                cache._cache, cache._size = next(caches), size
        wm.keys_values_wm_size_list_current = lengths
        wm.update_cache_context(latent, is_init_infer=False)
        wm.keys_values_wm_list, wm.keys_values_wm_size_list = [], []
        sizes = wm.retrieve_or_generate_kvcache(latent.numpy(), 4, 0, np.zeros(4, int))
        assert sizes == [5, 3, 5, 5]
        wm.trim_and_pad_kv_cache(is_init_infer=False)
        windows.append([layer.get() for layer in wm.keys_values_wm])
    for old, new in zip(*windows, strict=True):
        for a, b in zip(old, new, strict=True):
            assert a.shape == (4, 4, 5, 8)
            np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_a_list_that_somebody_touched_is_what_gets_aligned():
    _, twin, _ = pair()
    Driver(twin, 4).step(0)
    wm = twin.world_model
    wm.retrieve_or_generate_kvcache(wm.latent_state.numpy(), 4, 0, np.zeros(4, int))
    wm.keys_values_wm_list[2][0]._k_cache._cache[:] = 7
    wm.trim_and_pad_kv_cache(is_init_infer=False)
    assert (wm.keys_values_wm[0].get()[0][2] == 7).all()
    assert not (wm.keys_values_wm[0].get()[0][1] == 7).any()


def test_torch_owns_the_batch_alone():
    """The model writes into it; what is stored must not change, nor what is read next."""
    _, twin, _ = pair()
    Driver(twin, 4).step(2)
    wm = twin.world_model
    latent = wm.latent_state.numpy().copy()

    def read():
        wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int))
        wm.trim_and_pad_kv_cache(is_init_infer=False)
        size = wm.keys_values_wm.size
        return [layer._k_cache._cache[:, :, :size] for layer in wm.keys_values_wm]

    first = read()
    kept = [x.clone() for x in first]
    for x in first:
        x.fill_(99)
    second = read()
    for a, b in zip(kept, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((x == 99).all() for x in first)


def test_detaching_restores_the_module():
    model, twin = make(), make()
    wm = twin.world_model
    before = dict(vars(wm))
    handle = lightzero.attach(wm)
    assert type(wm) is not type(model.world_model)
    assert isinstance(wm, type(model.world_model))
    Driver(twin, 4).step()
    wm.clear_caches()
    handle.detach()
    assert type(wm) is type(model.world_model)
    left_by_steps = {"latent_state", "keys_values_wm_size_list_current"}
    assert vars(wm).keys() - before.keys() <= left_by_steps
    for name in ("past_kv_cache_recurrent_infer", "past_kv_cache_init_infer_envs"):
        assert getattr(wm, name) is before[name]
    for _ in range(3):
        with pytest.raises(ValueError, match="no longer attached"):
            handle.stats()
    ours, theirs = Driver(twin, 4, seed=5), Driver(model, 4, seed=5)
    for _ in range(8):
        assert difference(theirs.step(), ours.step()) == 0
    lightzero.attach(wm).detach()


def test_switching_at_run_time():
    model, twin, handle = pair()
    wm = twin.world_model
    assert wm.use_new_cache_manager is True
    ours, theirs = Driver(twin, 4), Driver(model, 4)
    for step, new in enumerate([True, True, False, False, True, True, False]):
        wm.use_new_cache_manager = new
        first = step == 0 or step in (2, 4, 6)
        queries = handle.stats()["queries"]
        found = difference(theirs.step(first=first), ours.step(first=first))
        assert found < TOLERANCE if new else found == 0
        assert (handle.stats()["queries"] > queries) == new


def test_switching_forgets_what_either_kept():
    _, twin, handle = pair()
    wm = twin.world_model
    driver = Driver(twin, 4)
    for new in (True, False, True):
        wm.use_new_cache_manager = new
        hits = wm.root_hit_cnt
        driver.step(1)
        assert wm.root_hit_cnt == hits
        driver.step(1)
        assert wm.root_hit_cnt == hits + 4
        own = *wm.past_kv_cache_init_infer_envs, wm.past_kv_cache_recurrent_infer
        assert all(own) != new
        assert (handle.stats()["roots_stored"] > 0) == new


@pytest.mark.parametrize(
    "update",
    [
        lambda p: p.mul_(1.1),
        lambda p: setattr(p, "data", p.data * 1.1),
        lambda p: p.data.mul_(1.1),
    ],
    ids=["in place", "new data", "in place behind autograd's back"],
)
def test_a_weight_update_drops_entries_and_renews_the_correction(update):
    torch = pytest.importorskip("torch")
    model, twin, handle = pair()
    ours, theirs = Driver(twin, 4), Driver(model, 4)
    for driver in (ours, theirs):
        for _ in range(5):
            driver.step(2)
    for m in (model, twin):
        with torch.no_grad():
            for parameter in m.world_model.parameters():
                update(parameter)
    model.world_model.precompute_pos_emb_diff_kv()
    model.world_model.clear_caches()
    twin.world_model.precompute_pos_emb_diff_kv()
    hits = handle.stats()["root_hits"]
    assert difference(theirs.step(2), ours.step(2)) < TOLERANCE
    assert handle.stats()["root_hits"] == hits
    for _ in range(5):
        assert difference(theirs.step(2), ours.step(2)) < TOLERANCE
    assert handle.stats()["root_hits"] == hits + 20


def test_weights_may_change_between_a_root_and_its_search():
    torch = pytest.importorskip("torch")
    _, twin, _ = pair()
    wm = twin.world_model
    latent = Driver(twin, 4).step(0)[2]
    for found in (4, 0):
        hits = wm.hit_count
        wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int))
        assert wm.hit_count - hits == found
        with torch.no_grad():
            wm.pos_emb.weight.add_(0)


def test_what_waits_to_be_filed_is_found_unless_it_was_forgotten():
    _, twin, handle = pair()
    wm, driver = twin.world_model, Driver(twin, 4)
    for forget in (None, handle.on_params_update, wm.past_kv_cache_recurrent_infer.clear):
        driver.step(2)
        latent, *_ = state_of(wm).bridge.scope.pending[0].filed()
        if forget is not None:
            forget()
        hits = wm.hit_count
        wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int))
        assert wm.hit_count - hits == (4 if forget is None else 0)


def test_what_is_filed_at_once_is_what_would_have_waited():
    _, one, handle = pair()
    other = pair()[1]
    often, seldom = Driver(one, 4), Driver(other, 4)
    for _ in range(2):
        often.step(0)
        seldom.step(0)
    nodes = [[m.world_model.latent_state.numpy()] for m in (one, other)]
    for index in range(4):
        outputs = [
            np.array(driver.simulate(grown, index, np.zeros(4, int)).latent_state)
            for driver, grown in zip((often, seldom), nodes, strict=True)
        ]
        handle.stats()  # files what waits
        assert difference(outputs[:1], outputs[1:]) < TOLERANCE


def test_a_latent_that_is_overwritten_is_filed_as_it_was(monkeypatch):
    _, twin, _ = pair()
    wm, given = twin.world_model, []
    update = wm.update_cache_context

    def remember(latent, *args, **kwargs):
        given.append(latent)
        return update(latent, *args, **kwargs)

    monkeypatch.setattr(wm, "update_cache_context", remember)
    Driver(twin, 4).step(2)
    latent = np.array(given[-1])
    given[-1][...] = 0
    hits = wm.hit_count
    wm.retrieve_or_generate_kvcache(latent, 4, 0, np.zeros(4, int))
    assert wm.hit_count - hits == 4


def test_a_forward_pass_finds_nothing_waiting_in_the_memory_it_writes_to():
    torch = pytest.importorskip("torch")
    _, twin, _ = pair()
    wm = twin.world_model
    Driver(twin, 4).step(2)
    bridge = state_of(wm).bridge
    assert bridge.scope.pending is not None
    with torch.no_grad():
        wm.forward({"obs_embeddings": torch.zeros(4, 1, 32)}, past_keys_values=wm.keys_values_wm)
    assert bridge.scope.pending is None


def test_any_weight_counts_and_may_be_announced():
    torch = pytest.importorskip("torch")
    _, twin, handle = pair()
    driver = Driver(twin, 4)
    driver.step(1)
    with torch.no_grad():
        twin.world_model.head_value.head_module[2].bias.add_(1)
    driver.step(1)
    assert handle.stats()["root_hits"] == 0
    driver.step(1)
    assert handle.stats()["root_hits"] == 4
    handle.on_params_update()
    assert handle.stats()["roots_stored"] == 0
    driver.step(1)
    assert handle.stats()["root_hits"] == 4


def test_a_stale_table_is_reported_and_not_used():
    torch = pytest.importorskip("torch")
    model, twin = make(), make()
    for m in (model, twin):
        with torch.no_grad():
            m.world_model.pos_emb.weight.add_(torch.linspace(0, 1, 20)[:, None])
    said = "table of position corrections is .* off"
    with pytest.warns(UserWarning, match=said) as told:
        lightzero.attach(twin.world_model)
    assert [warning.filename for warning in told] == [__file__]  # who called, not where we are
    model.world_model.precompute_pos_emb_diff_kv()
    ours, theirs = Driver(twin, 4), Driver(model, 4)
    for _ in range(6):
        assert difference(theirs.step(3), ours.step(3)) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightzero.attach(make().world_model)


def test_copies_are_attached_and_independent():
    model, twin, handle = pair()
    ours, theirs = Driver(twin, 4), Driver(model, 4)
    for _ in range(3):
        theirs.step(2), ours.step(2)
    target = copy.deepcopy(twin)
    copied = lightzero.handle_of(target.world_model)
    assert copied.stats() == handle.stats()
    second = Driver(target, 4)
    second.rng, second.last, second.steps = copy.deepcopy((ours.rng, ours.last, ours.steps))
    queries = handle.stats()["queries"]
    expected = theirs.step(2)
    assert difference(expected, second.step(2)) < TOLERANCE
    assert copied.stats()["root_hits"] == handle.stats()["root_hits"] + 4
    assert handle.stats()["queries"] == queries
    assert difference(expected, ours.step(2)) < TOLERANCE
    target.world_model.clear_caches()
    assert handle.stats()["roots_stored"] == 8
    assert copied.stats()["roots_stored"] == 0
    copied.detach()
    assert handle.stats()["roots_stored"] == 8


def test_state_dict_and_compile():
    torch = pytest.importorskip("torch")
    model, twin, handle = pair()
    names = model.state_dict().keys()
    assert twin.state_dict().keys() == names
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="eager")
    ours, theirs = Driver(compiled, 4), Driver(model, 4)
    for _ in range(3):
        assert difference(theirs.step(2), ours.step(2)) < TOLERANCE
    assert handle.stats()["root_hits"] == 8
    handle.detach()
    lightzero.attach(torch.compile(twin.world_model, backend="eager")).detach()


def test_scopes_keep_contexts_apart():
    """As a collector and an evaluator that share one model."""
    model, other, twin = make(), make(), make()
    handle = lightzero.attach(twin.world_model)
    runs = {
        "collect": (Driver(model, 4, seed=1), Driver(twin, 4, seed=1)),
        "evaluate": (Driver(other, 3, seed=2), Driver(twin, 3, seed=2)),
    }
    for _ in range(4):
        for name, (theirs, ours) in runs.items():
            with handle.scope(name):
                assert difference(theirs.step(2), ours.step(2)) < TOLERANCE
    assert handle.stats("collect")["root_hits"] == 12
    assert handle.stats("evaluate")["root_hits"] == 9
    with handle.scope("collect"):
        twin.world_model.clear_caches()
    assert handle.stats("collect")["roots_stored"] == 0
    assert handle.stats("evaluate")["roots_stored"] == 6
    twin.world_model.clear_caches()
    assert handle.stats("evaluate")["roots_stored"] == 0
    with pytest.raises(ValueError, match="no scope 'test'.*collect"):
        handle.stats("test")


def test_first_steps_with_lists_of_another_size():
    """What 0.2.0's evaluator leaves to a collector with more environments."""
    torch = pytest.importorskip("torch")
    model, twin, _ = pair()
    observation = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for last, action in ((torch.zeros(2, 4), [-1, -1]), (torch.zeros(6, 4), [-1] * 6)):
        outputs = [
            m.initial_inference(last[:4], action, observation, np.zeros(4, int)).value
            for m in (model, twin)
        ]
        np.testing.assert_allclose(outputs[0], outputs[1], atol=TOLERANCE)


def test_mixed_first_and_later_steps():
    """0.2.0 fails on them; split, each row must be as in a batch of its kind."""
    torch = pytest.importorskip("torch")
    twin, alone = make(), make()
    lightzero.attach(twin.world_model)
    lightzero.attach(alone.world_model)
    observation = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    for m in (twin, alone):
        m.initial_inference(observation[0], [-1] * 4, observation[0], np.zeros(4, int))
    mixed = twin.initial_inference(observation[0], [1, -1, 2, -1], observation[1], np.ones(4, int))
    first = alone.initial_inference(observation[0], [-1] * 4, observation[1], np.ones(4, int))
    np.testing.assert_allclose(mixed.value[1::2], first.value[1::2], atol=TOLERANCE)
    other = make()
    other.initial_inference(observation[0], [-1] * 4, observation[0], np.zeros(4, int))
    later = other.initial_inference(observation[0], [1, 0, 2, 0], observation[1], np.ones(4, int))
    np.testing.assert_allclose(mixed.value[::2], later.value[::2], atol=TOLERANCE)


def test_masked_padding_reads_no_pad():
    """A row's outputs do not depend on the depth of the others, as they do in 0.2.0."""
    results = {}
    for padding in ("reference", "masked"):
        for rows in (1, 4):
            model = make()
            lightzero.attach(model.world_model, padding=padding)
            results[padding, rows] = row_at_another_depth(model, rows)
    reference = difference(results["reference", 1], results["reference", 4])
    assert difference(results["masked", 1], results["masked", 4]) < TOLERANCE < 1e-3 < reference


def row_at_another_depth(model, rows):
    """Row 0 stays at the root; the others, if any, go down and miss at the next root."""
    torch = pytest.importorskip("torch")
    observation = torch.linspace(-1, 1, 12 * rows).reshape(rows, 3, 4).roll(1)
    observation[0] = torch.linspace(-1, 1, 12).reshape(3, 4)
    zeros = np.zeros(rows, int)
    out = model.initial_inference(observation[:, 0], [-1] * rows, observation[:, 0], zeros)
    root = out.latent_state.numpy()
    deep = model.recurrent_inference([(root, torch.zeros(rows).long())], 0, [1] * rows, zeros)
    nodes = deep.latent_state.numpy().copy()
    nodes[0] = root[0]
    deep = model.recurrent_inference([(nodes, torch.ones(rows).long())], 1, [1] * rows, zeros)
    before = observation[:, 0].clone()
    if rows > 1:
        model.world_model.past_kv_cache_init_infer_envs[0].clear()
    else:
        model.world_model.clear_caches()
    root = model.initial_inference(before, [1] * rows, observation[:, 1], zeros + 1)
    after = model.initial_inference(observation[:, 1], [0] * rows, observation[:, 2], zeros + 2)
    return [np.array(x.value[0]) for x in (deep, root, after)]


def test_memory_does_not_grow():
    """Live arrays and tensors are the same after many simulations as after a few."""
    torch = pytest.importorskip("torch")
    import jax

    _, twin, _ = pair()
    driver = Driver(twin, 4)

    def run(steps):
        for _ in range(steps):
            driver.step(5)
        gc.collect()
        arrays = jax.live_arrays()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(a.nbytes for a in arrays), len(arrays), len(tensors)

    run(3)
    assert run(3) == run(20)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m, r"WorldModel, got UniZeroModel.*pass its \.world_model"),
        (lambda m: None, "expected LightZero's WorldModel, got None, which has no"),
        (lambda m: "ckpt.pth.tar", "expected LightZero's WorldModel, got str, which has no"),
        (lambda m: type(m.world_model), "got the class .*WorldModel'>: pass an object of it"),
        (lambda m: m.world_model.to("meta"), "on a device that jax has.*got one on meta"),
        (lambda m: m.world_model.transformer, "WorldModel, got Transformer, which has no"),
        (lambda m: change(m, context_length=7), "context_length must be even.*got 7"),
        (lambda m: change(m, context_length=2), "at least 4, got 2"),
        (lambda m: m.world_model.half(), "float32 model and caches, got float16"),
        (lambda m: m.world_model.bfloat16(), "float32 model and caches, got bfloat16"),
        (lambda m: change(m, context_length=40), "position table of 39 rows, got 20"),
        (lambda m: change(m, num_observations_tokens=16), "1 token per observation, got 16"),
        (lambda m: change(m, exact_kv_window_reset=True), "has no _prepare_exact_cache_resets"),
    ],
)
def test_what_cannot_be_attached(spoil, message):
    with pytest.raises(ValueError, match=message):
        lightzero.attach(spoil(make()))


def change(model, **attributes):
    for name, value in attributes.items():
        setattr(model.world_model, name, value)
    return model.world_model


def test_bad_calls():
    torch = pytest.importorskip("torch")
    _, twin, handle = pair()
    wm = twin.world_model
    with pytest.raises(ValueError, match="attached already"):
        lightzero.attach(wm)
    with pytest.raises(ValueError, match="not attached"):
        lightzero.handle_of(make().world_model)
    with pytest.raises(ValueError, match="padding must be one of"):
        lightzero.attach(make().world_model, padding="none")
    with pytest.raises(ValueError, match="shadow must be"):
        lightzero.attach(make().world_model, shadow="raise")
    with pytest.raises(ValueError, match="5 rows do not fit into 4 environments"):
        wm.retrieve_or_generate_kvcache(np.zeros((5, 1, 32), np.float32), 5)
    with pytest.raises(ValueError, match="5 rows do not fit into 4 environments"):
        Driver(twin, 5).step(0)
    Driver(twin, 4).step(0)
    half = torch.zeros(4, 4, 8, 8, dtype=torch.float16)
    for layer in wm.keys_values_wm:
        layer._k_cache._cache = layer._v_cache._cache = half
    with pytest.raises(ValueError, match=r"float32 caches, got torch\.float16"):
        wm.update_cache_context(wm.latent_state)
    with pytest.raises(ValueError, match="4 rows need as many actions"):
        twin.initial_inference(torch.zeros(4, 4), [1], torch.zeros(4, 4), np.zeros(4, int))
    assert handle.stats()["roots_stored"] == 4


def test_targets_and_reanalysis_are_left_to_lightzero():
    """Neither looks anything up in 0.2.0."""
    torch = pytest.importorskip("torch")
    model, twin, handle = pair()
    observation = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    actions = np.array([[0, 1], [2, 0]])
    start = np.zeros((2, 3), int)
    outputs = [m.initial_inference(observation, actions, None, start) for m in (model, twin)]
    np.testing.assert_array_equal(outputs[0].value, outputs[1].value)
    for m in (model, twin):
        m.world_model.reanalyze_phase = True
    theirs, ours = Driver(model, 4), Driver(twin, 4)
    time = {"time": np.zeros((2, 1), int)}
    nodes = [[np.ones((4, 1, SMALL["embed_dim"]), np.float32)] for _ in range(2)]
    values = [d.simulate(n, 0, **time).value for d, n in zip((theirs, ours), nodes, strict=True)]
    np.testing.assert_array_equal(*values)
    assert handle.stats()["queries"] == 0


def in_a_new_process(program):
    program = f"import sys; sys.path.append({str(DATA.parent)!r})\n" + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("attached", [True, *in_full(False)])
def test_jax_is_set_up_once_a_model_is_attached_and_not_where_that_is_refused(attached):
    """It computes in the caller's thread, and says little."""
    program = f"""
import contextlib, logging, jax, jax.numpy as jnp
from torch_models import make
from kvjax import lightzero
wm = make().world_model
def attach(wm, **options):
    with contextlib.suppress(ValueError):
        lightzero.attach(wm, **options)
        assert {attached}
if {attached}:
    attach(wm)
attach(None)
attach(wm, padding="none")
attach(wm.half())
attach(wm.to("meta"))
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda i, y: y @ x, x))
slow(jnp.eye(500)).block_until_ready()
print(slow(jnp.ones((500, 500))).is_ready(), logging.getLogger("jax").level)
"""
    level = logging.WARNING if attached else logging.NOTSET
    assert in_a_new_process(program) == [str(attached), str(level)]


@pytest.fixture
def jax_logger():
    logger = logging.getLogger("jax")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_jax_says_little_where_the_root_logger_tells_everything(caplog, jax_logger):
    """As LightZero sets it; what jax warns of is still told."""
    jax_logger.setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    _, twin, handle = pair(num_simulations=5)  # a size of its own, to be compiled here
    Driver(twin, 4).step(1)
    assert [record for record in caplog.records if record.name.startswith("jax")] == []
    logging.getLogger("jax._src.dispatch").warning("told")
    assert caplog.messages[-1] == "told"
    handle.detach()


@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
def test_what_a_user_wants_jax_to_say_stays(jax_logger, level):
    jax_logger.setLevel(level)
    pair()
    assert jax_logger.level == level
