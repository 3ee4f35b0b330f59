"""Environments as an agent sees them: frames in plain numpy, packages, what does not fit."""

import argparse
import dataclasses
import importlib.util

import gymnasium
import numpy as np
import pytest
from conftest import SMALL
from gymnasium import spaces

from kvjax.config import EnvironmentConfig, FramesConfig
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools import cli, environments, options

SIDE, SCREEN, LAST = 64, 3 * 64, 12
PLAIN = FramesConfig(frame_skip=1, noop_max=0)
CAMERA = EnvironmentConfig("kvjax-tests/Camera-v0", frames=PLAIN)


class Camera(gymnasium.Env):
    """Shows the same random frames in every episode."""

    observation_space = spaces.Box(0, 255, (SCREEN, SCREEN, 3), np.uint8)
    action_space = spaces.Discrete(3)
    shown = np.random.default_rng(0).integers(0, 256, (LAST + 1, SCREEN, SCREEN, 3), np.uint8)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.shown[0], {}

    def step(self, action):
        self.time += 1
        return self.shown[self.time], 1.0 - 3 * action, self.time == LAST, False, {}


gymnasium.register(CAMERA.env_id, Camera, disable_env_checker=True)


def images(channels, side=SIDE):
    return dataclasses.replace(SMALL, observation_size=None, image_shape=(channels, side, side))


def played(frames, channels, actions=()):
    """Observations, rewards and ends of an episode."""
    environment = dataclasses.replace(CAMERA, frames=frames)
    env = environments.make(environment, images(channels), render=False)
    seen = [env.reset(seed=0)[0]]
    steps = [env.step(action) for action in actions]
    return [*seen, *(step[0] for step in steps)], [step[1:4] for step in steps]


def shrunk(frame):
    """Means of three by three pixels, rounded: channels first, in [0, 1]."""
    means = frame.reshape(SIDE, 3, SIDE, 3, -1).mean(axis=(1, 3))
    return np.moveaxis(np.rint(means), -1, 0).astype(np.float32) / np.float32(255)


@pytest.fixture
def _opencv():
    pytest.importorskip("cv2", reason="frames need opencv: pip install 'kvjax[atari]'")


@pytest.mark.usefixtures("_opencv")
def test_colour_frames_are_means_of_pixels():
    seen, steps = played(PLAIN, 3, [0, 1])
    for observation, frame in zip(seen, Camera.shown, strict=False):
        assert observation.dtype == np.float32
        np.testing.assert_array_equal(observation, shrunk(frame))
    assert steps == [(1.0, False, False), (-2.0, False, False)]


@pytest.mark.usefixtures("_opencv")
def test_gray_frames_are_weighted_before_they_shrink_and_stacked_the_oldest_first():
    frames = dataclasses.replace(PLAIN, gray_scale=True, frame_stack=4)
    seen, _ = played(frames, 4, [0] * 5)
    gray = np.rint(Camera.shown[:6] @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    for t, stack in enumerate(seen):
        assert stack.shape == (4, SIDE, SIDE)
        for plane, s in zip(stack, range(t - 3, t + 1), strict=True):
            wanted = shrunk(gray[max(s, 0)][..., None])[0]
            levels = np.rint(255 * np.abs(plane - wanted))  # opencv's weights are integers
            assert levels.max() <= 1
            assert levels.mean() < 0.01
    assert np.abs(seen[4][0] - seen[4][1]).max() > 0.1


@pytest.mark.usefixtures("_opencv")
def test_skipped_frames_are_pooled_and_rewards_added_and_clipped():
    frames = dataclasses.replace(PLAIN, frame_skip=4, max_episode_steps=2)
    seen, steps = played(frames, 3, [1, 1])
    pooled = np.maximum(Camera.shown[3::4], Camera.shown[4::4])
    for observation, frame in zip(seen[1:], pooled, strict=False):
        np.testing.assert_array_equal(observation, shrunk(frame))
    assert steps == [(-8.0, False, False), (-8.0, False, True)]
    _, steps = played(dataclasses.replace(frames, clip_rewards=True), 3, [1, 0])
    assert [step[0] for step in steps] == [-1.0, 1.0]


@pytest.mark.usefixtures("_opencv")
@pytest.mark.parametrize(
    ("environment", "config", "problem"),
    [
        (
            CAMERA,
            images(4),
            r"frames have 3 channels \(gray_scale False, frame_stack 1\), the model reads \(4, 64",
        ),
        (CAMERA, SMALL, r"frames have 3 channels .*, the model reads \(5,\)"),
        (
            EnvironmentConfig("CartPole-v1", frames=PLAIN),
            images(3),
            r"frames are made of images \(height, width, 3\) in uint8, CartPole-v1 observes",
        ),
        (
            EnvironmentConfig(CAMERA.env_id),
            images(3),
            r"observes \(192, 192, 3\), the model reads \(3, 64, 64\)",
        ),
        (
            CAMERA,
            dataclasses.replace(images(3), num_actions=4),
            "takes Discrete.3., the model has 4 discrete actions",
        ),
        *(
            (
                dataclasses.replace(CAMERA, frames=dataclasses.replace(PLAIN, **{name: value})),
                images(3),
                f"{name} must be {none} for .*Camera-v0, which is no Atari game, got {value}",
            )
            for name, value, none in [
                ("noop_max", 30, 0),
                ("episode_life", True, False),
                ("repeat_action_probability", 0.25, 0.0),
                ("full_action_space", True, False),
            ]
        ),
    ],
)
def test_what_does_not_fit_is_refused(environment, config, problem):
    with pytest.raises(ValueError, match=problem):
        environments.make(environment, config, render=False)


@pytest.mark.parametrize(
    ("env_id", "config", "needs"),
    [
        ("ALE/Pong-v5", images(3), r"ale_py and cv2: pip install 'kvjax\[atari\]'"),
        ("PongNoFrameskip-v4", images(4), r"ale_py and cv2: pip install 'kvjax\[atari\]'"),
        ("LunarLander-v3", SMALL, r"Box2D: pip install 'kvjax\[box2d\]'"),
        ("dm_control/cartpole-swingup-v0", SMALL, r"dm_control and shimmy: .*'kvjax\[dmc\]'"),
    ],
)
def test_what_is_missing_is_said_with_its_extra(monkeypatch, env_id, config, needs):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"cannot make environment '{env_id}': it needs {needs}"):
        environments.make(EnvironmentConfig(env_id), config, render=False)


