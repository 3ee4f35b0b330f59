"""LightZero's own Atari games, and its tree without chance, out of the installed release.

Release 0.2.0 makes its games with the gym of its time, which no longer has any: here they are
Gymnasium's, in gym's old ways. What wraps them is LightZero's and DI-engine's code.
"""

import collections
import functools
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np

from kvjax.tools.bench import lightzero_020

DRAWS = 150
"""A choice among six actions leaves the first one out as often once in 1e11 times."""


def _read(package, path):
    """A module of a package that is not imported itself: it needs what training needs."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    spec = importlib.util.spec_from_file_location(f"read_{Path(path).stem}", folder / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _wrappers():
    """LightZero's `atari_wrappers`."""
    with warnings.catch_warnings(action="ignore"):
        envs = sys.modules.get("ding.envs") or _read("ding", "envs/env_wrappers/env_wrappers.py")
        with mock.patch.dict(sys.modules, {"ding.envs": envs}):
            return _read("zoo", "atari/envs/atari_wrappers.py")


def _old_game(env_id, **options):
    """A game as gym made it: `reset` gives an observation, `step` four values."""
    import ale_py
    import gym
    import gymnasium

    class OldGame(gym.Wrapper):
        reward_range = -float("inf"), float("inf")

        def reset(self):
            return self.env.reset()[0]

        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            return observation, reward, terminated or truncated, info

    gym.logger.set_level(gym.logger.ERROR)  # it says how old it is
    gymnasium.register_envs(ale_py)
    return OldGame(gymnasium.make(env_id, **options))


class Game:
    """A game as LightZero's evaluator sees it, frames stacked."""

    def __init__(self, name, shape, *, stack=1, **said):
        options = {"render_mode_human": False, "frame_skip": 4, "warp_frame": True, "scale": True}
        options |= {"transform2string": False, "game_wrapper": True, "max_episode_steps": 108_000}
        options |= {"episode_life": False, "clip_rewards": False, "gray_scale": shape[0] == 1}
        options |= {"env_id": f"{name}NoFrameskip-v4", "observation_shape": shape} | said
        config = types.SimpleNamespace(**options)
        self._frames = collections.deque(maxlen=stack)
        with warnings.catch_warnings(action="ignore"), mock.patch("gym.make", _old_game):
            wrap = _wrappers().wrap_lightzero
            self._env = wrap(config, config.episode_life, config.clip_rewards)

    def reset(self, noops):
        """Begins an episode with that many no-ops, which LightZero draws of numpy."""
        with mock.patch("numpy.random.randint", return_value=noops):
            self._frames.extend([self._env.reset()] * self._frames.maxlen)
        return self._stacked()

    def step(self, action):
        frame, reward, done, _ = self._env.step(action)
        self._frames.append(frame)
        return self._stacked(), reward, done

    def _stacked(self):
        """As `AtariEnvLightZero.observe` and the evaluator hand it on."""
        planes = [np.transpose(frame, (2, 0, 1)) for frame in self._frames]
        return lightzero_020._load("lzero.mcts.utils").prepare_observation([planes])[0]


class _Drawn:
    """What a search holds of a walk down a tree: the walk that was kept."""

    def __init__(self, num):
        self.num, self.kept = num, None

    def get_search_len(self):
        return self.kept.get_search_len()


class FirstOfTies:
    """Stands for LightZero's module of C++ trees, of which it takes the chance, for one row.

    Where actions score alike, as all do below a new node, LightZero draws one of them, by the
    clock. Here it draws until the first of them comes.
    """

    ResultsWrapper = _Drawn

    def __init__(self, tree):
        self._tree = tree

    def __getattr__(self, name):
        return getattr(self._tree, name)

    def batch_traverse(self, *arguments):
        *arguments, drawn, players = arguments
        first = None
        for _ in range(DRAWS):
            walk = self._tree.ResultsWrapper(num=drawn.num)
            found = self._tree.batch_traverse(*arguments, walk, players)
            if first is None or found[2] < first[2]:
                drawn.kept, first = walk, found
            if first[2] == [0]:
                break
        return first

    def batch_backpropagate(self, *arguments):
        *arguments, drawn, players = arguments
        self._tree.batch_backpropagate(*arguments, drawn.kept, players)
