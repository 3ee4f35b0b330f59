"""The whole search in one jit: every node's window is found by its place in the tree, no lookup.

Shapes: B environments, A actions, E embedding size, C context_length in tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import meshes
from kvjax.base.arrays import ArrayLike, validate_legal
from kvjax.base.compilation import is_traced, jit_small_operations
from kvjax.base.meshes import Share
from kvjax.base.values import require, require_type
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import policies, sampling, subtree, unizero_tree
from kvjax.mcts.output import Dials, SearchOutput, split
from kvjax.mcts.protocol import Facts
from kvjax.mcts.subtree import Kept, Past
from kvjax.mcts.tree import RAW, Q
from kvjax.mcts.tree_search import by_rows, plan
from kvjax.model import folding, step
from kvjax.model.checks import validate_actions, validate_key
from kvjax.model.contexts import Contexts, advance, validate_contexts
from kvjax.model.folding import UniZero
from kvjax.model.world_model import Params
from kvjax.ops import support

_STATIC = ("config", "search", "rows", "return_tree")

_NARROW = 128
"""Embedding size up to which loops are faster in one thread; on 2 cores, 256 is slower so."""


def search(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
    kept: Kept | None = None,
    draws: ArrayLike | None = None,
    return_tree: bool = False,
) -> tuple[Contexts, SearchOutput]:
    """Advances every environment by one step and plans the next action. One jitted call.

    Args:
      params: the world model's variables, or what `prepare` made of them.
      rng: a JAX PRNG key.
      contexts: what the previous call returned, or `init_contexts`. If their rows lie on a mesh,
        each device searches its own, and the results lie there too.
      observation: [B, observation_size] float32, the current observations.
      last_action: [B] int32, the actions that led to them; -1 restarts a row from an empty context.
        Where actions are continuous [B, A] float32; a row of NaN restarts.
      legal: [B, A] bool, all true by default. Continuous actions are all legal.
      config: the model's configuration (static).
      search: the search's configuration (static).
      kept: with `kept_nodes`, the previous call's `out.kept`, from which rows go on that took an
        action it had tried; nothing by default. Drop it when the parameters change.
      draws: [B, 1 + num_simulations, K, ...], of a model whose nodes draw actions: those of the
        root and of the node that each simulation makes, in place of drawn ones. It repeats a search
        whose draws are known.
      return_tree: whether the output has the whole tree, for `SearchOutput.to_html` (static). What
        is kept has the network's values then too; of nodes that were kept without, they are NaN.

    Returns:
      The new contexts and a `SearchOutput`. A row whose observation or context makes the model
      answer NaN is reported in `finite`; other rows do not notice. Restart it: its context is NaN.
      So is a row without a legal action, whose context is as good as any.

    Raises:
      TypeError: an argument of another type.
      ValueError: variables or contexts of another configuration; a shape does not fit, or host
        arrays hold an action outside -1 .. A - 1 or a row without a legal action; `kept` without
        `kept_nodes`, or of another configuration; `kept_nodes` where nodes draw actions.
    """
    args, static = _checked(
        params,
        rng,
        contexts,
        observation,
        last_action,
        legal,
        config=config,
        search=search,
        kept=kept,
        draws=draws,
        return_tree=return_tree,
    )
    planned: tuple[Contexts, SearchOutput] = _search(*args, **static)
    return planned


def compiled(*args: Any, **options: Any) -> jax.stages.Compiled:
    """What `search` runs for these arguments: its text, and how much memory it takes."""
    args, static = _checked(*args, **options)
    program: jax.stages.Compiled = _search.lower(*args, **static).compile()
    return program


def _checked(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
    kept: Kept | None = None,
    draws: ArrayLike | None = None,
    return_tree: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `search` as the jitted one takes them."""
    folding.validate(params, config)
    validate_key(rng)
    require_type("search", search, SearchConfig, "kvjax.SearchConfig")
    arrays = _arrays(contexts, observation, last_action, legal, config)
    sampling.validate(search, config)
    kept = _kept(kept, contexts, config, search)
    if draws is not None:
        sampling.validate_draws(draws, contexts.timestep.shape[0], search, config)
    if search.tree == "muzero" and search.q_transform is None:
        search = dataclasses.replace(search, q_transform="tree")
    dials, search = split(search)
    # What nodes draw is the whole batch's: XLA places it.
    rows = None if config.num_sampled_actions else meshes.rows_of(contexts.timestep)
    static = {"config": config, "search": search, "rows": rows}
    static |= {"return_tree": True} if return_tree else {}
    return (params, rng, contexts, *arrays, kept, dials, draws), static


