"""Window modes: each against the full forward pass that it claims to equal."""

import dataclasses
import functools

import flax_model
import jax.numpy as jnp
import numpy as np
import one_row
import oracle
import pytest
from conftest import SMALL, random_params, with_mode

from kvjax.config import WINDOW_MODES
from kvjax.model import modes, step
from kvjax.ops import position
from kvjax.ops import window as windows

ROTARY = ("rope_lightzero", "rope_consistent")
STEPS = 200
ATOL = 1e-5


def play(config, params, steps, seed=0, dtype=np.float32):
    """One episode by the cache: actions, latents, and per step the window and root predictions."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(config.num_actions, size=steps)
    latents = rng.normal(size=(steps, config.embed_dim)).astype(dtype)
    push = functools.partial(one_row.root_step, params, config=config)
    window, out = windows.init(config.window), []
    for t in range(steps):
        action = np.int32(actions[t - 1] if t else step.FIRST_STEP)
        window, policy, value = push(window, action, latents[t], np.int32(t))
        out.append((window, policy, value))
    return actions, latents, out


def history_of(config, params, actions, latents):
    """The same episode as a list; yields it at each step, after the push and before the slide."""
    table = params["params"]["action_embedding"]["embedding"]
    history = oracle.History(config)
    for t, latent in enumerate(latents):
        if t:
            history.push(table[actions[t - 1]], 2 * t - 1)
        history.push(latent, 2 * t)
        yield history
        history.make_room()


def assert_head(ours, hidden, params, name):
    np.testing.assert_allclose(ours, oracle.head(hidden, params["params"][name]), atol=ATOL)


@pytest.mark.parametrize("mode", ROTARY)
def test_rotary_episode_equals_one_full_forward_of_all_its_tokens(mode):
    """Each token at its own position, attending to what was in its window when it was pushed."""
    config = with_mode(SMALL, mode)
    params = random_params(config)
    reference = oracle.as_float64(params)
    actions, latents, out = play(config, params, STEPS)
    *_, history = history_of(config, reference, actions, latents)
    hidden, kv = oracle.forward_with_kv(
        reference, history.tokens, config, history.positions, history.mask()
    )
    for t, (window, policy, value) in enumerate(out):
        assert_head(policy, hidden[2 * t], reference, "policy_head")
        assert_head(value, hidden[2 * t], reference, "value_head")
        length = int(window.length)
        held = kv[2 * t + 1 - length : 2 * t + 1]
        np.testing.assert_allclose(window.kv[:length], held, atol=ATOL)
    assert [int(window.length) for window, *_ in out[:5]] == [1, 3, 5, 5, 5]


@pytest.mark.parametrize("mode", ["rebuild", "reset"])
def test_window_equals_a_full_forward_over_its_own_tokens(mode):
    config = with_mode(SMALL, mode)
    params = random_params(config)
    reference = oracle.as_float64(params)
    actions, latents, out = play(config, params, STEPS)
    lengths = []
    for history, (window, policy, value) in zip(
        history_of(config, reference, actions, latents), out, strict=True
    ):
        tokens = [history.tokens[index] for index in history.window]
        hidden = oracle.forward(reference, tokens, config)[-1]
        assert_head(policy, hidden, reference, "policy_head")
        assert_head(value, hidden, reference, "value_head")
        history.make_room()
        kept = [history.tokens[index] for index in history.window]
        _, kv = oracle.forward_with_kv(reference, kept, config)
        assert int(window.length) == len(kept)
        np.testing.assert_allclose(window.kv[: len(kept)], kv, atol=ATOL)
        assert not np.any(window.kv[len(kept) :])
        lengths.append(len(kept))
    assert lengths[:8] == (
        [1, 3, 5, 5, 5, 5, 5, 5] if mode == "rebuild" else [1, 3, 5, 1, 3, 5, 1, 3]
    )


@pytest.mark.parametrize("mode", WINDOW_MODES)
@pytest.mark.parametrize("layout", ["0.2.0", "main"])
def test_sequence_equals_the_plain_forward(mode, layout):
    norm = "simnorm" if layout == "0.2.0" else "layernorm"
    config = with_mode(SMALL, mode)
    config = dataclasses.replace(config, layout=layout, latent_norm=norm)
    params = random_params(config)
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(6, config.embed_dim)).astype(np.float32)
    positions = np.array([0, 1, 3, 4, 5, 7], np.int32)
    sees = np.tril(rng.random((6, 6)) < 0.5) | np.eye(6, dtype=bool)
    hidden, kv = flax_model.sequence(
        params, tokens, positions, sees & ~np.eye(6, dtype=bool), config=config
    )
    expected = oracle.forward_with_kv(oracle.as_float64(params), tokens, config, positions, sees)
    np.testing.assert_allclose(hidden, expected[0], atol=ATOL)
    np.testing.assert_allclose(kv, expected[1], atol=ATOL)


def test_positions_of_the_reference():
    """Spec: root observation 2 t, root action 2 t - 1, then 2 (d + t) + 1 and 2 (d + t) + 2."""
    lightzero, consistent = (with_mode(SMALL, mode) for mode in ROTARY)
    t, d = jnp.int32(1), jnp.int32(1)
    for config in (lightzero, consistent):
        assert [int(x) for x in modes.token_positions(config, t)] == [1, 2]
    assert [int(x) for x in modes.token_positions(lightzero, t, d)] == [5, 6]
    assert [int(x) for x in modes.token_positions(consistent, t, d)] == [3, 4]
    assert [int(x) for x in modes.token_positions(lightzero, t, d + 3)] == [11, 12]
    assert modes.token_positions(SMALL, t, d) == (None, None)


@pytest.mark.parametrize("place", [0, 5, 8191, 8192, 100_001])
def test_rotation_is_that_of_an_endless_table(place):
    """As the reference makes its table: a float32 product of position and frequency."""
    frequencies = 1.0 / np.float32(10000) ** (np.arange(0, 8, 2, dtype=np.float32) / np.float32(8))
    angles = np.float32(place) * frequencies
    got = position.rotation(jnp.int32(place), 8, 10000.0)
    expected = [np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))]
    # One unit in the last place of a frequency turns the angle by that share of itself.
    np.testing.assert_allclose(got, expected, atol=1e-6 + 1e-7 * float(angles.max()))


def test_rotary_scores_depend_on_distance_alone_past_any_table():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 16)).astype(np.float32)

    def score(at, distance):
        turned = (
            position.rotate(x, position.rotation(jnp.int32(p), 16, 10000.0))
            for x, p in ((query, at), (key, at - distance))
        )
        return float(jnp.vdot(*turned))

    for distance in (0, 1, 5):
        near = score(10, distance)
        for at in (8191, 8192, 20_000):
            assert abs(score(at, distance) - near) < 5e-3
    assert abs(score(10, 1) - score(10, 5)) > 0.05


@pytest.mark.parametrize("mode", WINDOW_MODES)
def test_bfloat16_windows(mode):
    """The stated error: outputs within 0.05 of float32 windows after 40 steps with slides."""
    outputs = []
    for dtype in ("float32", "bfloat16"):
        config = with_mode(SMALL, mode)
        config = dataclasses.replace(config, dtype=dtype)
        params = random_params(config)
        outputs.append(np.stack([policy for _, policy, _ in play(config, params, 40)[2]]))
    error = np.max(np.abs(outputs[0] - outputs[1]))
    assert 1e-5 < error < 0.05
