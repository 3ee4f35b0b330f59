"""What environments carry from step to step: root windows and clocks; begun, advanced, replayed.

Shapes: B environments, T steps of a history, E embedding size, A actions, S support bins.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops, meshes
from kvjax.base.arrays import ArrayLike, is_deleted, validate_range
from kvjax.base.values import require, require_count, require_type
from kvjax.config import WorldModelConfig
from kvjax.model import folding, step, unizero
from kvjax.model.checks import validate_actions, validate_raw
from kvjax.model.folding import UniZero
from kvjax.model.world_model import Params
from kvjax.ops import window as windows
from kvjax.ops.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
    """What environments carry from step to step: their root windows and clocks.

    Attributes:
      window: a batch, `kv` [B, C, L, 2, H, D] and `length` [B].
      timestep: [B] int32, -1 before the first step.
    """

    window: Window
    timestep: jax.Array


def validate_contexts(contexts: Contexts, config: WorldModelConfig) -> None:
    """Refuses what are no contexts, donated ones, and those of another model or window mode."""
    require_type("contexts", contexts, Contexts, "kvjax.init_contexts")
    gone = is_deleted(contexts.timestep)
    require(not gone, "the contexts were donated to an earlier call: use those that came back")
    window, rows = contexts.window, contexts.timestep.shape
    validate_raw("contexts", window, config)
    expected = (*rows, config.context_length, *config.window.token_shape)
    if window.kv.shape != expected or window.kv.dtype != config.dtype:
        raise ValueError(
            f"the contexts hold windows {window.kv.dtype} {window.kv.shape}, the model's are"
            f" {config.dtype} {expected}"
        )


def init_contexts(
    config: WorldModelConfig, num_envs: int, *, mesh: jax.sharding.Mesh | None = None
) -> Contexts:
    """Empty contexts, one row per environment.

    Args:
      config: the model's configuration.
      num_envs: B.
      mesh: devices over which the rows are to lie, as many on each; on one device by default.

    Returns:
      `Contexts` with windows [B, C, L, 2, H, D] and timestep -1.

    Raises:
      TypeError: `config` is no `WorldModelConfig`, `mesh` no `Mesh`.
      ValueError: `num_envs` is not a positive integer, or no multiple of the mesh's devices.
    """
    require_type("config", config, WorldModelConfig, "kvjax.WorldModelConfig")
    num_envs = require_count("num_envs", num_envs)
    rows = None if mesh is None else meshes.over(mesh, "num_envs", num_envs)
    contexts: Contexts = _empty_on(rows)(config, num_envs)
    return contexts


@functools.lru_cache
def _empty_on(rows: jax.sharding.NamedSharding | None) -> Any:
    return jax.jit(_empty_contexts, static_argnums=(0, 1), out_shardings=rows)


def _empty_contexts(config: WorldModelConfig, num_envs: int) -> Contexts:
    empty = windows.init(config.window)
    window = jax.tree.map(lambda x: jnp.zeros((num_envs, *x.shape), x.dtype), empty)
    return Contexts(window=window, timestep=jnp.full((num_envs,), -1, jnp.int32))


def advance(
    model: UniZero,
    contexts: Contexts,
    observation: jax.Array,
    last_action: jax.Array,
    *,
    config: WorldModelConfig,
) -> tuple[Contexts, jax.Array, jax.Array]:
    """Takes what the environments did into their contexts.

    Args:
      observation: [B, *observation_shape].
      last_action: [B] int32, -1 restarts a row; or [B, A] float32, where NaN does.

    Returns:
      The new contexts, policy logits [B, A] and value logits [B, S] of the observations.
    """
    timestep = jnp.where(step.is_first(last_action), 0, contexts.timestep + 1)
    latent = unizero.encode(model, observation, config=config)
    window, policy, value = step.root_step(
        model, contexts.window, last_action, latent, timestep, config=config
    )
    return Contexts(window, timestep), policy, value


def replay(
    params: Params | UniZero,
    observation: ArrayLike,
    action: ArrayLike,
    length: ArrayLike,
    *,
    config: WorldModelConfig,
    contexts: Contexts | None = None,
) -> tuple[Contexts, jax.Array, jax.Array]:
    """Contexts of many recorded histories of unequal lengths, in one jitted call.

    They are those that the steps would have left one by one: for reanalysis, for resuming episodes,
    for a search from a recorded state.

    Args:
      observation: [B, T, *observation_shape] float32; what lies behind a row's length is not read.
      action: [B, T] integer; `action[:, i]` led to `observation[:, i]`, -1 begins an episode. A
        history that begins in the middle of an episode starts from its first observation alone.
        Continuous actions are [B, T, A] float32, and NaN begins an episode.
      length: [B] integer in 0 .. T, steps of each history.
      config: the model's configuration (static).
      contexts: where the histories continue from; empty by default. Rotary positions count from its
        clock. If their rows lie on a mesh, each device takes its own.

    Returns:
      `Contexts`, policy logits [B, A] and value logits [B, S] of each row's last observation (zeros
      where the length is 0).

    Raises:
      TypeError: an argument of another type.
      ValueError: variables or contexts of another configuration, a shape does not fit, or host
        arrays hold values out of range.
    """
    folding.validate(params, config)
    observation, action, length = (
        x if isinstance(x, jax.Array) else np.asarray(x) for x in (observation, action, length)
    )
    axes = 2 + len(config.action_shape)
    named = "[B, T, A]" if config.is_continuous else "[B, T]"
    require(action.ndim == axes, f"action must have shape {named}, got {action.shape}")
    rows, steps = action.shape[:2]
    validate_actions("action", action, (rows, steps), config)
    is_integer = jnp.issubdtype(length.dtype, np.integer)
    require(is_integer, f"length must be integers, got {length.dtype}")
    expected = {
        "observation": (observation, (rows, steps, *config.observation_shape)),
        "length": (length, (rows,)),
    }
    for name, (value, shape) in expected.items():
        require(value.shape == shape, f"{name} must have shape {shape}, got {value.shape}")
    validate_range("length", length, 0, steps)
    require(steps >= 1, "a history needs at least one step, got T = 0")
    contexts = init_contexts(config, rows) if contexts is None else contexts
    validate_contexts(contexts, config)
    given = contexts.timestep.shape[0]
    require(given == rows, f"contexts must have {rows} rows, got {given}")
    history = observation.astype(jnp.float32), step.as_taken(action), length.astype(jnp.int32)
    lie = meshes.rows_of(contexts.timestep)
    contexts, policy, value = _replay(params, contexts, history, config=config, rows=lie)
    return contexts, policy, value


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def _replay(
    params: Params | UniZero, contexts: Contexts, history: Any, *, config: Any, rows: Any
) -> Any:
    take_steps = functools.partial(_take_steps, config=config)
    by_row = meshes.spec(meshes.axes_of(rows, contexts.timestep))
    how = meshes.spec(), by_row, by_row
    return meshes.run(take_steps, (params, contexts, history), rows, how, by_row)


def _take_steps(
    params: Params | UniZero,
    contexts: Contexts,
    history: tuple[jax.Array, jax.Array, jax.Array],
    *,
    config: WorldModelConfig,
) -> tuple[Contexts, jax.Array, jax.Array]:
    observation, action, length = history
    model = folding.fold(params, config=config)
    rows = length.shape[0]

    def one_step(state: Any, recorded: Any) -> tuple[Any, None]:
        index, observed, acted = recorded
        moved = advance(model, state[0], observed, acted, config=config)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            alive = (index < length).reshape(rows, *[1] * (new.ndim - 1))
            return jnp.where(alive, new, old)

        return jax.tree.map(keep, moved, state), None

    steps = action.shape[1]
    observed, acted = (jnp.moveaxis(x, 1, 0) for x in (observation, action))
    by_step = jnp.arange(steps, dtype=jnp.int32), observed, acted
    step_of = functools.partial(advance, model, contexts, config=config)
    _, *outputs = jax.eval_shape(step_of, observation[:, 0], action[:, 0])
    policy, value = (jnp.zeros(x.shape, x.dtype) for x in outputs)
    start = contexts, policy, value
    result: tuple[Contexts, jax.Array, jax.Array] = loops.scan(one_step, start, by_step)[0]
    return result
