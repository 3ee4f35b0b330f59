"""The maze against a plain one; what sees no further than it looks turns rightly half the time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kvjax.config import EnvironmentConfig
from kvjax.tools import environments
from kvjax.train import ENVIRONMENTS, TMaze, TrainConfig, learn

AHEAD, LEFT, RIGHT = range(3)


class PlainMaze:
    """The rules, one `if` each."""

    def __init__(self, way, length):
        self.way, self.length, self.position = way, length, 0

    def seen(self):
        return [self.way if self.position == 0 else 0, float(self.position == self.length)]

    def step(self, action):
        if self.position < self.length:
            if action == AHEAD:
                self.position += 1
                return 0.0, False
            return -0.1, False
        if action == AHEAD:
            return -0.1, False
        return float(action == (RIGHT if self.way > 0 else LEFT)), True


def test_the_maze_is_a_plain_one_step_for_step():
    rng, maze = np.random.default_rng(0), TMaze(length=3)
    reset, step = jax.jit(maze.reset), jax.jit(maze.step)
    ways = []
    for seed in range(40):
        state, seen = reset(jax.random.key(seed))
        plain = PlainMaze(int(state[1]), 3)
        ways.append(plain.way)
        np.testing.assert_array_equal(seen, plain.seen())
        ended = False
        while not ended:
            action = int(rng.choice(3, p=[0.6, 0.2, 0.2]))
            state, answer = step(state, jnp.int32(action), jax.random.key(0))
            reward, ended = plain.step(action)
            np.testing.assert_array_equal(answer.observation, plain.seen())
            assert float(answer.reward) == np.float32(reward)
            assert bool(answer.terminated) == ended
    assert set(ways) == {-1, 1}


def test_no_policy_of_what_is_seen_passes_a_half():
    """The best deterministic one of all; a mixture of them is no better."""
    situations = [(-1, 0.0), (1, 0.0), (0, 0.0), (0, 1.0)]
    best = -np.inf
    for choice in itertools.product(range(3), repeat=len(situations)):
        policy, scores = dict(zip(situations, choice, strict=True)), []
        for way in (-1, 1):
            maze, score, ended, steps = PlainMaze(way, TMaze().length), 0.0, False, 0
            while not ended and steps < TMaze().max_steps:
                reward, ended = maze.step(policy[tuple(maze.seen())])
                score, steps = score + reward, steps + 1
            scores.append(score)
        best = max(best, np.mean(scores))
    assert best == 0.5


def test_the_recipe_reaches_back_to_the_start():
    maze = ENVIRONMENTS["tmaze"]
    train = TrainConfig.of(maze)
    assert train.model(maze).window.kept_length >= 2 * maze.length
    assert train.unroll_steps > maze.length
    assert TrainConfig.of(maze, context_length=4).context_length == 4
    assert TrainConfig.of(ENVIRONMENTS["cartpole_masked"]) == TrainConfig()
    assert TMaze(length=9).played_as is None
    with pytest.raises(ValueError, match="length must be a positive integer, got 0"):
        TMaze(length=0)


def test_gymnasium_plays_the_same_maze():
    maze = ENVIRONMENTS["tmaze"]
    assert maze.played_as == EnvironmentConfig("kvjax/TMaze-v0")
    env = environments.make(maze.played_as, TrainConfig.of(maze).model(maze), render=False)
    for seed in range(4):
        seen, _ = env.reset(seed=seed)
        plain = PlainMaze(int(seen[0]), maze.length)
        for action in (AHEAD, LEFT, *[AHEAD] * maze.length, RIGHT):
            seen, reward, ended, truncated, _ = env.step(action)
            expected, over = plain.step(action)
            np.testing.assert_array_equal(seen, plain.seen())
            assert (reward, ended, truncated) == (pytest.approx(expected), over, False)
    env.reset(seed=0)
    limit = [env.step(LEFT)[3] for _ in range(maze.max_steps)]
    assert limit == [False] * (maze.max_steps - 1) + [True]


def test_sequences_begin_where_an_episode_does():
    train = dataclasses.replace(tiny.TINY, seek_start=2, collect_steps=7)
    drawn = tiny.batch(size=16)
    drawn = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :2]], axis=1), drawn)
    cut = learn.from_starts(drawn, train)
    ended = np.array(drawn.terminated | drawn.truncated)
    found = set()
    for row in range(16):
        begin = next((t + 1 for t in range(2) if ended[row, t]), 0)
        found.add(begin)
        steps = slice(begin, begin + train.sequence_length)
        for ours, theirs in zip(jax.tree.leaves(cut), jax.tree.leaves(drawn), strict=True):
            np.testing.assert_array_equal(ours[row], theirs[row, steps])
    assert found == {0, 1, 2}
    with pytest.raises(ValueError, match="seek_start must be at least 0, got -1"):
        dataclasses.replace(tiny.TINY, seek_start=-1)
    with pytest.raises(ValueError, match=r"unroll_steps \+ td_steps \+ seek_start = 7, got 6"):
        dataclasses.replace(tiny.TINY, seek_start=2)
