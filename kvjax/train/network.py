"""The world model while it is trained: first weights, batch statistics, whole sequences at once.

Shapes: B sequences, T steps, E embedding size, O observation, A actions, S support bins.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import MIN_CONTEXT, WorldModelConfig
from kvjax.model import folding, unizero
from kvjax.model.world_model import Params, WorldModel, init_params

_ROWS = "rows"
"""The axis over which batch statistics are taken."""

_STD = 0.02
_HEADS = ("reward_head", "latent_head", "policy_head", "value_head")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of every step of sequences, from what came before.

    Attributes:
      latent: [B, T, E], the next latent.
      reward: [B, T, S] logits.
      policy: [B, T, A] logits.
      value: [B, T, S] logits.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def initial_params(rng: jax.Array, config: WorldModelConfig) -> Params:
    """Weights as LightZero begins with them: narrow, and heads that say nothing yet.

    Source: `init_weights` (normal, 0.02) and `_initialize_last_layer` (zeros).
    """
    variables = init_params(rng, config)
    keys = iter(jax.random.split(jax.random.fold_in(rng, 1), len(jax.tree.leaves(variables))))

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] not in ("kernel", "embedding") or names[1] == "encoder":
            return leaf
        if names[1] in _HEADS and names[2] == "output":
            return jnp.zeros_like(leaf)
        return _STD * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

    drawn: Params = jax.tree_util.tree_map_with_path(draw, variables)
    return drawn


def encode(
    params: Params, observation: jax.Array, *, config: WorldModelConfig
) -> tuple[jax.Array, Params]:
    """Encodes observations [N, O] by the statistics of these observations.

    Returns:
      Latents [N, E] and the statistics, shaped as `params["batch_stats"]`; {} if there are none.
    """
    apply = functools.partial(
        WorldModel(config).apply, params, method="encode", mutable=["batch_stats"]
    )
    with nn.intercept_methods(_use_batch_statistics):
        latent, changed = jax.vmap(apply, axis_name=_ROWS)(observation)
    return latent, jax.tree.map(lambda x: x[0], changed.get("batch_stats", {}))


def _use_batch_statistics(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Has a BatchNorm that would read its running statistics read those of all rows."""
    module = context.module
    if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
        places = tuple(range(args[0].ndim - 1))
        mean = _mean_of_rows(jnp.mean(args[0], axis=places))
        variance = _mean_of_rows(jnp.mean(jnp.square(args[0] - mean), axis=places))
        module.put_variable("batch_stats", "mean", mean)
        module.put_variable("batch_stats", "var", variance)
    return next_method(*args, **kwargs)


def _mean_of_rows(x: jax.Array) -> jax.Array:
    mean: jax.Array = jax.lax.pmean(x, _ROWS)  # type: ignore[no-untyped-call]
    return mean


def predict(
    params: Params, latent: jax.Array, action: jax.Array, *, config: WorldModelConfig
) -> Predictions:
    """Runs sequences through the transformer in one causal pass.

    Args:
      latent: [B, T, E], of the observations.
      action: [B, T] int32, `action[:, t]` follows `latent[:, t]`.
    """
    batch, steps, width = latent.shape
    config = dataclasses.replace(config, context_length=max(2 * steps, MIN_CONTEXT))
    model = folding.fold(params, config=config)
    # A product with ones and zeros: the gradient of a lookup takes far longer.
    acted = jax.nn.one_hot(action, config.num_actions, dtype=latent.dtype) @ model.actions
    seen = latent - jnp.mean(latent, axis=-1, keepdims=True)
    tokens = jnp.stack([seen, acted], axis=2).reshape(batch, 2 * steps, width)
    x, _ = unizero.sequence_stream(model, jnp.moveaxis(tokens, -1, 0), config=config)
    at_observation, at_action = jnp.moveaxis(x.reshape(width, -1, 2), -1, 0)
    policy, value = unizero.at_observation(model, at_observation)
    reward, predicted = unizero.at_action(model, at_action, config=config)
    back = [part.T.reshape(batch, steps, -1) for part in (predicted, reward, policy, value)]
    return Predictions(*back)


def running(params: Params, batch: Params, *, rows: int, rate: float) -> Params:
    """Variables whose running statistics have moved towards a batch's.

    As torch's BatchNorm the running variance is that of a sample: N / (N - 1) times the batch's.
    """
    if "batch_stats" not in params:
        return params

    def move(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        unbiased = rows / max(rows - 1, 1) if path[-1].key == "var" else 1.0
        return old + rate * (unbiased * new - old)

    moved = jax.tree_util.tree_map_with_path(move, params["batch_stats"], batch)
    return {**params, "batch_stats": moved}
