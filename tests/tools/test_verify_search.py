"""Recorded trees and episodes of LightZero; and that a wrong search is found out."""

import functools
import json

import jax
import numpy as np
import pytest
from test_verify import rewritten, set_config

from kvjax.lightzero.traces import npz, search_trace
from kvjax.mcts import puct
from kvjax.tools import cli
from kvjax.tools.parity import near_ties, reference_tree, verify
from kvjax.tools.parity import verify_trees as verify_search
from kvjax.tools.parity.nodes import Carried
from kvjax.tools.parity.verify_episodes import _begin, _read_player, verify_episodes
from kvjax.tools.parity.verify_trees import verify_trees

TREES, EPISODES = "lightzero_main_trees.npz", "cartpole_masked_episodes.npz"


def shortened(data, path, steps=12, change=lambda arrays: None):
    """The episode trace with its first steps only; windows slide from the fourth on."""

    def cut(arrays):
        for name in arrays.keys() - {"config"}:
            arrays[name] = arrays[name][:steps]
        change(arrays)

    return rewritten(data / EPISODES, path, cut)


def few_trees(data, path, change=lambda arrays: None, count=6):
    """The tree trace with its first trees only."""

    def cut(arrays):
        for name in [n for n in arrays if n != "meta" and int(n.split("/")[0]) >= count]:
            del arrays[name]
        arrays["meta"] = np.array(json.dumps(json.loads(str(arrays["meta"]))[:count]))
        change(arrays)

    return rewritten(data / TREES, path, cut)


@pytest.mark.parametrize("route", ["tree", "store"])
def test_two_hundred_recorded_trees(data, route):
    report = verify_trees(data / TREES, route=route)
    assert (report.found["trees"], report.found["identical_visits"], report.found["near_ties"]) == (
        200,
        200,
        0,
    )
    assert report.found["max_root_value_error"] <= 1e-5
    assert report.ok


def test_recorded_episodes_in_jit(data):
    """Two episodes of 200 steps, about 195 of them slid; the shipped agent is found by itself."""
    report = verify_episodes(data / EPISODES)
    assert (
        report.found["steps"],
        report.found["identical_visits"],
        report.found["identical_actions"],
    ) == (400, 1.0, 1.0)
    assert report.found["checkpoint"] == "cartpole_masked"
    assert 0 < report.found["max_root_value_error"] < 1e-4
    assert report.ok


def test_recorded_episodes_by_the_store(data, tmp_path):
    report = verify_episodes(shortened(data, tmp_path / "e.npz", steps=60), route="store")
    assert (
        report.found["steps"],
        report.found["identical_visits"],
        report.found["identical_actions"],
    ) == (120, 1.0, 1.0)
    assert report.ok


@pytest.mark.parametrize("route", ["tree", "store"])
def test_a_changed_tree_is_reported(data, tmp_path, route):
    def change(arrays):
        arrays["3/visits"] += np.array([1] + [0] * (len(arrays["3/visits"]) - 1), np.int32)

    report = verify_trees(few_trees(data, tmp_path / "t.npz", change), route=route)
    assert (report.found["trees"], report.found["identical_visits"], report.found["near_ties"]) == (
        6,
        5,
        0,
    )
    assert [d["where"] for d in report.found["differences"]] == ["tree 3"]
    assert report.found["differences"][0]["margin"] is None
    assert not report.ok


def test_a_changed_root_value_is_reported(data, tmp_path):
    def change(arrays):
        arrays["2/root_value"] = arrays["2/root_value"] * np.float32(1 + 1e-3)

    path = few_trees(data, tmp_path / "t.npz", change)
    report = verify_trees(path)
    assert report.found["identical_visits"] == 6
    assert abs(report.found["max_root_value_error"] - 1e-3) < 1e-5
    assert not report.ok
    assert verify_trees(path, tolerance=1e-2).ok


def test_a_wrong_rule_is_reported(data, tmp_path, monkeypatch):
    path = few_trees(data, tmp_path / "t.npz", count=8)
    monkeypatch.setattr(puct, "_MIN_RANGE", 1e9)
    anew = functools.partial(verify_search._grow.__wrapped__)  # not compiled yet
    monkeypatch.setattr(verify_search, "_grow", jax.jit(anew, static_argnames="config"))
    report = verify_trees(path)
    assert report.found["identical_visits"] < 6
    assert not report.ok


