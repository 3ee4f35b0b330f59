"""Runs that are killed and go on: the same actions as undisturbed, in the same words."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from conftest import FULL, HERE

from kvjax.base import files
from kvjax.config import EnvironmentConfig, FramesConfig, SearchConfig
from kvjax.tools import cli, play_rows, play_saving
from kvjax.tools.play import play
from kvjax.tools.routes import Answer

SHORT = SearchConfig(num_simulations=3)
KEEPS = SearchConfig(num_simulations=3, kept_nodes=2, noise_fraction=0.25, temperature=1.0)
BLURRED = EnvironmentConfig("CartPole-v0", (1.0, 0.0, 1.0, 0.0))
"""Angles that are too small to the agent, so that episodes end early and at different steps."""


class Killed(BaseException):
    """In place of a process's end."""


@pytest.fixture
def agent(masked_agent):
    return dataclasses.replace(masked_agent, environment=BLURRED)


def told(summary):
    """What does not tell the time."""
    return summary.returns, summary.steps, summary.actions_digest


def killed_at(steps):
    """Lets a run end so many steps after it began."""
    left = iter(range(steps))

    def progress(_):
        if next(left, None) is None:
            raise Killed

    return progress


def play_killed(agent, folder, after, **options):
    """Kills a run at steps after each of its beginnings; what it says in the end."""
    for steps in after:
        with pytest.raises(Killed):
            play(agent, save=folder, resume=True, progress=killed_at(steps), **options)
    return play(agent, save=folder, resume=True, **options)


