"""Imagined steps in a row, differentiable: for losses over what a model predicts of itself.

Shapes: K steps, E embedding size, A actions, S support bins.
"""

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.base.values import require_shape, require_type
from kvjax.config import WorldModelConfig
from kvjax.model import folding, step
from kvjax.model.folding import UniZero
from kvjax.model.step import Prediction
from kvjax.model.world_model import Params
from kvjax.ops.window import Window


def rollout(
    params: Params | UniZero,
    window: Window,
    action: jax.Array,
    timestep: jax.Array | int = 0,
    *,
    config: WorldModelConfig,
    checkpoint: bool = False,
) -> tuple[Window, Prediction]:
    """Imagines K steps from one root window, each from the model's own last latent (open loop).

    Gradients flow through keys and values, through slides and through the position correction.
    Batches come by `jax.vmap`.

    Args:
      window: of the root, `kv` [C, L, 2, H, D]; its last token is the root's latent.
      action: [K] int32, or [K, A] float32 where actions are continuous.
      timestep: [] int32 of the root; read by rotary positions only.
      config: the model's configuration.
      checkpoint: keep no activations of a step and compute them again when gradients are taken.

    Returns:
      The window after the last step, and a `Prediction` with a leading K: latent [K, E], reward
      [K, S], policy [K, A], value [K, S].

    Raises:
      TypeError: an argument of another type.
      ValueError: variables of another configuration, or a shape does not fit.
    """
    folding.validate(params, config)
    require_type("window", window, Window, "kvjax.ops.window.init")
    require_shape("window.kv", window.kv, (config.context_length, *config.window.token_shape))
    require_shape("action", action, ("K", *config.action_shape))
    require_shape("timestep", timestep, ())
    model = folding.fold(params, config=config)

    def one_step(
        model: UniZero, window: Window, action: jax.Array, depth: jax.Array
    ) -> tuple[Window, Prediction]:
        row = jax.tree.map(lambda x: x[None], (window, action, depth, jnp.asarray(timestep)))
        moved: tuple[Window, Prediction] = jax.tree.map(
            lambda x: x[0], step.recurrent_step(model, *row, config=config)
        )
        return moved

    if checkpoint:
        one_step = jax.checkpoint(one_step)
    depths = jnp.arange(1, action.shape[0] + 1, dtype=jnp.int32)
    imagined: tuple[Window, Prediction] = loops.scan(
        lambda window, x: one_step(model, window, *x), window, (action, depths)
    )
    return imagined
