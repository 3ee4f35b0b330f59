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
from kvjax.model import folding, unizero
from kvjax.model.folding import UniZero
from kvjax.model.world_model import Params
from kvjax.store import Store
from kvjax.tools.parity import reference_tree as trees
from kvjax.tools.parity import sampled_tree
from kvjax.tools.parity.nodes import Stored, network
from kvjax.tools.parity.sampled_tree import SampledTree

Array = np.ndarray[Any, Any]


@functools.partial(jax.jit, static_argnames=("config",))
def encode(params: Params | UniZero, observation: Any, *, config: WorldModelConfig) -> jax.Array:
    """Observations [B, observation_size] to latents [B, E]."""
    return unizero.encode(folding.fold(params, config=config), observation, config=config)


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
    nodes, latent, policy = _observe(
        params, store, last_latent, observation, last_action, timestep, config
    )
    everything = np.ones(config.num_actions, bool)
    forest = [trees.init(logits, everything, search) for logits in policy]
    trees.grow(forest, network(nodes, config))
    return nodes.store, latent, forest


def sampled_host_search(
    rng: np.random.Generator,
    params: Params | UniZero,
    store: Store,
    last_latent: Array,
    observation: Array,
    last_action: Array,
    timestep: Array,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Store, Array, list[SampledTree]]:
    """`host_search` for a model whose nodes draw their actions, with numpy's engine.

    Args:
      last_action: [B] int, or [B, numbers] float32; see `kvjax.initial_inference`.
    """
    nodes, latent, policy = _observe(
        params, store, last_latent, observation, last_action, timestep, config
    )
    draw = functools.partial(sampled_tree.draw, rng, config=config)
    forest = [sampled_tree.init(draw(said), search) for said in policy]
    sampled_tree.grow(forest, network(nodes, config), draw)
    return nodes.store, latent, forest


def _observe(
    params: Params | UniZero,
    store: Store,
    last_latent: Array,
    observation: Array,
    last_action: Array,
    timestep: Array,
    config: WorldModelConfig,
) -> tuple[Stored, Array, Array]:
    """Nodes that begin with what was observed, its latents, and the roots' policies."""
    latent = np.asarray(encode(params, observation, config=config))
    nodes = Stored(params, config, store)
    policy, _ = nodes.observe(last_latent, last_action, latent, timestep)
    return nodes, latent, np.asarray(policy)
