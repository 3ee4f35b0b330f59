"""The steps of `kvjax.model.step` for one item, by its variables; `__wrapped__` is not jitted."""

import functools

import jax
import jax.numpy as jnp

from kvjax.model import folding, modes, step, unizero

_jit = functools.partial(jax.jit, static_argnames="config")


def _of_one(function, params, args, config):
    model = folding.fold(params, config=config)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
    return jax.tree.map(lambda x: x[0], function(model, *rows, config=config))


@_jit
def root_step(params, window, last_action, latent, timestep, *, config):
    return _of_one(step.root_step, params, (window, last_action, latent, timestep), config)


@_jit
def recurrent_step(params, window, action, depth, timestep, *, config):
    return _of_one(step.recurrent_step, params, (window, action, depth, timestep), config)


@_jit
def observe(params, window, latent, timestep, *, config):
    return _of_one(step.observe, params, (window, latent, timestep), config)


@_jit
def encode(params, observation, *, config):
    return _of_one(unizero.encode, params, (observation,), config)


@_jit
def rebuild(params, window, *, config):
    return _of_one(modes.rebuild, params, (window,), config)
