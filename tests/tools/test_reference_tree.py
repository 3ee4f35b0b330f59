"""The numpy tree against 200 searches recorded from LightZero's C++ tree."""

import dataclasses
import json

import numpy as np
import pytest

from kvjax.config import SearchConfig
from kvjax.tools.parity import reference_tree as trees

CONFIG = SearchConfig(num_simulations=4)


def recorded_trees(data):
    with np.load(data / "lightzero_main_trees.npz") as archive:
        described = json.loads(str(archive["meta"]))
        for index, tree in enumerate(described):
            names = ("root_logits", "legal", "reward", "value", "logits", "visits", "root_value")
            names += ("noise",) if tree["noise"] else ()
            yield tree, {name: archive[f"{index}/{name}"] for name in names}


def searched(described, answers):
    config = SearchConfig(
        num_simulations=described["simulations"],
        discount=described["discount"],
        noise_fraction=0.25 if described["noise"] else 0.0,
    )
    legal = answers["legal"].astype(bool)
    tree = trees.init(answers["root_logits"], legal, config, answers.get("noise"))
    for _ in range(config.num_simulations):
        edge = trees.select(tree)
        trees.expand(tree, *(answers[name][edge] for name in ("reward", "value", "logits")))
    return tree


def test_two_hundred_recorded_searches(data):
    compared = 0
    for described, answers in recorded_trees(data):
        tree = searched(described, answers)
        np.testing.assert_array_equal(trees.visit_counts(tree), answers["visits"])
        assert trees.root_value(tree) == np.float32(answers["root_value"])
        compared += 1
    assert compared == 200


def test_a_changed_rule_is_noticed(data, monkeypatch):
    monkeypatch.setattr(trees, "_MIN_RANGE", np.float32(1e9))
    agree = [
        np.array_equal(trees.visit_counts(searched(*recorded)), recorded[1]["visits"])
        for recorded in recorded_trees(data)
    ]
    assert sum(agree) < 150


def test_first_legal_action_first_and_illegal_ones_never():
    legal = np.array([False, True, True])
    tree = trees.init(np.array([9.0, 0.0, 1.0]), legal, CONFIG)
    assert trees.select(tree) == (trees.ROOT, 1)
    for _ in range(4):
        trees.select(tree)
        trees.expand(tree, 0.0, 1.0, np.zeros(3))
    assert trees.visit_counts(tree)[0] == 0
    assert trees.visit_counts(tree).sum() == 4


def test_no_legal_action():
    with pytest.raises(ValueError, match="no legal action"):
        trees.init(np.zeros(2), np.zeros(2, bool), CONFIG)


def test_backup_by_hand():
    """Two simulations down one path, discount 0.5: the sums written out."""
    config = dataclasses.replace(CONFIG, discount=0.5)
    tree = trees.init(np.array([0.0]), np.array([True]), config)
    trees.select(tree)
    trees.expand(tree, 1.0, 4.0, np.zeros(1))
    assert trees.select(tree) == (1, 0)
    trees.expand(tree, 2.0, 8.0, np.zeros(1))
    assert tree.value_sum.tolist()[:3] == [3.0 + 4.0, 4.0 + 6.0, 8.0]
    assert tree.visits.tolist()[:3] == [3, 2, 1]
    np.testing.assert_allclose(trees.root_value(tree), 7.0 / 3.0, rtol=1e-6)
