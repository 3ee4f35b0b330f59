"""What a compiled loop collects is what a plain one does, episode by episode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from conftest import random_params

from kvjax import init_contexts, search
from kvjax.model import folding
from kvjax.train import Step, collect
from kvjax.train.reanalyse import reanalyse

ROWS, STEPS = 2, 12
CONFIG = dataclasses.replace(tiny.SETUP.model, observation_size=3)
SEARCH = tiny.TINY.evaluated


@dataclasses.dataclass(frozen=True)
class Walk:
    """To 3 on either side, in 3 steps at most; rewards tell where."""

    observation_size: int = 3
    num_actions: int = 2
    max_steps: int = 3

    def reset(self, key):
        state = jax.random.randint(key, (), -1, 2)
        return state, self.seen(state)

    def step(self, state, action, key):
        state = state + 2 * action - 1
        return state, Step(self.seen(state), 1.0 + state, jnp.abs(state) > 2)

    def seen(self, state):
        return jnp.sin(jnp.arange(3.0) + state)


def by_hand(params, begun):
    """Row by row and step by step; the states in which episodes begin are given."""
    env, contexts = Walk(), init_contexts(CONFIG, ROWS)
    states, clocks, scores = [int(s) for s in begun[0]], [0] * ROWS, [0.0] * ROWS
    last, out = np.full(ROWS, -1), []
    for t in range(STEPS):
        seen = np.stack([env.seen(jnp.int32(s)) for s in states])
        arguments = params, jax.random.key(0), contexts, seen, last
        contexts, found = search(*arguments, config=CONFIG, search=SEARCH)
        last, rows = np.array(found.action), []
        for row, action in enumerate(last.tolist()):
            states[row] += 2 * action - 1
            clocks[row], scores[row] = clocks[row] + 1, scores[row] + 1 + states[row]
            fell = abs(states[row]) > 2
            cut = clocks[row] == env.max_steps and not fell
            rows.append((seen[row], action, 1 + states[row], fell, cut, scores[row]))
            if fell or cut:
                states[row], clocks[row], scores[row], last[row] = (
                    int(begun[t + 1][row]),
                    0,
                    0.0,
                    -1,
                )
        out.append([np.asarray(x) for x in zip(*rows, strict=True)])
        out[-1] += [np.asarray(found.action_weights), np.asarray(found.root_value)]
    return [np.stack(x) for x in zip(*out, strict=True)]


def test_episodes_are_played_one_after_the_other():
    params, env = random_params(CONFIG, seed=4), Walk()
    actors = collect.begin(jax.random.key(1), env, ROWS, config=CONFIG)
    step = functools.partial(collect.play_step, env=env, config=CONFIG, search_config=SEARCH)
    model = jax.jit(functools.partial(folding.fold, config=CONFIG))(params)
    step, states, played = jax.jit(step), [np.array(actors.state)], []
    for t in range(STEPS):
        actors, one = step(model, actors, jax.random.key(t))
        states.append(np.array(actors.state))
        played.append(one)
    played = jax.tree.map(lambda *x: np.stack(x), *played)
    kept = played.transition
    ours = [kept.observation, kept.action, kept.reward, kept.terminated, kept.truncated]
    ours += [played.score, kept.policy, kept.value]
    for found, expected in zip(ours, by_hand(params, states), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert kept.truncated.any()
    assert kept.terminated.any()
    np.testing.assert_array_equal(played.ended, kept.terminated | kept.truncated)


def test_what_is_searched_again_by_the_same_weights_is_what_was_found():
    """Over ends of episodes; rows behind those that are searched stay as they are."""
    params, env = random_params(CONFIG), Walk()
    model = folding.fold(params, config=CONFIG)
    options = {"config": CONFIG, "search_config": SEARCH}
    actors = collect.begin(jax.random.key(1), env, ROWS + 1, config=CONFIG)
    play = functools.partial(collect.collect, env=env, steps=STEPS, **options)
    _, played = jax.jit(play)(model, actors, jax.random.key(0))
    found = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), played.transition)
    assert bool(found.truncated.any())
    nothing = {name: jnp.zeros_like(getattr(found, name)) for name in ("policy", "value")}
    spoilt = dataclasses.replace(found, **nothing)
    again = functools.partial(reanalyse, rows=ROWS, steps=STEPS - 2, **options)
    back = jax.jit(again)(params, jax.random.key(2), spoilt)
    for name in nothing:
        ours, theirs = getattr(back, name), np.array(getattr(found, name))
        theirs[ROWS:], theirs[:, STEPS - 2 :] = 0, 0
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
        assert np.ptp(theirs[:ROWS, : STEPS - 2]) > 0.1
