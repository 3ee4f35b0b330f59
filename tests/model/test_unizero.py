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
from kvjax.model import folding, unizero
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
    folded = folding.fold(params, config=config)
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
    model = folding.prepare(random_params(config), config=config)
    folding.validate(model, config)
    other = dataclasses.replace(config, **change)
    if mode != "learned" and "context_length" in change:
        folding.validate(model, other)  # nothing of a rotary model depends on it
        return
    with pytest.raises(ValueError, match="prepared for .* call kvjax.prepare"):
        folding.validate(model, other)


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def test_a_product_of_bfloat16_weights():
    """Both sides are rounded, once; nothing else is."""
    draw = np.random.default_rng(0)
    weight, x = (draw.normal(size=shape).astype(np.float32) for shape in ((37, 129), (129, 9)))
    found = jax.jit(unizero.product)(jnp.asarray(weight, jnp.bfloat16), x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rounded(weight) @ rounded(x), rtol=0, atol=2e-5)
    assert np.abs(found - weight.astype(np.float64) @ x).max() > 1e-2
    weight = jnp.asarray(weight)
    np.testing.assert_array_equal(unizero.product(weight, x), weight @ x)


CONTINUOUS = {"sigma_type": "conditioned", "num_sampled_actions": 4}


@pytest.mark.parametrize("layout", [{}, MAIN, CONTINUOUS], ids=["0.2.0", "main", "continuous"])
def test_which_weights_become_bfloat16(layout):
    """Matrices of blocks and heads: all that a simulation multiplies by."""
    config = dataclasses.replace(SMALL, **layout)
    params = random_params(config)
    plain = folding.prepare(params, config=config)
    model = folding.prepare(params, config=config, dtype="bfloat16")
    named = zip(jax.tree.leaves_with_path(model), jax.tree.leaves(plain), strict=True)
    changed = {jax.tree_util.keystr(path) for (path, x), y in named if x.dtype != y.dtype}
    matrices = [
        f".blocks[{layer}].{name}.weight"
        for layer in range(2)
        for name in ("qkv", "projection", "expand", "contract")
    ]
    outputs = {"at_action": 2, "at_observation": 1 if layout is CONTINUOUS else 2}
    for pair, count in outputs.items():
        matrices += [f".{pair}.hidden.weight"]
        matrices += [f".{pair}.outputs[{index}].weight" for index in range(count)]
    if layout is CONTINUOUS:
        names = ("hidden", "deeper", "mean", "log_sigma")
        matrices += [f".gaussian.{name}.weight" for name in names]
    assert changed == set(matrices)
    np.testing.assert_array_equal(
        model.blocks[0].qkv.weight, plain.blocks[0].qkv.weight.astype(jnp.bfloat16)
    )
    assert model.dtype == jnp.float32
    assert folding.prepare(model, config=config) is model
    again = folding.prepare(model, config=config, dtype="float32")
    chex.assert_trees_all_equal(again, plain)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        folding.prepare(params, config=config, dtype="float16")


def test_steps_of_bfloat16_weights(monkeypatch):
    """The same as of numbers that were rounded, computed in float32."""
    config = with_mode(SMALL, "rebuild")
    params = random_params(config)
    model = folding.prepare(params, config=config, dtype="bfloat16")
    plain = folding.prepare(params, config=config)
    draw = np.random.default_rng(1)
    seen = draw.normal(size=(9, 3, *config.observation_shape)).astype(np.float32)
    acted = draw.integers(config.num_actions, size=(9, 3)).astype(np.int32)

    def episode(model):
        step = jax.jit(functools.partial(advance, model, config=config))
        contexts = init_contexts(config, 3)
        for observation, action in zip(seen, acted, strict=True):
            contexts, policy, value = step(contexts, observation, action)
        return policy, value

    found, exact = episode(model), episode(plain)
    monkeypatch.setattr(
        unizero,
        "product",
        lambda weight, x: weight.astype(jnp.float32) @ x.astype(weight.dtype).astype(jnp.float32),
    )
    same = episode(model)
    far = [np.abs(x - y).max() for x, y in zip(found, exact, strict=True)]
    near = [np.abs(x - y).max() for x, y in zip(found, same, strict=True)]
    assert max(near) < min(far) / 10
    assert 1e-4 < max(far) < 0.1