def test_box2d():
    pytest.importorskip("Box2D", reason="LunarLander needs Box2D: pip install 'kvjax[box2d]'")
    config = dataclasses.replace(SMALL, observation_size=8, num_actions=4)
    env = environments.make(EnvironmentConfig("LunarLander-v3"), config, render=False)
    assert env.reset(seed=0)[0].shape == env.step(2)[0].shape == (8,)
    env.close()


def test_dm_control():
    pytest.importorskip("shimmy", reason="dm_control needs shimmy: pip install 'kvjax[dmc]'")
    with pytest.raises(ValueError, match=r"takes Box.*, the model has 3 discrete actions"):
        environments.make(EnvironmentConfig("dm_control/cartpole-swingup-v0"), SMALL, render=False)


def test_atari_games_have_lightzeros_frames_where_none_are_said():
    pong = EnvironmentConfig("ALE/Pong-v5")
    assert pong.completed(images(3)).frames == FramesConfig()
    assert pong.completed(images(4)).frames == FramesConfig(gray_scale=True, frame_stack=4)
    assert pong.completed(images(1)).frames == FramesConfig(gray_scale=True)
    assert pong.completed(images(6)).frames == FramesConfig(frame_stack=2)
    assert pong.completed(SMALL) == pong
    said = EnvironmentConfig("PongNoFrameskip-v4", frames=PLAIN)
    assert said.completed(images(3)) == said
    for env_id in ("CartPole-v1", "Pong-v4", "module:ALE/Pong-v5"):
        assert EnvironmentConfig(env_id).completed(images(3)).frames is None
    assert FramesConfig(frame_stack=2).channels == 6


def test_frames_are_kept_in_the_file(tmp_path):
    frames = FramesConfig(gray_scale=True, frame_stack=4, clip_rewards=True)
    stored = Checkpoint(SMALL, {}, EnvironmentConfig("ALE/Pong-v5", frames=frames))
    said = checkpoint._said_of(stored.environment)
    assert checkpoint._parsed_environment(said) == stored.environment
    assert "frames" not in checkpoint._said_of(EnvironmentConfig("CartPole-v0"))


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("frame_skip", "expected NAME=VALUE,... of frame_skip, noop_max, "),
        ("frame_skip=four", "got 'frame_skip=four'"),
        ("frame_skip=0", "frame_skip must be a positive integer, got 0"),
        ("size=84", "unexpected keyword argument 'size'"),
        ("gray_scale=1", "gray_scale must be True or False, got 1"),
    ],
)
def test_odd_options_are_refused(capsys, said, problem):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["play", "--frames", said])
    assert problem in capsys.readouterr().err


def environment_of(stored, env=None, frames=None, channels=3):
    args = argparse.Namespace(env=env, observation_scale=None, frames=frames)
    agent = Checkpoint(images(channels) if channels else SMALL, {}, stored)
    return options.environment_of(args, agent)


def test_what_is_said_of_frames_changes_what_is_stored():
    stored = EnvironmentConfig("ALE/Pong-v5", frames=FramesConfig(clip_rewards=True))
    assert environment_of(stored) == stored
    frames = environment_of(stored, frames={"frame_skip": 2}).frames
    assert frames == FramesConfig(clip_rewards=True, frame_skip=2)
    other = environment_of(stored, "ALE/Breakout-v5", {"noop_max": 0})
    assert other == EnvironmentConfig("ALE/Breakout-v5", frames=FramesConfig(noop_max=0))
    assert environment_of(None, "ALE/Pong-v5", channels=4).frames.frame_stack == 4
    said = environment_of(None, CAMERA.env_id, {"frame_skip": 1, "noop_max": 0})
    assert said == CAMERA


def test_frames_need_an_environment_of_images():
    with pytest.raises(ValueError, match="--frames needs --env"):
        environment_of(None, frames={"frame_skip": 2})
    with pytest.raises(ValueError, match=r"frames have 3 channels .*, the model reads \(5,\)"):
        environment_of(EnvironmentConfig("CartPole-v1"), frames={"frame_skip": 2}, channels=0)
