"""Nodes that draw K actions of their policy, as Sampled UniZero's do, instead of having all.

What was drawn is a node's state; edges of the tree are numbered by its places. The prior of a drawn
action is 1 / K, since the policy has had its say in the draw (LightZero's sampled tree, "uniform";
Hubert et al., 2021, where the policy is what is drawn from).

Shapes: B rows, A actions or numbers of an action, P numbers of a policy (2A of a Gaussian, else A),
K actions that are drawn, N nodes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base.values import require
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import tree as trees
from kvjax.mcts.output import SearchOutput
from kvjax.mcts.protocol import Node, Root

CLIP = 4.0
"""What is drawn of a Gaussian lies between minus this and this, before the tanh."""

_LOWEST = float(np.finfo(np.float32).min)


def draw(
    rng: jax.Array, policy: jax.Array, config: WorldModelConfig, legal: jax.Array | None = None
) -> jax.Array:
    """Actions of each row's policy: [B, K, A] float32 in -1 .. 1, or [B, K] int32.

    Discrete actions are drawn without replacement, in proportion to their probabilities; illegal
    ones where there are no others.

    Args:
      policy: [B, P].
      legal: [B, A] bool, of discrete actions; None: all.
    """
    count = config.num_edges
    if not config.is_continuous:
        scores = jnp.maximum(policy, _LOWEST) + jax.random.gumbel(rng, policy.shape, policy.dtype)
        scores = scores if legal is None else jnp.where(legal, scores, -jnp.inf)
        return jax.lax.top_k(scores, count)[1].astype(jnp.int32)
    mean, sigma = jnp.split(policy, 2, axis=1)
    normal = jax.random.normal(rng, (mean.shape[0], count, mean.shape[1]), jnp.float32)
    return jnp.tanh(jnp.clip(mean[:, None] + sigma[:, None] * normal, -CLIP, CLIP))


def uniform(policy: jax.Array, config: WorldModelConfig) -> jax.Array:
    """Logits [B, K] of drawn actions, which are alike; NaN where a policy [B, P] is broken."""
    broken = jnp.isnan(policy) | (policy == jnp.inf)
    if config.is_continuous:
        broken = ~jnp.isfinite(policy)
    one = jnp.where(jnp.any(broken, axis=1, keepdims=True), jnp.nan, 0.0)
    return jnp.broadcast_to(one, (policy.shape[0], config.num_edges)).astype(jnp.float32)


def at_root(
    root: Root, rng: jax.Array, config: WorldModelConfig, draws: jax.Array | None = None
) -> Root:
    """A root whose edges are drawn actions.

    Args:
      root: with a policy [B, P] and, of discrete actions, legal ones [B, A].
      draws: [B, N, K, ...], in place of those that all nodes would draw.
    """
    legal = None if config.is_continuous else root.legal
    actions = draw(rng, root.policy, config, legal) if draws is None else draws[:, trees.ROOT]
    return dataclasses.replace(
        root,
        policy=uniform(root.policy, config),
        state=actions,
        data=(*root.data, draws),
        legal=None if legal is None else jnp.take_along_axis(legal, actions, axis=1),
    )


def of_new_node(
    rng: jax.Array,
    node: Node,
    draws: jax.Array | None,
    policy: jax.Array,
    config: WorldModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """What a step's new nodes draw of their policy [B, P], and logits [B, K].

    Args:
      node: from which the step was taken.
    """
    actions = draw(rng, policy, config) if draws is None else draws[:, node.number]
    return actions, uniform(policy, config)


def taken(actions: jax.Array, place: jax.Array) -> jax.Array:
    """The actions [B, ...] in places [B] of drawn ones [B, K, ...]."""
    return actions[trees.every(place.shape[0]), place]


def answer(output: SearchOutput, actions: jax.Array) -> SearchOutput:
    """A search's answer in terms of the root's drawn actions [B, K, ...]."""
    chosen = taken(actions, output.action)
    return dataclasses.replace(output, action=chosen, sampled_actions=actions)


def validate(search: SearchConfig, config: WorldModelConfig) -> None:
    """Raises `ValueError` for a search that cannot be made with drawn actions."""
    drawn = config.num_sampled_actions
    require(
        drawn is None or search.kept_nodes == 0,
        f"kept_nodes must be 0 for a model whose nodes draw actions (num_sampled_actions {drawn}),"
        f" got {search.kept_nodes}: a new root draws others",
    )


def validate_draws(draws: Any, rows: int, search: SearchConfig, config: WorldModelConfig) -> None:
    """Raises `ValueError` unless draws [B, N, K, ...] fit."""
    require(
        config.num_sampled_actions is not None,
        "draws are for a model whose nodes draw actions, this one has num_sampled_actions None",
    )
    expected = (rows, search.num_nodes, config.num_edges, *config.action_shape)
    kind = jnp.floating if config.is_continuous else jnp.integer
    dtype, shape = getattr(draws, "dtype", type(draws).__name__), np.shape(draws)
    require(
        shape == expected and hasattr(draws, "dtype") and jnp.issubdtype(dtype, kind),
        f"draws must be {kind.__name__} numbers of shape {expected}, got {dtype} {shape}",
    )
