"""UniZero as a search sees it: two tokens a step, an action's and the imagined latent's."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require_count, require_type
from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.mcts import policies, sampling, subtree
from kvjax.mcts.protocol import Node, Root, Transition, TreeModel
from kvjax.mcts.subtree import Kept
from kvjax.model import modes, root_window, unizero
from kvjax.model.contexts import Contexts
from kvjax.model.folding import UniZero
from kvjax.ops import support

_LONG = 128
"""Context length in tokens from which a copy of a window takes longer than what saves it."""


@functools.lru_cache
def tree_model(config: WorldModelConfig) -> TreeModel:
    """The one of a configuration; of the roots it is told their timesteps [B]."""
    window, step = config.window, functools.partial(_step, config=config)
    return TreeModel(window.block, window.kept_length, step, config.mode.carry, in_place(config))


def in_place(config: WorldModelConfig) -> bool:
    """Whether windows are long enough to be read where they lie, and read as they are."""
    return config.context_length >= _LONG and not config.mode.keeps_raw


def root(
    model: UniZero,
    contexts: Contexts,
    policy: jax.Array,
    value: jax.Array,
    legal: jax.Array | None,
    config: WorldModelConfig,
) -> Root:
    """Contexts as a search sees them.

    Args:
      policy: [B, P], and `value` [B], of their last observations.
      legal: [B, A] bool; None: all actions.
    """
    window = contexts.window
    dtype = modes.table_dtype(config)
    held = tuple(part.astype(dtype) for part in modes.held(model, window, config))
    arranged = None
    if in_place(config):
        parts = tuple(part.astype(model.dtype) for part in held)
        positions = model.projected
        arranged = root_window.arrange(parts, window.length, positions, config.num_heads)
    data = contexts.timestep, arranged
    return Root(held, window.length, policy, value, data=data, legal=legal)


def init_kept(config: WorldModelConfig, num_envs: int, search: SearchConfig) -> Kept:
    """Empty trees to begin with, where a loop needs something to carry.

    Returns:
      `Kept` with edges [N, B, F, A], tables [M, B, E] and windows [N, B, T].

    Raises:
      TypeError: an argument of another type.
      ValueError: the search has no `kept_nodes`, the model draws actions, or `num_envs` is not a
        positive integer.
    """
    require_type("config", config, WorldModelConfig, "kvjax.WorldModelConfig")
    require_type("search", search, SearchConfig, "kvjax.SearchConfig")
    num_envs = require_count("num_envs", num_envs)
    sampling.validate(search, config)
    subtree.require_kept_nodes(search)
    shape: Any = jax.ShapeDtypeStruct
    window = (num_envs, config.window.kept_length, *config.latent_shape)
    tokens = (shape(window, modes.table_dtype(config)),) * modes.num_tables(config)
    length = shape((num_envs,), jnp.int32)
    empty = Root(tokens, length, shape((num_envs, config.num_actions), jnp.float32), length)
    fields = policies.num_fields(search, discounted=False, raw=False)
    return subtree.begin(tree_model(config), empty, search, fields)


def _step(
    model: UniZero, rng: jax.Array, node: Node, action: jax.Array, *, config: WorldModelConfig
) -> tuple[Any, Any, Transition]:
    """Imagines a step: the action's token, the latent that it brings, and that one's token.

    Where nodes draw actions they are the node's state, and `action` [B] is a place among them.
    """
    read = [part.astype(model.dtype) for part in node.tokens]
    timestep, arranged, *draws = node.root
    if config.num_sampled_actions is not None:
        action = sampling.taken(node.state, action)
    if arranged is None:
        view, cached = None, modes.as_read(model, read, config)
    else:
        view, cached = root_window.View(arranged, node.at_root), modes.layers(read)
    length = node.length
    at_action, at_observation = modes.rotations(timestep, node.depth + 1, config)
    token_step = functools.partial(unizero.token_step, model, config=config, at_root=view)
    acted = unizero.embed_action(model, action)
    x = unizero.place(model, acted, length)
    x, first = token_step(x, cached, node.valid, (), at_action)
    reward, latent = unizero.at_action(model, x, config=config)
    observed = unizero.embed_latent(latent)
    x = unizero.place(model, observed, length + 1)
    x, second = token_step(x, cached, node.valid, (first,), at_observation)
    policy, value = unizero.at_observation(model, x)
    held = modes.block_held(model, (acted, observed), (first, second), length, config)
    reward, value = (support.to_scalar(x, config.support, axis=0) for x in (reward, value))
    tokens = tuple(part.astype(modes.table_dtype(config)) for part in held)
    drawn, policy = None, policy.T
    if config.num_sampled_actions is not None:
        drawn, policy = sampling.of_new_node(rng, node, draws[0], policy, config)
    return tokens, drawn, Transition(reward, value, policy)
