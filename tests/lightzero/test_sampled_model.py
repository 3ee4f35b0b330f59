"""Models of LightZero's Sampled UniZero 0.2.0: read, and beside the real ones at random weights."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import lightzero
from kvjax.lightzero.traces import npz
from kvjax.model import folding, step, unizero
from kvjax.model.contexts import advance, init_contexts
from kvjax.tools.bench import lightzero_020
from kvjax.tools.parity.verify import verify

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

HEADS = {
    "conditioned": {"sigma_type": "conditioned", "bound_type": None},
    "fixed": {"sigma_type": "fixed", "fixed_sigma_value": 0.3, "bound_type": "tanh"},
    "independent": {"sigma_type": "independent", "bound_type": None},
    "happo": {"sigma_type": "happo", "bound_type": "tanh"},
}


@functools.cache
def model_of(name, num_actions=2):
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "context_length": 8}
    return lightzero_020.build_model(
        observation_size=3,
        num_actions=num_actions,
        num_envs=3,
        num_simulations=4,
        continuous_action_space=True,
        num_of_sampled_actions=6,
        **sizes,
        **HEADS[name],
    )


def steps_of(model, rows=3, steps=7):
    """Steps of the environment, each with an imagined one, as LightZero's policy asks for them."""
    import torch

    rng, last = np.random.default_rng(0), torch.zeros(rows, 3)
    actions = model.world_model.action_space_size
    for index in range(steps):
        observation = rng.normal(size=(rows, 3)).astype(np.float32)
        acted, action = rng.uniform(-1, 1, size=(2, rows, actions)).astype(np.float32)
        taken, time = list(acted) if index else [-1] * rows, np.full(rows, index)
        seen = torch.tensor(observation)
        with torch.no_grad():
            root = model.initial_inference(last, taken, seen, time)
            chosen = [(root.latent_state.numpy(), torch.tensor(action))]
            child = model.recurrent_inference(chosen, 0, [1] * rows, time)
        last = seen
        acted = acted if index else np.full_like(acted, np.nan)
        yield observation, acted, action, root, child


@pytest.mark.parametrize("name", HEADS)
def test_every_policy_head(name):
    """Of random streams."""
    import torch

    model = model_of(name)
    config, params = lightzero.load(model)
    folded = folding.prepare(params, config=config)
    stream = 5 * np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    with torch.no_grad():
        hidden = model.world_model.transformer.ln_f(torch.tensor(stream))
        theirs = model.world_model.head_policy.head_module(hidden)
    centred = (stream - stream.mean(axis=1, keepdims=True)).T
    policy, _ = jax.jit(unizero.at_observation)(folded, centred)
    expected = np.concatenate([theirs["mu"], theirs["sigma"]], axis=1)
    np.testing.assert_allclose(policy.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conditioned", "fixed"])
def test_every_head_along_an_episode(name):
    """All outputs within 1e-5 of LightZero's, over two slides."""
    model = model_of(name)
    config, params = lightzero.load(model)
    folded = folding.prepare(params, config=config)
    move = jax.jit(functools.partial(advance, config=config))
    imagine = jax.jit(functools.partial(step.recurrent_step, config=config))
    contexts, ones = init_contexts(config, 3), jnp.ones(3, jnp.int32)
    for observation, acted, action, root, child in steps_of(model):
        contexts, policy, value = move(folded, contexts, observation, acted)
        np.testing.assert_allclose(policy, root.policy_logits, atol=1e-5)
        np.testing.assert_allclose(value, root.value, atol=1e-5)
        _, came = imagine(folded, contexts.window, action, ones, contexts.timestep)
        theirs = {"latent": child.latent_state[:, 0], "reward": child.reward}
        theirs |= {"policy": child.policy_logits, "value": child.value}
        for field, wanted in theirs.items():
            np.testing.assert_allclose(getattr(came, field), wanted, atol=1e-5, err_msg=field)
    assert contexts.window.length.tolist() == [5, 5, 5]


@pytest.mark.parametrize("name", HEADS)
def test_what_tensors_tell_and_what_must_be_said(name):
    model, heads = model_of(name), HEADS[name]
    state = model.state_dict()
    own, params = lightzero.load(model)
    said = {"num_heads": 4, "context_length": 8, "num_sampled_actions": 6}
    if name != "conditioned":
        missing = "fixed_sigma_value" if name == "fixed" else "sigma_type"
        with pytest.raises(ValueError, match=f"{missing} is not stored in a LightZero checkpoint"):
            lightzero.load(state, **said)
    config, again = lightzero.load(state, **said, **{k: v for k, v in heads.items() if v})
    assert config == own
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (config.num_actions, config.sigma_type) == (2, name)
    other = "fixed" if name == "conditioned" else "conditioned"
    if name in ("conditioned", "fixed"):
        with pytest.raises(ValueError, match=f"sigma_type='{other}', but the tensors say '{name}'"):
            lightzero.load(state, **said, sigma_type=other)


def test_twenty_actions_are_drawn_unless_somebody_says():
    state = model_of("conditioned").state_dict()
    config, _ = lightzero.load(state, num_heads=4, context_length=8)
    own, _ = lightzero.load(model_of("conditioned"))
    assert config == dataclasses.replace(own, num_sampled_actions=20)


def test_copies_of_the_policy_must_agree():
    state = dict(model_of("conditioned").state_dict())
    (name,) = [x for x in state if x.endswith("fc_policy_head.mu.bias")]
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match="mu.bias differs from the first copy of"):
        lightzero.load(state, num_heads=4, context_length=8)