def _arrays(
    contexts: Contexts,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike | None,
    config: WorldModelConfig,
) -> tuple[ArrayLike, ArrayLike, ArrayLike | None]:
    """Observations, last actions and legal actions, checked, as the jitted search takes them."""
    validate_contexts(contexts, config)
    num_envs = contexts.timestep.shape[0]
    observation, last_action = map(_as_array, (observation, last_action))
    _validate(num_envs, observation, last_action, config)
    observed = observation.astype(jnp.float32), step.as_taken(last_action)
    if config.is_continuous:
        require(legal is None, "legal must be None: continuous actions are all legal")
        return *observed, None
    legal = _all_legal(num_envs, config.num_actions) if legal is None else _as_array(legal)
    shape = (num_envs, config.num_actions)
    require(np.shape(legal) == shape, f"legal must have shape {shape}, got {np.shape(legal)}")
    validate_legal(legal)
    return *observed, legal.astype(bool)


def _as_array(x: ArrayLike) -> ArrayLike:
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _all_legal(rows: int, num_actions: int) -> jax.Array:
    """Kept on the device, so that a call moves nothing there."""
    make = _all_legal_here if is_traced() else _all_legal_kept
    return make(rows, num_actions)


def _all_legal_here(rows: int, num_actions: int) -> jax.Array:
    return jnp.ones((rows, num_actions), bool)


@functools.lru_cache
def _all_legal_kept(rows: int, num_actions: int) -> jax.Array:
    legal: jax.Array = jax.jit(_all_legal_here, static_argnums=(0, 1))(rows, num_actions)
    return legal


def _kept(
    kept: Kept | None, contexts: Contexts, config: WorldModelConfig, search: SearchConfig
) -> Kept | None:
    """Nothing at all unless the search keeps nodes, so that it can be None."""
    rows = contexts.timestep.shape[0]
    if kept is not None:
        require_type("kept", kept, Kept, "kvjax.init_kept")
        subtree.require_kept_nodes(search)
        return kept
    if search.kept_nodes == 0:
        return None
    begin = unizero_tree.init_kept if is_traced() else _begin
    return begin(config, rows, search)


_begin = jax.jit(unizero_tree.init_kept, static_argnums=(0, 1, 2))


def _validate(
    num_envs: int, observation: ArrayLike, last_action: ArrayLike, config: WorldModelConfig
) -> None:
    expected = (num_envs, *config.observation_shape)
    came = np.shape(observation)
    require(came == expected, f"observation must have shape {expected}, got {came}")
    validate_actions("last_action", last_action, (num_envs,), config)


def is_narrow(config: WorldModelConfig, **_: Any) -> bool:
    """Whether loops are faster in one thread."""
    return config.embed_dim <= _NARROW


@functools.partial(jit_small_operations, one_thread=is_narrow, static_argnames=_STATIC)
def _search(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array | None,
    kept: Kept | None = None,
    dials: Dials | None = None,
    draws: jax.Array | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
    rows: Any = None,
    return_tree: bool = False,
) -> tuple[Contexts, SearchOutput]:
    """The search itself; without `dials` temperature and discount are those of `search`.

    Args:
      rows: how they lie on a mesh.
    """
    dials = split(search)[0] if dials is None else dials
    arguments = params, rng, contexts, observation, last_action, legal, kept, dials, draws
    share = Share.of(rows)
    run = functools.partial(
        _advance_and_plan, config=config, search=search, return_tree=return_tree, share=share
    )
    axes, whole = meshes.axes_of(rows, contexts.timestep), meshes.spec()
    of_rows = meshes.spec(axes)
    how = whole, whole, *[of_rows] * 4, meshes.specs(kept, axes, 1), whole, of_rows
    results = of_rows, by_rows(axes, kept, return_tree)
    planned: tuple[Contexts, SearchOutput] = meshes.run(run, arguments, rows, how, results)
    return planned


def _advance_and_plan(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array | None,
    kept: Kept | None,
    dials: Dials,
    draws: jax.Array | None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
    return_tree: bool,
    share: Share,
) -> tuple[Contexts, SearchOutput]:
    model = folding.fold(params, config=config)
    contexts, policy, value = advance(model, contexts, observation, last_action, config=config)
    value = support.to_scalar(value, config.support)
    root = unizero_tree.root(model, contexts, policy, value, legal, config)
    is_sampled = config.num_sampled_actions is not None
    if is_sampled:
        rng, draw_rng = jax.random.split(rng)
        root = sampling.at_root(root, draw_rng, config, draws)
    fields = policies.num_fields(search, discounted=False, raw=return_tree)
    output = plan(
        model,
        rng,
        root,
        None if kept is None else Past(_told(kept, fields), last_action, contexts.timestep),
        dials,
        model=unizero_tree.tree_model(config),
        facts=Facts(),
        search=search,
        raw=return_tree,
        return_tree=return_tree,
        share=share,
    )
    return contexts, sampling.answer(output, root.state) if is_sampled else output


def _told(kept: Kept, fields: int) -> Kept:
    """With the network's values of its nodes, NaN where these are unknown, or without."""
    edges = kept.tree.edges
    if {edges.shape[2], fields} != {Q + 1, RAW + 1}:
        return kept
    more = jnp.full((*edges.shape[:2], 1, edges.shape[3]), jnp.nan, edges.dtype)
    edges = jnp.concatenate([edges, more], axis=2)[:, :, :fields]
    return dataclasses.replace(kept, tree=dataclasses.replace(kept.tree, edges=edges))
