"""Inference steps for a tree that lives outside: find the caches, run the model, store the results.

Each step is one jitted call for the whole batch and moves the store: its buffers are donated, the
store that was passed in is gone, use the one that comes back. (Inside a jit of your own nothing is
donated unless you donate it there.)

Shapes: B rows, E embedding size, A actions, R support bins.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.base import interrupts, loops
from kvjax.base.arrays import ArrayLike, num_rows
from kvjax.base.compilation import computed_once
from kvjax.base.values import require, require_one_of, require_shape
from kvjax.config import WorldModelConfig
from kvjax.mcts.checks import validate_batch
from kvjax.model import folding, modes, step
from kvjax.model.checks import validate_actions
from kvjax.model.folding import UniZero
from kvjax.model.world_model import Params
from kvjax.ops import hashing
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.store import Store
from kvjax.store import pool as pools
from kvjax.store.pool import NO_SLOT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inference:
    """Result of one inference step of a store; a `Prediction` per row, and how it was looked up.

    Attributes:
      latent: [B, E], of the new node.
      reward: [B, S] logits over the support, zero at roots.
      policy: [B, A] logits, or [B, 2A] means and deviations of Gaussians.
      value: [B, S] logits over the support.
      hit: [B] bool, the parent's window was found (a first step needs none: False).
      slot: [B] int32, handle of the new window, -1 if it is not stored.
      valid: [B] bool, False: an id was out of range, the row is NaN and not stored.
      full: [B] bool, the new window is not stored: the node pool has no slot left.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array
    hit: jax.Array
    slot: jax.Array
    valid: jax.Array
    full: jax.Array