@pytest.mark.parametrize(
    ("route", "search"),
    [("tree", SHORT), ("tree", KEEPS), ("store", SHORT)],
    ids=["tree", "kept nodes, noise, temperature", "store"],
)
def test_killed_again_and_again(agent, tmp_path, route, search):
    """Before the first step, between two saves, and when some episodes are over."""
    options = {"episodes": 3, "search_config": search, "route": route, "seed": 5}
    options["save_every"] = 4
    undisturbed = play(agent, **options | {"save_every": 1})
    after = [0, 2, 5, *[6] * (undisturbed.steps // 25)]
    assert told(play_killed(agent, tmp_path / "run", after, **options)) == told(undisturbed)
    again = play(agent, save=tmp_path / "run", resume=True, **options)
    assert told(again) == told(undisturbed)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"agent.safetensors", "run.safetensors", "lock"}


def test_actions_tell_runs_apart(agent):
    options = {"episodes": 3, "search_config": SHORT}
    one, other = (play(agent, seed=seed, **options) for seed in (5, 6))
    assert one.actions_digest != other.actions_digest
    assert len(one.actions_digest) == 32


def test_killed_while_it_saves(agent, tmp_path, monkeypatch):
    """What was saved before stays, and nothing else."""
    options = {"episodes": 3, "search_config": SHORT, "save_every": 3}
    undisturbed = play(agent, episodes=3, search_config=SHORT)
    write, calls = files.os.fsync, iter(range(100))

    def kill(file):
        write(file)
        if next(calls) == 4:  # the agent, the first state, two saves
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", kill)
        with pytest.raises(Killed):
            play(agent, save=tmp_path, **options)
    kept = play_saving.SavedRun(tmp_path)
    assert kept.about["host"]["steps"] == 3 * 3 * 2
    (tmp_path / f"run.safetensors.0{files.PARTIAL}").write_bytes(b"half")
    assert told(play(agent, save=tmp_path, resume=True, **options)) == told(undisturbed)
    assert not list(tmp_path.glob(f"*{files.PARTIAL}"))


class Forgetful(gymnasium.Wrapper):
    """Answers otherwise each time that it is made."""

    made = 0

    def __init__(self, env):
        super().__init__(env)
        Forgetful.made += 1

    def step(self, action):
        observation, *rest = self.env.step(action)
        return observation + np.float32(1e-6 * Forgetful.made), *rest


def test_an_environment_that_does_not_repeat_itself(agent, tmp_path, monkeypatch):
    make = play_rows.environments.make
    monkeypatch.setattr(play_rows.environments, "make", lambda *x, **y: Forgetful(make(*x, **y)))
    with pytest.raises(ValueError, match=r"run.safetensors: the environment does not repeat it.*"):
        play_killed(agent, tmp_path, [9], episodes=3, search_config=SHORT, save_every=4)


class Counting(gymnasium.Env):
    """An emulator that goes on from episode to episode, as a game with lives does."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.total = self.steps = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.array([seed, self.total], np.float32), {}

    def step(self, action):
        self.total, self.steps = self.total + 2 * int(action) + 1, self.steps + 1
        ends = self.steps == 5
        return np.array([self.steps, self.total], np.float32), float(self.total), ends, False, {}


def moves(seed, count):
    return [np.int32(x) for x in np.random.default_rng(seed).integers(2, size=count)]


def test_the_way_leads_over_earlier_episodes_where_one_goes_on_from_another():
    row = play_rows.Row(Counting(), np.int32(-1), goes_on=True)
    for episode in (0, 3):
        row.start(episode, 7)
        for action in moves(episode, 5):
            row.advance(action)
    row.start(4, 7)
    row.advance(np.int32(1))
    other = play_rows.Row(Counting(), np.int32(-1), goes_on=True)
    other.start(1, 7)
    other.go(row.way, 7, row.seen)
    assert other.env.total == row.env.total
    assert (other.episode, other.steps, other.seen) == (4, 1, row.seen)
    np.testing.assert_array_equal(other.observation, row.observation)
    with pytest.raises(ValueError, match="the seed 11 of episode 4 and the 1 actions since"):
        play_rows.Row(Counting(), np.int32(-1)).go(row.way, 7, row.seen)


def test_lives_make_episodes_that_go_on(masked_agent, monkeypatch):
    monkeypatch.setattr(play_rows.environments, "make", lambda *x, **y: Counting())
    for lives in (False, True):
        frames = FramesConfig(episode_life=lives)
        environment = EnvironmentConfig("ALE/Pong-v5", frames=frames)
        with play_rows.side_by_side(environment, masked_agent.config, 1, render=False) as (row,):
            assert row.goes_on is lives


def run(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


BEGIN = ("play", "cartpole_masked", "--episodes", 3, "--simulations", 3, "--seed", 1, "--json")
SCALE = ("--observation-scale", "1,0,1,0")


def timeless(text):
    times = ("seconds", "compile_seconds", "searches_per_second")
    return {name: value for name, value in json.loads(text).items() if name not in times}


def test_the_command_line(capsys, tmp_path):
    """The folder knows all; what is said besides must agree, be it a default."""
    folder = tmp_path / "run"
    code, begun, _ = run(capsys, *BEGIN, *SCALE, "--save", folder)
    assert code == 0
    for besides in ((), ("cartpole_masked", "--episodes", 3), ("--save-every", 7), SCALE):
        code, out, _ = run(capsys, "play", *besides, "--resume", folder, "--json")
        assert code == 0
        assert timeless(out) == timeless(begun)
    for besides, message in (
        (("--episodes", 8), "is a run with episodes 3, got 8"),
        (("--simulations", 25), "is a run with simulations 3, got 25"),
        (("--no-context",), "is a run with no_context False, got True"),
        (("--route", "store"), "is a run with route tree, got store"),
        (("cartpole",), "is a run of an agent with other weights"),
        (("cartpole_masked_rope",), "is a run with "),
        (("--window-mode", "rebuild"), "is a run with window_mode learned, got rebuild"),
        (("--env", "module:CartPole-v0"), "is a run with env CartPole-v0, got module:"),
        (("--env", "CartPole-v1"), "is a run with env CartPole-v0, got CartPole-v1"),
        (("--observation-scale", "1,0,2,0"), r"run with observation_scale \(1.0, 0.0, 1.0, 0"),
        (("--gif", "a.gif"), "an animation needs its episode in one process"),
        (("--devices", 9), "devices must be at most 1 here"),
    ):
        code, out, err = run(capsys, "play", *besides, "--resume", folder, "--json")
        assert (code, out) == (2, "")
        assert re.search(message, err)
    code, _, err = run(capsys, *BEGIN, "--save", folder)
    assert code == 2
    assert f"holds a run already: go on with --resume {folder}" in err
    assert "holds no run" in run(capsys, "play", "--resume", tmp_path / "none")[2]
    (folder / "run.safetensors").write_bytes((folder / "run.safetensors").read_bytes()[:-1])
    assert "run.safetensors is" in run(capsys, "play", "--resume", folder)[2]
    (folder / "command.json").write_text("{")
    assert "command.json is damaged" in run(capsys, "play", "--resume", folder)[2]


def test_killed_before_its_first_state(capsys, tmp_path, monkeypatch):
    """All that is told is in the folder by then."""
    begin = play_saving.Keeper.begin
    monkeypatch.setattr(play_saving.Keeper, "begin", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        cli.main([*map(str, BEGIN), "--save", str(tmp_path)])
    monkeypatch.setattr(play_saving.Keeper, "begin", begin)
    code, out, _ = run(capsys, "play", "--resume", tmp_path, "--json")
    assert code == 0
    assert timeless(out) == timeless(run(capsys, *BEGIN)[1])


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with (
        play_saving.alone_in(tmp_path),
        pytest.raises(ValueError, match="another process plays in"),
        play_saving.alone_in(tmp_path),
    ):
        pass
    with play_saving.alone_in(tmp_path):
        pass


def test_a_route_without_a_state(agent, tmp_path):
    def route(*_):
        return lambda *_: Answer(np.zeros((1, 2), int), np.zeros(1), np.zeros(1, int))

    with pytest.raises(ValueError, match="this route cannot be saved"):
        play(agent, episodes=1, save=tmp_path, route=route)


def test_another_batch_than_devices_divide(agent, tmp_path):
    play(agent, episodes=3, search_config=SHORT, save=tmp_path)

    class Mesh:
        size = 2

    with pytest.raises(ValueError, match="plays 3 environments at once, which 2 devices cannot"):
        play(agent, episodes=3, search_config=SHORT, save=tmp_path, resume=True, mesh=Mesh())


COMMAND = (sys.executable, "-m", "kvjax.tools.cli", "play", "--json")


def process(folder, *arguments, **pipes):
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=env, text=True, **pipes)


def kill_at_random(begun, folder, draw):
    """Kills a process some time after it has begun to play, outright; whether it was still there.

    A process that ends before has played all.
    """
    wait, saved = time.monotonic() + 60, folder / "run.safetensors"
    before = saved.stat().st_mtime_ns if saved.exists() else None
    while begun.poll() is None and time.monotonic() < wait:
        if saved.exists() and saved.stat().st_mtime_ns != before:
            break
        time.sleep(0.005)
    time.sleep(draw.random() * 0.3)
    begun.send_signal(signal.SIGKILL)
    return begun.wait() == -signal.SIGKILL


@pytest.mark.skipif(not FULL, reason="each process compiles anew")
def test_killed_outright(capsys, tmp_path):
    """Processes, on one device and on two, at 20 random moments."""
    kills, draw, done = 20, random.Random(0), 0
    size = ("--episodes", 40, "--simulations", 3, "--seed", 3)
    begun = process(tmp_path, *size, "--save", tmp_path, "--save-every", 5)
    while kill_at_random(begun, tmp_path, draw):
        done += 1
        if done == kills:
            break
        resumed = ("--resume", tmp_path, "--save-every", 5, "--devices", 1 + done % 2)
        begun = process(tmp_path, *resumed)
    assert done == kills
    code, undisturbed, _ = run(capsys, "play", *size, "--json")
    assert code == 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    last = process(tmp_path, "--resume", tmp_path, "--devices", 2, **pipes)
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert timeless(out) == timeless(undisturbed)
