"""The cached model against a full forward without cache, in float64."""

import dataclasses
import functools

import chex
import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import one_row
import oracle
import pytest
from conftest import SMALL, in_full, random_params

from kvjax.config import WorldModelConfig
from kvjax.model import step
from kvjax.ops import window as windows

MAIN = dataclasses.replace(SMALL, layout="main", encoder_norm="layernorm", latent_norm="layernorm")
LAYOUTS = pytest.mark.parametrize("config", [SMALL, MAIN], ids=["0.2.0", "main"])
ATOL = 2e-5


def play(config, params, steps, actions, latents):
    """Real steps by cache: windows and root predictions of one row."""
    window = windows.init(config.window)
    out = []
    for t in range(steps):
        action = jnp.int32(actions[t - 1] if t else step.FIRST_STEP)
        window, policy, value = one_row.root_step(
            params, window, action, latents[t], t, config=config
        )
        out.append((window, policy, value))
    return out


def episode(config, steps, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(steps, config.embed_dim)).astype(np.float32)
    return rng.integers(config.num_actions, size=steps), latents


def full_tokens(params, actions, latents):
    """o0 a0 o1 a1 o2 ... as the uncached model reads them."""
    table = params["params"]["action_embedding"]["embedding"]
    tokens = [latents[0]]
    for action, latent in zip(actions, latents[1:], strict=False):
        tokens += [table[action], latent]
    return np.asarray(tokens, np.float64)


@LAYOUTS
def test_cached_equals_full_forward_until_the_first_slide(config):
    params = random_params(config)
    reference = oracle.as_float64(params)
    actions, latents = episode(config, steps=4)
    cached = play(config, params, 4, actions, latents)
    hidden = oracle.forward(reference, full_tokens(params, actions, latents), config)
    for t, (_, policy, value) in enumerate(cached):
        at = hidden[2 * t]
        np.testing.assert_allclose(
            policy, oracle.head(at, reference["params"]["policy_head"]), atol=ATOL
        )
        np.testing.assert_allclose(
            value, oracle.head(at, reference["params"]["value_head"]), atol=ATOL
        )
    assert [int(w.length) for w, _, _ in cached] == [1, 3, 5, 5]


@LAYOUTS
def test_imagined_step_equals_full_forward(config):
    params = random_params(config)
    reference = oracle.as_float64(params)
    actions, latents = episode(config, steps=2)
    window = play(config, params, 2, actions, latents)[-1][0]
    _, out = one_row.recurrent_step(params, window, jnp.int32(1), 1, 1, config=config)

    action_token = reference["params"]["action_embedding"]["embedding"][1]
    tokens = np.concatenate([full_tokens(params, actions, latents), action_token[None]])
    at_action = oracle.forward(reference, tokens, config)[-1]
    latent = oracle.latent_head(at_action, reference["params"], config)
    np.testing.assert_allclose(
        out.reward, oracle.head(at_action, reference["params"]["reward_head"]), atol=ATOL
    )
    np.testing.assert_allclose(out.latent, latent, atol=ATOL)
    at_latent = oracle.forward(reference, np.concatenate([tokens, latent[None]]), config)[-1]
    np.testing.assert_allclose(
        out.policy, oracle.head(at_latent, reference["params"]["policy_head"]), atol=ATOL
    )
    np.testing.assert_allclose(
        out.value, oracle.head(at_latent, reference["params"]["value_head"]), atol=ATOL
    )


def test_slide_adds_the_projected_difference_of_positions():
    config = dataclasses.replace(SMALL, num_layers=1)
    params = random_params(config)
    reference = oracle.as_float64(params)["params"]
    actions, latents = episode(config, steps=4)
    correction = flax_model.slide_correction(params, config=config)
    window = play(config, params, 3, actions, latents)[-1][0]
    full = window
    for token in (
        flax_model.embed_action(params, jnp.int32(actions[2]), config=config),
        latents[3],
    ):
        _, kv = flax_model.token_step(params, token, full, config=config)
        full = windows.append(full, kv)
    slid = windows.slide(full, correction)
    table = reference["position_embedding"]["embedding"]
    for slot in range(5):
        moved = table[slot] - table[slot + 2]
        for side, name in enumerate(("key", "value")):
            added = (moved @ reference["blocks_0"][name]["kernel"]).reshape(config.num_heads, -1)
            np.testing.assert_allclose(
                slid.kv[slot, 0, side], full.kv[slot + 2, 0, side] + added, atol=ATOL
            )


