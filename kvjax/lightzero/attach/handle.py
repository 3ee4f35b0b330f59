"""LightZero's torch `WorldModel` with its caches kept by kvjax.

    handle = kvjax.lightzero.attach(world_model)

The model keeps its own forward pass, its counters and its `clear_caches`. What finds, aligns,
slides and stores key/value windows is replaced: one jitted call per simulation, for all
environments at once. Windows live in jax; only the rows that a simulation reads cross to torch, in
memory that both see.

Shapes: P environments.
"""

import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Literal

import jax

from kvjax.base.values import require, require_one_of
from kvjax.lightzero import module
from kvjax.lightzero.attach import caches
from kvjax.lightzero.attach.attached import STATE, Attachment, attached_class, state_of
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.logged import log_with
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
    saved = _reroute(wm, bridge, description.num_envs)
    own_flag = vars(wm).pop("use_new_cache_manager", None)
    vars(wm)[STATE] = Attachment(bridge, Shadow(mode=shadow), type(wm), own_flag, saved)
    wm.__class__ = attached_class(state_of(wm).original)
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

    def log_with(self, worker: Any, scope: str | None = None) -> None:
        """Adds the counters to what LightZero's collector or evaluator reports.

        Whenever it logs its own numbers, its logger gets `stats(scope)` as text, and its
        TensorBoard a curve of each, `evaluator_iter/kvjax_hit_rate` and so on. Nothing is added
        once the model is detached.

        Args:
          worker: LightZero's `MuZeroCollector` or `MuZeroEvaluator`.
          scope: whose counters, see `scope()`; None is outside of any.

        Raises:
          ValueError: the worker is neither.
        """
        log_with(worker, partial(_stats_or_none, self, scope))

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
        _restore(wm, state.saved)
        if state.own_flag is not None:
            wm.use_new_cache_manager = state.own_flag
        if isinstance(wm.keys_values_wm_list, caches.Rows):
            wm.keys_values_wm_list = list(wm.keys_values_wm_list)


def _stats_or_none(handle: "Handle", scope: str | None) -> Statistics | None:
    """None of a model that is detached or gone, or of a scope that nobody was in yet."""
    with suppress(ValueError):
        return handle.stats(scope)
    return None


_KEYS_AND_VALUES, _RAW_TOKENS = (
    (f"past_{kind}_init_infer_envs", f"past_{kind}_recurrent_infer")
    for kind in ("kv_cache", "token_context")
)
"""Attributes that hold entries, by environment those of roots, and those of nodes."""


class _Missing:
    """An attribute that was not there; a class, so that copies of a module know it too."""


class _ClearingDict(dict[Any, Any]):
    """A cache dictionary whose `clear` reaches further."""

    further: Callable[[], None]

    def clear(self) -> None:
        """Forgets LightZero's entries and kvjax's."""
        super().clear()
        self.further()


class _StandIn:
    """What is not said of it is what it stands for."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "own":  # not there yet while it is being copied
            raise AttributeError(name)
        return getattr(self.own, name)


class _ClearingPool(_StandIn):
    """One pool of a cache manager."""

    def __init__(self, own: Any, forget: Callable[[], None]) -> None:
        super().__init__(own)
        self._forget = forget

    def __len__(self) -> int:
        return len(self.own)

    def clear(self) -> None:
        """Forgets LightZero's entries and kvjax's."""
        self.own.clear()
        self._forget()


class _ClearingManager(_StandIn):
    """A `kv_cache_manager`, also for models that were built without one: its `own` is None."""

    def __init__(self, own: Any, init_pools: list[Any], recur_pool: Any) -> None:
        super().__init__(own)
        self.init_pools, self.recur_pool = init_pools, recur_pool

    def clear_init_caches(self) -> None:
        """Forgets all roots."""
        for pool in self.init_pools:
            pool.clear()

    def clear_recur_cache(self) -> None:
        """Forgets all searched nodes."""
        self.recur_pool.clear()

    def clear_all(self) -> None:
        """Forgets everything."""
        if self.own is not None:
            self.own.clear_all()
        self.clear_init_caches()
        self.clear_recur_cache()


def _reroute(wm: Any, bridge: Bridge, num_envs: int) -> dict[str, Any]:
    """Makes all that policies clear to forget reach further; what was there, for `_restore`.

    LightZero's policies reach into the world model's attributes. While it is attached these are
    stand-ins: they hold LightZero's own entries as before, and clearing them clears kvjax's too.
    """
    forgets: list[Callable[[], None]]  # of the environments' roots, and of the nodes
    forgets = [partial(bridge.forget, roots=(env,)) for env in range(num_envs)]
    forgets.append(partial(bridge.forget, nodes=True))
    own, pools = vars(wm).get("kv_cache_manager"), []
    if own is not None:
        originals = *own.init_pools[:num_envs], own.recur_pool
        pools = [_ClearingPool(*each) for each in zip(originals, forgets, strict=True)]
    entries = _stand_ins(wm, _KEYS_AND_VALUES, [pool.clear for pool in pools] or forgets)
    *roots, nodes = pools or entries
    made: dict[str, Any] = {"kv_cache_manager": _ClearingManager(own, roots, nodes)}
    made |= zip(_KEYS_AND_VALUES, (entries[:-1], entries[-1]), strict=True)
    if _RAW_TOKENS[0] in vars(wm):
        tokens = _stand_ins(wm, _RAW_TOKENS, forgets)
        made |= zip(_RAW_TOKENS, (tokens[:-1], tokens[-1]), strict=True)
    saved = {name: vars(wm).get(name, _Missing) for name in made}
    vars(wm).update(made)
    return saved


def _stand_ins(
    wm: Any, names: tuple[str, str], further: list[Callable[[], None]]
) -> list[_ClearingDict]:
    """For the dictionaries of the environments' roots, and for that of the nodes."""
    num_envs, (per_env, nodes) = len(further) - 1, (vars(wm).get(name) for name in names)
    originals = *(per_env or [{}] * num_envs)[:num_envs], nodes or {}
    made = [_ClearingDict(original) for original in originals]
    for stand_in, clear in zip(made, further, strict=True):
        stand_in.further = clear
    return made


def _restore(wm: Any, saved: dict[str, Any]) -> None:
    """Puts back what was there, with the entries that the stand-ins hold now."""
    for name, original in saved.items():
        stand_in = vars(wm).pop(name)
        if original is _Missing:
            continue
        if isinstance(original, dict):
            _refill(original, stand_in)
        elif isinstance(original, list):
            for one, other in zip(original, stand_in, strict=True):
                _refill(one, other)
        vars(wm)[name] = original


def _refill(original: Any, stand_in: Any) -> None:
    original.clear()
    original.update(stand_in)
