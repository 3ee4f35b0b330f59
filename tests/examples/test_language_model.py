"""The example of a language model: nodes are whole texts, and a search pays what greed does not."""

import sys

import jax
import language_model
import numpy as np
import pytest
import receipts
from whole_episodes import TOLERANCE, continued, last, paths

import kvjax

AMOUNTS = receipts.AMOUNTS


@pytest.fixture(scope="module")
def params():
    return receipts.train(jax.random.key(0))


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    """What `main` makes: its picture, what is paid, and what its searches answer."""
    picture = tmp_path_factory.mktemp("change") / "change.png"
    outputs, paid, search, draw = [], {}, kvjax.tree_search, language_model.draw

    def searched(*args, **options):
        outputs.append(search(*args, **options))
        return outputs[-1]

    def drawn(of, *args):
        paid.update(of)
        draw(of, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["language_model.py", str(picture)])
        patch.setattr(language_model, "train", lambda rng: params)
        patch.setattr(language_model, "draw", drawn)
        patch.setattr(kvjax, "tree_search", searched)
        language_model.main()
    return picture, paid, outputs


def test_every_node_of_a_receipt_says_what_a_whole_text_says(params, run):
    *_, outputs = run
    assert all(out.finite.all() for out in outputs)
    tree = jax.device_get(outputs[0].tree)
    ways, left = paths(tree), tree.state
    rows = np.repeat(np.arange(len(AMOUNTS)), tree.parent.shape[1])
    ended = (left <= 0) | (tree.depth >= receipts.LIMIT)
    inside = np.array(  # nodes behind the end are worth nothing, whatever is said of them
        [not ended[row, [0, *way[:-1]]].any() for row, way in zip(rows, ways, strict=True)]
    )
    begun = AMOUNTS.astype(np.int32)[:, None]
    ones = np.ones(len(AMOUNTS), int)
    texts, lengths = continued(tree, begun, ones, receipts.MOST + 1 + tree.action)
    assert lengths[inside].max() == receipts.LENGTH
    texts, lengths = texts[:, : receipts.LENGTH], np.minimum(lengths, receipts.LENGTH)
    apply = jax.jit(receipts.Reader().apply)
    policy, value, _ = jax.device_get(apply(params, *receipts.whole(texts)))
    policy, value = last(lengths, policy, jax.nn.sigmoid(value))
    open_, left = inside & ~ended.ravel(), left.ravel()
    legal = left[:, None] >= receipts.COINS
    prior = np.where(legal, np.exp(policy - policy.max(axis=1, keepdims=True)), 0.0)
    prior = prior[open_] / prior[open_].sum(axis=1, keepdims=True)
    errors = {
        "value": np.abs(tree.value.ravel() - value)[inside].max(),
        "policy": np.abs(tree.prior.reshape(legal.shape)[open_] - prior).max(),
    }
    coins = [
        sum(receipts.COINS[tree.action[row, way]]) for row, way in zip(rows, ways, strict=True)
    ]
    np.testing.assert_array_equal(left, AMOUNTS[rows] - coins)
    np.testing.assert_array_equal(tree.reward.ravel()[inside], (left == 0)[inside])
    print(errors, inside.sum(), open_.sum())
    assert max(errors.values()) < TOLERANCE
    assert open_.sum() > 500


def test_a_search_pays_what_greed_does_not(run):
    _, paid, _ = run
    greedily, searched = paid["greedily"], paid["by search"]
    print(greedily.mean(), searched.mean())
    assert greedily.mean() < 0.6
    assert searched.mean() > 0.9
    assert not np.any(greedily & ~searched)


def test_it_draws_a_picture(run):
    picture, *_ = run
    assert picture.read_bytes().startswith(b"\x89PNG")
