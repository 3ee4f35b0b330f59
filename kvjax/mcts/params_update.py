"""What becomes of contexts when the weights change: nothing stale is ever read."""

import functools
from typing import Any, overload

import jax

from kvjax import store as stores
from kvjax.base import meshes
from kvjax.base.values import describe
from kvjax.config import WorldModelConfig
from kvjax.mcts.checks import validate_store
from kvjax.model import folding, modes
from kvjax.model.contexts import Contexts, init_contexts, validate_contexts
from kvjax.model.folding import UniZero
from kvjax.model.world_model import Params
from kvjax.store import Store


@overload
def on_params_update(
    state: Contexts, params: Params | UniZero, *, config: WorldModelConfig
) -> Contexts: ...


@overload
def on_params_update(
    state: Store, params: Params | UniZero, *, config: WorldModelConfig
) -> Store: ...


def on_params_update(
    state: Contexts | Store, params: Params | UniZero, *, config: WorldModelConfig
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
    folding.validate(params, config)
    if isinstance(state, Store):
        validate_store(state, config)
        return stores.new_epoch(state)
    if not isinstance(state, Contexts):
        raise TypeError(f"state must be Contexts or a Store, got {describe(state)}")
    validate_contexts(state, config)
    rows = meshes.rows_of(state.timestep)
    contexts: Contexts = _renew(params, state, config=config, rows=rows)
    return contexts


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def _renew(
    params: Params | UniZero, contexts: Contexts, *, config: WorldModelConfig, rows: Any
) -> Contexts:
    by_row = meshes.spec(meshes.axes_of(rows, contexts.timestep))
    renew = functools.partial(_renewed, config=config)
    how, arguments = (meshes.spec(), by_row), (params, contexts)
    renewed: Contexts = meshes.run(renew, arguments, rows, how, by_row)
    return renewed


def _renewed(
    params: Params | UniZero,
    contexts: Contexts,
    *,
    config: WorldModelConfig,
) -> Contexts:
    if config.mode.keeps_raw:
        model = folding.fold(params, config=config)
        window = modes.rebuild(model, contexts.window, config=config)
    else:
        window = init_contexts(config, contexts.timestep.shape[0]).window
    return Contexts(window, contexts.timestep)
