"""Two ways to plan a batch of environments, behind one call: a tree in jit, or one on the host.

Shapes: B environments.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax import store as stores
from kvjax.base.values import require
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.search import search
from kvjax.mcts.subtree import Kept
from kvjax.model.contexts import init_contexts
from kvjax.model.step import FIRST_STEP
from kvjax.model.unizero import prepare
from kvjax.model.world_model import Params
from kvjax.tools.parity.host_search import host_search, most_visited

Array = np.ndarray[Any, Any]
Planner = Callable[[jax.Array, Array, Array], Array]
"""Key, observations [B, observation_size], last actions [B] (-1 restarts a row) to actions [B]."""

ROUTES = ("tree", "store")


def make_planner(
    route: str, params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    """A planner that remembers each environment's context.

    Args:
      route: "tree" (`kvjax.search`) or "store" (`kvjax.tools.parity.host_search`).

    Raises:
      ValueError: the host's trees are to keep nodes.
    """
    make = {"tree": _tree_planner, "store": _store_planner}[route]
    return make(params, config, search_config, num_envs)


def _tree_planner(
    params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    contexts, prepared = init_contexts(config, num_envs), prepare(params, config=config)
    kept: Kept | None = None

    def plan(rng: jax.Array, observation: Array, last_action: Array) -> Array:
        nonlocal contexts, kept
        contexts, out = search(
            prepared,
            rng,
            contexts,
            observation,
            last_action,
            config=config,
            search=search_config,
            kept=kept,
        )
        kept = out.kept
        return np.asarray(out.action)

    return plan


def _store_planner(
    params: Params, config: WorldModelConfig, search_config: SearchConfig, num_envs: int
) -> Planner:
    kept = search_config.kept_nodes
    require(kept == 0, f'route "store" begins each search anew: kept_nodes must be 0, got {kept}')
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
