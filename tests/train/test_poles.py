"""CartPole in JAX is Gymnasium's, step for step; an environment of one's own is ten lines."""

import re
import warnings
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.train import ENVIRONMENTS, CartPole, environments
from kvjax.train.environments import MASK


def gymnasiums(steps, seed):
    """States before and after random actions, and whether Gymnasium's episode ended with them."""
    with warnings.catch_warnings(action="ignore"):
        env = gymnasium.make("CartPole-v0").unwrapped
    rng, rows = np.random.default_rng(seed), []
    env.reset(seed=seed)
    for _ in range(steps):
        before, action = np.array(env.state), int(rng.integers(2))
        seen, reward, ended, _, _ = env.step(action)
        rows.append((before, action, seen, reward, ended))
        if ended:
            env.reset()
            env.state = tuple(rng.uniform(-1, 1, 4) * (2.4, 2, 0.2, 2))  # everywhere
    return [np.asarray(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", ["cartpole", "cartpole_masked"])
def test_cartpole_is_gymnasiums_step_for_step(name):
    env, key = ENVIRONMENTS[name], jax.random.key(0)
    before, action, seen, reward, ended = gymnasiums(steps=2000, seed=1)
    state, step = jax.jit(jax.vmap(env.step, (0, 0, None)))(
        before.astype(np.float32), jnp.asarray(action), key
    )
    np.testing.assert_allclose(state, seen, atol=2e-6)
    np.testing.assert_allclose(step.observation, seen * env.scale, atol=2e-5)
    np.testing.assert_array_equal(step.reward, reward)
    np.testing.assert_array_equal(step.terminated, ended)
    assert 20 < ended.sum() < 1000


def test_episodes_begin_as_gymnasiums():
    env = CartPole(scale=MASK)
    state, seen = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 1000))
    assert np.abs(state).max() <= 0.05 < 1.1 * np.abs(state).max()
    assert np.abs(np.mean(state, axis=0)).max() < 0.005
    np.testing.assert_allclose(seen, state * np.array(MASK, np.float32))


def test_what_is_played_is_the_environment_that_was_trained_in():
    env = ENVIRONMENTS["cartpole_masked"]
    assert env.played_as.env_id == "CartPole-v0"
    assert env.played_as.observation_scale == env.scale
    with warnings.catch_warnings(action="ignore"):
        assert gymnasium.spec("CartPole-v0").max_episode_steps == env.max_steps
    with pytest.raises(ValueError, match="scale must have 4 factors"):
        CartPole(scale=(1.0, 2.0))
    with pytest.raises(ValueError, match="max_steps must be a positive integer"):
        CartPole(max_steps=0)


def test_an_environment_of_your_own():
    """That of the page, which is that of the module's text."""
    root = Path(kvjax.__file__).parent.parent
    code = re.search(r"```python\n(.*?)```", (root / "docs" / "training.md").read_text(), re.S)[1]
    lines = [line.strip() for line in code[code.index("@dataclasses") :].splitlines()]
    assert not set(lines) - {line.strip() for line in environments.__doc__.splitlines()}
    names = {}
    exec(code, names)
    env, key = names["Walk"](), jax.random.key(0)
    state, _ = env.reset(key)
    for n in range(1, 11):
        state, step = env.step(state, jnp.int32(1), key)
        assert (float(step.reward), bool(step.terminated)) == (n, n > 9)