@LAYOUTS
@pytest.mark.parametrize("jit", [True, *in_full(False)])
def test_batch_row_equals_row_alone_at_unequal_lengths(config, jit):
    params = random_params(config)
    steps = one_row.recurrent_step, one_row.root_step
    imagine, push = (functools.partial(f, params, config=config) for f in steps)
    imagine_all, push_all = (
        jax.jit(jax.vmap(functools.partial(f, params, config=config)))
        if jit
        else jax.vmap(functools.partial(f.__wrapped__, params, config=config))
        for f in steps
    )
    rows = []
    for steps in (1, 2, 3, 4):
        actions, latents = episode(config, steps, seed=steps)
        rows.append(play(config, params, steps, actions, latents)[-1][0])
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    assert sorted(np.asarray(batch.length)) == [1, 3, 5, 5]
    action = jnp.asarray([0, 2, 1, 1])
    last_action = jnp.asarray([0, -1, 1, 2])  # the second row restarts among the others
    latent = jnp.asarray(episode(config, 4)[1])
    depth = jnp.arange(1, 5)
    imagined = imagine_all(batch, action, depth, depth)
    pushed = push_all(batch, last_action, latent, depth)
    for b, window in enumerate(rows):
        alone = imagine(window, action[b], depth[b], depth[b])
        chex.assert_trees_all_close(jax.tree.map(lambda x, b=b: x[b], imagined), alone, atol=ATOL)
        alone = push(window, last_action[b], latent[b], depth[b])
        chex.assert_trees_all_close(jax.tree.map(lambda x, b=b: x[b], pushed), alone, atol=ATOL)
    assert np.asarray(pushed[0].length).tolist() == [3, 1, 5, 5]


def test_restart_forgets_the_past_exactly():
    params = random_params(SMALL)
    actions, latents = episode(SMALL, 4)
    used = play(SMALL, params, 3, actions, latents)[-1][0]
    fresh = windows.init(SMALL.window)
    restart = functools.partial(one_row.root_step, params, config=SMALL)
    action = jnp.int32(step.FIRST_STEP)
    chex.assert_trees_all_equal(
        restart(used, action, latents[3], 0), restart(fresh, action, latents[3], 0)
    )


@LAYOUTS
def test_encoder(config):
    params = random_params(config)
    p = oracle.as_float64(params)
    encoder, stats = p["params"]["encoder"], p["batch_stats"]["encoder"]["batch_norm"]
    observation = np.random.default_rng(0).normal(size=5)
    hidden = oracle.dense(observation, encoder["input"])
    norm = encoder["batch_norm"]
    hidden = (hidden - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    latent = oracle.dense(oracle.gelu(hidden), encoder["output"])
    if config.encoder_norm == "simnorm":
        latent = oracle.simnorm(latent, config.simnorm_group)
    else:
        latent = oracle.layer_norm(latent, encoder["final"]["norm"])
    out = flax_model.encode(params, jnp.asarray(observation, jnp.float32), config=config)
    np.testing.assert_allclose(out, latent, atol=ATOL)


def test_model_without_encoder_takes_latents():
    config = dataclasses.replace(SMALL, observation_size=None)
    latent = jnp.arange(16.0)
    out = flax_model.encode(random_params(config), latent, config=config)
    chex.assert_trees_all_equal(out, latent)


def test_positions_continue_beyond_a_short_table():
    config = dataclasses.replace(SMALL, max_tokens=4)
    params = random_params(config)
    table = np.asarray(params["params"]["position_embedding"]["embedding"])
    longer = [*table, *(table[3] + n * (table[3] - table[2]) for n in (1, 2, 3, 4))]
    extended = jax.tree.map(lambda x: x, params)
    extended["params"]["position_embedding"]["embedding"] = jnp.asarray(np.stack(longer))
    actions, latents = episode(config, 4)
    ours = play(config, params, 4, actions, latents)
    theirs = play(dataclasses.replace(config, max_tokens=8), extended, 4, actions, latents)
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)


def test_bfloat16_window_stays_close_to_float32():
    params = random_params(SMALL)
    actions, latents = episode(SMALL, 6)
    exact = play(SMALL, params, 6, actions, latents)
    half = play(dataclasses.replace(SMALL, dtype="bfloat16"), params, 6, actions, latents)
    chex.assert_type(half[-1][0].kv, jnp.bfloat16)
    errors = [np.abs(a[2] - b[2]).max() for a, b in zip(exact, half, strict=True)]
    assert 0 < max(errors) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide embed_dim 16, got 3"),
        ({"context_length": 7}, "context_length must be even"),
        ({"context_length": 2}, "context_length must be at least 4, got 2"),
        ({"embed_dim": 12, "num_heads": 2}, "simnorm_group must divide embed_dim 12, got 8"),
        ({"support": (3, 3)}, "first < last, got"),
        ({"num_actions": 0}, "num_actions must be a positive integer, got 0"),
        ({"observation_size": 0}, "observation_size must be a positive integer, got 0"),
        ({"layout": "0.3.0"}, "layout must be one of 0.2.0, main, got '0.3.0'"),
        ({"latent_norm": "batchnorm"}, "latent_norm must be one of simnorm, layernorm"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_configuration_is_hashable_and_static():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL))
    assert isinstance(SMALL, WorldModelConfig)
