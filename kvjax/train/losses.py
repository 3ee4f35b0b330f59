"""UniZero's losses and targets.

Sources are methods of LightZero 0.2.0's `WorldModel` (world_model.py) and functions beside them.

Shapes: B sequences, T steps, n td_steps, E embedding size, A actions, S support bins.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.config import WorldModelConfig
from kvjax.train.config import TrainConfig
from kvjax.train.network import Predictions

_SLOPE = 1e-3
"""Of MuZero's value transform far from zero."""

_EPSILON = 1e-6
"""Keeps the logarithms of group KL finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What sequences teach.

    Attributes:
      latent: [B, T, E], of the observations, by the target encoder.
      reward: [B, T].
      policy: [B, T, A], shares of visits.
      value: [B, T].
      mask: [B, T] bool, steps of the episode in which the sequence begins.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Means over the steps that count, [] each; `total` is their weighted sum."""

    total: jax.Array
    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array
    entropy: jax.Array  # of the policy, no loss


def value_transform(x: jax.Array) -> jax.Array:
    """MuZero's `h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x`. Source: `scalar_transform`."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1.0) - 1.0) + _SLOPE * x


def two_hot(x: jax.Array, support: tuple[int, int]) -> jax.Array:
    """Scalars [...] as weights [..., S] of the two bins beside `value_transform(x)`.

    Source: `phi_transform`.
    """
    first, last = support
    place = jnp.clip(value_transform(x), first, last) - first
    bins = jnp.arange(last - first + 1, dtype=place.dtype)
    return jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - bins))


def within_first_episode(ended: jax.Array) -> jax.Array:
    """Which steps [B, T] come before or at the first end. Source: `mask_padding`."""
    ends_before = jnp.cumsum(ended, axis=1) - ended
    return ends_before == 0


def n_step_values(
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    own: jax.Array,
    bootstrap: jax.Array,
    *,
    discount: float,
) -> jax.Array:
    """Values of T steps from n rewards and the value of what is seen then.

    Nothing follows an end. An episode that is cut off goes on unseen, so that its last step is
    worth what its own search found, and the steps before it build on that.

    Args:
      reward, terminated, truncated, own: [B, T + n], `own` the values that searches found.
      bootstrap: [B, T], of the observations n steps later.

    Returns:
      [B, T].

    Source: `_compute_target_reward_value` of game_buffer_unizero.py, but for what is cut off, which
    it takes for an end.
    """
    steps = bootstrap.shape[1]
    value = bootstrap
    for i in reversed(range(reward.shape[1] - steps)):
        here = slice(i, i + steps)
        follows = discount * jnp.where(terminated[:, here], 0.0, value)
        value = jnp.where(truncated[:, here], own[:, here], reward[:, here] + follows)
    return value


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Source: `compute_cross_entropy_loss`."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def _entropy(logits: jax.Array) -> jax.Array:
    """Source: `compute_policy_entropy_loss`."""
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def latent_distance(predicted: jax.Array, target: jax.Array, kind: str, group: int) -> jax.Array:
    """Of latents [..., E]: "mse", or the mean over groups of KL(target || predicted).

    Source: `compute_loss`, `predict_latent_loss_type`.
    """
    if kind == "mse":
        return jnp.mean(jnp.square(predicted - target), axis=-1)
    groups = (*predicted.shape[:-1], -1, group)
    predicted, target = (x.reshape(groups) + _EPSILON for x in (predicted, target))
    return jnp.mean(jnp.sum(target * (jnp.log(target) - jnp.log(predicted)), axis=-1), axis=-1)


def losses(
    predictions: Predictions,
    targets: Targets,
    *,
    config: WorldModelConfig,
    train: TrainConfig,
) -> Losses:
    """All terms and their weighted sum. Source: `compute_loss`, `LossWithIntermediateLosses`."""
    mask = targets.mask.astype(targets.value.dtype)
    weights = mask * train.unroll_discount ** jnp.arange(mask.shape[1])

    def mean(per_step: jax.Array, first: int = 0) -> jax.Array:
        count = jnp.maximum(jnp.sum(mask[:, first:]), 1.0)
        return jnp.sum(per_step * weights[:, first:]) / count

    distance = latent_distance(
        predictions.latent[:, :-1], targets.latent[:, 1:], train.latent_loss, config.simnorm_group
    )
    latent = mean(distance, first=1)
    reward = mean(_cross_entropy(predictions.reward, two_hot(targets.reward, config.support)))
    value = mean(_cross_entropy(predictions.value, two_hot(targets.value, config.support)))
    entropy = mean(_entropy(predictions.policy))
    policy = mean(_cross_entropy(predictions.policy, targets.policy))
    policy = policy - train.entropy_weight * entropy
    total = (
        train.latent_weight * latent
        + train.reward_weight * reward
        + train.policy_weight * policy
        + train.value_weight * value
    )
    return Losses(total, latent, reward, policy, value, entropy)
