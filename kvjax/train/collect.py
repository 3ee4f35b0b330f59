"""Environments that are played by search, step by step, in one compiled program.

Shapes: B environments, T steps, O observation, A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts.search import search
from kvjax.model.contexts import Contexts, init_contexts
from kvjax.model.folding import UniZero
from kvjax.model.step import FIRST_STEP
from kvjax.train.environments import Environment, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """One step of an environment.

    Attributes:
      observation: [O], before the action.
      action: [] int32.
      reward: [].
      terminated: [] bool, the episode ended with this step.
      truncated: [] bool, it was cut off after this step.
      policy: [A], the search's policy target.
      value: [], the search's value.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    policy: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Actors:
    """Environments in the middle of their episodes, [B, ...] each.

    Attributes:
      contexts: what the world model remembers.
      state: of the environments.
      observation: [B, O].
      last_action: [B] int32, -1 where an episode begins.
      steps: [B] int32 of the episode.
      score: [B], sum of the episode's rewards.
    """

    contexts: Contexts
    state: State
    observation: jax.Array
    last_action: jax.Array
    steps: jax.Array
    score: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Played:
    """What a step of all environments left behind, [B] each."""

    transition: Transition
    score: jax.Array  # of the episode so far
    ended: jax.Array  # bool
    finite: jax.Array  # bool: the model answered with numbers


def empty_transition(env: Environment) -> Transition:
    """What a buffer learns the shapes of its entries from."""
    return Transition(
        observation=jnp.zeros((env.observation_size,)),
        action=jnp.zeros((), jnp.int32),
        reward=jnp.zeros(()),
        terminated=jnp.zeros((), bool),
        truncated=jnp.zeros((), bool),
        policy=jnp.zeros((env.num_actions,)),
        value=jnp.zeros(()),
    )


def begin(key: jax.Array, env: Environment, num_envs: int, *, config: WorldModelConfig) -> Actors:
    """Environments before their first step."""
    state, observation = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    return Actors(
        contexts=init_contexts(config, num_envs),
        state=state,
        observation=observation,
        last_action=jnp.full((num_envs,), FIRST_STEP, jnp.int32),
        steps=jnp.zeros((num_envs,), jnp.int32),
        score=jnp.zeros((num_envs,)),
    )


def play_step(
    model: UniZero,
    actors: Actors,
    key: jax.Array,
    env: Environment,
    *,
    config: WorldModelConfig,
    search_config: SearchConfig,
) -> tuple[Actors, Played]:
    """Searches every environment, acts, and begins a new episode where one has ended."""
    search_key, step_key, reset_key = jax.random.split(key, 3)
    contexts, out = search(
        model,
        search_key,
        actors.contexts,
        actors.observation,
        actors.last_action,
        config=config,
        search=search_config,
    )
    count = out.action.shape[0]
    state, seen = jax.vmap(env.step)(actors.state, out.action, jax.random.split(step_key, count))
    steps, score = actors.steps + 1, actors.score + seen.reward
    truncated = (steps >= env.max_steps) & ~seen.terminated
    ended = seen.terminated | truncated
    fresh = begin(reset_key, env, count, config=config)
    after = Actors(contexts, state, seen.observation, out.action, steps, score)
    begun = dataclasses.replace(fresh, contexts=contexts)  # a first step empties them
    transition = Transition(
        observation=actors.observation,
        action=out.action,
        reward=seen.reward,
        terminated=seen.terminated,
        truncated=truncated,
        policy=out.action_weights,
        value=out.root_value,
    )
    return _where(ended, begun, after), Played(transition, score, ended, out.finite)


def _where(rows: jax.Array, ones: Any, others: Any) -> Any:
    """Row by row: ones where true."""

    def choose(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return jax.tree.map(choose, ones, others)


def collect(
    model: UniZero,
    actors: Actors,
    key: jax.Array,
    env: Environment,
    steps: int,
    *,
    config: WorldModelConfig,
    search_config: SearchConfig,
) -> tuple[Actors, Played]:
    """Plays T steps of every environment; what they leave is [T, B, ...]."""

    def one(actors: Actors, key: jax.Array) -> tuple[Actors, Played]:
        return play_step(model, actors, key, env, config=config, search_config=search_config)

    return jax.lax.scan(one, actors, jax.random.split(key, steps))


def evaluate(
    model: UniZero,
    key: jax.Array,
    env: Environment,
    episodes: int,
    *,
    config: WorldModelConfig,
    search_config: SearchConfig,
) -> jax.Array:
    """Returns [episodes] of episodes that are played side by side, one of each environment."""
    first, key = jax.random.split(key)
    actors = begin(first, env, episodes, config=config)
    start = actors, jnp.zeros((episodes,)), jnp.zeros((episodes,), bool), jnp.zeros((), jnp.int32)

    def one(state: Any) -> Any:
        actors, scores, done, step = state
        here = jax.random.fold_in(key, step)
        actors, played = play_step(
            model, actors, here, env, config=config, search_config=search_config
        )
        scores = jnp.where(played.ended & ~done, played.score, scores)
        return actors, scores, done | played.ended, step + 1

    _, scores, _, _ = jax.lax.while_loop(lambda state: ~jnp.all(state[2]), one, start)
    return scores
