"""UniZero as a search sees it: two tokens a step, an action's and the imagined latent's."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import WorldModelConfig
from kvjax.mcts import tokens as own_tokens
from kvjax.mcts.tokens import Node, Tokens, Transition, TreeModel
from kvjax.model import modes, unizero
from kvjax.model.unizero import UniZero
from kvjax.ops import support
from kvjax.ops.window import Window


@functools.lru_cache
def tree_model(config: WorldModelConfig) -> TreeModel:
    """The one of a configuration; of the roots it is told their timesteps [B]."""
    window, step = config.window, functools.partial(_step, config=config)
    return TreeModel(window.block, window.kept_length, step, config.mode.carry)


def empty_tokens(config: WorldModelConfig, rows: int, nodes: int) -> Tokens:
    """Tables of zeros and nodes without a window."""
    one = jnp.zeros(config.latent_shape, modes.table_dtype(config))
    like = (one,) * modes.num_tables(config)
    return own_tokens.empty_tokens(tree_model(config), like, rows, nodes)


def init_tokens(model: UniZero, window: Window, config: WorldModelConfig, nodes: int) -> Tokens:
    """Tables that hold the roots' windows: `window.kv` [B, C, L, 2, H, D]."""
    held = tuple(modes.held(model, window, config))
    empty = empty_tokens(config, window.length.shape[0], nodes)
    return own_tokens.with_roots(empty, held, window.length)


def _step(
    model: UniZero, node: Node, action: jax.Array, *, config: WorldModelConfig
) -> tuple[Any, Transition]:
    """Imagines a step: the action's token, the latent that it brings, and that one's token."""
    read = [part.astype(model.dtype) for part in node.tokens]
    cached, length = modes.as_read(model, read, config), node.length
    at_action, at_observation = modes.rotations(node.root, node.depth + 1, config)
    token_step = functools.partial(unizero.token_step, model, config=config)
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
    return tuple(held), Transition(reward, value, policy.T)
