"""Shared models and files."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvjax import checkpoint, world_model
from kvjax.config import WorldModelConfig

jax.devices()  # starts jax before any test can set how calls are dispatched

DATA = Path(__file__).parent / "data"

SMALL = WorldModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_actions=3,
    context_length=8,
    max_tokens=12,
    observation_size=5,
    support=(-3, 3),
)


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def masked_agent():
    return checkpoint.load(checkpoint.shipped()["cartpole_masked"])


def with_mode(config, mode):
    """A configuration in another window mode; rotary ones have no position table."""
    max_tokens = None if mode.startswith("rope") else 24
    return dataclasses.replace(config, window_mode=mode, max_tokens=max_tokens)


def random_params(config, seed=0):
    """Every weight random, norms and statistics too, so that none can be left out unnoticed."""
    rng = jax.random.key(seed)
    params = world_model.init_params(rng, config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(rng, len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))
    for stats in params.get("batch_stats", {}).values():
        stats["batch_norm"]["var"] = jnp.abs(stats["batch_norm"]["var"])
    return params
