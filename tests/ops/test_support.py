"""Supports and MuZero's value transform."""

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from kvjax.ops import support


def transform(x):
    """MuZero's h, in float64."""
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x


class SupportTest(chex.TestCase, parameterized.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_inverse_undoes_the_transform(self):
        x = np.concatenate([-np.logspace(-3, 4, 40), [0.0], np.logspace(-3, 4, 40)])
        back = self.variant(support.inverse_value_transform)(jnp.asarray(transform(x), jnp.float32))
        np.testing.assert_allclose(back, x, rtol=2e-6, atol=1e-6)

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(((-50, 50), 3), ((0, 4), 2), ((-2, 1), -1))
    def test_one_hot_logits_are_their_bin(self, bins, value):
        logits = np.where(np.arange(bins[0], bins[1] + 1) == value, 100.0, 0.0)
        out = self.variant(lambda x: support.to_scalar(x, bins))(jnp.asarray(logits, jnp.float32))
        expected = support.inverse_value_transform(jnp.float32(value))
        np.testing.assert_allclose(out, expected, rtol=1e-6)

    def test_expectation_comes_before_the_transform(self):
        logits = jnp.log(jnp.asarray([0.25, 0.0, 0.75]))  # bins 1, 2, 3
        np.testing.assert_allclose(transform(support.to_scalar(logits, (1, 3))), 2.5, rtol=1e-5)
