"""The folded model takes environments' steps as the model itself does, in every window mode."""

import dataclasses
import functools

import chex
import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, in_full, random_params, with_mode

from kvjax.config import WINDOW_MODES
from kvjax.model import unizero
from kvjax.model.contexts import Contexts, advance, init_contexts
from kvjax.model.step import FIRST_STEP

MAIN = {"layout": "main", "encoder_norm": "layernorm", "latent_norm": "layernorm"}


def by_flax(params, contexts, observation, last_action, *, config):
    """Row by row, unfolded."""
    latent = jax.vmap(functools.partial(flax_model.encode, params, config=config))(observation)
    timestep = jnp.where(last_action == FIRST_STEP, 0, contexts.timestep + 1)
    push = jax.vmap(functools.partial(flax_model.root_step, params, config=config))
    window, *heads = push(contexts.window, last_action, latent, timestep)
    return Contexts(window, timestep), *heads


CASES = [
    *((mode, MAIN) for mode in WINDOW_MODES),
    ("learned", {}),
    *in_full(*((mode, {}) for mode in WINDOW_MODES[1:])),
]


@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_equals_the_model_over_an_episode_with_slides_and_restarts(mode, layout):
    config = dataclasses.replace(with_mode(SMALL, mode), **layout)
    params = random_params(config)
    expected_step = jax.jit(functools.partial(by_flax, params, config=config))
    folded = unizero.fold(params, config=config)
    step = jax.jit(functools.partial(advance, folded, config=config))
    expected = contexts = init_contexts(config, 3)
    rng = np.random.default_rng(0)
    for index in range(12):
        observation = rng.normal(size=(3, *config.observation_shape)).astype(np.float32)
        restart = [False, index in (0, 5), index in (0, 9)]  # row 0 goes on from nothing
        action = np.where(restart, -1, rng.integers(0, config.num_actions, 3)).astype(np.int32)
        expected, *expected_heads = expected_step(expected, observation, action)
        contexts, *heads = step(contexts, observation, action)
        chex.assert_trees_all_close((contexts, heads), (expected, expected_heads), atol=2e-5)
    assert int(jnp.max(contexts.window.length)) == config.window.kept_length


@pytest.mark.parametrize("mode", ["learned", "rope_consistent"])
@pytest.mark.parametrize("change", [{"context_length": 10}, {"num_heads": 4}])
def test_what_was_prepared_for_another_configuration_is_refused(mode, change):
    """Its weights may be the same: positions and the queries' scale are not."""
    config = with_mode(SMALL, mode)
    model = unizero.prepare(random_params(config), config=config)
    unizero.validate(model, config)
    other = dataclasses.replace(config, **change)
    if mode != "learned" and "context_length" in change:
        unizero.validate(model, other)  # nothing of a rotary model depends on it
        return
    with pytest.raises(ValueError, match="prepared for .* call kvjax.prepare"):
        unizero.validate(model, other)
