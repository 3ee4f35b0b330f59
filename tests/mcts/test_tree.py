"""The search of own tokens and the folded model; recorded searches are in test_verify_search."""

import dataclasses
import functools

import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, in_full, random_params, with_mode

from kvjax import SearchConfig, init_contexts, prepare
from kvjax.mcts import search
from kvjax.model import folding, unizero
from kvjax.ops import support
from kvjax.ops import window as windows
from kvjax.tools.parity import reference_tree

MAIN = dataclasses.replace(SMALL, layout="main", encoder_norm="layernorm", latent_norm="layernorm")
GROUPS = dataclasses.replace(SMALL, simnorm_group=4)


@pytest.mark.parametrize("config", [SMALL, MAIN, GROUPS], ids=["0.2.0", "main", "groups of 4"])
def test_folded_model_equals_the_model(config):
    params = random_params(config)
    length = np.asarray([0, 1, 3, 5], np.int32)
    valid = np.arange(8) < length[:, None]
    kv = np.random.default_rng(0).normal(size=(4, 8, *config.window.token_shape))
    kv = np.asarray(kv * valid[..., None, None, None, None], np.float32)
    action = np.asarray([0, 1, 2, 0], np.int32)

    def one_row(action, window):
        token = flax_model.embed_action(params, action, config=config)
        hidden, own = flax_model.token_step(params, token, window, config=config)
        reward, latent = flax_model.read_action(params, hidden, config=config)
        policy, value = flax_model.read_observation(params, hidden, config=config)
        return own, reward, latent, policy, value

    def all_rows(params, action, kv, length, valid):
        folded = folding.fold(params, config=config)
        x = unizero.place(folded, unizero.embed_action(folded, action), length)
        cached = tuple(
            tuple(kv[:, :, layer, kind].reshape(*kv.shape[:2], -1) for kind in range(2))
            for layer in range(config.num_layers)
        )
        x, own = unizero.token_step(folded, x, cached, valid, config=config)
        own = jnp.stack(own, axis=1).reshape(4, *config.window.token_shape)
        heads = (*unizero.at_action(folded, x, config=config), *unizero.at_observation(folded, x))
        return own, *(head.T for head in heads)

    expected = jax.jit(jax.vmap(one_row))(action, windows.Window(kv, length))
    found = jax.jit(all_rows)(params, action, kv, length, valid)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


recurrent_step = jax.jit(
    flax_model.recurrent_step, static_argnames="config"
)  # compiled once a mode
to_scalar = jax.jit(support.to_scalar, static_argnums=1)


def window_search(params, window, policy, timestep, config, search_config):
    """One row with a whole window per node, on the host: what own tokens must equal."""
    imagine = functools.partial(recurrent_step, params, config=config)
    grown = reference_tree.init(policy, np.ones(len(policy), bool), search_config)
    nodes, depths = [window], [0]
    for _ in range(search_config.num_simulations):
        parent, action = reference_tree.select(grown)
        depths.append(depths[parent] + 1)
        child, out = imagine(nodes[parent], jnp.int32(action), depths[-1], timestep)
        nodes.append(child)
        reward, value = (float(to_scalar(x, config.support)) for x in (out.reward, out.value))
        reference_tree.expand(grown, reward, value, np.asarray(out.policy))
    return grown


MODES = (
    ("learned", 64),
    ("rope_consistent", 4),
    ("rebuild", 20),
    ("reset", 4),
    *in_full(*(("learned", length) for length in (4, 8, 20))),
    *in_full(("rope_lightzero", 8), ("rebuild", 8), ("reset", 8)),
)


@pytest.mark.parametrize(("mode", "context_length"), MODES)
def test_own_tokens_equal_whole_windows(mode, context_length):
    """Deep searches from short, full and slid root windows; a row restarts on the way."""
    config = with_mode(dataclasses.replace(SMALL, context_length=context_length), mode)
    if not config.is_rotary:
        config = dataclasses.replace(config, max_tokens=max(24, context_length))
    restart, fills = 7, context_length // 2
    steps = max(12, restart + fills + 5)
    params, search_config = random_params(config), SearchConfig(num_simulations=30, discount=0.9)
    push = jax.jit(functools.partial(flax_model.root_step, params, config=config))
    encode = jax.jit(functools.partial(flax_model.encode, params, config=config))
    rng = np.random.default_rng(0)
    contexts = init_contexts(config, 2)
    for t in range(steps):
        observation = rng.normal(size=(2, 5)).astype(np.float32)
        action = rng.integers(0, 3, size=2)
        action[[t == 0, t in (0, restart)]] = -1
        before = contexts.window
        timesteps = np.array([t, t - restart if t >= restart else t])
        contexts, out = search(
            params,
            jax.random.key(0),
            contexts,
            observation,
            action,
            config=config,
            search=search_config,
        )
        if t % 4 == 3:
            for b in range(2):
                held = jax.tree.map(lambda x, b=b: np.asarray(x)[b], before)
                window, policy, _ = push(
                    held, jnp.int32(action[b]), encode(observation[b]), timesteps[b]
                )
                grown = window_search(
                    params, window, np.asarray(policy), timesteps[b], config, search_config
                )
                np.testing.assert_array_equal(
                    out.visit_counts[b], reference_tree.visit_counts(grown)
                )
                expected = reference_tree.root_value(grown)
                np.testing.assert_allclose(out.root_value[b], expected, rtol=1e-4, atol=1e-5)


def test_prepared_parameters_change_nothing():
    params, outputs = random_params(SMALL), []
    for given in (params, prepare(params, config=SMALL)):
        _, out = search(
            given,
            jax.random.key(0),
            init_contexts(SMALL, 2),
            np.ones((2, 5), np.float32),
            np.array([-1, -1]),
            config=SMALL,
            search=SearchConfig(num_simulations=10),
        )
        outputs.append(out)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *outputs)


@pytest.mark.parametrize("name", ["lightzero", "muzero", "gumbel"])
def test_every_tree_searches(name):
    _, out = search(
        random_params(SMALL),
        jax.random.key(0),
        init_contexts(SMALL, 2),
        np.ones((2, 5), np.float32),
        np.array([-1, -1]),
        config=SMALL,
        search=SearchConfig(num_simulations=12, tree=name, max_depth=2),
    )
    assert np.sum(out.visit_counts, axis=1).tolist() == [12, 12]
    assert (out.mean_depth >= 1).all()
    assert (out.mean_depth <= 2).all()


def test_a_row_with_nan_leaves_the_others_alone():
    observation = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    broken = observation.copy()
    broken[1] = np.nan
    clean, dirty = (
        search(
            random_params(SMALL),
            jax.random.key(0),
            init_contexts(SMALL, 3),
            seen,
            np.full(3, -1),
            config=SMALL,
            search=SearchConfig(num_simulations=10),
        )[1]
        for seen in (observation, broken)
    )
    assert np.isnan(dirty.root_value[1])
    for row in (0, 2):
        np.testing.assert_array_equal(dirty.visit_counts[row], clean.visit_counts[row])
        np.testing.assert_array_equal(dirty.root_value[row], clean.root_value[row])
