"""The example of IRIS: a node says what a whole episode of the very words it drew says."""

import iris
import jax
import numpy as np
import pytest
from whole_episodes import TOLERANCE, continued, largest_errors, last, window_error

import kvjax

LENGTH = np.int32([1, 2, 5])  # the last one begins with a full window


@pytest.fixture(scope="module")
def searched():
    rng = np.random.default_rng(0)
    params = iris.init_params(jax.random.key(1))
    actions = rng.integers(iris.ACTIONS, size=(3, 5)).astype(np.int32)
    actions[:, 0] = iris.START
    observed = rng.integers(iris.WORDS, size=(3, 5, iris.TOKENS)).astype(np.int32)
    root = jax.jit(iris.root)(params, actions, observed, LENGTH)
    out = kvjax.tree_search(
        params, jax.random.key(2), root, iris.MODEL, search=iris.SEARCH, return_tree=True
    )
    assert out.finite.all()
    tree = jax.device_get(out.tree)
    episodes, lengths = continued(tree, actions, LENGTH, tree.action)
    words, _ = continued(tree, observed, LENGTH, tree.state)
    said, tokens = jax.jit(iris.forward)(params, episodes, words)
    return tree, lengths, last(lengths, *said), tokens


def test_every_node_says_what_a_whole_episode_says(searched):
    tree, lengths, (reward, _, value, policy), tokens = searched
    assert np.sum(lengths > iris.MEMORY + 1) > 40  # of which steps have been dropped
    came = largest_errors(tree, reward, value, policy)
    came["windows"] = window_error(tree, tokens, lengths * iris.BLOCK)
    print(came)
    assert max(came.values()) < TOLERANCE


def test_words_are_drawn_from_what_a_whole_episode_says(searched):
    """Their log-likelihood is what it is on average, within four standard errors."""
    tree, _, (_, logits, *_), _ = searched
    new = tree.parent.ravel() >= 0
    logs = np.asarray(jax.nn.log_softmax(logits))[new]
    words = tree.state.reshape(-1, iris.TOKENS)[new]
    drawn = np.take_along_axis(logs, words[..., None], axis=-1)[..., 0]
    mean = np.sum(np.exp(logs) * logs, axis=-1)
    variance = np.sum(np.exp(logs) * logs**2, axis=-1) - mean**2
    excess = np.sum(drawn - mean) / np.sqrt(np.sum(variance))
    print(excess)
    assert abs(excess) < 4


def test_nodes_draw_by_themselves(searched):
    tree, *_ = searched
    words = tree.state[:, 1:].reshape(-1, iris.TOKENS)
    assert len({tuple(of) for of in words.tolist()}) > 60


def test_it_runs(capsys):
    iris.main()
    assert "row 2" in capsys.readouterr().out
