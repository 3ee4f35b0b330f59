"""Episodes of continuous actions, played by both routes, and by hand."""

import dataclasses
import functools

import gymnasium
import jax
import numpy as np
import pytest
from conftest import SMALL, random_params

from kvjax import SearchConfig, init_contexts, search
from kvjax.config import EnvironmentConfig
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.play import play

CONFIG = dataclasses.replace(
    SMALL,
    num_layers=1,
    num_actions=1,
    observation_size=3,
    sigma_type="conditioned",
    num_sampled_actions=3,
)
PENDULUM = Checkpoint(CONFIG, random_params(CONFIG), EnvironmentConfig("Pendulum-v1"))
THREE = SearchConfig(num_simulations=3)


def by_hand(seed):
    """One episode with the same keys; -1 .. 1 is a torque of -2 .. 2."""
    env, rng, score = gymnasium.make("Pendulum-v1"), jax.random.key(seed), 0.0
    observation, _ = env.reset(seed=seed)
    contexts, action = init_contexts(CONFIG, 1), np.full((1, 1), np.nan, np.float32)
    find = functools.partial(search, PENDULUM.params, config=CONFIG, search=THREE)
    for step in range(200):
        rng = jax.random.fold_in(rng, step)
        contexts, out = find(rng, contexts, observation[None], action)
        action = np.asarray(out.action)
        observation, reward, _, truncated, _ = env.step(2 * action[0])
        score += float(reward)
    assert truncated
    return score


def test_an_episode_is_what_it_is_by_hand():
    summary = play(PENDULUM, episodes=1, seed=3, search_config=THREE)
    assert summary.steps == 200
    np.testing.assert_allclose(summary.returns, [by_hand(3)], rtol=1e-4)


def test_the_store_route_plays_too():
    """Its trees draw with numpy's engine, the same at the same seed."""
    how = {"search_config": THREE, "route": "store"}
    one, again = (play(PENDULUM, episodes=1, seed=3, **how) for _ in range(2))
    assert one.steps == 200
    assert one.returns == again.returns
    assert -2500 < one.returns[0] < 0


@pytest.mark.parametrize(
    ("changes", "env", "message"),
    [
        ({"num_actions": 2}, "Pendulum-v1", r"takes Box\(-2.0, 2.0, \(1,\).*has 2 numbers to an"),
        ({"observation_size": 4}, "CartPole-v1", r"takes Discrete\(2\), the model has 1 numbers"),
    ],
)
def test_environments_that_do_not_fit(changes, env, message):
    config = dataclasses.replace(CONFIG, **changes)
    agent = Checkpoint(config, random_params(config), EnvironmentConfig(env))
    with pytest.raises(ValueError, match=message):
        play(agent, episodes=1, search_config=THREE)


def test_a_discrete_agent_does_not_fill_a_box():
    config = dataclasses.replace(SMALL, observation_size=3)
    agent = Checkpoint(config, random_params(config), EnvironmentConfig("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"takes Box.*the model has 3 discrete actions"):
        play(agent, episodes=1, search_config=THREE)
