"""Ctrl-C anywhere in what keeps caches, between any two of Python's steps: no entry is lost."""

import signal
import sys

import numpy as np
import pytest
from test_attach import pytestmark
from test_kv_cache_manager import content, filled
from torch_models import Driver, make

from kvjax import lightzero
from kvjax.lightzero import manager
from kvjax.lightzero.attach import bridge, scope
from kvjax.lightzero.attach.attached import state_of

__all__ = ["pytestmark"]

ROWS = 4
STRIDE = 7  # steps are short: others than those of a line's end are tried too


class Interrupt:
    """Inside a `with` block the n-th step of Python in some modules is interrupted."""

    def __init__(self, number, *modules):
        self.left, self.files = number, {module.__file__ for module in modules}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        self.before, self.handler = sys.gettrace(), signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.settrace(self)
        return self

    def __exit__(self, kind, *rest):
        sys.settrace(self.before)
        signal.signal(signal.SIGINT, self.handler)
        return kind is KeyboardInterrupt


@pytest.mark.parametrize("step", ["simulation", "simulation of fewer rows", "root step"])
def test_of_an_attached_model_every_entry_is_found(step):
    model = make()
    handle, wm = lightzero.attach(model.world_model), model.world_model
    driver = Driver(model, ROWS)
    time, number, left = np.zeros(ROWS, int), 0, 0
    while left <= 0:
        number += STRIDE
        root = driver.step(0)[2]
        nodes = [root]
        driver.simulate(nodes, 0, time)
        assert state_of(wm).bridge.scope.pending is not None
        with Interrupt(number, bridge, scope) as interrupt:
            if step == "root step":
                driver.step(0)
            elif step == "simulation":
                driver.simulate(list(nodes), 1, time)
            else:
                wm.retrieve_or_generate_kvcache(root[:2], 2, 1, time[:2])
        left = interrupt.left
        for latent in nodes[:1] if step == "root step" else nodes:
            hits = wm.hit_count
            assert wm.retrieve_or_generate_kvcache(latent, ROWS, 1, time)
            assert wm.hit_count - hits == ROWS
    assert number > 300
    assert handle.stats()["not_stored"] == 0


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
def test_of_a_pool_every_entry_is_found(eviction):
    pool, number, left = manager.KVCachePool(50, eviction), 0, 0
    kept = {key: filled(key) for key in range(3)}
    for key, value in kept.items():
        pool.set(key, value)
    while left <= 0:
        number += 1
        with Interrupt(number, manager) as interrupt:
            pool.set(3, kept[0])
            pool.get(1)
        left = interrupt.left
        for key, value in kept.items():
            sizes, tensors = content(pool.get(key))
            assert sizes == content(value)[0]
            for ours, theirs in zip(tensors, content(value)[1], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert number > 100
