"""A search whose trees live on the host: numpy trees in front of a store, one call a simulation.

This is how a tree that is not written in JAX uses kvjax. It follows LightZero's rules exactly and
is slower than `kvjax.search`.

Shapes: B environments, A actions, E embedding size.
"""

import functools
from typing import Any

import jax
import numpy as np

from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.inference import Inference, initial_inference, recurrent_inference
from kvjax.model import unizero
from kvjax.model.unizero import UniZero
from kvjax.model.world_model import Params
from kvjax.ops import support
from kvjax.store import Store
from kvjax.tools.parity import reference_tree as trees

Array = np.ndarray[Any, Any]


@functools.partial(jax.jit, static_argnames=("config",))
def encode(params: Params | UniZero, observation: Any, *, config: WorldModelConfig) -> jax.Array:
    """Observations [B, observation_size] to latents [B, E]."""
    return unizero.encode(unizero.fold(params, config=config), observation, config=config)


@functools.partial(jax.jit, static_argnames=("config",))
def _scalars(out: Inference, *, config: WorldModelConfig) -> tuple[jax.Array, jax.Array]:
    reward, value = (support.to_scalar(x, config.support) for x in (out.reward, out.value))
    return reward, value


def host_search(
    params: Params | UniZero,
    store: Store,
    last_latent: Array,
    observation: Array,
    last_action: Array,
    timestep: Array,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Store, Array, list[trees.Tree]]:
    """Advances every environment by one step and searches it; row b is environment b.

    Args:
      store: moved, see `kvjax.mcts.inference`.
      last_latent: [B, E] float32, what the previous call returned; anything at first steps.
      observation: [B, observation_size] float32.
      last_action: [B] int, -1 at an environment's first step.
      timestep: [B] int.

    Returns:
      The store, the current latents [B, E], and the searched trees. There is no root noise.
    """
    rows = np.arange(len(last_action))
    latent = np.asarray(encode(params, observation, config=config))
    store, out = initial_inference(
        params, store, last_latent, last_action, latent, rows, timestep, config=config
    )
    everything = np.ones(config.num_actions, bool)
    forest = [trees.init(logits, everything, search) for logits in np.asarray(out.policy)]
    latents = np.zeros((search.num_simulations + 1, *latent.shape), np.float32)
    latents[trees.ROOT] = latent
    for simulation in range(search.num_simulations):
        parent, action = np.array([trees.select(tree) for tree in forest]).T
        depth = np.array([len(tree.path) for tree in forest])
        store, out = recurrent_inference(
            params,
            store,
            latents[parent, rows],
            action,
            rows,
            depth,
            timestep,
            config=config,
        )
        latents[simulation + 1] = out.latent
        reward, value = (np.asarray(x) for x in _scalars(out, config=config))
        policy = np.asarray(out.policy)
        for row, tree in enumerate(forest):
            trees.expand(tree, reward[row], value[row], policy[row])
    return store, latent, forest


def most_visited(forest: list[trees.Tree]) -> Array:
    """The most visited action of each tree, the first on ties: [B] int."""
    return np.array([int(np.argmax(trees.visit_counts(tree))) for tree in forest])
