"""Position tables and slide corrections against plain loops."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from kvjax.ops import position

RNG = np.random.default_rng(0)
C, E, L, H, D = 8, 6, 2, 3, 4
TABLE = RNG.normal(size=(10, E)).astype(np.float32)
KERNELS = RNG.normal(size=(L, 2, E, H * D)).astype(np.float32)


class PositionTest(chex.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 9, 10)
    def test_table_is_cut(self, length):
        np.testing.assert_array_equal(
            position.continue_table(jnp.asarray(TABLE), length), TABLE[:length]
        )

    @chex.all_variants(with_pmap=False)
    def test_table_continues_linearly(self):
        table = self.variant(lambda t: position.continue_table(t, 13))(jnp.asarray(TABLE))
        np.testing.assert_array_equal(table[:10], TABLE)
        for n in (1, 2, 3):
            expected = TABLE[-1] + n * (TABLE[-1] - TABLE[-2])
            np.testing.assert_allclose(table[9 + n], expected, rtol=1e-6)

    def test_table_of_one_row_cannot_continue(self):
        with pytest.raises(ValueError, match="1 row cannot reach 2"):
            position.continue_table(jnp.zeros((1, E)), 2)

    @chex.all_variants(with_pmap=False)
    def test_project(self):
        project = self.variant(lambda t, k: position.project(t, k, H))
        projected = project(jnp.asarray(TABLE[:C]), jnp.asarray(KERNELS))
        chex.assert_shape(projected, (C, L, 2, H, D))
        for slot in range(C):
            for layer in range(L):
                for side in range(2):
                    expected = (TABLE[slot] @ KERNELS[layer, side]).reshape(H, D)
                    np.testing.assert_allclose(projected[slot, layer, side], expected, atol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_slide_correction_is_new_minus_old_position(self):
        projected = RNG.normal(size=(C, L, 2, H, D)).astype(np.float32)
        correction = self.variant(position.slide_correction)(jnp.asarray(projected))
        chex.assert_shape(correction, (C - 3, L, 2, H, D))
        for slot in range(C - 3):
            np.testing.assert_array_equal(correction[slot], projected[slot] - projected[slot + 2])
