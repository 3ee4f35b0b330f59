"""kvjax beside the real LightZero 0.2.0, installed: same weights, same episode."""

import jax
import numpy as np
import pytest
from conftest import in_full

from kvjax import SearchConfig, init_contexts, lightzero
from kvjax.mcts import search
from kvjax.tools.bench import lightzero_020

pytestmark = pytest.mark.skipif(
    not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"
)

ENVS, OBSERVATION = 3, 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("embed", "layers", "heads", "context"),
    [(32, 1, 4, 4), (48, 3, 3, 14), *in_full((64, 2, 2, 8))],
)
def test_root_predictions_along_an_episode(embed, layers, heads, context):
    """Random weights, encoder included: 12 steps, most of them after a slide."""
    model = lightzero_020.build_model(
        observation_size=OBSERVATION,
        num_actions=4,
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        context_length=context,
        num_envs=ENVS,
        num_simulations=4,
    )
    config, params = lightzero.load(model)
    assert (config.num_heads, config.context_length) == (heads, context)
    searcher = lightzero_020.Searcher(model)
    contexts = init_contexts(config, ENVS)
    rng = np.random.default_rng(0)
    action = np.full(ENVS, -1)
    for _ in range(12):
        observation = rng.normal(size=(ENVS, OBSERVATION)).astype(np.float32)
        theirs = searcher.step(observation, action)
        contexts, ours = search(
            params,
            jax.random.key(0),
            contexts,
            observation,
            action,
            config=config,
            search=SearchConfig(num_simulations=2),
        )
        logits = theirs["policy_logits"]
        np.testing.assert_allclose(np.log(ours.prior), log_softmax(logits), atol=2e-5)
        np.testing.assert_allclose(ours.network_value, theirs["network_value"], atol=2e-3)
        action = rng.integers(4, size=ENVS)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
