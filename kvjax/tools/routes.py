"""Two routes to a search's answer for a batch of environments: a tree in jit, or one on the host.

A route begins environments and gives their `Step`: what was observed goes in, an answer comes out,
and each environment's context is remembered.

Shapes: B environments, A actions; where nodes draw their actions, A of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from kvjax.mcts.unizero_tree import init_kept
from kvjax.model.contexts import Contexts, init_contexts
from kvjax.model.folding import UniZero, prepare
from kvjax.model.step import is_first
from kvjax.model.world_model import Params
from kvjax.store import Store
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
        params: Params | UniZero,
        config: WorldModelConfig,
        search_config: SearchConfig,
        num_envs: int,
        mesh: Mesh | None = None,
    ) -> Step:
        """With a model and how to search, on the devices of a mesh or on one."""


@runtime_checkable
class Resumable(Protocol):
    """A step whose memory can be kept and given back."""

    state: Any
    """What the environments have come to: a state as `kvjax.save_state` takes it."""

    def __call__(self, rng: jax.Array, observation: Array, last_action: Array) -> Answer:
        """See `Step`."""


def tree(
    params: Params | UniZero,
    config: WorldModelConfig,
    search_config: SearchConfig,
    num_envs: int,
    mesh: Mesh | None = None,
    look: Callable[[SearchOutput], None] | None = None,
) -> Step:
    """By `kvjax.search`; `look` is shown each output, with its whole tree."""
    return _Tree(params, config, search_config, num_envs, mesh, look)


class _Tree:
    """The state: contexts, and what trees keep."""

    def __init__(
        self,
        params: Params | UniZero,
        config: WorldModelConfig,
        search_config: SearchConfig,
        num_envs: int,
        mesh: Mesh | None,
        look: Callable[[SearchOutput], None] | None,
    ) -> None:
        keeps = search_config.kept_nodes > 0
        kept = init_kept(config, num_envs, search_config) if keeps else None
        self.state: tuple[Contexts, Kept | None]
        self.state = init_contexts(config, num_envs, mesh=mesh), kept
        self._model = meshes.replicated(prepare(params, config=config), mesh)
        self._how: Any = {"config": config, "search": search_config}
        self._how["return_tree"] = look is not None
        self._look = look

    def __call__(self, rng: jax.Array, observation: Array, last_action: Array) -> Answer:
        contexts, kept = self.state
        arguments = rng, contexts, observation, last_action
        contexts, out = search(self._model, *arguments, **self._how, kept=kept)
        self.state = contexts, out.kept
        if self._look is not None:
            self._look(out)
        return Answer(*map(np.asarray, (out.visit_counts, out.root_value, out.action)))


def _store(
    params: Params | UniZero,
    config: WorldModelConfig,
    search_config: SearchConfig,
    num_envs: int,
    mesh: Mesh | None = None,
) -> Step:
    """By `host_search`; raises `ValueError` if its trees are to keep nodes, or for a mesh."""
    kept = search_config.kept_nodes
    require(mesh is None, 'route "store" searches on one device: play without --devices')
    require(kept == 0, f'route "store" begins each search anew: kept_nodes must be 0, got {kept}')
    return _Stored(params, config, search_config, num_envs)


class _Stored:
    """The state: the store, the latents [B, E] of the last observations, their clocks [B]."""

    def __init__(
        self,
        params: Params | UniZero,
        config: WorldModelConfig,
        search_config: SearchConfig,
        num_envs: int,
    ) -> None:
        store = stores.init_store(config, num_envs, search_config.num_simulations)
        latent = np.zeros((num_envs, config.embed_dim), np.float32)
        self.state: tuple[Store, Array, Array] = store, latent, np.zeros(num_envs, np.int32)
        self._model = prepare(params, config=config)
        self._how: Any = {"config": config, "search": search_config}
        self._is_sampled = config.num_sampled_actions is not None
        self._clear = jax.jit(stores.clear_environment, donate_argnames=("store",))

    def __call__(self, rng: jax.Array, observation: Array, last_action: Array) -> Answer:
        store, latent, timestep = self.state
        starts = np.asarray(is_first(last_action))
        timestep = np.where(starts, 0, timestep + 1).astype(np.int32)
        for env_id in np.flatnonzero(starts):
            store = self._clear(store, env_id)
        arguments = self._model, store, latent, observation, last_action, timestep
        if self._is_sampled:
            engine = np.random.default_rng(np.asarray(jax.random.key_data(rng)))
            store, latent, drawn = sampled_host_search(engine, *arguments, **self._how)
            actions = np.stack([sampled_tree.best(tree) for tree in drawn])
            answer = Answer(*_said([tree.tree for tree in drawn]), actions)
        else:
            store, latent, forest = host_search(*arguments, **self._how)
            visits, values = _said(forest)
            answer = Answer(visits, values, visits.argmax(axis=1))
        self.state = store, np.asarray(latent), timestep
        return answer


def _said(forest: list[trees.Tree]) -> tuple[Array, Array]:
    """Visits [B, A] of the roots' actions, and values [B]."""
    visits = np.stack([trees.visit_counts(tree) for tree in forest])
    return visits, np.array([trees.root_value(tree) for tree in forest])


ROUTES: dict[str, Route] = {"tree": tree, "store": _store}
