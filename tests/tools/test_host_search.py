"""The host's tree in front of the store; recorded episodes are in test_verify_search."""

import numpy as np

from kvjax import SearchConfig, init_store, stats
from kvjax.tools.parity.host_search import host_search


def test_every_node_is_found(masked_agent):
    """Along 20 steps, most of them slid, each look-up finds its window."""
    config, simulations, steps = masked_agent.config, 25, 20
    store = init_store(config, 1, simulations)
    latent = np.zeros((1, config.embed_dim), np.float32)
    observations = np.random.default_rng(0).normal(size=(steps, 1, 4)).astype(np.float32)
    for t, observation in enumerate(observations):
        store, latent, _ = host_search(
            masked_agent.params,
            store,
            latent,
            observation,
            np.array([0 if t else -1]),
            np.array([t]),
            config=config,
            search=SearchConfig(num_simulations=simulations),
        )
    counted = stats(store)
    assert counted["misses"] == 0
    assert counted["root_hits"] == steps - 1
    assert counted["queries"] == steps - 1 + steps * simulations
