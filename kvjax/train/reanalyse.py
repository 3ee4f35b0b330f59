"""Old sequences searched again, by the target network, so that their policies are of today.

Shapes: B sequences, R of which are searched, T steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.search import search
from kvjax.model import folding
from kvjax.model.contexts import Contexts, init_contexts
from kvjax.model.step import FIRST_STEP
from kvjax.model.world_model import Params
from kvjax.train.collect import Transition


def reanalyse(
    params: Params,
    key: jax.Array,
    batch: Transition,
    rows: int,
    steps: int,
    *,
    config: WorldModelConfig,
    search_config: SearchConfig,
) -> Transition:
    """Puts what searches find today in the place of what they found, in the first R sequences.

    A sequence begins without a past, as it is trained. Source: `_compute_target_policy_reanalyzed`
    of game_buffer_unizero.py.

    Args:
      params: of the target network.
      batch: sequences [B, ...] of at least T steps, in an order that means nothing.
      rows: R.
      steps: T, the first steps, which are searched.

    Returns:
      The batch, with policies and values of its first T steps exchanged in R sequences.
    """
    model = folding.fold(params, config=config)
    before = jnp.full((rows, 1), FIRST_STEP, jnp.int32)
    ended = (batch.terminated | batch.truncated)[:rows, : steps - 1]
    last = jnp.where(ended, FIRST_STEP, batch.action[:rows, : steps - 1])
    seen = batch.observation[:rows, :steps]

    def one(contexts: Contexts, given: Any) -> Any:
        key, observation, last_action = given
        contexts, out = search(
            model,
            key,
            contexts,
            observation,
            last_action,
            config=config,
            search=search_config,
        )
        return contexts, (out.action_weights, out.root_value)

    given = (
        jax.random.split(key, steps),
        jnp.swapaxes(seen, 0, 1),
        jnp.concatenate([before, last], axis=1).T,
    )
    _, (policy, value) = jax.lax.scan(one, init_contexts(config, rows), given)
    return dataclasses.replace(
        batch,
        policy=batch.policy.at[:rows, :steps].set(jnp.swapaxes(policy, 0, 1)),
        value=batch.value.at[:rows, :steps].set(value.T),
    )
