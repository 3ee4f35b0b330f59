"""What a run computes: an iteration and an evaluation, one compiled program each.

Shapes: B environments, T steps, N updates.
"""

import dataclasses
import functools
from typing import Any

import flashbax
import jax
import jax.numpy as jnp

from kvjax.config import WorldModelConfig
from kvjax.model import folding
from kvjax.train import collect, learn
from kvjax.train.collect import Actors, Transition
from kvjax.train.config import TrainConfig
from kvjax.train.environments import Environment
from kvjax.train.learn import Learner
from kvjax.train.losses import Losses
from kvjax.train.reanalyse import reanalyse


@dataclasses.dataclass(frozen=True)
class Setup:
    """What programs are compiled for."""

    env: Environment
    train: TrainConfig

    @functools.cached_property
    def model(self) -> WorldModelConfig:
        """The world model's configuration."""
        return self.train.model(self.env)

    @functools.cached_property
    def memory(self) -> Any:
        """A buffer of trajectories, one row per environment."""
        train = self.train
        return flashbax.make_trajectory_buffer(
            add_batch_size=train.num_envs,
            sample_batch_size=train.batch_size,
            sample_sequence_length=train.drawn_length,
            period=1,
            min_length_time_axis=train.drawn_length,
            max_length_time_axis=train.replay_size // train.num_envs,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an iteration starts from; with the seed it says what follows, bit for bit.

    Attributes:
      iteration: [] int32, iterations made.
      failed_at: [] int32, the update of the last iteration that met NaN or infinity and was not
        made, nor any after it; -1 if there is none.
    """

    learner: Learner
    actors: Actors
    memory: Any
    iteration: jax.Array
    failed_at: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What an iteration tells, [] each.

    Attributes:
      losses: of its last update.
      episodes: how many ended.
      score: mean return of those, NaN if there are none.
      finite: bool, whether every search answered with numbers.
    """

    losses: Losses
    episodes: jax.Array
    score: jax.Array
    finite: jax.Array


def begin(key: jax.Array, setup: Setup) -> TrainState:
    """A run before its first iteration."""
    of_learner, of_actors = jax.random.split(key)
    config, train = setup.model, setup.train
    return TrainState(
        learner=learn.init_learner(of_learner, config=config, train=train),
        actors=collect.begin(of_actors, setup.env, train.num_envs, config=config),
        memory=setup.memory.init(collect.empty_transition(setup.env)),
        iteration=jnp.zeros((), jnp.int32),
        failed_at=jnp.full((), -1, jnp.int32),
    )


def iterate(state: TrainState, key: jax.Array, setup: Setup) -> tuple[TrainState, Report]:
    """Plays T steps of B environments, stores them and makes N updates.

    Args:
      key: of the run, the same for every iteration.
    """
    of_play, of_updates = jax.random.split(jax.random.fold_in(key, state.iteration))
    config, train = setup.model, setup.train
    actors, played = collect.collect(
        folding.fold(state.learner.params, config=config),
        state.actors,
        of_play,
        setup.env,
        train.collect_steps,
        config=config,
        search_config=train.searched,
    )
    rows_first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), played.transition)
    memory = setup.memory.add(state.memory, rows_first)

    def one(carry: tuple[Learner, jax.Array], n: jax.Array) -> Any:
        learner, failed_at = carry
        batch = drawn(memory, learner, of_updates, n, setup)
        after, losses = learn.update(learner, batch, config=config, train=train)
        fits = (failed_at < 0) & learn.is_finite(after)
        learner = jax.tree.map(lambda new, old: jnp.where(fits, new, old), after, learner)
        failed_at = jnp.where(fits | (failed_at >= 0), failed_at, n)
        return (learner, failed_at), losses

    begin = state.learner, jnp.full((), -1, jnp.int32)
    (learner, failed_at), losses = jax.lax.scan(one, begin, jnp.arange(train.updates))
    report = Report(
        losses=jax.tree.map(lambda x: x[-1], losses),
        episodes=jnp.sum(played.ended),
        score=jnp.sum(played.score * played.ended) / jnp.sum(played.ended),
        finite=jnp.all(played.finite),
    )
    return TrainState(learner, actors, memory, state.iteration + 1, failed_at), report


def drawn(
    memory: Any, learner: Learner, of_updates: jax.Array, n: jax.Array, setup: Setup
) -> Transition:
    """The sequences of an iteration's update n, some of them searched again."""
    train, key = setup.train, jax.random.fold_in(of_updates, n)
    batch: Transition = setup.memory.sample(memory, key).experience
    if train.seek_start:
        batch = learn.from_starts(batch, train)
    if train.reanalysed_rows:
        batch = reanalyse(
            learner.target,
            jax.random.fold_in(key, 1),
            batch,
            train.reanalysed_rows,
            train.unroll_steps,
            config=setup.model,
            search_config=train.searched,
        )
    return batch


def failed_batch(state: TrainState, key: jax.Array, setup: Setup) -> Transition:
    """The sequences of the update that failed in the iteration that led to a state."""
    _, of_updates = jax.random.split(jax.random.fold_in(key, state.iteration - 1))
    return drawn(state.memory, state.learner, of_updates, state.failed_at, setup)


def evaluate(learner: Learner, key: jax.Array, setup: Setup) -> jax.Array:
    """Returns [eval_episodes] of a learner's agent."""
    return collect.evaluate(
        folding.fold(learner.params, config=setup.model),
        key,
        setup.env,
        setup.train.eval_episodes,
        config=setup.model,
        search_config=setup.train.evaluated,
    )
