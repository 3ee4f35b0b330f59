"""One token's attention against the softmax written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from absl.testing import parameterized

from kvjax.ops.attention import attend

C, H, D = 6, 2, 4


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((H, D), (2, H, D), (C, 2, H, D))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def expected(query, fresh, cached, length, zero_keys=0):
    """Attention over exactly the tokens that are there (and the zero keys, if any)."""
    pads = np.zeros((zero_keys, 2, H, D))
    held = np.concatenate([cached[:length], pads, fresh[None]]).astype(np.float64)
    scores = np.einsum("hd,khd->hk", query, held[:, 0]) / np.sqrt(D)
    return np.einsum("hk,khd->hd", oracle.softmax(scores), held[:, 1])


class AttendTest(chex.TestCase, parameterized.TestCase):
    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(range(C + 1))
    def test_reads_the_valid_slots_and_itself(self, length):
        query, fresh, cached = inputs()
        out = self.variant(attend)(query, fresh, cached, jnp.arange(C) < length)
        np.testing.assert_allclose(out, expected(query, fresh, cached, length), atol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_never_reads_an_invalid_slot(self):
        query, fresh, cached = inputs()
        poisoned = cached.copy()
        poisoned[3:] = 1e9
        valid = jnp.arange(C) < 3
        clean = self.variant(attend)(query, fresh, cached, valid)
        chex.assert_trees_all_equal(self.variant(attend)(query, fresh, poisoned, valid), clean)

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(0, 1, 4)
    def test_zero_keys_of_release_020(self, count):
        query, fresh, cached = inputs()
        out = self.variant(attend)(query, fresh, cached, jnp.arange(C) < 2, jnp.int32(count))
        np.testing.assert_allclose(out, expected(query, fresh, cached, 2, count), atol=1e-6)
        if count:
            masked = expected(query, fresh, cached, 2)
            assert np.abs(out - masked).max() > 0.01

    @chex.variants(with_jit=True, without_jit=True)
    def test_row_equals_row_alone(self):
        batch = [np.stack(leaves) for leaves in zip(*map(inputs, range(4)), strict=True)]
        valid = jnp.arange(C) < jnp.asarray([0, 1, 3, 6])[:, None]
        together = self.variant(jax.vmap(attend))(*batch, valid)
        for index in range(4):
            alone = self.variant(attend)(*inputs(index), valid[index])
            np.testing.assert_allclose(together[index], alone, atol=1e-6)

    def test_bfloat16_window_is_read_in_float32(self):
        query, fresh, cached = inputs()
        out = attend(query, fresh, jnp.asarray(cached, jnp.bfloat16), jnp.ones(C, bool))
        chex.assert_type(out, jnp.float32)
        np.testing.assert_allclose(out, expected(query, fresh, cached, C), atol=3e-2)
