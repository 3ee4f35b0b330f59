"""One environment step and one imagined step of one item: push tokens, read heads, make room.

Both routes are built from these two: the search in one jit and the store's inference steps.

Shapes: C context_length in tokens, L layers, H heads, D head size, E embedding size, A actions,
S support bins.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.base.compilation import computed_once
from kvjax.config import WorldModelConfig
from kvjax.model import world_model
from kvjax.model.world_model import Params
from kvjax.ops import window as windows
from kvjax.ops.position import observation_position
from kvjax.ops.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a world model says about one transition.

    Attributes:
      latent: [E], the next latent state.
      reward: [S] logits over the support.
      policy: [A] logits.
      value: [S] logits over the support.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array


FIRST_STEP = -1
"""The last action of a row that starts an episode."""

_GAPS = {"rope_lightzero": 2, "rope_consistent": 0}


def _push(
    params: Params,
    token: jax.Array,
    window: Window,
    position: jax.Array | None,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[jax.Array, Window]:
    hidden, kv_token = world_model.token_step(
        params, token, window, position, config=config, zero_keys=zero_keys
    )
    return hidden, windows.append(window, kv_token, None if window.raw is None else token)


def token_positions(
    config: WorldModelConfig, timestep: jax.Array, depth: jax.Array | int = 0
) -> tuple[jax.Array | None, jax.Array | None]:
    """Where a step's action and observation go; None where the window's length says it.

    Args:
      timestep: [] int32 of the root.
      depth: [] int32 below the root.
    """
    if not config.is_rotary:
        return None, None
    observation = observation_position(timestep, depth, gap=_GAPS[config.window_mode])
    return observation - 1, observation


def observe(
    params: Params,
    window: Window,
    latent: jax.Array,
    timestep: jax.Array,
    *,
    config: WorldModelConfig,
) -> Window:
    """Pushes an observation's latent [E] and predicts nothing; the window does not slide."""
    _, position = token_positions(config, timestep)
    return _push(params, latent, window, position, config)[1]


def root_step(
    params: Params,
    correction: jax.Array | None,
    window: Window,
    last_action: jax.Array,
    latent: jax.Array,
    timestep: jax.Array,
    may_overflow: jax.Array | None = None,
    *,
    config: WorldModelConfig,
) -> tuple[Window, jax.Array, jax.Array]:
    """Pushes what the environment did: the last action and the latent of what was then observed.

    Args:
      correction: [C - 3, L, 2, H, D] or None, from `world_model.slide_correction`.
      window: the root's window before the action. An empty one starts from the observation alone.
      last_action: [] int32; -1 starts an episode from an empty window.
      latent: [E] of the current observation.
      timestep: [] int32 of the current observation; read by rotary positions only.
      may_overflow: see `recurrent_step`.

    Returns:
      The new root window, policy logits [A] and value logits [S] of the current observation.
    """
    starts = (last_action == FIRST_STEP) | (window.length == 0)
    action = world_model.embed_action(params, jnp.maximum(last_action, 0), config=config)
    at_action, at_observation = token_positions(config, timestep)
    _, continued = _push(params, action, window, at_action, config)
    window = windows.where(starts, windows.init(config.window), continued)
    hidden, window = _push(params, latent, window, at_observation, config)
    policy, value = world_model.at_observation(params, hidden, config=config)
    return make_room(params, correction, window, latent, may_overflow, config), policy, value


def recurrent_step(
    params: Params,
    correction: jax.Array | None,
    window: Window,
    action: jax.Array,
    depth: jax.Array,
    timestep: jax.Array,
    may_overflow: jax.Array | None = None,
    *,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
) -> tuple[Window, Prediction]:
    """Imagines one step: pushes an action, reads the next latent from it and pushes that too.

    Args:
      correction: [C - 3, L, 2, H, D] or None, from `world_model.slide_correction`.
      window: the parent node's window; the parent's latent is its last token.
      action: [] int32 in 0 .. A - 1.
      depth: [] int32 of the new node below its root, from 1; read by rotary positions only.
      timestep: [] int32 of the root; read by rotary positions only.
      may_overflow: [] bool, whether any window of a batch overflows (`any_overflows`). Where a mode
        computes keys and values again, all rows are spared it if none does; give it unbatched.
      zero_keys: [] int32, see `kvjax.ops.attention.attend`.

    Returns:
      The child's window and the `Prediction` for it.
    """
    at_action, at_observation = token_positions(config, timestep, depth)
    token = world_model.embed_action(params, action, config=config)
    hidden, window = _push(params, token, window, at_action, config, zero_keys)
    reward, latent = world_model.at_action(params, hidden, config=config)
    latent = computed_once(latent)  # it is stored, returned and hashed
    hidden, window = _push(params, latent, window, at_observation, config, zero_keys)
    policy, value = world_model.at_observation(params, hidden, config=config)
    window = make_room(params, correction, window, latent, may_overflow, config)
    return window, Prediction(latent, reward, policy, value)


def any_overflows(window: Window, config: WorldModelConfig) -> jax.Array:
    """Whether a block more makes any window [B] of a batch overflow: [] bool."""
    return jnp.any(window.length >= config.window.kept_length)


def make_room(
    params: Params,
    correction: jax.Array | None,
    window: Window,
    latent: jax.Array,
    may_overflow: jax.Array | None,
    config: WorldModelConfig,
) -> Window:
    """What the window mode does with a window that has reached C - 1 tokens; see `root_step`."""
    if config.window_mode not in ("rebuild", "reset"):
        return windows.slide(window, correction)

    def compute_again() -> Window:
        if config.window_mode == "rebuild":
            return world_model.rebuild(params, windows.slide(window), config=config)
        return _push(params, latent, windows.init(config.window), None, config)[1]

    overflows = windows.overflows(window)
    wanted = overflows if may_overflow is None else may_overflow
    return windows.where(overflows, loops.cond(wanted, compute_again, lambda: window), window)
