"""mctx with a whole window per node: what its users pay, and what own tokens must equal.

Shapes: B environments, A actions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import mctx

from kvjax.base.compilation import jit_small_operations
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import mctx_rules
from kvjax.mcts.search import is_narrow
from kvjax.model import step
from kvjax.model.contexts import Contexts, advance
from kvjax.model.folding import UniZero
from kvjax.ops import support
from kvjax.ops.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Node:
    """What mctx keeps of a node; the node's latent is its window's last token."""

    window: Window  # batched: [B, C, L, 2, H, D] and [B]
    depth: jax.Array  # [B] int32, edges below the root


@functools.partial(jit_small_operations, one_thread=is_narrow, static_argnames=("config", "search"))
def search(
    model: UniZero,
    rng: jax.Array,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    legal: jax.Array | None = None,
    *,
    config: WorldModelConfig,
    search: SearchConfig,
) -> tuple[Contexts, mctx.PolicyOutput]:
    """As `kvjax.search` with tree "muzero" or "gumbel" and a transform of mctx.

    Returns:
      The new contexts and what mctx's policy answers, windows left out.
    """
    contexts, policy, value = advance(model, contexts, observation, last_action, config=config)
    embedding = _Node(contexts.window, jnp.zeros_like(contexts.timestep))
    options: dict[str, Any] = {
        "params": model,
        "rng_key": rng,
        "root": mctx.RootFnOutput(
            prior_logits=policy,
            value=support.to_scalar(value, config.support),
            embedding=embedding,
        ),
        "recurrent_fn": _recurrent_fn(contexts.timestep, config, search.discount),
        "num_simulations": search.num_simulations,
        "invalid_actions": None if legal is None else ~legal,
        "max_depth": search.max_depth,
        "qtransform": mctx_rules.q_transform(search),
    }
    if search.tree == "gumbel":
        options["gumbel_scale"] = 1.0 if search.noise_fraction > 0.0 else 0.0
        options["max_num_considered_actions"] = search.max_considered_actions
        output = mctx.gumbel_muzero_policy(**options)
    else:
        output = mctx.muzero_policy(
            **options,
            dirichlet_fraction=search.noise_fraction,
            dirichlet_alpha=search.dirichlet_alpha,
            pb_c_init=search.pb_c_init,
            pb_c_base=search.pb_c_base,
            temperature=search.temperature,
        )
    return contexts, output.replace(search_tree=output.search_tree.replace(embeddings=None))


def _recurrent_fn(
    timestep: jax.Array,
    config: WorldModelConfig,
    discount: float,
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
            value=value,
        ), _Node(window, depth)

    return recurrent_fn


def compiled(*args: Any, **options: Any) -> jax.stages.Compiled:
    """What `search` runs for these arguments."""
    program: jax.stages.Compiled = search.lower(*args, **options).compile()
    return program
