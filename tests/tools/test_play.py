"""Episodes: seeds, restarts inside the batch, what is shown."""

import dataclasses

import numpy as np
import pytest
from conftest import FULL

from kvjax.config import EnvironmentConfig, SearchConfig
from kvjax.tools.play import play

SHORT = SearchConfig(num_simulations=3)


def returns(agent, episodes, seed=0, **options):
    return play(agent, episodes=episodes, seed=seed, search_config=SHORT, **options).returns


@pytest.mark.parametrize("keep_context", [True, False])
def test_every_episode_is_its_own_seed_also_after_a_restart(masked_agent, keep_context):
    """Episodes 8 to 10 start in a row that is free while others go on.

    The agent is shown angles that are too small, so that its episodes end at different steps.
    """
    blurred = EnvironmentConfig("CartPole-v0", (1.0, 0.0, 1.0, 0.0))
    masked_agent = dataclasses.replace(masked_agent, environment=blurred)
    together = returns(masked_agent, 11, seed=5, keep_context=keep_context)
    assert len(set(together)) > 1
    for index in (0, 8, 10):
        alone = returns(masked_agent, 1, seed=5 + index, keep_context=keep_context)
        assert alone == (together[index],)


def test_context_matters_on_every_step(masked_agent):
    with_context, without = (
        np.mean(play(masked_agent, episodes=4, keep_context=keep).returns) for keep in (True, False)
    )
    assert with_context > 195
    assert without < 80


def test_both_routes_play_alike(masked_agent):
    """The host's numpy tree and the tree in jit follow the same rules."""
    assert returns(masked_agent, 3, route="store") == returns(masked_agent, 3, route="tree")


@pytest.mark.skipif(not FULL, reason="another tree is compiled")
def test_mctx_plays_as_well(masked_agent):
    """MuZero's policy of mctx, with a window per node and values scaled over the whole tree."""
    config = SearchConfig(num_simulations=25, tree="muzero")
    assert play(masked_agent, episodes=4, search_config=config).mean_return >= 195


def test_progress_and_summary(masked_agent):
    shown = []
    summary = play(masked_agent, episodes=3, search_config=SHORT, progress=shown.append)
    assert shown[0].steps == shown[0].finished == 0
    assert shown[0].fraction == 0
    assert [s.steps for s in shown] == sorted(s.steps for s in shown)
    assert shown[-1].fraction == 1
    assert shown[-1].steps == summary.steps == sum(summary.returns)
    assert shown[-1].mean_return == summary.mean_return == np.mean(summary.returns)
    assert summary.steps / summary.searches_per_second < summary.seconds
    assert summary.compile_seconds < summary.seconds


def test_the_scale_is_the_agents_view(masked_agent):
    environment = EnvironmentConfig("CartPole-v0", (1.0, 1.0, 1.0, 1.0))
    other = dataclasses.replace(masked_agent, environment=environment)
    assert returns(other, 3) != returns(masked_agent, 3)
    other = dataclasses.replace(masked_agent, environment=EnvironmentConfig("CartPole-v0"))
    assert returns(other, 3) == returns(
        dataclasses.replace(masked_agent, environment=environment), 3
    )
