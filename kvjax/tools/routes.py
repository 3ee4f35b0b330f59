"""Two routes to a search's answer for a batch of environments: a tree in jit, or one on the host.

A route begins environments and gives their `Step`: what was observed goes in, an answer comes out,
and each environment's context is remembered.

Shapes: B environments, A actions; where nodes draw their actions, A of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax import store as stores
from kvjax.base import meshes
from kvjax.base.values import require
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.output import SearchOutput
from kvjax.mcts.search import search
from kvjax.mcts.subtree import Kept
from kvjax.model.contexts import init_contexts
from kvjax.model.step import is_first
from kvjax.model.unizero import prepare
from kvjax.model.world_model import Params
from kvjax.tools.parity import reference_tree as trees
from kvjax.tools.parity import sampled_tree
from kvjax.tools.parity.host_search import host_search, sampled_host_search

Array = np.ndarray[Any, Any]


class Answer(NamedTuple):
    """What a search says."""

    visits: Array  # [B, A] int
    root_value: Array  # [B]
    action: Array  # [B] int or [B, numbers], the most visited one, the first on ties


Step = Callable[[jax.Array, Array, Array], Answer]
"""Key, observations [B, observation_size], last actions [B] (-1 restarts a row) to the answer.

Continuous last actions are [B, numbers], and NaN restarts a row.
"""


class Route(Protocol):
    """Begins environments."""

    def __call__(
        self,
        params: Params,
        config: WorldModelConfig,
        search_config: SearchConfig,
        num_envs: int,
        mesh: Mesh | None = None,
    ) -> Step:
        """With a model and how to search, on the devices of a mesh or on one."""


def tree(
    params: Params,
    config: WorldModelConfig,
    search_config: SearchConfig,
    num_envs: int,
    mesh: Mesh | None = None,
    look: Callable[[SearchOutput], None] | None = None,
) -> Step:
    """By `kvjax.search`; `look` is shown each output, with its whole tree."""
    contexts = init_contexts(config, num_envs, mesh=mesh)
    prepared = meshes.replicated(prepare(params, config=config), mesh)
    kept: Kept | None = None

    def step(rng: jax.Array, observation: Array, last_action: Array) -> Answer:
        nonlocal contexts, kept
        arguments = rng, contexts, observation, last_action
        how: Any = {"config": config, "search": search_config, "return_tree": look is not None}
        contexts, out = search(prepared, *arguments, **how, kept=kept)
        kept = out.kept
        if look is not None:
            look(out)
        return Answer(*map(np.asarray, (out.visit_counts, out.root_value, out.action)))

    return step


def _store(
    params: Params,
    config: WorldModelConfig,
    search_config: SearchConfig,
    num_envs: int,
    mesh: Mesh | None = None,
) -> Step:
    """By `host_search`; raises `ValueError` if its trees are to keep nodes, or for a mesh."""
    kept = search_config.kept_nodes
    require(mesh is None, 'route "store" searches on one device: play without --devices')
    require(kept == 0, f'route "store" begins each search anew: kept_nodes must be 0, got {kept}')
    clear = jax.jit(stores.clear_environment, donate_argnames=("store",))
    store = stores.init_store(config, num_envs, search_config.num_simulations)
    latent, model = (
        np.zeros((num_envs, config.embed_dim), np.float32),
        prepare(params, config=config),
    )
    timestep = np.zeros(num_envs, np.int32)

    def step(rng: jax.Array, observation: Array, last_action: Array) -> Answer:
        nonlocal store, latent, timestep
        starts = np.asarray(is_first(last_action))
        timestep = np.where(starts, 0, timestep + 1)
        for env_id in np.flatnonzero(starts):
            store = clear(store, env_id)
        arguments = store, latent, observation, last_action, timestep
        how: Any = {"config": config, "search": search_config}
        if config.num_sampled_actions is None:
            store, latent, forest = host_search(model, *arguments, **how)
            visits, values = _said(forest)
            return Answer(visits, values, visits.argmax(axis=1))
        engine = np.random.default_rng(np.asarray(jax.random.key_data(rng)))
        store, latent, drawn = sampled_host_search(engine, model, *arguments, **how)
        actions = np.stack([sampled_tree.best(tree) for tree in drawn])
        return Answer(*_said([tree.tree for tree in drawn]), actions)

    return step


def _said(forest: list[trees.Tree]) -> tuple[Array, Array]:
    """Visits [B, A] of the roots' actions, and values [B]."""
    visits = np.stack([trees.visit_counts(tree) for tree in forest])
    return visits, np.array([trees.root_value(tree) for tree in forest])


ROUTES: dict[str, Route] = {"tree": tree, "store": _store}
