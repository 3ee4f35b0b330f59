"""The steps of `kvjax.model.step` for one item, by its variables."""

import jax
import jax.numpy as jnp

from kvjax.model import modes, step, unizero


def _of_one(function, params, args, config, **options):
    model = unizero.fold(params, config=config)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
    return jax.tree.map(lambda x: x[0], function(model, *rows, config=config, **options))


def root_step(params, window, last_action, latent, timestep, *, config):
    return _of_one(step.root_step, params, (window, last_action, latent, timestep), config)


def recurrent_step(params, window, action, depth, timestep, *, config):
    return _of_one(step.recurrent_step, params, (window, action, depth, timestep), config)


def observe(params, window, latent, timestep, *, config):
    return _of_one(step.observe, params, (window, latent, timestep), config)


def encode(params, observation, *, config):
    return _of_one(unizero.encode, params, (observation,), config)


def rebuild(params, window, *, config):
    return _of_one(modes.rebuild, params, (window,), config)
