"""A run that takes seconds, and batches for its learner."""

import jax.numpy as jnp
import numpy as np

from kvjax.train import ENVIRONMENTS, TrainConfig
from kvjax.train.collect import Transition
from kvjax.train.loop import Setup

TINY = TrainConfig(
    num_envs=2,
    collect_steps=6,
    num_simulations=3,
    updates=2,
    batch_size=4,
    unroll_steps=3,
    td_steps=2,
    embed_dim=16,
    num_layers=1,
    context_length=6,
    support=(-5, 5),
    replay_size=60,
    eval_episodes=2,
)
ENV = ENVIRONMENTS["cartpole_masked"]
SETUP = Setup(ENV, TINY)


def batch(dtype="float32", seed=0, size=TINY.batch_size):
    """Sequences of random steps, in some of which episodes end."""
    rng = np.random.default_rng(seed)
    shape = size, TINY.sequence_length
    shares = rng.dirichlet(np.ones(2), shape)
    ended = rng.random(shape) < 0.2
    observation = rng.normal(size=(*shape, 4))
    reward, value = rng.normal(size=(2, *shape))
    return Transition(
        observation=jnp.asarray(observation, dtype),
        action=jnp.asarray(rng.integers(2, size=shape), jnp.int32),
        reward=jnp.asarray(reward, dtype),
        terminated=jnp.asarray(ended & (reward > 0)),
        truncated=jnp.asarray(ended & (reward <= 0)),
        policy=jnp.asarray(shares, dtype),
        value=jnp.asarray(value, dtype),
    )
