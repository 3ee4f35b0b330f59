"""An update of the weights: its gradients, its direction, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from conftest import random_params

from kvjax.train import learn
from kvjax.train.learn import Learner

CONFIG = tiny.SETUP.model
update = jax.jit(functools.partial(learn.update, config=CONFIG, train=tiny.TINY))


def test_gradients_are_finite_differences_in_float64():
    """Of the whole loss: encoder, batch statistics, transformer, heads, targets kept fixed."""
    with jax.enable_x64(True):
        params, target = (
            jax.tree.map(lambda x: x.astype(jnp.float64), random_params(CONFIG, seed))
            for seed in (0, 1)
        )
        batch = tiny.batch("float64")
        targets = learn.make_targets(target, batch, config=CONFIG, train=tiny.TINY)
        loss = functools.partial(
            learn.loss, params=params, batch=batch, targets=targets, config=CONFIG, train=tiny.TINY
        )
        value = jax.jit(lambda weights: loss(weights)[0])
        gradient = jax.jit(jax.grad(lambda weights: loss(weights)[0]))(params["params"])
        rng, small = np.random.default_rng(0), 1e-5
        for name in params["params"]:  # along a direction in each module, so that none is left out
            along = jax.tree.map(jnp.zeros_like, params["params"])
            along[name] = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), along[name])
            ahead, behind = (
                value(jax.tree.map(lambda x, d, s=s: x + s * d, params["params"], along))
                for s in (small, -small)
            )
            slope = sum(
                jnp.vdot(g, d)
                for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
            )
            np.testing.assert_allclose(
                slope, (ahead - behind) / (2 * small), rtol=1e-6, atol=1e-8, err_msg=name
            )
            assert abs(slope) > 1e-4, name


@functools.cache
def fresh():
    init = functools.partial(learn.init_learner, config=CONFIG, train=tiny.TINY)
    return jax.jit(init)(jax.random.key(0))


def test_updates_improve_what_a_fixed_batch_teaches():
    learner, found = fresh(), []
    for _ in range(40):
        learner, losses = update(learner, tiny.batch())
        found.append(losses)
    first, last = found[0], found[-1]
    assert last.total < 0.9 * first.total
    assert last.policy < 0.95 * first.policy
    assert last.reward < 0.8 * first.reward
    assert update._cache_size() == 1


def test_the_target_follows_slowly():
    begun = fresh()
    learner, _ = update(begun, tiny.batch())
    rate = tiny.TINY.target_rate
    jax.tree.map(
        lambda old, new, target: np.testing.assert_allclose(
            target, old + rate * (new - old), atol=1e-7
        ),
        begun.target,
        learner.params,
        learner.target,
    )
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), begun.params, learner.params)
    assert moved["params"]["reward_head"]["output"]["kernel"]
    assert moved["batch_stats"]["encoder"]["batch_norm"]["mean"]


def test_vectors_do_not_decay():
    """Without a gradient a matrix shrinks and a vector stays."""
    params = random_params(CONFIG)["params"]
    params = {"encoder": params["encoder"]}
    optimiser = learn.make_optimiser(tiny.TINY)
    none = jax.tree.map(jnp.zeros_like, params)
    change, _ = optimiser.update(none, optimiser.init(params), params)
    kernel, bias = (change["encoder"]["input"][name] for name in ("kernel", "bias"))
    shrunk = (
        -tiny.TINY.learning_rate * tiny.TINY.weight_decay * params["encoder"]["input"]["kernel"]
    )
    np.testing.assert_allclose(kernel, shrunk, rtol=1e-5)
    assert not np.any(bias)


def test_a_nan_anywhere_in_a_batch_is_seen():
    learner = fresh()
    assert learn.is_finite(update(learner, tiny.batch())[0])
    for name in ("observation", "reward", "policy"):
        batch = tiny.batch()
        value = getattr(batch, name)
        spoilt = batch.__class__(**vars(batch) | {name: value.at[0, 0].set(jnp.nan)})
        assert not learn.is_finite(update(learner, spoilt)[0]), name


def test_targets_use_the_target_network_alone():
    """Values and latents do not change with the weights that are trained."""
    one, other = random_params(CONFIG, 0), random_params(CONFIG, 1)
    losses = [
        update(Learner(weights, target, fresh().optimiser), tiny.batch())[1]
        for weights, target in ((one, one), (one, other))
    ]
    assert losses[0].policy == losses[1].policy
    assert losses[0].value != losses[1].value
    assert losses[0].latent != losses[1].latent
