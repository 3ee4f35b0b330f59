"""The steps of one item, one token after the other, by the Flax module: what folding must equal.

The arguments are those of `kvjax.model.step`, with variables in place of the folded model.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.base import loops
from kvjax.model.modes import token_positions
from kvjax.model.step import FIRST_STEP, Prediction
from kvjax.model.world_model import WorldModel
from kvjax.ops import position
from kvjax.ops import window as windows


def _method(name):
    def apply(params, *args, config):
        return WorldModel(config).apply(params, *args, method=name)

    return jax.jit(apply, static_argnames="config")


encode, embed_action, positions = map(_method, ("encode", "embed_action", "positions"))
token_step, sequence = map(_method, ("token_step", "sequence"))
read_action, read_observation = map(_method, ("at_action", "at_observation"))


def projected_positions(params, *, config):
    blocks = [params["params"][f"blocks_{layer}"] for layer in range(config.num_layers)]
    kernels = [jnp.stack([block[name]["kernel"] for name in ("key", "value")]) for block in blocks]
    return position.project(positions(params, config=config), jnp.stack(kernels), config.num_heads)


def slide_correction(params, *, config):
    if config.window_mode != "learned":
        return None
    return position.slide_correction(projected_positions(params, config=config))


def rebuild(params, window, *, config):
    kept = config.window.kept_length
    _, kv = sequence(params, jnp.asarray(window.raw)[:kept], config=config)
    valid = jnp.arange(kept) < window.length
    kv = jnp.where(valid[:, None, None, None, None], kv, 0).astype(window.kv.dtype)
    return dataclasses.replace(window, kv=jnp.zeros_like(window.kv).at[:kept].set(kv))


def _push(params, token, window, place, config, zero_keys=None):
    hidden, kv = token_step(params, token, window, place, zero_keys, config=config)
    return hidden, windows.append(window, kv, None if window.raw is None else token)


def observe(params, window, latent, timestep, *, config):
    _, place = token_positions(config, timestep)
    return _push(params, latent, window, place, config)[1]


def root_step(params, window, last_action, latent, timestep, *, config):
    is_first = (
        jnp.all(jnp.isnan(last_action)) if config.is_continuous else last_action == FIRST_STEP
    )
    starts = is_first | (window.length == 0)
    taken = jnp.nan_to_num(last_action) if config.is_continuous else jnp.maximum(last_action, 0)
    action = embed_action(params, taken, config=config)
    at_action, at_observation = token_positions(config, timestep)
    _, continued = _push(params, action, window, at_action, config)
    window = windows.where(starts, windows.init(config.window), continued)
    hidden, window = _push(params, latent, window, at_observation, config)
    policy, value = read_observation(params, hidden, config=config)
    return make_room(params, window, latent, config), policy, value


def recurrent_step(params, window, action, depth, timestep, *, config, zero_keys=None):
    at_action, at_observation = token_positions(config, timestep, depth)
    token = embed_action(params, action, config=config)
    hidden, window = _push(params, token, window, at_action, config, zero_keys)
    reward, latent = read_action(params, hidden, config=config)
    hidden, window = _push(params, latent, window, at_observation, config, zero_keys)
    policy, value = read_observation(params, hidden, config=config)
    return make_room(params, window, latent, config), Prediction(latent, reward, policy, value)


def make_room(params, window, latent, config):
    if config.window_mode not in ("rebuild", "reset"):
        return windows.slide(window, slide_correction(params, config=config))

    def compute_again():
        if config.window_mode == "rebuild":
            return rebuild(params, windows.slide(window), config=config)
        return _push(params, latent, windows.init(config.window), None, config)[1]

    full = windows.overflows(window)
    return windows.where(full, loops.cond(full, compute_again, lambda: window), window)
