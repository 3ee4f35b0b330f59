"""The floor of a search: its matrix products alone, in the best layout, in one jit.

A simulation multiplies, for each of its two tokens, query, key and value (one matrix), projection
and the two of the feed-forward layer in each layer; then the hidden and output matrices of two
heads. The products form a chain, each reads what the one before it wrote, and all of them reach the
result, so that none can be left out or run beside another. What stands between them is as little
as that takes. Attention, norms, activations, the tree and the cache are left out.

Shapes: B rows, E embedding size, K hidden units of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.model.folding import Block, Heads, UniZero
from kvjax.model.unizero import product
from kvjax.tools.bench.timing import finished

_SMALLEST = 1e-6


def make(model: UniZero, *, rows: int, simulations: int) -> Callable[[], Any]:
    """A call that multiplies as often as a search of `rows` environments does, and blocks."""
    width = model.actions.shape[1]
    start = jnp.asarray(np.random.default_rng(0).normal(size=(width, rows)), jnp.float32)
    chain = compiled(model, start, simulations=simulations)
    return lambda: finished(chain(model, start))


def compiled(model: UniZero, start: jax.Array, *, simulations: int) -> Any:
    """The compiled chain; `as_text` shows its products."""
    return _chain.lower(model, start, simulations=simulations).compile()


def num_products(layers: int) -> int:
    """Matrix products of one simulation."""
    tokens, per_layer, per_head_pair = 2, 4, 3
    return tokens * (per_layer * layers + per_head_pair)


@functools.partial(jax.jit, static_argnames="simulations")
def _chain(model: UniZero, start: jax.Array, *, simulations: int) -> jax.Array:
    """Streams [E, B] after all simulations."""

    def simulate(_: jax.Array, x: jax.Array) -> jax.Array:
        for heads in (model.at_action, model.at_observation):
            for block in model.blocks:
                x = _layer(block, x)
            x = _heads(heads, x)
        return x

    result: jax.Array = jax.lax.fori_loop(0, simulations, simulate, start)
    return result


def _layer(block: Block, x: jax.Array) -> jax.Array:
    query, key, value = jnp.split(product(block.qkv.weight, x), 3)
    x = product(block.projection.weight, query + key * value)
    return product(block.contract.weight, product(block.expand.weight, x))


def _heads(heads: Heads, x: jax.Array) -> jax.Array:
    """Both heads' outputs, which reach the next stream by their extremes, at its scale."""
    parts = jnp.split(product(heads.hidden.weight, x), len(heads.outputs))
    pairs = zip(heads.outputs, parts, strict=True)
    outputs = [product(output.weight, part) for output, part in pairs]
    reached = sum(jnp.max(output, axis=0) for output in outputs)
    mixed = x + reached
    return mixed / (jnp.max(jnp.abs(mixed), axis=0) + _SMALLEST)
