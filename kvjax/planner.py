"""Two ways to plan a batch of environments, behind one call: a tree in jit, or one on the host.

Shapes: B environments.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax import store as stores
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.contexts import init_contexts
from kvjax.host_search import host_search, most_visited
from kvjax.search import prepare, search
from kvjax.step import FIRST_STEP
from kvjax.types import Params

Array = np.ndarray[Any, Any]
Planner = Callable[[jax.Array, Array, Array], Array]
"""Key, observations [B, observation_size], last actions [B] (-1 restarts a row) to actions [B]."""

ROUTES = ("tree", "store")


def make_planner(
    route: str, params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    """A planner that remembers each environment's context.

    Args:
      route: "tree" (`kvjax.search`) or "store" (`kvjax.host_search`).
    """
    make = {"tree": _tree_planner, "store": _store_planner}[route]
    return make(params, config, search_config, num_envs)


def _tree_planner(
    params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    contexts, prepared = init_contexts(config, num_envs), prepare(params, config=config)

    def plan(rng: jax.Array, observation: Array, last_action: Array) -> Array:
        nonlocal contexts
        contexts, out = search(
            prepared, rng, contexts, observation, last_action, config=config, search=search_config
        )
        return np.asarray(out.action)

    return plan


def _store_planner(
    params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    clear = jax.jit(stores.clear_environment, donate_argnames=("store",))
    store = stores.init_store(config, num_envs, search_config.num_simulations)
    latent = np.zeros((num_envs, config.embed_dim), np.float32)
    timestep = np.zeros(num_envs, np.int32)

    def plan(rng: jax.Array, observation: Array, last_action: Array) -> Array:
        nonlocal store, latent, timestep
        del rng  # the host's tree draws nothing
        starts = last_action == FIRST_STEP
        timestep = np.where(starts, 0, timestep + 1)
        for env_id in np.flatnonzero(starts):
            store = clear(store, env_id)
        store, latent, forest = host_search(
            params,
            store,
            latent,
            observation,
            last_action,
            timestep,
            config=config,
            search=search_config,
        )
        return most_visited(forest)

    return plan
