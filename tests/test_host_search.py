"""The host's tree in front of the store, on the trained agent."""

import numpy as np
import pytest

from kvjax import SearchConfig, init_store, stats
from kvjax import reference_tree as trees
from kvjax.host_search import host_search, most_visited


@pytest.mark.parametrize("seed", [1000, 1001])
def test_recorded_episode_gives_identical_visits(data, masked_agent, seed):
    """LightZero's model and tree along 100 steps, half an episode: every visit count is equal."""
    with np.load(data / "cartpole_masked_episodes.npz") as archive:
        names = ("obs", "action", "visits", "root_value")
        recorded = {name: archive[f"seed{seed}/{name}"] for name in names}
    config, simulations = masked_agent.config, 25
    store = init_store(config, 1, simulations)
    latent = np.zeros((1, config.embed_dim), np.float32)
    for t in range(100):
        store, latent, (tree,) = host_search(
            masked_agent.params,
            store,
            latent,
            recorded["obs"][[t]].astype(np.float32),
            np.array([recorded["action"][t - 1] if t else -1]),
            np.array([t]),
            config=config,
            search=SearchConfig(num_simulations=simulations),
        )
        np.testing.assert_array_equal(trees.visit_counts(tree), recorded["visits"][t])
        np.testing.assert_allclose(trees.root_value(tree), recorded["root_value"][t], atol=2e-3)
        assert most_visited([tree])[0] == recorded["action"][t]
    counted = stats(store)
    assert counted["misses"] == 0
    assert counted["root_hits"] == 99
    assert counted["queries"] == 99 + 100 * simulations
