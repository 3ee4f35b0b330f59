"""Searches with drawn actions beside LightZero 0.2.0's own: its C++ tree, its Sampled UniZero."""

import functools

import jax
import numpy as np
import pytest
import sampled_lightzero

from kvjax import SearchConfig, init_contexts, lightzero, search
from kvjax.tools.bench import lightzero_020
from kvjax.tools.parity import reference_tree

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

SIMULATIONS, STEPS = 16, 20


@pytest.mark.parametrize(
    ("rows", "simulations", "draws", "policy", "options"),
    [
        (24, 25, 5, 2, {}),
        (16, 50, 20, 6, {"noise": True}),  # which reaches no score
        (16, 40, 3, 4, {"scale": 1e-3}),  # Q values closer together than the smallest range
        (24, 50, 6, -9, {"noise": True}),
        (8, 30, 20, -300, {"scale": 10.0}),
    ],
)
def test_numpys_tree_is_the_compiled_one(rows, simulations, draws, policy, options):
    rng = np.random.default_rng(0)
    trees = sampled_lightzero.random_search(rng, rows, simulations, draws, policy, **options)
    compared = [tree for tree in trees if tree is not None]
    for recorded in compared:
        tree, ties = sampled_lightzero.follow(recorded)
        np.testing.assert_array_equal(reference_tree.visit_counts(tree), recorded.visits)
        assert np.float32(reference_tree.root_value(tree)) == recorded.value
        assert ties <= 1
    assert len(compared) >= rows - 4


def test_a_prior_of_densities_is_noticed(monkeypatch):
    """LightZero's code has it beside the uniform one, and does not use it."""
    trees = sampled_lightzero.random_search(np.random.default_rng(1), 4, 20, 5, 2)
    uneven = np.float32([0.4, 0.3, 0.15, 0.1, 0.05])
    monkeypatch.setattr(reference_tree, "softmax", lambda logits: uneven)
    for recorded in trees:
        with pytest.raises(AssertionError):
            sampled_lightzero.follow(recorded)


@functools.cache
def model_of(kind):
    sizes = {"embed_dim": 32, "num_layers": 1, "num_heads": 4, "context_length": 8}
    actions = {"continuous": 2, "discrete": 30}[kind]
    return lightzero_020.build_model(
        observation_size=3,
        num_actions=actions,
        num_envs=1,
        num_simulations=SIMULATIONS,
        continuous_action_space=kind == "continuous",
        sigma_type="conditioned",
        bound_type=None,
        num_of_sampled_actions=5,
        **sizes,
    )


def episode(kind, monkeypatch):
    """An episode by LightZero's own search: observation, last action, network's answer and tree."""
    import torch

    model = model_of(kind)
    lightzero_020.clear(model)
    rng, last, action = np.random.default_rng(0), torch.zeros(1, 3), -1
    tree = sampled_lightzero.search_of(model, SIMULATIONS)
    size = model.world_model.action_space_size
    for time in range(STEPS):
        observation = rng.normal(size=(1, 3)).astype(np.float32)
        seen, times = torch.tensor(observation), np.array([time])
        with torch.no_grad(), sampled_lightzero.recording(monkeypatch) as recorder:
            out = model.initial_inference(last, [action], seen, times)
            roots = tree.roots(1, [[-1] * 5], size, 5, kind == "continuous")
            roots.prepare_no_noise(out.reward, out.policy_logits.tolist(), [-1])
            tree.search(roots, model, out.latent_state.numpy(), [-1], times)
            (recorded,) = sampled_lightzero.recorded_trees(recorder, roots)
        value = tree.inverse_scalar_transform_handle(out.value).numpy()[:, 0]
        yield observation, action, value, recorded
        last, best = seen, int(np.argmax(recorded.visits))
        action = recorded.draws[0, best]
        action = action if kind == "continuous" else int(action[0])


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_whole_searches_with_lightzeros_draws(kind, monkeypatch):
    """Visits of all searches of an episode are LightZero's, and values as near as float32 is."""
    config, params = lightzero.load(model_of(kind))
    assert config.num_sampled_actions == 5
    contexts, ties, seen = init_contexts(config, 1), 0, 0
    for observation, action, value, recorded in episode(kind, monkeypatch):
        if kind == "continuous":
            last = np.full((1, 2), np.nan, np.float32) if np.ndim(action) == 0 else action[None]
            draws = recorded.draws[None]
        else:
            last, draws = np.array([action]), recorded.draws[None, ..., 0].astype(np.int32)
        contexts, out = search(
            params,
            jax.random.key(0),
            contexts,
            observation,
            last,
            config=config,
            search=SearchConfig(num_simulations=SIMULATIONS),
            draws=draws,
        )
        np.testing.assert_array_equal(out.sampled_actions, draws[:, 0])
        np.testing.assert_allclose(out.network_value, value, atol=1e-3, rtol=1e-4)
        _, tied = sampled_lightzero.follow(recorded)
        ties, seen = ties + (tied > 0), seen + 1
        if tied == 0:
            np.testing.assert_array_equal(out.visit_counts[0], recorded.visits)
            np.testing.assert_allclose(out.root_value[0], recorded.value, atol=1e-3, rtol=1e-4)
    assert seen == STEPS
    assert ties <= 1
