"""A short soak; and that it sees what is forgotten, compiled anew or left behind."""

import jax
import numpy as np
import pytest
import soak
from conftest import FULL

import kvjax


@pytest.mark.skipif(not FULL, reason="takes 20 s to compile")
def test_a_short_one(capsys):
    told = soak.run(1, evictions=("lru",))
    assert told["rounds"] == 2 * soak.PERIOD
    assert (told["updates"], told["files"]) == (2, 4)
    assert told["evictions"] > 0
    assert capsys.readouterr().out.count("simulations") == 2


@pytest.mark.skipif(not FULL, reason="compiles a store's steps")
def test_it_sees_windows_that_outlive_their_weights(monkeypatch):
    stored = soak.Stored(soak.weights(1), "lru")
    monkeypatch.setattr(kvjax, "on_params_update", lambda store, *_, **__: store)
    stored.round(np.random.default_rng(0))
    with pytest.raises(AssertionError):
        stored.update(stored.params)


def test_it_sees_what_is_compiled_and_what_is_left():
    with soak.Watch() as watch:
        first = watch.now()
        soak.check(first, watch.now())
        left = [jax.jit(lambda x: x + 1)(1.0)]
    with pytest.raises(AssertionError, match="1 programs were compiled anew"):
        soak.check(first, watch.now())
    first = watch.now()
    left.append(jax.device_put(np.ones(3, np.float32)))
    with pytest.raises(AssertionError, match="1 arrays were left behind"):
        soak.check(first, watch.now())
    grown = first[0], first[1] + 1, first[2] - 2 * soak.MOST_GROWTH
    with pytest.raises(AssertionError, match="MiB more"):
        soak.check(grown, watch.now())
