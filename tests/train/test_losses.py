"""Loss terms and targets against plain numpy, term by term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL
from oracle import softmax

from kvjax.ops import support
from kvjax.train import Predictions, Targets, TrainConfig
from kvjax.train import losses as terms

B, T, N = 5, 7, 3


def test_value_transform_is_undone_by_its_inverse():
    x = np.linspace(-400, 400, 1001, dtype=np.float32)
    np.testing.assert_allclose(
        support.inverse_value_transform(terms.value_transform(x)), x, rtol=1e-5, atol=1e-5
    )


def test_two_hot_weighs_the_bins_on_both_sides():
    """-3 -2 -1 0 1 2 3: what lies between two bins is shared, what lies beyond is the last's."""
    x = np.array([0.0, 0.5, -7.3, 1e6, -1e6], np.float32)
    found = np.asarray(terms.two_hot(x, (-3, 3)))
    for value, weights in zip(x.tolist(), found, strict=True):
        place = np.sign(value) * (np.sqrt(abs(value) + 1) - 1) + 1e-3 * value
        place = min(max(place, -3), 3)
        expected, low = np.zeros(7), int(np.floor(place))
        expected[low + 3] += 1 - (place - low)
        if place > low:
            expected[low + 4] += place - low
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def plain_values(reward, terminated, truncated, own, bootstrap, discount):
    """Step by step, by what happens after each one."""
    values = np.zeros(bootstrap.shape)
    for row in range(B):
        for t in range(T):
            for i in range(N + 1):
                at, factor = t + i, discount**i
                if i == N:
                    values[row, t] += factor * bootstrap[row, t]
                elif truncated[row, at]:
                    values[row, t] += factor * own[row, at]
                    break
                else:
                    values[row, t] += factor * reward[row, at]
                    if terminated[row, at]:
                        break
    return values


def test_n_step_values():
    rng = np.random.default_rng(0)
    reward, own = rng.normal(size=(2, B, T + N))
    ends = rng.random((B, T + N)) < 0.25
    terminated, truncated = ends & (reward > 0), ends & (reward <= 0)
    bootstrap = 10 + rng.normal(size=(B, T))
    given = reward, terminated, truncated, own, bootstrap
    found = terms.n_step_values(*given, discount=0.9)
    assert terminated.sum() > 3 < truncated.sum()
    np.testing.assert_allclose(found, plain_values(*given, 0.9), atol=1e-5)


def test_a_mask_ends_behind_the_first_end():
    """A step that ends an episode still belongs to it: [. . x . x] counts three."""
    ended = np.array([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(
        terms.within_first_episode(ended), [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    )


def example():
    rng = np.random.default_rng(1)
    bins, width = SMALL.support_size, SMALL.embed_dim
    latents = [softmax(rng.normal(size=(B, T, width // 8, 8))).reshape(B, T, width) for _ in "ab"]
    said = Predictions(
        latents[0],
        rng.normal(size=(B, T, bins)),
        rng.normal(size=(B, T, SMALL.num_actions)),
        rng.normal(size=(B, T, bins)),
    )
    mask = np.arange(T)[None] < rng.integers(1, T + 1, B)[:, None]
    policy = softmax(rng.normal(size=(B, T, SMALL.num_actions)))
    true = Targets(latents[1], rng.normal(size=(B, T)), policy, 3 * rng.normal(size=(B, T)), mask)
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype != bool else bool), (said, true)
    )


def plain_losses(said, true, train):
    """Sums over the steps that count, weighed by their place, over their number."""
    mask = np.asarray(true.mask)
    bins = [np.asarray(terms.two_hot(x, SMALL.support)) for x in (true.reward, true.value)]
    sums = dict.fromkeys(("latent", "reward", "policy", "value", "entropy"), 0.0)
    for row in range(B):
        for t in range(T):
            weight = train.unroll_discount**t
            log = {
                name: np.log(softmax(np.asarray(getattr(said, name)[row, t], np.float64)))
                for name in ("reward", "policy", "value")
            }
            if mask[row, t]:
                sums["reward"] -= weight * (bins[0][row, t] * log["reward"]).sum()
                sums["value"] -= weight * (bins[1][row, t] * log["value"]).sum()
                sums["policy"] -= weight * (true.policy[row, t] * log["policy"]).sum()
                sums["entropy"] -= weight * (np.exp(log["policy"]) * log["policy"]).sum()
            if t + 1 < T and mask[row, t + 1]:
                ours, theirs = (
                    np.asarray(x, np.float64)
                    for x in (said.latent[row, t], true.latent[row, t + 1])
                )
                if train.latent_loss == "mse":
                    distance = ((ours - theirs) ** 2).mean()
                else:
                    distance = (theirs * np.log((theirs + 1e-6) / (ours + 1e-6))).sum() / 2
                sums["latent"] += weight * train.unroll_discount * distance
    count = {name: mask.sum() for name in sums} | {"latent": mask[:, 1:].sum()}
    means = {name: sums[name] / count[name] for name in sums}
    means["policy"] -= train.entropy_weight * means["entropy"]
    weights = {"latent": 10.0, "reward": 1.0, "policy": 1.0, "value": 0.5}
    return means | {"total": sum(weights[name] * means[name] for name in weights)}


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(),
        TrainConfig(latent_loss="mse", unroll_discount=0.8, entropy_weight=0.3),
    ],
    ids=["group_kl", "mse"],
)
def test_all_terms_and_their_sum(train):
    said, true = example()
    found = terms.losses(said, true, config=SMALL, train=train)
    expected = plain_losses(said, true, train)
    for name, value in dataclasses.asdict(found).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)


def test_what_is_masked_teaches_nothing():
    said, true = example()
    hidden = ~true.mask
    noise = lambda x: jnp.where(hidden.reshape(B, T, *[1] * (x.ndim - 2)), 0.125, x)  # noqa: E731
    other = Targets(*map(noise, (true.latent, true.reward, true.policy, true.value)), true.mask)
    for ours, theirs in zip(
        *(
            jax.tree.leaves(terms.losses(said, t, config=SMALL, train=TrainConfig()))
            for t in (true, other)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
