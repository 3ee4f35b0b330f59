"""Models of continuous actions: the folded one against Flax's, and both against plain numpy."""

import dataclasses
import functools

import chex
import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import SMALL, in_full, random_params, with_mode

from kvjax import checkpoint
from kvjax.config import SIGMA_TYPES, WorldModelConfig
from kvjax.model import folding, step
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.contexts import Contexts, advance, init_contexts

CONTINUOUS = dataclasses.replace(
    SMALL, num_actions=2, sigma_type="conditioned", num_sampled_actions=4
)
MAIN = {"layout": "main", "encoder_norm": "layernorm", "latent_norm": "layernorm"}


def by_flax(params, contexts, observation, last_action, action, *, config):
    """A step of the environment and an imagined one, row by row, unfolded."""
    latent = jax.vmap(functools.partial(flax_model.encode, params, config=config))(observation)
    starts = jnp.isnan(last_action).all(axis=1)
    timestep = jnp.where(starts, 0, contexts.timestep + 1)
    push = jax.vmap(functools.partial(flax_model.root_step, params, config=config))
    window, *heads = push(contexts.window, last_action, latent, timestep)
    imagine = jax.vmap(functools.partial(flax_model.recurrent_step, params, config=config))
    imagined = imagine(window, action, jnp.ones_like(timestep), timestep)
    return Contexts(window, timestep), heads, imagined


def folded(model, contexts, observation, last_action, action, *, config):
    contexts, *heads = advance(model, contexts, observation, last_action, config=config)
    depth = jnp.ones_like(contexts.timestep)
    imagined = step.recurrent_step(
        model, contexts.window, action, depth, contexts.timestep, config=config
    )
    return contexts, heads, imagined


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("learned", {"sigma_type": "independent", "bound_type": "tanh", "num_actions": 1}),
        *in_full(("rebuild", MAIN), ("rope_lightzero", {"sigma_type": "happo"})),
    ],
)
def test_the_folded_model_equals_the_model_over_an_episode_with_restarts(mode, changes):
    config = dataclasses.replace(with_mode(CONTINUOUS, mode), **changes)
    params, rng = random_params(config), np.random.default_rng(0)
    model = folding.fold(params, config=config)
    expected_step = jax.jit(functools.partial(by_flax, params, config=config))
    step_of = jax.jit(functools.partial(folded, model, config=config))
    expected = contexts = init_contexts(config, 3)
    for index in range(6):
        observation = rng.normal(size=(3, *config.observation_shape)).astype(np.float32)
        last, action = rng.normal(size=(2, 3, config.num_actions)).astype(np.float32)
        last[[False, index == 0, index in (0, 4)]] = np.nan  # row 0 goes on from nothing
        expected, *wanted = expected_step(expected, observation, last, action)
        contexts, *came = step_of(contexts, observation, last, action)
        chex.assert_trees_all_close((contexts, came), (expected, wanted), atol=2e-5)
    assert contexts.window.length.tolist() == [config.window.kept_length] * 2 + [3]
    assert contexts.timestep.tolist() == [5, 5, 1]


@pytest.mark.parametrize("sigma_type", SIGMA_TYPES)
def test_policy_and_action_against_numpy(sigma_type):
    """The published formulas in float64; deviations beyond their bounds included."""
    config = dataclasses.replace(CONTINUOUS, sigma_type=sigma_type, fixed_sigma_value=0.7)
    params = random_params(config)
    if sigma_type == "conditioned":
        params["params"]["policy_head"]["log_sigma"]["bias"] = jnp.array([9.0, -1.0])
    head = oracle.as_float64(params)["params"]["policy_head"]
    hidden, action = np.random.default_rng(1).normal(size=16), np.array([0.3, -0.9])
    deep = oracle.gelu(
        oracle.dense(oracle.gelu(oracle.dense(hidden, head["hidden"])), head["deeper"])
    )
    said = {
        "conditioned": lambda: np.exp(np.clip(oracle.dense(deep, head["log_sigma"]), -20, 2)),
        "fixed": lambda: np.full(2, 0.7),
        "independent": lambda: np.exp(head["log_sigma"][0]),
        "happo": lambda: 0.5 / (1 + np.exp(-head["log_sigma"][0])),
    }
    policy, _ = flax_model.read_observation(params, jnp.float32(hidden), config=config)
    expected = np.concatenate([oracle.dense(deep, head["mean"]), said[sigma_type]()])
    np.testing.assert_allclose(policy, expected, rtol=1e-5, atol=1e-6)
    kernel = oracle.as_float64(params)["params"]["action_embedding"]["kernel"]
    token = flax_model.embed_action(params, jnp.float32(action), config=config)
    np.testing.assert_allclose(token, oracle.simnorm(action @ kernel, 8), rtol=1e-5)


def test_a_checkpoint_comes_back(tmp_path):
    path, params = tmp_path / "pendulum.safetensors", random_params(CONTINUOUS)
    checkpoint.save(path, Checkpoint(CONTINUOUS, params))
    came = checkpoint.load(path)
    assert came.config == CONTINUOUS
    chex.assert_trees_all_equal(came.params, params)


def test_variables_of_other_actions_are_refused():
    discrete = dataclasses.replace(SMALL, num_actions=2)
    for config, other in ((CONTINUOUS, discrete), (discrete, CONTINUOUS)):
        with pytest.raises(ValueError, match="params are not those of this config: .*action_emb"):
            folding.validate(random_params(config), other)
    fixed = dataclasses.replace(CONTINUOUS, sigma_type="fixed")
    with pytest.raises(ValueError, match="policy_head/log_sigma/bias must have shape"):
        folding.validate(random_params(fixed), CONTINUOUS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sampled_actions": None}, "continuous actions need num_sampled_actions"),
        ({"num_sampled_actions": 0}, "num_sampled_actions must be a positive integer"),
        ({"sigma_type": None}, "num_sampled_actions must be at most num_actions 2, got 4"),
        ({"sigma_type": "wide"}, "sigma_type must be one of conditioned, fixed"),
        ({"bound_type": "clip"}, "bound_type must be one of tanh"),
        ({"simnorm_group": 5}, "simnorm_group must divide embed_dim 16"),
    ],
)
def test_what_is_no_configuration(changes, message):
    latents = {"encoder_norm": "layernorm", "latent_norm": "layernorm"}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONTINUOUS, **latents, **changes)


def test_an_older_configuration_is_discrete():
    fields = dataclasses.asdict(SMALL)
    for name in ("sigma_type", "fixed_sigma_value", "bound_type", "num_sampled_actions"):
        del fields[name]
    config = WorldModelConfig(**fields)
    assert config == SMALL
    assert (config.action_shape, config.policy_size, config.num_edges) == ((), 3, 3)
