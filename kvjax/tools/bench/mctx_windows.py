"""Searches by mctx: MuZero's and Gumbel MuZero's policies, with a whole window per node.

Shapes: B environments, A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np

from kvjax.base import loops
from kvjax.base.values import require
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.output import Dials, SearchOutput
from kvjax.mcts.policies import all_finite, choose
from kvjax.model import step
from kvjax.model.contexts import Contexts
from kvjax.model.unizero import UniZero
from kvjax.ops import support
from kvjax.ops.window import Window

_NEVER = float(np.finfo(np.float32).min)
"""Policy logit of an illegal action."""

_MIN_RANGE = 0.01
"""Q values closer together than this are not blown up to a range of 1 (LightZero's constant)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Node:
    """What mctx keeps of a node; the node's latent is its window's last token."""

    window: Window  # batched: [B, C, L, 2, H, D] and [B]
    depth: jax.Array  # [B] int32, edges below the root


def run(
    model: UniZero,
    rng: jax.Array,
    contexts: Contexts,
    policy: jax.Array,
    root_value: jax.Array,
    legal: jax.Array,
    dials: Dials,
    config: WorldModelConfig,
    search: SearchConfig,
) -> SearchOutput:
    """Searches all rows from their root windows.

    Args:
      contexts: of the roots, the current step included.
      policy: [B, A] logits of the roots.
      root_value: [B].
      legal: [B, A] bool.
      dials: in place of the search's.

    Raises:
      ValueError: inside a `shard_map` that keeps account of what differs between devices.
    """
    require(
        not loops.varies(contexts),
        f'tree "{search.tree}" needs shard_map(check_vma=False): the loops of mctx begin with'
        " constants, which that check refuses",
    )
    finite = all_finite(policy, root_value)
    policy = jnp.where(legal, policy, _NEVER)
    embedding = _Node(contexts.window, jnp.zeros_like(contexts.timestep))
    root = mctx.RootFnOutput(prior_logits=policy, value=root_value, embedding=embedding)
    search_rng, action_rng = jax.random.split(rng)
    result = _plan(model, search_rng, root, contexts.timestep, legal, dials, config, search)
    if search.tree == "gumbel":
        action = result.action.astype(jnp.int32)
    else:
        counts = result.search_tree.summary().visit_counts
        action = choose(action_rng, counts, legal, dials.temperature)
    summary = result.search_tree.summary()
    return SearchOutput(
        action=action,
        visit_counts=summary.visit_counts.astype(jnp.int32),
        root_value=summary.value,
        q_values=summary.qvalues,
        prior=jax.nn.softmax(policy),
        network_value=root_value,
        mean_depth=_mean_depth(result.search_tree),
        finite=finite & all_finite(summary.value, summary.qvalues) & jnp.any(legal, axis=1),
        action_weights=result.action_weights,
    )


def _plan(
    model: UniZero,
    rng: jax.Array,
    root: mctx.RootFnOutput,
    timestep: jax.Array,
    legal: jax.Array,
    dials: Dials,
    config: WorldModelConfig,
    search: SearchConfig,
) -> Any:
    """What mctx's policy answers, its `PolicyOutput`."""
    options: dict[str, Any] = {
        "params": model,
        "rng_key": rng,
        "root": root,
        "recurrent_fn": _recurrent_fn(timestep, config, dials.discount),
        "num_simulations": search.num_simulations,
        "invalid_actions": ~legal,
        "max_depth": search.max_depth,
    }
    if search.tree == "gumbel":
        scale = 1.0 if search.noise_fraction > 0.0 else 0.0
        return mctx.gumbel_muzero_policy(**options, gumbel_scale=scale)
    return mctx.muzero_policy(
        **options,
        qtransform=_normalise_over_tree,
        dirichlet_fraction=search.noise_fraction,
        dirichlet_alpha=search.dirichlet_alpha,
        pb_c_init=search.pb_c_init,
        pb_c_base=search.pb_c_base,
    )


def _mean_depth(tree: Any) -> jax.Array:
    """Mean depth of the nodes that simulations made: [B]."""

    def one_row(parents: jax.Array) -> jax.Array:
        def step_down(node: jax.Array, depths: jax.Array) -> jax.Array:
            return depths.at[node].set(depths[parents[node]] + 1)

        nodes = parents.shape[0]
        start = jnp.zeros(nodes, jnp.int32)
        depths: jax.Array = jax.lax.fori_loop(1, nodes, step_down, start)
        return jnp.sum(depths).astype(jnp.float32) / (nodes - 1)

    return jax.vmap(one_row)(tree.parents)


def _recurrent_fn(
    timestep: jax.Array,
    config: WorldModelConfig,
    discount: jax.Array,
) -> mctx.RecurrentFn:
    """The model as mctx sees it."""

    def recurrent_fn(
        model: UniZero, rng: jax.Array, action: jax.Array, node: _Node
    ) -> tuple[mctx.RecurrentFnOutput, _Node]:
        del rng
        depth = node.depth + 1
        window, prediction = step.recurrent_step(
            model, node.window, action, depth, timestep, config=config
        )
        reward = support.to_scalar(prediction.reward, config.support)
        value = support.to_scalar(prediction.value, config.support)
        return mctx.RecurrentFnOutput(
            reward=reward,
            discount=jnp.full_like(reward, discount),
            prior_logits=prediction.policy,
            value=jnp.where(all_finite(prediction.policy), value, jnp.nan),
        ), _Node(window, depth)

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
