"""One environment step and one imagined step of one item: push tokens, read heads, slide.

Both routes are built from these two: the search in one jit and the store's inference steps.
"""

import jax
import jax.numpy as jnp

from kvjax import world_model
from kvjax.config import WorldModelConfig
from kvjax.ops import window as windows
from kvjax.types import Params, Prediction, Window

FIRST_STEP = -1
"""The last action of a row that starts an episode."""


def _push(
    params: Params,
    token: jax.Array,
    window: Window,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[jax.Array, Window]:
    hidden, kv_token = world_model.token_step(
        params, token, window, config=config, zero_keys=zero_keys
    )
    return hidden, windows.append(window, kv_token)


def observe(
    params: Params, window: Window, latent: jax.Array, *, config: WorldModelConfig
) -> Window:
    """Pushes an observation's latent [E] and predicts nothing; the window does not slide."""
    return _push(params, latent, window, config)[1]


def root_step(
    params: Params,
    correction: jax.Array,
    window: Window,
    last_action: jax.Array,
    latent: jax.Array,
    *,
    config: WorldModelConfig,
) -> tuple[Window, jax.Array, jax.Array]:
    """Pushes what the environment did: the last action and the latent of what was then observed.

    Args:
      correction: [C - 3, L, 2, H, D], from `world_model.slide_correction`.
      window: the root's window before the action.
      last_action: [] int32; -1 starts an episode from an empty window.
      latent: [E] of the current observation.

    Returns:
      The new root window, policy logits [A] and value logits [S] of the current observation.
    """
    starts = last_action == FIRST_STEP
    action = jnp.maximum(last_action, 0)
    _, continued = _push(
        params, world_model.embed_action(params, action, config=config), window, config
    )
    window = windows.where(starts, windows.init(config.window), continued)
    hidden, window = _push(params, latent, window, config)
    policy, value = world_model.at_observation(params, hidden, config=config)
    return windows.slide(window, correction), policy, value


def recurrent_step(
    params: Params,
    correction: jax.Array,
    window: Window,
    action: jax.Array,
    *,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[Window, Prediction]:
    """Imagines one step: pushes an action, reads the next latent from it and pushes that too.

    Args:
      correction: [C - 3, L, 2, H, D], from `world_model.slide_correction`.
      window: the parent node's window; the parent's latent is its last token.
      action: [] int32 in 0 .. A - 1.
      zero_keys: [] int32, see `kvjax.ops.attention.attend`.

    Returns:
      The child's window and the `Prediction` for it.
    """
    token = world_model.embed_action(params, action, config=config)
    hidden, window = _push(params, token, window, config, zero_keys)
    reward, latent = world_model.at_action(params, hidden, config=config)
    hidden, window = _push(params, latent, window, config, zero_keys)
    policy, value = world_model.at_observation(params, hidden, config=config)
    return windows.slide(window, correction), Prediction(latent, reward, policy, value)
