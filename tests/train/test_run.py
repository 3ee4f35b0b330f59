"""Whole runs of seconds: what they leave, that they go on bit for bit, and how they end."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from conftest import FULL

from kvjax.model import checkpoint
from kvjax.tools import cli, training
from kvjax.tools.play import play
from kvjax.train import NotFiniteError, collect, loop, saving, train
from kvjax.train import run as runs
from kvjax.train.run import BEST, CURVE, FAILURE, LAST, PICTURE, STATE

LIKE = jax.eval_shape(lambda key: loop.begin(key, tiny.SETUP), jax.random.key(0))


def run(folder, config=tiny.TINY, max_env_steps=48, **options):
    given = {"output": folder, "max_env_steps": max_env_steps} | options
    return train("cartpole_masked", config, **given)


def state(folder):
    return saving.load(folder / STATE, LIKE)[0]


def rows(folder):
    with (folder / CURVE).open() as file:
        return list(csv.DictReader(file))


class KilledError(Exception):
    pass


def killed_after(count):
    """A progress that ends a run behind so many iterations, whatever is written by then."""
    seen = []

    def progress(row, share):
        seen.append(row)
        if len(seen) == count:
            raise KilledError

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    traced = []
    with pytest.MonkeyPatch.context() as patch:
        play_step = collect.play_step
        patch.setattr(collect, "play_step", lambda *a, **k: traced.append(1) or play_step(*a, **k))
        summary = run(folder)
    return folder, summary, len(traced)


def test_what_a_run_leaves(whole):
    folder, summary, traces = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {BEST, LAST, STATE, CURVE, PICTURE}
    assert summary.env_steps == 48
    assert summary.reached_target_at is None
    assert len(summary.returns) == 2
    assert summary.mean_return == np.mean(summary.returns) >= 8
    assert 0 < summary.compile_seconds < summary.seconds
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    course = rows(folder)
    assert [int(row["env_steps"]) for row in course] == [12, 24, 36, 48]
    assert [bool(row["mean_return"]) for row in course] == [False, True, False, True]
    assert traces <= 3  # of the collecting loop, of the evaluating one: none is compiled again


def test_the_agent_is_a_checkpoint_like_any_other(whole):
    folder, _, _ = whole
    agent, last = checkpoint.load(folder / BEST), checkpoint.load(folder / LAST)
    assert agent.config == last.config == tiny.SETUP.model
    assert agent.environment == tiny.ENV.played_as
    learnt = state(folder).learner.params
    jax.tree.map(np.testing.assert_array_equal, last.params, learnt)
    assert play(agent, episodes=1, search_config=tiny.TINY.evaluated).mean_return >= 8


@pytest.mark.parametrize("count", [1, 3])
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, count):
    """After 1 nothing has been written; after 3 the file is that of iteration 2."""
    with pytest.raises(KilledError):
        run(tmp_path, progress=killed_after(count))
    assert (tmp_path / STATE).exists() == (count == 3)
    summary = run(tmp_path, resume=True)
    assert summary.returns == whole[1].returns
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path), state(whole[0]))
    assert (tmp_path / BEST).read_bytes() == (whole[0] / BEST).read_bytes()
    assert_same_course(tmp_path, whole[0])


def assert_same_course(one, other):
    """But for what was timed."""
    timed = {"seconds", "searches_per_second"}
    for ours, theirs in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }


@pytest.mark.skipif(not FULL, reason="each kill makes programs anew: minutes")
def test_a_process_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """At random moments: while it compiles, while it learns, while it writes."""
    whole, killed, kills, steps = tmp_path / "whole", tmp_path / "killed", 20, 12_000
    run(whole, max_env_steps=steps)
    script = Path(__file__).with_name("killed_run.py")
    options = ["--env=cartpole_masked", f"--max-env-steps={steps}", "--target=inf", *settings()]
    command = [sys.executable, script, str(kills), "0", killed, *options]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert len(json.loads(told.stdout)) == kills
    jax.tree.map(np.testing.assert_array_equal, state(killed), state(whole))
    for name in (BEST, LAST):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert_same_course(killed, whole)


def test_what_is_over_is_told_again_or_goes_on_for_longer(whole):
    folder, summary, _ = whole
    assert run(folder, resume=True) == summary
    with pytest.raises(KilledError):
        run(folder, max_env_steps=60, resume=True, progress=killed_after(1))


def test_a_folder_that_holds_another_run_is_refused(whole):
    folder, _, _ = whole
    with pytest.raises(ValueError, match="holds a run already: say --resume"):
        run(folder)
    with pytest.raises(ValueError, match="is a run with seed 0, got 1"):
        run(folder, seed=1, resume=True)
    other = dataclasses.replace(tiny.TINY, learning_rate=1e-4)
    with pytest.raises(ValueError, match="is a run with learning_rate 0.003, got 0.0001"):
        run(folder, other, resume=True)


def test_damaged_states_are_refused(whole, tmp_path):
    content = (whole[0] / STATE).read_bytes()
    middle = len(content) // 2
    spoilt = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"", content[:middle], spoilt):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no saved run"):
            run(tmp_path, resume=True)


def test_the_target_ends_a_run(tmp_path):
    summary = run(tmp_path, target=1.0)
    assert summary.reached_target_at == summary.env_steps == 24


def test_nan_ends_a_run_and_is_kept(tmp_path):
    """As if a reward had been NaN."""
    with pytest.raises(KilledError):
        run(tmp_path, progress=killed_after(2))
    begun, about = saving.load(tmp_path / STATE, LIKE)
    reward = begun.memory.experience.reward
    reward[:] = np.nan
    saving.save(tmp_path / STATE, begun, about)
    with pytest.raises(NotFiniteError, match="update 0 of iteration 3 met NaN") as raised:
        run(tmp_path, resume=True)
    assert raised.value.path == tmp_path / FAILURE
    with np.load(tmp_path / FAILURE) as kept:
        assert np.isnan(kept["['batch'].reward"]).any()
        weights = {k: x for k, x in kept.items() if k.startswith("['learner'].params")}
    assert len(weights) > 20
    learnt = jax.tree_util.tree_leaves_with_path({"learner": begun.learner})
    for path, value in learnt:  # the update that failed was not made
        name = jax.tree_util.keystr(path)
        if name in weights:
            np.testing.assert_array_equal(weights[name], value)


def test_what_is_refused_before_anything_is_compiled(tmp_path):
    with pytest.raises(
        ValueError, match="env must be one of cartpole, cartpole_masked, tmaze, got"
    ):
        train("pong", output=tmp_path)
    with pytest.raises(ValueError, match="seed must be in 0"):
        run(tmp_path, seed=-1)
    with pytest.raises(ValueError, match="collect_steps must be at least"):
        dataclasses.replace(tiny.TINY, collect_steps=4)
    with pytest.raises(ValueError, match="replay_size must be at least"):
        dataclasses.replace(tiny.TINY, replay_size=11)
    with pytest.raises(ValueError, match="latent_loss must be one of"):
        dataclasses.replace(tiny.TINY, latent_loss="kl")
    with pytest.raises(ValueError, match="value_weight must be at least 0"):
        dataclasses.replace(tiny.TINY, value_weight=-1.0)
    with pytest.raises(ValueError, match="target_rate must be in"):
        dataclasses.replace(tiny.TINY, target_rate=0.0)


def test_the_best_agent_is_kept_and_judged_anew(tmp_path, monkeypatch):
    """The second evaluation is worse than the first; what is told at the end is a third."""
    answers = iter([[30.0, 32.0], [9.0, 9.0]])
    monkeypatch.setattr(runs._Run, "_returns", lambda self, number: np.array(next(answers)))
    best = []
    summary = run(tmp_path, progress=lambda row, share: best.append(agent_bytes(tmp_path)))
    assert best[1] == best[3] == (tmp_path / BEST).read_bytes()
    assert best[1] != (tmp_path / LAST).read_bytes()
    assert set(summary.returns).isdisjoint({30.0, 32.0})
    assert [row["mean_return"] for row in rows(tmp_path)] == ["", "31.0", "", "9.0"]


def agent_bytes(folder):
    return (folder / BEST).read_bytes() if (folder / BEST).exists() else None


def test_a_target_that_was_reached_by_luck_ends_nothing(tmp_path, monkeypatch):
    answers = iter([[9.0, 9.0], [2.0, 3.0], [9.0, 9.0], [9.0, 8.0]])
    monkeypatch.setattr(runs._Run, "_returns", lambda self, number: np.array(next(answers)))
    summary = run(tmp_path, target=8.5)
    assert (summary.env_steps, summary.reached_target_at) == (48, 48)
    assert summary.returns == (9.0, 8.0)


def settings():
    return [
        f"--set={field.name}={getattr(tiny.TINY, field.name)}"
        for field in dataclasses.fields(tiny.TINY)
        if getattr(tiny.TINY, field.name) != field.default
    ]


def command(capsys, folder, *arguments):
    fixed = ["train", "--env=cartpole_masked", f"--output={folder}", "--max-env-steps=48"]
    code = cli.main([*fixed, *settings(), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_trains_as_the_function_does(whole, capsys, tmp_path):
    code, out, err = command(capsys, tmp_path / "new", "--json")
    summary = json.loads(out)
    names = "mean_return returns env_steps seconds compile_seconds reached_target_at"
    assert list(summary) == names.split()
    assert code == 0
    assert tuple(summary["returns"]) == whole[1].returns
    assert "48 steps" in err
    code, out, _ = command(capsys, tmp_path / "new", "--resume")
    assert code == 0
    assert "not reached" in out
    assert "whole run" in out


def test_the_command_says_in_a_line_what_is_wrong(whole, capsys, tmp_path):
    cases = {
        ("--set", "lr=1"): "--set takes NAME=VALUE, got 'lr=1'",
        ("--set", "updates"): "--set takes NAME=VALUE, got 'updates'",
        ("--set", "updates=many"): "updates must be a positive integer, got 'many'",
        ("--env", "pong"): "env must be one of cartpole, cartpole_masked, tmaze, got 'pong'",
        ("--max-env-steps", "0"): "max_env_steps must be a positive integer, got 0",
        ("--output", str(whole[0])): "holds a run already: say --resume",
    }
    for arguments, expected in cases.items():
        code, out, err = command(capsys, tmp_path, *arguments)
        assert (code, out) == (2, "")
        assert expected in err
        assert "kvjax train: " in err


def test_what_is_missing_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    code, _, err = command(capsys, tmp_path)
    assert code == 2
    assert "training needs flashbax, matplotlib, optax: pip install 'kvjax[train]'" in err
