"""One update of the weights: targets of sampled sequences, gradients, optimiser, target network.

Shapes: B sequences, U unroll_steps, n td_steps, O observation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kvjax.config import WorldModelConfig
from kvjax.model.world_model import Params
from kvjax.ops import support
from kvjax.train import losses as terms
from kvjax.train import network
from kvjax.train.collect import Transition
from kvjax.train.config import TrainConfig
from kvjax.train.losses import Losses, Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """Weights and what trains them."""

    params: Params
    target: Params
    optimiser: Any


def make_optimiser(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped norm; matrices decay, vectors do not.

    Source: `configure_optimizers_nanogpt`.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.adamw(
            train.learning_rate,
            *train.betas,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
        ),
    )


def init_learner(key: jax.Array, *, config: WorldModelConfig, train: TrainConfig) -> Learner:
    """A learner before its first update."""
    params = network.initial_params(key, config)
    target = jax.tree.map(jnp.copy, params)
    return Learner(params, target, make_optimiser(train).init(params["params"]))


def from_starts(batch: Transition, train: TrainConfig) -> Transition:
    """Cuts sequences [B, U + n] out of longer ones, from where an episode begins.

    Where none begins within `seek_start` steps a sequence begins where it was drawn.
    """
    ended = (batch.terminated | batch.truncated)[:, : train.seek_start]
    first = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1) + 1, 0)

    def cut(row: jax.Array, begin: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, begin, train.sequence_length)

    cut_rows: Transition = jax.tree.map(lambda x: jax.vmap(cut)(x, first), batch)
    return cut_rows


def make_targets(
    target: Params, batch: Transition, *, config: WorldModelConfig, train: TrainConfig
) -> Targets:
    """What sequences [B, U + n] teach of their first U steps."""
    steps = train.unroll_steps
    ended = batch.terminated | batch.truncated
    bootstrap = target_values(
        target, batch.observation[:, -steps:], batch.action[:, -steps:], config=config
    )
    value = terms.n_step_values(
        batch.reward,
        batch.terminated,
        batch.truncated,
        batch.value,
        bootstrap,
        discount=train.discount,
    )
    seen = batch.observation[:, :steps]
    latent, _ = network.encode(target, seen.reshape(-1, *seen.shape[2:]), config=config)
    return Targets(
        latent=latent.reshape(*seen.shape[:2], -1),
        reward=batch.reward[:, :steps],
        policy=batch.policy[:, :steps],
        value=value,
        mask=terms.within_first_episode(ended[:, :steps]),
    )


def target_values(
    target: Params, observation: jax.Array, action: jax.Array, *, config: WorldModelConfig
) -> jax.Array:
    """Values [B, U] of observations [B, U, O], each read with those before it."""
    rows = observation.reshape(-1, *observation.shape[2:])
    latent, _ = network.encode(target, rows, config=config)
    latent = latent.reshape(*observation.shape[:2], -1)
    predictions = network.predict(target, latent, action, config=config)
    return support.to_scalar(predictions.value, config.support)


def loss(
    weights: Params,
    params: Params,
    batch: Transition,
    targets: Targets,
    *,
    config: WorldModelConfig,
    train: TrainConfig,
) -> tuple[jax.Array, tuple[Losses, Params]]:
    """The total loss of weights, its terms, and the batch's statistics."""
    steps = train.unroll_steps
    variables = {**params, "params": weights}
    seen = batch.observation[:, :steps]
    rows = seen.reshape(-1, *seen.shape[2:])
    latent, statistics = network.encode(variables, rows, config=config)
    latent = latent.reshape(*seen.shape[:2], -1)
    predictions = network.predict(variables, latent, batch.action[:, :steps], config=config)
    found = terms.losses(predictions, targets, config=config, train=train)
    return found.total, (found, statistics)


def update(
    learner: Learner, batch: Transition, *, config: WorldModelConfig, train: TrainConfig
) -> tuple[Learner, Losses]:
    """One update of a learner by sequences [B, U + n]."""
    targets = jax.lax.stop_gradient(make_targets(learner.target, batch, config=config, train=train))
    gradients, (found, statistics) = jax.grad(loss, has_aux=True)(
        learner.params["params"], learner.params, batch, targets, config=config, train=train
    )
    change, optimiser = make_optimiser(train).update(
        gradients, learner.optimiser, learner.params["params"]
    )
    weights = optax.apply_updates(learner.params["params"], change)
    rows = targets.mask.size
    params = network.running(
        {**learner.params, "params": weights}, statistics, rows=rows, rate=train.statistics_rate
    )
    target = optax.incremental_update(params, learner.target, train.target_rate)
    return Learner(params, target, optimiser), found


def is_finite(learner: Learner) -> jax.Array:
    """Whether all weights are numbers, [] bool: a NaN anywhere in an update reaches some."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(learner.params)]).all()
