"""The losses are LightZero 0.2.0's own, on the same weights and the same batch, gradients too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from kvjax import lightzero
from kvjax.train import Targets, TrainConfig, learn, network
from kvjax.train import losses as terms
from kvjax.train.collect import Transition

torch = pytest.importorskip("torch")
B, T, ACTIONS = 6, 10, 3


def example(config):
    """A batch that both take; `Transition` has steps behind the sequences, which nobody reads."""
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(ACTIONS), (B, T)).astype(np.float32)
    reward, value = rng.normal(size=(2, B, T)).astype(np.float32) * [[[1.0]], [[9.0]]]
    mask = np.arange(T)[None] < rng.integers(2, T + 1, B)[:, None]
    observation = rng.normal(size=(B, T, 4)).astype(np.float32)
    return observation, rng.integers(ACTIONS, size=(B, T)), reward, value, policy, mask


def theirs(model, target, batch, config):
    """What `compute_loss` says of a batch, and its gradients in kvjax's layout."""
    observation, action, reward, value, policy, mask = batch
    model.train()
    target.train()
    categories = [torch.tensor(np.array(terms.two_hot(x, config.support))) for x in (reward, value)]
    given = {
        "observations": torch.tensor(observation),
        "actions": torch.tensor(action),
        "timestep": torch.zeros(B, T, dtype=torch.long),
        "rewards": categories[0],
        "target_value": categories[1],
        "target_policy": torch.tensor(policy),
        "mask_padding": torch.tensor(mask),
        "ends": torch.zeros(B, T, dtype=torch.long),
    }
    found = model.world_model.compute_loss(given, target.world_model.tokenizer)
    found.loss_total.backward()
    state = dict(model.state_dict())
    for name, weight in model.named_parameters(remove_duplicate=False):
        state[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    sizes = {"num_heads": config.num_heads, "context_length": config.context_length}
    return found, lightzero.load(state, **sizes)[1]


def ours(params, target, batch, config, train):
    """The same by kvjax."""
    observation, action, reward, value, policy, mask = map(jnp.asarray, batch)
    latent, _ = network.encode(target, observation.reshape(-1, 4), config=config)
    targets = Targets(latent.reshape(B, T, -1), reward, policy, value, mask)
    nothing = jnp.zeros((B, T))
    steps = Transition(observation, action, reward, nothing, nothing, policy, value)
    loss = functools.partial(learn.loss, config=config, train=train)
    return jax.jit(jax.grad(loss, has_aux=True))(params["params"], params, steps, targets)


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(),
        TrainConfig(latent_loss="mse", unroll_discount=0.9, entropy_weight=0.1),
    ],
    ids=["group_kl", "mse"],
)
def test_terms_gradients_and_statistics(train):
    model = torch_models.make(num_actions=ACTIONS)
    target = torch_models.make(num_actions=ACTIONS, seed=1)
    config, params = lightzero.load(model)
    _, target_params = lightzero.load(target)
    wm = model.world_model
    wm.predict_latent_loss_type = train.latent_loss
    wm.gamma, wm.policy_entropy_weight = train.unroll_discount, train.entropy_weight
    batch = example(config)
    gradient, (found, statistics) = ours(params, target_params, batch, config, train)
    expected, their_gradient = theirs(model, target, batch, config)
    said = expected.intermediate_losses | {"total": expected.loss_total.detach()}
    names = {"latent": "loss_obs", "reward": "loss_rewards", "policy": "loss_policy"}
    names |= {"value": "loss_value", "entropy": "policy_entropy", "total": "total"}
    for name, value in dataclasses.asdict(found).items():
        np.testing.assert_allclose(
            value, torch.as_tensor(said[names[name]]).detach(), rtol=1e-4, err_msg=name
        )
    largest = max(np.abs(x).max() for x in jax.tree.leaves(their_gradient["params"]))
    for path, value in jax.tree_util.tree_leaves_with_path(their_gradient["params"]):
        entry = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
        np.testing.assert_allclose(entry, value, atol=1e-4 * largest, err_msg=str(path))
    moved = network.running(params, statistics, rows=B * T, rate=train.statistics_rate)
    _, after = lightzero.load(model)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        moved["batch_stats"],
        after["batch_stats"],
    )