def test_root_values_that_are_nan_are_a_failure(data, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_tree, "root_value", lambda grown: np.nan)
    report = verify_trees(few_trees(data, tmp_path / "t.npz"), route="store")
    assert not report.ok
    assert report.as_json()["max_root_value_error"] is None
    json.dumps(report.as_json(), allow_nan=False)


def two_actions(path, visits, difference):
    """Three simulations; at the third both actions have one visit and the priors decide."""
    arrays = {
        "meta": json.dumps([{"actions": 2, "simulations": 3, "discount": 1.0, "noise": False}]),
        "0/root_logits": np.array([0.0, difference], np.float32),
        "0/legal": np.ones(2, bool),
        "0/reward": np.zeros((4, 2), np.float32),
        "0/value": np.zeros((4, 2), np.float32),
        "0/logits": np.zeros((4, 2, 2), np.float32),
        "0/visits": np.array(visits),
        "0/root_value": np.float32(0),
    }
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("route", ["tree", "store"])
@pytest.mark.parametrize(
    ("visits", "difference", "near", "ok"),
    [
        ([1, 2], 1e-6, 0, True),  # what the rules say
        ([2, 1], 1e-6, 1, True),  # the other choice of a near tie
        ([3, 0], 1e-6, 0, False),  # no choice of it
        ([2, 1], 1e-3, 0, False),  # no near tie
    ],
)
def test_near_ties_are_shown(tmp_path, route, visits, difference, near, ok):
    report = verify_trees(two_actions(tmp_path / "t.npz", visits, difference), route=route)
    assert (report.found["near_ties"], report.ok) == (near, ok)
    if near:
        assert report.found["identical_visits"] == 0
        assert 0 < report.found["differences"][0]["margin"] < near_ties.LIMIT


@pytest.mark.parametrize("route", ["tree", "store"])
def test_other_visits_and_actions_of_episodes_are_reported(data, tmp_path, route):
    def change(arrays):
        arrays["seed1001/visits"][7] = [25, 0]

    path = shortened(data, tmp_path / "e.npz", steps=10, change=change)
    report = verify_episodes(path, route=route)
    assert report.found["identical_visits"] == 19 / 20
    assert report.found["identical_actions"] == 1.0
    assert [d["where"] for d in report.found["differences"]] == ["seed 1001, step 7"]
    assert not report.ok


def test_a_wrong_last_action_alone_fails(data, tmp_path):
    """The last action goes nowhere else, so that visits stay the same."""

    def change(arrays):
        arrays["seed1000/action"][-1] = 1 - arrays["seed1000/action"][-1]

    report = verify_episodes(shortened(data, tmp_path / "e.npz", steps=10, change=change))
    assert report.found["identical_visits"] == 1.0
    assert report.found["identical_actions"] == 19 / 20
    assert not report.ok


def test_few_other_visits_are_allowed(data, tmp_path):
    def change(arrays):
        arrays["seed1001/visits"][7] = [25, 0]

    path = rewritten(data / EPISODES, tmp_path / "e.npz", change)
    report = verify_episodes(path)
    assert report.found["identical_visits"] == 399 / 400
    assert report.ok


def test_a_near_tie_of_an_episode(data):
    """The whole search of a step is repeated for it, context included."""
    trace = search_trace.read_episodes(data / EPISODES)
    player = _read_player("trace", trace, "cartpole_masked")
    nodes = Carried(player.params, player.config, 1)
    for t in (0, 2, 9):
        grown, network = _begin(player, nodes, trace.search, trace.episodes[0], t)
        reference_tree.grow([grown], network)
        visits = reference_tree.visit_counts(grown)
        np.testing.assert_array_equal(visits, trace.episodes[0].visits[t])