def test_a_discrete_model_has_no_deviations(data):
    path = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    with pytest.raises(ValueError, match="sigma_type='fixed', but the tensors say None"):
        lightzero.load(path, num_heads=2, context_length=8, sigma_type="fixed")


def test_an_attached_model_answers_as_before():
    """Caches by kvjax, LightZero's own beside them on every call; the last outputs compared too."""
    model = model_of("conditioned")
    lightzero_020.clear(model)
    plain = [(root.value, child.policy_logits, child.reward) for *_, root, child in steps_of(model)]
    attached = copy.deepcopy(model)
    lightzero_020.clear(attached)
    handle = lightzero.attach(attached.world_model, shadow=True)
    came = [
        (root.value, child.policy_logits, child.reward) for *_, root, child in steps_of(attached)
    ]
    told = handle.stats()
    handle.detach()
    assert told["root_hits"] == 3 * 6
    for ones, others in zip(came, plain, strict=True):
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of continuous actions: windows that slide, and a restart half way."""
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    return path, lightzero.record_trace(model_of("conditioned"), path, steps=8, simulations=4)


@pytest.mark.parametrize("route", ["tree", "store"])
def test_a_trace_of_continuous_actions_is_verified(recorded, route):
    report = verify(recorded[0], route=route, tolerance=1e-5)
    assert report.ok, report
    assert report.found["simulations"] == 32


def test_a_trace_says_which_gaussian_it_is_of(tmp_path):
    model, path = model_of("fixed"), tmp_path / "trace.npz"
    trace = lightzero.record_trace(model, path, rows=1, steps=2, simulations=1)
    own, _ = lightzero.load(model, encoder=None, num_sampled_actions=20)
    assert trace.config == own
    assert (own.sigma_type, own.fixed_sigma_value, own.bound_type) == ("fixed", 0.3, "tanh")


def test_the_walks_of_continuous_actions(recorded):
    _, trace = recorded
    steps = list(trace.steps())
    starts = [bool(np.isnan(step["action"]).all()) for step in steps]
    assert starts == [True, False, False, False, True, False, False, False]
    assert steps[1]["sim_action"].shape == (4, 3, 2)
    assert steps[1]["policy_logits"].shape == (3, 4)
    assert len({float(x) for step in steps for x in step["sim_action"].flat}) > 100


def changed(path, target, change):
    arrays = npz.read_arrays(path)
    change(arrays)
    np.savez(target, **arrays)
    return target


@pytest.mark.parametrize("name", ["step1/action", "step2/sim_action"])
def test_other_actions_are_found_out(recorded, tmp_path, name):
    def move(arrays):
        arrays[name] = arrays[name] + np.float32(0.1)

    assert not verify(changed(recorded[0], tmp_path / "moved.npz", move)).ok


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step1/action", np.array([[0.0, np.nan]] * 3), "step1/action holds 3 NaN or infinity"),
        ("step1/action", np.full((3, 2), np.inf), "step1/action holds 6 NaN or infinity"),
        ("step1/action", np.zeros(3), r"step1/action has shape \(3,\), expected \(3, 2\)"),
        ("step1/sim_action", np.full((4, 3, 2), np.nan), "step1/sim_action holds 24 NaN"),
    ],
)
def test_broken_actions_are_refused(recorded, tmp_path, name, value, message):
    path = changed(recorded[0], tmp_path / "broken.npz", lambda x: x.update({name: value}))
    with pytest.raises(ValueError, match=message):
        verify(path)
