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
from kvjax.base.arrays import ArrayLike, validate_range
from kvjax.base.compilation import is_traced, jit_small_operations
from kvjax.base.values import require_type
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import mctx_search, policies, subtree
from kvjax.mcts import tokens as own_tokens
from kvjax.mcts import tree as trees
from kvjax.mcts.output import Dials, SearchOutput
from kvjax.mcts.subtree import Kept
from kvjax.mcts.unizero_tree import init_tokens, tree_model
from kvjax.model import step, unizero
from kvjax.model.checks import validate_key
from kvjax.model.contexts import Contexts, advance, validate_contexts
from kvjax.model.unizero import UniZero
from kvjax.model.world_model import Params
from kvjax.ops import support

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
) -> tuple[Contexts, SearchOutput]:
    """Advances every environment by one step and plans the next action. One jitted call.

    Args:
      params: the world model's variables, or what `prepare` made of them.
      rng: a JAX PRNG key.
      contexts: what the previous call returned, or `init_contexts`.
      observation: [B, observation_size] float32, the current observations.
      last_action: [B] int32, the actions that led to them; -1 restarts a row from an empty context.
      legal: [B, A] bool, all true by default.
      config: the model's configuration (static).
      search: the search's configuration (static).
      kept: with `kept_nodes`, the previous call's `out.kept`, from which rows go on that took an
        action it had tried; nothing by default. Drop it when the parameters change.

    Returns:
      The new contexts and a `SearchOutput`. A row whose observation or context makes the model
      answer NaN is reported in `finite`; other rows do not notice. Restart it: its context is NaN.
      So is a row without a legal action, whose context is as good as any.

    Raises:
      TypeError: an argument of another type.
      ValueError: variables or contexts of another configuration; a shape does not fit, or host
        arrays hold an action outside -1 .. A - 1 or a row without a legal action; `kept` without
        `kept_nodes`, or of another configuration.
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
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `search` as the jitted one takes them."""
    unizero.validate(params, config)
    validate_key(rng)
    require_type("search", search, SearchConfig, "kvjax.SearchConfig")
    arrays = _arrays(contexts, observation, last_action, legal, config)
    kept = _kept(kept, contexts, config, search)
    dials, search = _split(search) if is_traced() else _split_on_device(search)
    return (params, rng, contexts, *arrays, kept, dials), {"config": config, "search": search}


def _arrays(
    contexts: Contexts,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike | None,
    config: WorldModelConfig,
) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
    """Observations, last actions and legal actions, checked, as the jitted search takes them."""
    validate_contexts(contexts, config)
    num_envs = contexts.timestep.shape[0]
    if legal is None:
        legal = _all_legal(num_envs, config.num_actions)
    observation, last_action, legal = (
        x if isinstance(x, jax.Array) else np.asarray(x) for x in (observation, last_action, legal)
    )
    _validate(num_envs, observation, last_action, legal, config)
    return (
        observation.astype(jnp.float32),
        last_action.astype(jnp.int32),
        legal.astype(bool),
    )


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
        subtree.validate(kept, rows, config, search)
        return kept
    if search.kept_nodes == 0:
        return None
    begin = subtree.init_kept if is_traced() else _begin
    return begin(config, rows, search)


_begin = jax.jit(subtree.init_kept, static_argnums=(0, 1, 2))


def _split(search: SearchConfig) -> tuple[Dials, SearchConfig]:
    """What is data, and a configuration that is the same for all that differ only in it."""
    dials: Any = (np.asarray(x, np.float32) for x in (search.temperature, search.discount))
    return Dials(*dials), dataclasses.replace(search, temperature=0.0, discount=1.0)


@functools.lru_cache
def _split_on_device(search: SearchConfig) -> tuple[Dials, SearchConfig]:
    """Kept there, so that a call moves nothing."""
    dials, same = _split(search)
    return jax.device_put(dials), same


def _validate(
    num_envs: int,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike,
    config: WorldModelConfig,
) -> None:
    expected = {
        "observation": (observation, (num_envs, *config.observation_shape)),
        "last_action": (last_action, (num_envs,)),
        "legal": (legal, (num_envs, config.num_actions)),
    }
    for name, (value, shape) in expected.items():
        if np.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {np.shape(value)}")
    if not jnp.issubdtype(last_action.dtype, jnp.integer):
        raise ValueError(f"last_action must be integers, got {last_action.dtype}")
    validate_range("last_action", last_action, step.FIRST_STEP, config.num_actions - 1)
    if isinstance(legal, np.ndarray) and not legal.any(axis=-1).all():
        rows = np.flatnonzero(~legal.any(axis=-1)).tolist()
        raise ValueError(f"every row needs a legal action, rows {rows} have none")


def _is_narrow(config: WorldModelConfig, **_: Any) -> bool:
    return config.embed_dim <= _NARROW


@functools.partial(
    jit_small_operations, one_thread=_is_narrow, static_argnames=("config", "search")
)
def _search(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array,
    kept: Kept | None = None,
    dials: Dials | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Contexts, SearchOutput]:
    """The search itself; without `dials` temperature and discount are those of `search`."""
    dials = _split(search)[0] if dials is None else dials
    arguments = params, rng, contexts, observation, last_action, legal, kept, dials
    run = functools.partial(_advance_and_plan, config=config, search=search)
    rows = meshes.rows_of(contexts.timestep)
    by_row: Any = meshes.spec(rows)
    fields = {field.name: by_row for field in dataclasses.fields(SearchOutput)}
    results = by_row, SearchOutput(**fields | {"kept": meshes.specs(kept, rows, 1)})
    planned: tuple[Contexts, SearchOutput] = meshes.run_automatic(run, arguments, results)
    return planned


def _advance_and_plan(
    params: Params | UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array,
    kept: Kept | None,
    dials: Dials,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Contexts, SearchOutput]:
    model = unizero.fold(params, config=config)
    contexts, policy, value = advance(model, contexts, observation, last_action, config=config)
    root_value = support.to_scalar(value, config.support)
    if search.tree != "lightzero":
        return contexts, mctx_search.run(
            model, rng, contexts, policy, root_value, legal, dials, config, search
        )
    noise_rng, action_rng = jax.random.split(rng)
    prior = trees.softmax(policy, legal)
    tree = trees.init(policies.with_noise(noise_rng, prior, legal, search), search)
    tokens = init_tokens(model, contexts.window, config, search.num_nodes)
    if kept is not None:
        tree, tokens = subtree.promote(kept, tree, tokens, contexts.timestep, last_action, search)
    tree, tokens = own_tokens.run(
        tree_model(config), model, tree, tokens, contexts.timestep, dials.discount, search
    )
    visit_counts = trees.visit_counts(tree)
    return contexts, SearchOutput(
        action=policies.choose(action_rng, visit_counts, legal, dials.temperature),
        visit_counts=visit_counts,
        root_value=trees.root_value(tree),
        q_values=trees.q_values(tree),
        prior=jnp.maximum(prior, 0.0),
        network_value=root_value,
        mean_depth=tree.total_depth / search.num_simulations,
        finite=policies.all_finite(policy, root_value, trees.root_value(tree), tree.low, tree.high)
        & jnp.any(legal, axis=1),
        action_weights=policies.visit_shares(jnp.where(legal, visit_counts, 0)),
        kept=None if kept is None else Kept(tree, tokens, contexts.timestep),
    )
