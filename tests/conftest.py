"""Shared models and files."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.config import WorldModelConfig
from kvjax.model import checkpoint, world_model

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
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = 0.2 * rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "embedding"):  # as wide as they are when training begins
            inputs = math.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else leaf.shape[-1]
            value += rng.normal(size=leaf.shape) / math.sqrt(inputs)
        if path[-1].key in ("scale", "var"):
            value = np.abs(1.0 + value)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, world_model.params_shapes(config))
