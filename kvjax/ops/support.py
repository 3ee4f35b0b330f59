"""Categorical supports to scalars. Shapes: S bins of a support with step 1."""

import jax
import jax.numpy as jnp

from kvjax.base.values import require

_EPSILON = 1e-3
"""Slope of MuZero's value transform far from zero."""


def inverse_value_transform(x: jax.Array) -> jax.Array:
    """Inverse of MuZero's `h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x`, element by element.

    Written without the cancelling difference of the usual form, so that float32 suffices.

    Args:
      x: [...].

    Source: MuZero (Schrittwieser et al., 2020), appendix F, after Pohlen et al. (2018).
    """
    shifted = jnp.abs(x) + 1.0 + _EPSILON
    root = 2.0 * shifted / (jnp.sqrt(1.0 + 4.0 * _EPSILON * shifted) + 1.0)
    return jnp.sign(x) * (root - 1.0) * (root + 1.0)


def to_scalar(logits: jax.Array, support: tuple[int, int], axis: int = -1) -> jax.Array:
    """Scalar value of categorical logits: softmax expectation, then the inverse transform.

    Args:
      logits: [..., S], or with the S bins along another axis.
      support: first and last bin; S = last - first + 1.

    Returns:
      [...].

    Raises:
      ValueError: another number of bins.
    """
    first, last = support
    came = logits.shape[axis]
    require(came == last - first + 1, f"support {support} has {last - first + 1} bins, got {came}")
    bins = jnp.arange(first, last + 1, dtype=logits.dtype)
    expectation = jnp.tensordot(jax.nn.softmax(logits, axis=axis), bins, axes=(axis, 0))
    return inverse_value_transform(expectation)