def test_weights_of_a_file(capsys, data, tmp_path):
    pytest.importorskip("torch")
    path = shortened(data, tmp_path / "e.npz", steps=6)
    source = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    code = cli.main(["verify", str(path), "--json", "--checkpoint", str(source)])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["identical_visits"] == 1.0
    other = data / "cartpole_lightzero_0.2.0.pth.tar"
    assert cli.main(["verify", str(path), "--json", "--checkpoint", str(other)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["identical_visits"] < 0.9
    assert not report["ok"]


def test_command_line(capsys, data, tmp_path):
    path = few_trees(data, tmp_path / "t.npz")
    assert cli.main(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical_visits"] == 6
    assert cli.main(["verify", str(path)]) == 0
    assert "within tolerance" in capsys.readouterr().out
    assert cli.main(["verify", str(path), "--checkpoint", "cartpole_masked"]) == 2
    assert "brings its own network" in capsys.readouterr().err
    path = two_actions(path, [3, 0], 1e-6)
    assert cli.main(["verify", str(path)]) == 1
    assert "NOT within tolerance" in capsys.readouterr().out


def set_meta(arrays, **changes):
    described = json.loads(str(arrays["meta"]))
    described[1] |= changes
    arrays["meta"] = np.array(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(meta=np.array("{")), "meta is no JSON"),
        (lambda a: a.update(meta=np.array("[]")), r"meta must be a JSON list of trees, got \[\]"),
        (lambda a: a.update(meta=np.array("[3]")), r"meta\[0\] must be a JSON object, got 3"),
        (
            lambda a: a.update(meta=np.array('[{"actions": 2}]')),
            r"meta\[0\] lacks discount, noise, simulations",
        ),
        (lambda a: set_meta(a, simulations=0), "num_simulations must be a positive integer, got 0"),
        (lambda a: set_meta(a, discount="x"), "trace.npz: "),
        (lambda a: set_meta(a, simulations=9), r"1/reward has shape \(9, 2\), expected \(10, 2\)"),
        (lambda a: a.pop("4/visits"), "4/visits is missing"),
        (lambda a: a.pop("0/noise"), "0/noise is missing"),
        (lambda a: a["1/value"].__setitem__((0, 0), np.nan), "1/value holds 1 NaN or infinity"),
        (lambda a: a["1/legal"].__setitem__(slice(None), False), "1/legal allows no action"),
        (lambda a: a.update({"1/legal": np.array(["a", "b"])}), "1/legal holds <U1, expected num"),
    ],
)
def test_bad_tree_traces(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        verify.verify(few_trees(data, tmp_path / "trace.npz", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: set_config(a, seeds=[]), r"seeds must be a list of numbers, got \[\]"),
        (lambda a: set_config(a, seeds=[7]), "seed7/obs is missing"),
        (
            lambda a: set_config(a, rope=True, rope_positions="mine"),
            "rope_positions must be lightzero or consistent, got mine",
        ),
        (lambda a: set_config(a, num_heads=4), "was converted with num_heads 2, got 4"),
        (lambda a: set_config(a, support=[-3, 3]), r"support \(-3, 3\), cartpole_masked has"),
        (lambda a: set_config(a, env="Pong-v5"), "no agent that is shipped plays .*Pong-v5"),
        (lambda a: set_config(a, simulations=0), "num_simulations must be a positive integer"),
        (lambda a: a.pop("seed1001/action"), "seed1001/action is missing"),
        (lambda a: a.pop("seed1001/visits"), "seed1001/visits is missing"),
        (lambda a: a["seed1000/action"].__setitem__(3, 2), r"seed1000/action must be in 0 .. 1"),
        (
            lambda a: a.update({"seed1000/root_value": np.zeros(3)}),
            r"seed1000/root_value has shape \(3,\), expected \(200,\)",
        ),
        (
            lambda a: a.update({"seed1000/obs": np.zeros((0, 4))}),
            r"seed1000/obs has shape \(0, 4\), expected a row per step",
        ),
    ],
)
def test_bad_episode_traces(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        verify.verify(rewritten(data / EPISODES, tmp_path / "trace.npz", change))


def test_a_description_must_be_complete(data, tmp_path):
    def change(arrays):
        arrays["config"] = np.array('{"seeds": [1000]}')

    path = rewritten(data / EPISODES, tmp_path / "trace.npz", change)
    with pytest.raises(ValueError, match="config lacks context_length, discount, env"):
        verify.verify(path)


def test_readers_refuse_another_kind(data):
    with pytest.raises(ValueError, match="is a trace of episodes, not of trees"):
        search_trace.read_trees(data / EPISODES)
    with pytest.raises(ValueError, match="is a trace of trees, not of episodes"):
        search_trace.read_episodes(data / TREES)
    with pytest.raises(ValueError, match="is a trace of trees, not of a world model"):
        verify.verify_world_model(data / TREES)
    with pytest.raises(FileNotFoundError, match="no such trace"):
        npz.read_arrays("absent.npz")
