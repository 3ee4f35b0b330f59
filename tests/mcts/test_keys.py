"""Every node that was just stored is found: its key is that of the latent that was handed back."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import let_programs_go
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from kvjax import init_store, initial_inference, recurrent_inference
from kvjax.base.compilation import computed_once
from kvjax.config import WINDOW_MODES, WorldModelConfig
from kvjax.model import world_model
from kvjax.ops import hashing

pytestmark = pytest.mark.optimised  # rounding is XLA's affair

EXAMPLES = 100 if os.environ.get("KVJAX_FULL") else 1
QUICK = (Phase.explicit, Phase.generate)  # a smaller example is not worth its compilations
DEPTH = 2
HEAD_DIM = 4


@st.composite
def models(draw):
    mode = draw(st.sampled_from(WINDOW_MODES))
    embed_dim = 8 * draw(st.integers(1, 128))
    return WorldModelConfig(
        embed_dim=embed_dim,
        num_layers=1,
        num_heads=embed_dim // HEAD_DIM,
        num_actions=2,
        context_length=4,
        max_tokens=None if mode.startswith("rope") else 8,
        support=(-1, 1),
        layout=draw(st.sampled_from(["0.2.0", "main"])),
        latent_norm=draw(st.sampled_from(["simnorm", "layernorm"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        window_mode=mode,
    )


def random_weights(config):
    rng = np.random.default_rng(config.embed_dim)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape.shape, scale=0.1), shape.dtype)

    return jax.tree.map(draw, world_model.params_shapes(config))


# XLA computed this one's latent twice, and differently.
DIFFERED = WorldModelConfig(
    embed_dim=96,
    num_layers=1,
    num_heads=24,
    num_actions=2,
    context_length=4,
    max_tokens=8,
    support=(-1, 1),
    layout="main",
    latent_norm="layernorm",
    window_mode="rebuild",
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=QUICK,
)
@example(config=DIFFERED, rows=3, verify_keys=False, by_handle=False)
@given(config=models(), rows=st.integers(1, 9), verify_keys=st.booleans(), by_handle=st.booleans())
def test_what_was_just_stored_is_found(config, rows, verify_keys, by_handle):
    """By its latent, or by its handle; the windows of latents beside it are found by neither."""
    let_programs_go()  # each example compiles its own
    params = random_weights(config)
    store = init_store(config, rows, DEPTH, root_slots=2, verify_keys=verify_keys)
    rng = np.random.default_rng(rows)
    latent = rng.normal(size=(rows, config.embed_dim)).astype(np.float32)
    env_id, zeros = np.arange(rows), np.zeros(rows, np.int32)
    store, out = initial_inference(
        params, store, latent, zeros - 1, latent, env_id, zeros, config=config
    )
    for depth in range(1, DEPTH + 1):
        store, out = recurrent_inference(
            params,
            store,
            np.asarray(out.latent),
            zeros,
            env_id,
            zeros + depth,
            zeros,
            config=config,
            slot=np.asarray(out.slot) if by_handle else None,
            miss_policy="error",
        )
        assert out.hit.all()
    if config.window_mode == "rebuild":
        raw = np.asarray(store.nodes.entries.raw)
        stored = raw.reshape(-1, config.embed_dim)
        for row in np.asarray(out.latent):
            assert (stored == row).all(axis=1).any(), "a raw token is not the latent's bits"


@settings(max_examples=max(5, EXAMPLES), deadline=None, database=None, phases=QUICK)
@given(width=st.integers(1, 128).map(lambda eighths: 8 * eighths), rows=st.integers(1, 9))
def test_a_number_that_is_computed_once_has_the_same_bits_for_its_key(width, rows):
    """A LayerNorm of any width; where it is not computed once, most widths above 64 differ."""

    def normalise(x):
        x = x - jnp.mean(x)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-5)

    @jax.jit
    def hand_out_and_key(x):
        latent = computed_once(jax.vmap(normalise)(x))
        return latent, keys(latent)

    x = np.random.default_rng(width).normal(size=(rows, width)).astype(np.float32)
    latent, filed = hand_out_and_key(x)
    np.testing.assert_array_equal(filed, keys(latent))


@jax.jit
def keys(latent):
    return jax.vmap(lambda row: hashing.latent_key(row, 0, 0))(latent)


def test_what_is_computed_once_has_gradients_and_rows():
    x = jnp.arange(1.0, 4.0)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(computed_once(x) ** 2))(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(computed_once)(x[:, None]), x[:, None])
