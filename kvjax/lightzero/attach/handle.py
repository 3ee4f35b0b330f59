"""LightZero's torch `WorldModel` with its caches kept by kvjax.

    handle = kvjax.lightzero.attach(world_model)

The model keeps its own forward pass, its counters and its `clear_caches`. What finds, aligns,
slides and stores key/value windows is replaced: one jitted call per simulation, for all
environments at once. Windows live in jax; only the rows that a simulation reads cross to torch, in
memory that both see.

Shapes: B rows, E embedding size.
"""

import logging
import weakref
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax

from kvjax.base.values import require, require_one_of
from kvjax.lightzero import module
from kvjax.lightzero.attach import caches, routes
from kvjax.lightzero.attach.attached import STATE, Attachment, attached_class, state_of
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.shadow import Shadow
from kvjax.store.statistics import Statistics

Padding = Literal["reference", "masked"]
PADDINGS = ("reference", "masked")


def attach(
    world_model: Any,
    shadow: bool | Literal["log"] = False,
    *,
    padding: Padding = "reference",
) -> "Handle":
    """Lets kvjax keep a live world model's caches, from its next step on.

    Attach between episodes: contexts of running ones stay behind, and their next step continues
    from its last observation alone. `world_model.use_new_cache_manager = False` switches back to
    LightZero's own caches at run time, `True` to kvjax's; both start without context.

    Weights may change: entries made with other weights are dropped when that is noticed, at the
    latest at the next root step. Where a model keeps raw tokens (main's
    `rebuild_kv_window_from_tokens`) it computes each environment's newest context again at its next
    root miss; LightZero's `clear_caches` forgets raw tokens too. Copies by `copy.deepcopy` are
    attached too, independently. Reanalysis is left to LightZero, which looks nothing up there.

    A search that makes more simulations than `world_model_cfg.num_simulations` says is as right as
    any other: the pool of nodes grows, which a warning in the log tells and which compiles anew.

    Two settings are made for the whole process. If jax has not started yet, it computes in the
    caller's thread from now on when it runs on a CPU (`jax_cpu_enable_async_dispatch`): every
    simulation waits for jax anyway. And unless the logger "jax" has a level it gets WARNING, since
    LightZero lets the root logger tell everything, which would be each of jax's compilations.

    Args:
      world_model: LightZero's `WorldModel` (`model.world_model`), release 0.2.0 or main, float32.
      shadow: run LightZero's own code too, on every call, and compare caches, sizes and hits. True
        raises `ShadowError` at the first disagreement, "log" collects them in
        `handle.disagreements` and logs them. A fresh model, whose heads end in zeros, imagines the
        same latent everywhere; LightZero then serves one environment another's window, kvjax never.
      padding: "reference" does as the model's release does; 0.2.0 lets rows attend to the padding
        of their batch and counts it as context at roots. "masked" never reads a pad, as main.

    Returns:
      A `Handle`: `stats()`, `scope(name)`, `on_params_update()`, `detach()`.

    Raises:
      ValueError: the module is no `WorldModel`, is attached already, is not float32, has an odd or
        too short context, is a variant that is not supported, or is on a device that jax lacks.
    """
    wm = module.unwrap(world_model)
    module.require_world_model(wm)
    require(STATE not in vars(wm), "this world model is attached already: detach() it first")
    require_one_of("padding", padding, PADDINGS)
    require(shadow in (True, False, "log"), f"shadow must be True, False or 'log', got {shadow!r}")
    description = module.describe(wm)
    mask_padding = padding == "masked" and not description.masks_padding
    _set_up_jax()
    bridge = Bridge(wm, description, mask_padding=mask_padding)
    state = Attachment(bridge, type(wm), Shadow(mode=shadow))
    state.own_flag = vars(wm).pop("use_new_cache_manager", None)
    state.saved = routes.install(wm, bridge, description.num_envs)
    vars(wm)[STATE] = state
    wm.__class__ = attached_class(state.original)
    return Handle(wm)


def _set_up_jax() -> None:
    """Makes jax compute in the caller's thread and say little."""
    # To wake another thread takes longer than what a simulation computes, and waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]
    logger = logging.getLogger("jax")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def handle_of(world_model: Any) -> "Handle":
    """The handle of an attached world model, such as a deep copy of one.

    Raises:
      ValueError: the model is not attached.
    """
    wm = module.unwrap(world_model)
    require(STATE in getattr(wm, "__dict__", ()), f"this {type(wm).__name__} is not attached")
    return Handle(wm)


class Handle:
    """What the user of an attached world model holds."""

    def __init__(self, wm: Any) -> None:
        self._wm = weakref.ref(wm)

    def _module(self) -> Any:
        wm = self._wm()
        require(
            wm is not None and STATE in vars(wm), "the world model is no longer attached or gone"
        )
        return wm

    def stats(self, scope: str | None = None) -> Statistics:
        """Counters of look-ups, hits, evictions and padding, and how full the pools are."""
        return state_of(self._module()).bridge.stats(scope)

    @property
    def disagreements(self) -> list[str]:
        """What shadow mode found."""
        return list(state_of(self._module()).shadow.disagreements)

    @property
    def comparisons(self) -> int:
        """How many comparisons shadow mode made."""
        return state_of(self._module()).shadow.comparisons

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Keeps contexts in a store of its own inside a `with` block.

        For a model that is shared, as LightZero's collector and evaluator do. Clearing inside a
        scope clears that scope, outside of any all of them.
        """
        return state_of(self._module()).bridge.use(name)

    def on_params_update(self) -> None:
        """Says that the weights changed: drops all entries and computes the correction anew.

        Raw tokens stay, see `attach`.
        """
        wm = self._module()
        state_of(wm).bridge.on_params_update(wm)

    def detach(self) -> None:
        """Gives the model back as it was."""
        wm = self._module()
        state = vars(wm).pop(STATE)
        wm.__class__ = state.original
        routes.uninstall(wm, state.saved)
        if state.own_flag is not None:
            wm.use_new_cache_manager = state.own_flag
        if isinstance(wm.keys_values_wm_list, caches.Rows):
            wm.keys_values_wm_list = list(wm.keys_values_wm_list)
