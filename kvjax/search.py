"""The whole search in one jit: every node's window lives in the tree, no lookup, no pool.

Shapes: B environments, A actions, E embedding size, C context_length in tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np

from kvjax import step, world_model
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.ops import support
from kvjax.ops import window as windows
from kvjax.types import Contexts, Params, SearchOutput, Window

_NEVER = float(np.finfo(np.float32).min)
"""Policy logit of an illegal action."""

_MIN_RANGE = 0.01
"""Q values closer together than this are not blown up to a range of 1 (LightZero's constant)."""

ArrayLike = jax.Array | np.ndarray[Any, Any]


def init_contexts(config: WorldModelConfig, num_envs: int) -> Contexts:
    """Empty contexts, one row per environment.

    Returns:
      `Contexts` with windows [B, C, L, 2, H, D] and timestep -1.

    Raises:
      ValueError: `num_envs` is below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    window = jax.vmap(lambda _: windows.init(config.window))(jnp.arange(num_envs))
    return Contexts(window=window, timestep=jnp.full((num_envs,), -1, jnp.int32))


def search(
    params: Params,
    rng: jax.Array,
    contexts: Contexts,
    observation: ArrayLike,
    last_action: ArrayLike,
    legal: ArrayLike | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Contexts, SearchOutput]:
    """Advances every environment by one step and plans the next action. One jitted call.

    Args:
      params: the world model's variables.
      rng: a JAX PRNG key.
      contexts: what the previous call returned, or `init_contexts`.
      observation: [B, observation_size] float32, the current observations.
      last_action: [B] int32, the actions that led to them; -1 restarts a row from an empty context.
      legal: [B, A] bool, all true by default.
      config: the model's configuration (static).
      search: the search's configuration (static).

    Returns:
      The new contexts and a `SearchOutput`.

    Raises:
      ValueError: a shape does not fit, or host arrays hold an action outside -1 .. A - 1 or a row
        without a legal action.
    """
    num_envs = contexts.timestep.shape[0]
    if legal is None:
        legal = np.ones((num_envs, config.num_actions), bool)
    _validate(num_envs, observation, last_action, legal, config)
    contexts, out = _search(
        params,
        rng,
        contexts,
        jnp.asarray(observation, jnp.float32),
        jnp.asarray(last_action, jnp.int32),
        jnp.asarray(legal, bool),
        config=config,
        search=search,
    )
    return contexts, out


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
    if isinstance(last_action, np.ndarray):
        outside = (last_action < step.FIRST_STEP) | (last_action >= config.num_actions)
        if outside.any():
            raise ValueError(
                f"last_action must be in -1 .. {config.num_actions - 1}, got"
                f" {last_action[outside].tolist()} in rows {np.flatnonzero(outside).tolist()}"
            )
    if isinstance(legal, np.ndarray) and not legal.any(axis=-1).all():
        rows = np.flatnonzero(~legal.any(axis=-1)).tolist()
        raise ValueError(f"every row needs a legal action, rows {rows} have none")


@functools.partial(jax.jit, static_argnames=("config", "search"))
def _search(
    params: Params,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Contexts, SearchOutput]:
    correction = world_model.slide_correction(params, config=config)
    encode = functools.partial(world_model.encode, params, config=config)
    latent = jax.vmap(encode)(observation)
    push = functools.partial(step.root_step, params, correction, config=config)
    window, policy, value = jax.vmap(push)(contexts.window, last_action, latent)
    policy = jnp.where(legal, policy, _NEVER)
    root = mctx.RootFnOutput(
        prior_logits=policy, value=support.to_scalar(value, config.support), embedding=window
    )
    search_rng, action_rng = jax.random.split(rng)
    tree = mctx.muzero_policy(
        params=params,
        rng_key=search_rng,
        root=root,
        recurrent_fn=_recurrent_fn(correction, config, search.discount),
        num_simulations=search.num_simulations,
        invalid_actions=~legal,
        qtransform=_normalise_over_tree,
        dirichlet_fraction=search.noise_fraction,
        dirichlet_alpha=search.dirichlet_alpha,
        pb_c_init=search.pb_c_init,
        pb_c_base=search.pb_c_base,
    ).search_tree
    summary = tree.summary()
    visit_counts = summary.visit_counts.astype(jnp.int32)
    starts = last_action == step.FIRST_STEP
    timestep = jnp.where(starts, 0, contexts.timestep + 1)
    return Contexts(window=window, timestep=timestep), SearchOutput(
        action=_choose(action_rng, visit_counts, legal, search.temperature),
        visit_counts=visit_counts,
        root_value=summary.value,
        q_values=summary.qvalues,
        prior=jax.nn.softmax(policy),
        network_value=root.value,
    )


def _recurrent_fn(
    correction: jax.Array, config: WorldModelConfig, discount: float
) -> mctx.RecurrentFn:
    """The model as mctx sees it. A node is its window: the latent is the window's last token."""

    def recurrent_fn(
        params: Params, rng: jax.Array, action: jax.Array, window: Window
    ) -> tuple[mctx.RecurrentFnOutput, Window]:
        del rng
        imagine = functools.partial(step.recurrent_step, params, correction, config=config)
        window, prediction = jax.vmap(imagine)(window, action)
        reward = support.to_scalar(prediction.reward, config.support)
        return mctx.RecurrentFnOutput(
            reward=reward,
            discount=jnp.full_like(reward, discount),
            prior_logits=prediction.policy,
            value=support.to_scalar(prediction.value, config.support),
        ), window

    return recurrent_fn


def _normalise_over_tree(tree: Any, node: jax.Array) -> jax.Array:
    """Q values [A] of one node, scaled to [0, 1] by the extremes of its whole tree.

    That is LightZero's rule. mctx's own scales by a node's siblings, which blows up the small
    differences of a long task: with it the masked CartPole agent reaches 159 instead of 200.
    An action that was never tried counts as the mean of its node and its tried siblings (at the
    root: of the siblings alone).

    Args:
      tree: an unbatched `mctx.Tree`.
      node: [] int32.
    """
    edges = tree.children_rewards + tree.children_discounts * tree.children_values
    visited, tried = tree.children_visits > 0, tree.children_visits[node] > 0
    root_value = tree.node_values[mctx.Tree.ROOT_INDEX]
    low = jnp.minimum(jnp.min(edges, where=visited, initial=jnp.inf), root_value)
    high = jnp.maximum(jnp.max(edges, where=visited, initial=-jnp.inf), root_value)
    total, count = jnp.sum(edges[node], where=tried), jnp.sum(tried)
    at_root = (node == mctx.Tree.ROOT_INDEX) & (count > 0)
    mean = jnp.where(at_root, total / count, (tree.node_values[node] + total) / (count + 1))
    q = jnp.where(tried, edges[node], mean)
    return jnp.clip((q - low) / jnp.maximum(high - low, _MIN_RANGE), 0.0, 1.0)


def _choose(
    rng: jax.Array, visit_counts: jax.Array, legal: jax.Array, temperature: float
) -> jax.Array:
    """The most visited legal action, the first on ties; or a sample of the visits: [B] int32."""
    counts = jnp.where(legal, visit_counts, -1)
    if temperature == 0.0:
        return jnp.argmax(counts, axis=-1).astype(jnp.int32)
    logits = jnp.where(counts > 0, jnp.log(counts), -jnp.inf) / temperature
    return jax.random.categorical(rng, logits).astype(jnp.int32)
