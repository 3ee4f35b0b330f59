"""Searches that make more simulations than the world model's configuration says."""

import copy
import logging

import numpy as np
import pytest
from test_attach import pytestmark
from test_attach_exact import Checked
from torch_models import Driver, difference, make

from kvjax import lightzero
from kvjax.lightzero.attach import layout
from kvjax.lightzero.attach.attached import state_of

__all__ = ["pytestmark"]

TOLERANCE = 1e-6
ROWS, CONFIGURED = 4, 6
SEARCHED = 2 * CONFIGURED  # as many as there is room for after the first growth


def attached(simulations=CONFIGURED, **options):
    model = make(num_simulations=simulations)
    return model, lightzero.attach(model.world_model, **options)


def growths(caplog):
    return [x for x in caplog.records if "Set world_model_cfg.num_simulations" in x.getMessage()]


def check_whole(handle):
    stats = handle.stats()
    assert (stats["misses"], stats["node_evictions"], stats["not_stored"]) == (0, 0, 0)
    return stats


@pytest.mark.parametrize("rows", [ROWS, 3])
def test_it_is_as_if_it_had_been_configured(caplog, rows):
    (large, _), (small, handle) = attached(SEARCHED), attached()
    theirs, ours = Driver(large, rows), Driver(small, rows)
    for simulations in (CONFIGURED, SEARCHED, 0, SEARCHED):
        assert difference(theirs.step(simulations), ours.step(simulations)) < TOLERANCE
    stats = check_whole(handle)
    assert stats["nodes_slots"] == 48
    assert stats["queries"] == rows * (3 + CONFIGURED + 2 * SEARCHED)
    (told,) = growths(caplog)
    assert told.levelno == logging.WARNING
    assert "more than 24 nodes" in told.getMessage()
    assert "num_simulations=6 of env_num=4: there is room for 48" in told.getMessage()


def test_in_scopes_and_copies(caplog):
    """Each store grows alone; a copy made in the middle of a search goes on with it."""
    (large, _), (small, handle) = attached(SEARCHED), attached()
    theirs, ours = Driver(large, ROWS), Driver(small, ROWS)
    with handle.scope("evaluate"):
        assert difference(theirs.step(SEARCHED), ours.step(SEARCHED)) < TOLERANCE
    check_whole(handle)
    assert handle.stats("evaluate")["nodes_slots"] == 48
    assert handle.stats()["nodes_slots"] == 24
    large.world_model.clear_caches()
    small.world_model.clear_caches()
    time = np.zeros(ROWS, int)
    nodes = [[driver.step(0, first=True)[2]] for driver in (theirs, ours)]
    copies = []
    for driver in (theirs, ours):
        driver.rng = np.random.default_rng(1)
    for index in range(SEARCHED):
        outputs = [d.simulate(n, index, time) for d, n in zip((theirs, ours), nodes, strict=True)]
        ours_and_copies = [outputs[1]]
        for driver, grown in copies:
            ours_and_copies.append(driver.simulate(grown, index, time))
        for out in ours_and_copies:
            np.testing.assert_allclose(out.value, outputs[0].value, atol=TOLERANCE)
        if index in (CONFIGURED - 1, CONFIGURED + 1):  # full, and with room again
            twin = Driver(copy.deepcopy(small), ROWS)
            twin.rng = copy.deepcopy(ours.rng)
            copies.append((twin, list(nodes[1])))
    for model in (small, *(driver.model for driver, _ in copies)):
        assert check_whole(lightzero.handle_of(model.world_model))["nodes_slots"] == 48
    assert len(growths(caplog)) == 3  # the scope, the model, and its copy that was full


def test_models_that_keep_raw_tokens():
    checked = Checked("rebuild_kv_window_from_tokens")
    for restarts in (range(ROWS), (), (1,)):
        checked.step(restarts, simulations=SEARCHED)
    assert checked.error < 2e-5
    check_whole(checked.handle)


def test_rewriting_what_is_stored_takes_no_room(caplog):
    model, handle = attached()
    driver = Driver(model, ROWS)
    root = driver.step(0)[2]
    for index in range(5 * CONFIGURED):
        driver.rng = np.random.default_rng(index % CONFIGURED)
        driver.simulate([root], index, np.zeros(ROWS, int))
    assert not growths(caplog)
    assert check_whole(handle)["nodes_slots"] == 24


def test_it_is_told_once_however_often_it_grows(caplog):
    caplog.set_level(logging.INFO, logger="kvjax")
    model, handle = attached()
    Driver(model, ROWS).step(2 * SEARCHED)
    assert check_whole(handle)["nodes_slots"] == 96
    levels = [x.levelno for x in growths(caplog)]
    assert levels == [logging.WARNING, logging.INFO]


def test_a_larger_search_is_not_compiled_again_and_again():
    model, _ = attached()
    driver = Driver(model, ROWS)
    driver.step(SEARCHED)
    between = state_of(model.world_model).bridge.scope.between
    compiled = between._cache_size(), layout.file._cache_size()
    for _ in range(3):
        driver.step(SEARCHED)
    assert (between._cache_size(), layout.file._cache_size()) == compiled


def test_the_shadow_says_that_the_pool_of_lightzero_is_too_small():
    """There entries are overwritten; up to that no word is lost about it."""
    model, handle = attached(shadow="log")
    driver = Driver(model, ROWS)
    driver.step(CONFIGURED)
    assert handle.disagreements == []
    driver.step(SEARCHED)
    assert handle.disagreements
    for text in handle.disagreements:
        assert "LightZero's own pool holds 24 nodes and overwrites" in text
    check_whole(handle)