MissPolicy = Literal["context_free", "error", "rebuild"]
MISS_POLICIES = ("context_free", "error")
FullPolicy = Literal["error", "evict"]
FULL_POLICIES = ("error", "evict")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a step brings, row by row."""

    latent: Any  # [B, E]: the current one of a root step, the parent's of a searched one
    action: Any  # [B] or [B, A]
    env_id: Any  # [B]
    timestep: Any  # [B]
    priority: Any = None  # [B]
    last_latent: Any = None  # [B, E], of root steps
    depth: Any = None  # [B], of searched steps
    slot: Any = None  # [B]


@dataclasses.dataclass(frozen=True)
class _How:
    """What of a step is static."""

    config: WorldModelConfig
    miss_policy: MissPolicy
    reanalysis: bool
    full_policy: FullPolicy = "error"
    pads_are_read: bool = False


class CacheMissError(LookupError):
    """A window was not found and the miss policy is "error". Nothing was stored.

    Attributes:
      store: the store as it was before the step, but for its statistics.
      rows: indices of the rows that missed.
    """

    def __init__(self, store: Store, rows: list[int]) -> None:
        super().__init__(f"no window stored for rows {rows}")
        self.store = store
        self.rows = rows


class StoreFullError(ValueError):
    """A search has more nodes than the store was made for, see `init_store`.

    Attributes:
      store: the store after the step. It lacks the new windows of `rows` and nothing else.
      rows: indices of the rows whose new windows are not stored.
    """

    def __init__(self, store: Store, rows: list[int]) -> None:
        slots = pools.total_slots(store.nodes)
        super().__init__(
            f"the store has {slots} node slots and a search needs more (no room for rows {rows}):"
            f" call init_store with more than {slots // stores.num_envs(store)} num_simulations, or"
            ' pass full_policy="evict" to go on without the oldest nodes'
        )
        self.store = store
        self.rows = rows


class StepInterrupt(KeyboardInterrupt):
    """An interrupt (Ctrl-C) during a step, raised after it.

    Attributes:
      store: the store after the step, since the one that was passed in is gone.
      out: the step's `Inference`.
    """

    def __init__(self, store: Store, out: Inference) -> None:
        super().__init__()
        self.store = store
        self.out = out


def initial_inference(
    params: Params | UniZero,
    store: Store,
    last_latent: ArrayLike,
    action: ArrayLike,
    latent: ArrayLike,
    env_id: ArrayLike,
    timestep: ArrayLike,
    *,
    config: WorldModelConfig,
    miss_policy: MissPolicy = "context_free",
    reanalysis: bool = False,
    priority: ArrayLike | None = None,
) -> tuple[Store, Inference]:
    """A root step: pushes what the environments did, predicts, and stores the new root windows.

    A row's window is looked up by `last_latent` in its environment's root pool. All searched nodes
    are forgotten afterwards.

    Args:
      params: the world model's variables, or what `kvjax.prepare` made of them once for many steps:
        a wide model's matrices are then not rewritten in each.
      store: moved, see the module's text.
      last_latent: [B, E] float32, of the observation before; not read in first steps.
      action: [B] integer, the action taken there; -1 marks an environment's first step. Where
        actions are continuous [B, A] float32; NaN in a whole row marks a first step.
      latent: [B, E] float32, of the current observation.
      env_id: [B] integer in 0 .. P - 1; any subset, in any order.
      timestep: [B] integer, of the current observation (the default priority).
      miss_policy: "context_free" continues from the last observation alone, as LightZero does;
        "error" raises and stores nothing; "rebuild" computes the environment's newest root again
        from its raw tokens, with `last_latent` as its last one, and continues without context only
        where there is none. That is how contexts outlive `on_params_update` (window mode "rebuild";
        the latents of older observations stay as they were encoded).
      reanalysis: look nothing up and store nothing; every row is free of context.
      priority: [B] float32 for the "priority" eviction; `timestep` by default.

    Returns:
      The store and an `Inference`. Rows with an id out of range (which only values on the host can
      be checked for in advance) have `valid` False and NaN predictions and are not stored.

    Raises:
      TypeError: an argument of another type.
      ValueError: variables or a store of another configuration, or a store that was moved; shapes
        or dtypes do not fit, or host arrays hold ids out of range.
      CacheMissError: a row missed and the policy is "error".
      StepInterrupt: an interrupt (Ctrl-C) came; it has the store.
    """
    folding.validate(params, config)
    rows = num_rows(latent)
    ids = {"env_id": env_id, "timestep": timestep}
    latents = {"last_latent": last_latent, "latent": latent}
    validate_batch(store, config, rows, latents, action, ids)
    _require_priority(store, priority, rows)
    require_one_of("miss_policy", miss_policy, (*MISS_POLICIES, "rebuild"))
    if miss_policy == "rebuild" and store.latest is None:
        raise ValueError(
            'miss_policy "rebuild" needs windows with raw tokens (window_mode "rebuild"), the'
            f' model\'s window_mode is "{config.window_mode}"'
        )
    validate_actions("action", action, (rows,), config)

    def refuse(store: Store, out: Inference) -> None:
        if miss_policy == "error" and not reanalysis:
            _raise_on_miss(store, out.valid & ~out.hit & ~step.is_first(action))

    arrays = _Rows(latent, action, env_id, timestep, priority, last_latent=last_latent)
    how = _How(config, miss_policy, reanalysis)
    return _uninterrupted(_initial, refuse, params, store, arrays, how)


def recurrent_inference(
    params: Params | UniZero,
    store: Store,
    latent: ArrayLike,
    action: ArrayLike,
    env_id: ArrayLike,
    depth: ArrayLike,
    timestep: ArrayLike,
    *,
    config: WorldModelConfig,
    slot: ArrayLike | None = None,
    miss_policy: MissPolicy = "context_free",
    full_policy: FullPolicy = "error",
    reanalysis: bool = False,
    pads_are_read: bool = False,
    priority: ArrayLike | None = None,
) -> tuple[Store, Inference]:
    """A searched step: finds each parent's window, imagines one step, stores the child's window.

    A parent is looked up by its latent, in its environment's root pool and then among the searched
    nodes. Equal latents with different histories share that key. With `slot` (an earlier result's
    `slot`) parents are found by handle instead and children are filed by their path, so that equal
    latents are kept apart; use one way or the other for a whole search.

    Args:
      params: as in `initial_inference`.
      store: moved, see the module's text.
      latent: [B, E] float32, of the parent nodes.
      action: [B] integer in 0 .. A - 1, or [B, A] float32.
      env_id: [B] integer in 0 .. P - 1.
      depth: [B] integer, of the new nodes below their root (the default priority, shallow first).
      timestep: [B] integer, of the roots; read by rotary positions only.
      slot: [B] int32 handles of the parents' windows.
      miss_policy: "context_free" or "error", as in `initial_inference`.
      full_policy: what happens if the search has more nodes than the store was made for: "error"
        stores no window that has no room and raises (inside a jit of your own, `full` tells);
        "evict" forgets nodes of the running search, whose rows then miss.
      reanalysis: as in `initial_inference`.
      pads_are_read: reproduce release 0.2.0, whose rows attend to the padding of their batch.
      priority: [B] float32 for the "priority" eviction; `-depth` by default.

    Returns:
      The store and an `Inference`, as `initial_inference`.

    Raises:
      TypeError, ValueError, CacheMissError, StepInterrupt: as `initial_inference`; and more rows
        than the node pool's slots.
      StoreFullError: a new window has no room and the policy is "error".
    """
    folding.validate(params, config)
    rows = num_rows(latent)
    ids = {"env_id": env_id, "depth": depth, "timestep": timestep}
    ids |= {} if slot is None else {"slot": slot}
    validate_batch(store, config, rows, {"latent": latent}, action, ids)
    _require_priority(store, priority, rows)
    require_one_of("miss_policy", miss_policy, MISS_POLICIES)
    require_one_of("full_policy", full_policy, FULL_POLICIES)
    validate_actions("action", action, (rows,), config, or_first=False)
    if rows > pools.total_slots(store.nodes):
        raise ValueError(f"{rows} rows do not fit into {pools.total_slots(store.nodes)} node slots")

    def refuse(store: Store, out: Inference) -> None:
        if miss_policy == "error" and not reanalysis:
            _raise_on_miss(store, out.valid & ~out.hit)
        if full_policy == "error":
            _raise_on_full(store, out.full)

    arrays = _Rows(latent, action, env_id, timestep, priority, depth=depth, slot=slot)
    how = _How(config, miss_policy, reanalysis, full_policy, pads_are_read)
    return _uninterrupted(_recurrent, refuse, params, store, arrays, how)


def _require_priority(store: Store, priority: ArrayLike | None, rows: int) -> None:
    if priority is None:
        return
    require_shape("priority", priority, (rows,))
    policy = store.roots.eviction
    require(
        policy == "priority",
        f'priority is for a store with eviction "priority", got one with "{policy}"',
    )


def _uninterrupted(
    move: Callable[..., tuple[Store, Inference]],
    refuse: Callable[[Store, Inference], None],
    *args: Any,
) -> tuple[Store, Inference]:
    """Moves a store and looks at what came of it; an interrupt waits, and brings that store."""
    moved = None
    try:
        with interrupts.held():
            moved = move(*args)
            refuse(*moved)
    except KeyboardInterrupt as interrupt:
        if moved is None:
            raise
        raise StepInterrupt(*moved) from interrupt
    return moved


def _raise_on_miss(store: Store, missed: jax.Array) -> None:
    """On the host only: while an outer jit traces, nobody can tell."""
    if not isinstance(missed, jax.core.Tracer) and missed.any():
        raise CacheMissError(store, np.flatnonzero(missed).tolist())


def _raise_on_full(store: Store, full: jax.Array) -> None:
    if not isinstance(full, jax.core.Tracer) and np.asarray(full).any():
        raise StoreFullError(store, np.flatnonzero(full).tolist())


_step = functools.partial(jax.jit, static_argnames=("how",), donate_argnames=("store",))


@_step
def _initial(
    params: Params | UniZero, store: Store, rows: _Rows, how: _How
) -> tuple[Store, Inference]:
    config = how.config
    model, latent = folding.fold(params, config=config), computed_once(rows.latent)
    valid = _in_range(rows.env_id, stores.num_envs(store))
    starts = step.is_first(rows.action)
    valid &= starts | _is_action(rows.action, config)
    continues = valid & ~starts
    asks = continues & (not how.reanalysis)
    last_keys = stores.latent_keys(store, rows.last_latent, rows.env_id)
    found = stores.only(stores.find(store, last_keys, rows.env_id, roots_only=True), asks)
    missed = continues & ~found.hit
    kept = _kept(valid, missed, how)
    window = stores.take(store, found)
    if how.miss_policy == "rebuild" and not how.reanalysis:
        window = _recall(model, store, window, rows, missed, config)
        recalled = missed & (window.length > 0)
        store, missed = stores.count_rebuilt(store, recalled), missed & ~recalled
    window = _with_context(model, window, rows.last_latent, rows.timestep, missed, config)
    store = stores.count_lookups(store, found, asks, roots_only=True)
    store = stores.count_padding(store, window.length, continues)
    store = stores.touch(store, stores.only(found, kept))
    window, policy, value = step.root_step(
        model, window, rows.action, latent, rows.timestep, config=config
    )
    rank = rows.timestep if rows.priority is None else rows.priority
    store, handle = stores.add_roots(
        store,
        stores.latent_keys(store, latent, rows.env_id),
        rows.env_id,
        window,
        priority=rank.astype(jnp.float32),
        valid=kept,
    )
    store = stores.clear_nodes(store, when=jnp.any(kept))
    none, never = jnp.zeros_like(value), jnp.zeros_like(valid)
    return store, _poison(
        Inference(latent, none, policy, value, found.hit, handle, valid, full=never)
    )


@_step
def _recurrent(
    params: Params | UniZero, store: Store, rows: _Rows, how: _How
) -> tuple[Store, Inference]:
    config, env_id = how.config, rows.env_id
    model = folding.fold(params, config=config)
    valid = _in_range(env_id, stores.num_envs(store)) & _is_action(rows.action, config)
    keys = stores.latent_keys(store, rows.latent, env_id)
    if rows.slot is None:
        found = stores.find(store, keys, env_id)
    else:
        found = stores.resolve(store, rows.slot, env_id)
        keys = jnp.where(found.hit[:, None], stores.keys_of(store, found), keys)
    asks = valid & (not how.reanalysis)
    found = stores.only(found, asks)
    missed = valid & ~found.hit
    kept = _kept(valid, missed, how)
    window = stores.take(store, found)
    window = _with_context(model, window, rows.latent, rows.timestep, missed, config)
    store = stores.count_lookups(store, found, asks)
    store = stores.count_padding(store, window.length, valid)
    store = stores.touch(store, stores.only(found, kept))
    pads = jnp.max(window.length) - window.length if how.pads_are_read else None
    window, new = step.recurrent_step(
        model, window, rows.action, rows.depth, rows.timestep, config=config, zero_keys=pads
    )
    if rows.slot is None:
        child_keys = stores.latent_keys(store, new.latent, env_id)
    else:
        child_keys = jax.vmap(hashing.path_key)(keys, rows.action)
    rank = -rows.depth if rows.priority is None else rows.priority
    may_evict = how.full_policy == "evict"
    store, handle = stores.add_nodes(
        store,
        child_keys,
        window,
        priority=rank.astype(jnp.float32),
        valid=kept,
        may_evict=may_evict,
    )
    full = kept & (handle == NO_SLOT) & (not may_evict)
    return store, _poison(
        Inference(new.latent, new.reward, new.policy, new.value, found.hit, handle, valid, full)
    )


def _is_action(action: jax.Array, config: WorldModelConfig) -> jax.Array:
    if config.is_continuous:
        return jnp.all(jnp.isfinite(action), axis=-1)
    return _in_range(action, config.num_actions)


def _in_range(ids: jax.Array, size: int) -> jax.Array:
    return (ids >= 0) & (ids < size)


def _kept(valid: jax.Array, missed: jax.Array, how: _How) -> jax.Array:
    """Which rows may be stored: [B] bool."""
    if how.reanalysis:
        return jnp.zeros_like(valid)
    return valid & ~jnp.any(missed) if how.miss_policy == "error" else valid


def _with_context(
    model: UniZero,
    window: Window,
    latent: jax.Array,
    timestep: jax.Array,
    missed: jax.Array,
    config: WorldModelConfig,
) -> Window:
    """Gives rows that missed a context of one token, their latent's; free of cost if none did."""

    def alone() -> Window:
        empty = jax.tree.map(jnp.zeros_like, window)
        rebuilt = step.observe(model, empty, latent, timestep, config=config)
        return jax.vmap(windows.where)(missed, rebuilt, window)

    result: Window = loops.cond(jnp.any(missed), alone, lambda: window)
    return result


def _recall(
    model: UniZero,
    store: Store,
    window: Window,
    rows: _Rows,
    missed: jax.Array,
    config: WorldModelConfig,
) -> Window:
    """Gives rows that missed their environment's newest root, computed again."""

    def with_last(row: Window, latent: jax.Array) -> Window:
        last, raw = row.length - 1, jnp.asarray(row.raw)
        raw = raw.at[last].set(jnp.where(last < 0, raw[last], latent))
        return dataclasses.replace(row, raw=raw)

    def recalled() -> Window:
        newest = jax.vmap(with_last)(stores.latest_roots(store, rows.env_id), rows.last_latent)
        renewed = modes.rebuild(model, newest, config=config)
        return jax.vmap(windows.where)(missed, renewed, window)

    result: Window = loops.cond(jnp.any(missed), recalled, lambda: window)
    return result


def _poison(out: Inference) -> Inference:
    """NaN for rows that are not valid, so that nobody plans with them unnoticed."""

    def poison(x: jax.Array) -> jax.Array:
        return jnp.where(out.valid[:, None], x, jnp.nan)

    numbers = ("latent", "reward", "policy", "value")
    return dataclasses.replace(out, **{name: poison(getattr(out, name)) for name in numbers})
