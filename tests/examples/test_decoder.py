"""The example of a decoder: a node says what a whole episode says, without a cache."""

import functools

import decoder
import jax
import numpy as np
import pytest
from whole_episodes import TOLERANCE, continued, largest_errors, last, window_error

import kvjax

LENGTH = np.int32([1, 4, 9])  # the last one begins with a full window


@pytest.fixture(scope="module")
def searched():
    rng = np.random.default_rng(0)
    params = decoder.init_params(jax.random.key(1))
    actions = rng.integers(decoder.ACTIONS, size=(3, 9)).astype(np.int32)
    seen = rng.normal(size=(3, 9, decoder.OBSERVATION)).astype(np.float32)
    root = jax.jit(decoder.root)(params, actions, seen, LENGTH)
    out = kvjax.tree_search(
        params, jax.random.key(2), root, decoder.MODEL, search=decoder.SEARCH, return_tree=True
    )
    assert out.finite.all()
    tree = jax.device_get(out.tree)
    episodes, lengths = continued(tree, actions, LENGTH, tree.action)
    unseen = np.zeros((*tree.action.shape, decoder.OBSERVATION))
    return tree, lengths, (params, episodes, continued(tree, seen, LENGTH, unseen)[0])


def errors(tree, lengths, arguments):
    said, tokens = jax.jit(functools.partial(decoder.forward))(*arguments)
    of_windows = window_error(tree, tokens, lengths)
    return largest_errors(tree, *last(lengths, *said)) | {"windows": of_windows}


def test_every_node_says_what_a_whole_episode_says(searched):
    assert np.sum(searched[1] > decoder.WINDOW + 1) > 60  # of which tokens have been dropped
    came = errors(*searched)
    print(came)
    assert max(came.values()) < TOLERANCE


def test_the_tolerance_tells_a_window_that_drops_nothing(searched, monkeypatch):
    monkeypatch.setattr(decoder, "WINDOW", 99)
    assert min(errors(*searched).values()) > 1000 * TOLERANCE


def test_it_runs(capsys):
    decoder.main()
    assert "row 2" in capsys.readouterr().out
