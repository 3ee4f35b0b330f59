"""What becomes of contexts when the weights change: nothing stale is ever read."""

import functools
from typing import overload

import jax

from kvjax import store as stores
from kvjax.base.values import describe
from kvjax.config import WorldModelConfig
from kvjax.mcts.checks import validate_store
from kvjax.model import world_model
from kvjax.model.checks import validate_model
from kvjax.model.contexts import Contexts, init_contexts, validate_contexts
from kvjax.model.fused import Prepared
from kvjax.model.world_model import Params
from kvjax.store import Store


@overload
def on_params_update(
    state: Contexts, params: Params | Prepared, *, config: WorldModelConfig
) -> Contexts: ...


@overload
def on_params_update(
    state: Store, params: Params | Prepared, *, config: WorldModelConfig
) -> Store: ...


def on_params_update(
    state: Contexts | Store, params: Params | Prepared, *, config: WorldModelConfig
) -> Contexts | Store:
    """Carries a state over to new parameters. Call it whenever they change.

    Contexts: in window mode "rebuild" keys and values are computed again from the raw tokens
    (latents and actions as the old parameters embedded them); in the other modes the windows are
    emptied and each row goes on from its next observation alone. Clocks run on.

    A store: all windows are forgotten. In mode "rebuild" each environment's newest root can be
    brought back, see the `miss_policy` "rebuild" of `initial_inference`.

    Args:
      state: `Contexts`, windows [B, C, L, 2, H, D], or a `Store`.
      params: the new parameters, or what `kvjax.prepare` made of them.

    Raises:
      TypeError: the state is neither, or another argument has another type.
      ValueError: the parameters or the state are another configuration's; the store was moved.
    """
    params = params.params if isinstance(params, Prepared) else params
    validate_model(params, config)
    if isinstance(state, Store):
        validate_store(state, config)
        return stores.new_epoch(state)
    if not isinstance(state, Contexts):
        raise TypeError(f"state must be Contexts or a Store, got {describe(state)}")
    validate_contexts(state, config)
    contexts: Contexts = _renew(params, state, config=config)
    return contexts


@functools.partial(jax.jit, static_argnames=("config",))
def _renew(params: Params, contexts: Contexts, *, config: WorldModelConfig) -> Contexts:
    if config.window_mode == "rebuild":
        renew = functools.partial(world_model.rebuild, params, config=config)
        window = jax.vmap(renew)(contexts.window)
    else:
        window = init_contexts(config, contexts.timestep.shape[0]).window
    return Contexts(window, contexts.timestep)
