"""The native tree: LightZero's recorded searches, and windows of own tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_params, with_mode
from test_reference_tree import recorded_trees

from kvjax import (
    SearchConfig,
    fused,
    init_contexts,
    prepare,
    reference_tree,
    search,
    step,
    tree,
    world_model,
)
from kvjax.config import WINDOW_MODES
from kvjax.ops import support
from kvjax.ops import window as windows

MAIN = dataclasses.replace(SMALL, layout="main", encoder_norm="layernorm", latent_norm="layernorm")


@functools.partial(jax.jit, static_argnames="config")
def searched(prior, answers, config):
    def simulate(simulation, grown):
        path = tree.select(grown, config)
        edge = (jnp.arange(prior.shape[0]), *path.leaf())
        new = [answers[name][edge] for name in ("reward", "value", "logits")]
        return tree.expand(grown, path, simulation + 1, *new[:2], tree.softmax(new[2]), config)

    return jax.lax.fori_loop(0, config.num_simulations, simulate, tree.init(prior, config))


def test_two_hundred_recorded_searches(data):
    compared = 0
    for described, answers in recorded_trees(data):
        config = SearchConfig(described["simulations"], discount=described["discount"])
        batch = {name: jnp.asarray(value)[None] for name, value in answers.items()}
        legal = batch["legal"].astype(bool)
        prior = tree.softmax(batch["root_logits"], legal)
        if described["noise"]:
            prior = jnp.where(legal, prior * 0.75 + 0.25 * batch["noise"], tree.ILLEGAL)
        answered = {name: batch[name] for name in ("reward", "value", "logits")}
        grown = searched(prior, answered, config)
        np.testing.assert_array_equal(tree.visit_counts(grown)[0], answers["visits"])
        np.testing.assert_allclose(tree.root_value(grown)[0], answers["root_value"], rtol=1e-5)
        compared += 1
    assert compared == 200


@pytest.mark.parametrize("seed", [1000, 1001])
def test_recorded_episodes_of_the_trained_agent(data, masked_agent, seed):
    """Identical visits and actions on all 200 steps of an episode, about 195 of them slid."""
    with np.load(data / "cartpole_masked_episodes.npz") as archive:
        names = ("obs", "action", "visits", "root_value")
        recorded = {name: archive[f"seed{seed}/{name}"] for name in names}
    config, contexts = masked_agent.config, init_contexts(masked_agent.config, 1)
    params = prepare(masked_agent.params, config=config)
    for t in range(200):
        contexts, out = search(
            params,
            jax.random.key(0),
            contexts,
            recorded["obs"][[t]],
            np.array([recorded["action"][t - 1] if t else -1]),
            config=config,
            search=SearchConfig(num_simulations=25),
        )
        np.testing.assert_array_equal(out.visit_counts[0], recorded["visits"][t])
        np.testing.assert_allclose(out.root_value[0], recorded["root_value"][t], atol=2e-3)
        assert out.action[0] == recorded["action"][t]


@pytest.mark.parametrize("config", [SMALL, MAIN], ids=["0.2.0", "main"])
def test_folded_model_equals_the_model(config):
    params = random_params(config)
    folded = fused.fold(params, config=config)
    length = jnp.asarray([0, 1, 3, 5])
    valid = jnp.arange(8) < length[:, None]
    kv = np.random.default_rng(0).normal(size=(4, 8, *config.window.token_shape))
    kv = jnp.asarray(kv * valid[..., None, None, None, None], jnp.float32)
    action = jnp.asarray([0, 1, 2, 0])

    def one_row(action, window):
        token = world_model.embed_action(params, action, config=config)
        hidden, own = world_model.token_step(params, token, window, config=config)
        reward, latent = world_model.at_action(params, hidden, config=config)
        policy, value = world_model.at_observation(params, hidden, config=config)
        return own, reward, latent, policy, value

    expected = jax.vmap(one_row)(action, windows.Window(kv, length))
    x = fused.place(folded, fused.embed_action(folded, action), length)
    x, own = fused.token_step(folded, x, kv, valid)
    heads = (*fused.at_action(folded, x, config=config), *fused.at_observation(folded, x))
    for ours, theirs in zip((own, *(head.T for head in heads)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def window_search(params, window, policy, timestep, config, search_config):
    """One row with a whole window per node, on the host: what own tokens must equal."""
    correction = world_model.slide_correction(params, config=config)
    imagine = jax.jit(functools.partial(step.recurrent_step, params, correction, config=config))
    grown = reference_tree.init(policy, np.ones(len(policy), bool), search_config)
    nodes, depths = [window], [0]
    for _ in range(search_config.num_simulations):
        parent, action = reference_tree.select(grown)
        depths.append(depths[parent] + 1)
        child, out = imagine(nodes[parent], jnp.int32(action), depths[-1], timestep)
        nodes.append(child)
        reward, value = (
            float(support.to_scalar(x, config.support)) for x in (out.reward, out.value)
        )
        reference_tree.expand(grown, reward, value, np.asarray(out.policy))
    return grown


@pytest.mark.parametrize("context_length", [4, 8, 20])
@pytest.mark.parametrize("mode", WINDOW_MODES)
def test_own_tokens_equal_whole_windows(mode, context_length):
    """Deep searches from short, full and slid root windows; a row restarts on the way."""
    config = with_mode(dataclasses.replace(SMALL, context_length=context_length), mode)
    params, search_config = random_params(config), SearchConfig(num_simulations=30, discount=0.9)
    correction = world_model.slide_correction(params, config=config)
    push = jax.jit(functools.partial(step.root_step, params, correction, config=config))
    encode = functools.partial(world_model.encode, params, config=config)
    rng = np.random.default_rng(0)
    contexts = init_contexts(config, 2)
    for t in range(12):
        observation = rng.normal(size=(2, 5)).astype(np.float32)
        action = rng.integers(0, 3, size=2)
        action[[t == 0, t in (0, 7)]] = -1
        before = contexts.window
        timesteps = np.array([t, t % 7])
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
                held = jax.tree.map(lambda x, b=b: x[b], before)
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
            search=SearchConfig(num_simulations=5),
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
            search=SearchConfig(num_simulations=8),
        )[1]
        for seen in (observation, broken)
    )
    assert np.isnan(dirty.root_value[1])
    for row in (0, 2):
        np.testing.assert_array_equal(dirty.visit_counts[row], clean.visit_counts[row])
        np.testing.assert_array_equal(dirty.root_value[row], clean.root_value[row])
