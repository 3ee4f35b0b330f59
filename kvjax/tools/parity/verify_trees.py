"""Replays whole searches that LightZero's tree did, with the network as a table.

Shapes: B trees, A actions, N nodes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import SearchConfig
from kvjax.lightzero.traces import npz
from kvjax.lightzero.traces.search_trace import NOISE_FRACTION, RecordedTree, read_trees
from kvjax.mcts import puct
from kvjax.mcts import tree as trees
from kvjax.tools.parity import reference_tree
from kvjax.tools.parity.report import Report, compare, differences
from kvjax.tools.routes import Answer

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""Largest relative error of a root value."""


def verify_trees(path: str | Path, *, route: str = "tree", tolerance: float = TOLERANCE) -> Report:
    """Replays a tree trace.

    Args:
      path: see `kvjax.lightzero.traces.search_trace`.
      route: "tree" searches in jit, "store" with the tree of searches that live on the host.
      tolerance: largest relative error of a root value.

    Returns:
      Finds the number of `trees`, of those with `identical_visits`, and of `near_ties` that explain
      a difference; `max_root_value_error`, relative; and the `differences`. All is well if near
      ties explain all of them and every root value is within the tolerance.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no tree trace or is incomplete.
    """
    recorded = read_trees(path)
    _check_size(path, recorded)
    answers = {"tree": _search_in_jit, "store": _search_on_host}[route](recorded)
    searches = [
        compare(
            f"tree {index}",
            _answer(*answer),
            _answer(tree.visits, tree.root_value),
            functools.partial(_begin, tree),
        )
        for index, (tree, answer) in enumerate(zip(recorded, answers, strict=True))
    ]
    identical = sum(one.same_visits for one in searches)
    found = {"trees": len(recorded), "identical_visits": identical} | differences(searches)
    explained = identical + found["near_ties"] == len(recorded)
    ok = explained and found["max_root_value_error"] <= tolerance
    return Report(str(path), route, found, ok)


def _answer(visits: Array, root_value: float) -> Answer:
    """Trees are replayed without what was then done."""
    return Answer(visits, np.array(root_value), np.array(0))


def _check_size(path: str | Path, recorded: Sequence[RecordedTree]) -> None:
    """Tables are searched in batches, each tree in the size of the largest."""
    nodes = 1 + max(tree.config.num_simulations for tree in recorded)
    edges = sum(nodes * len(tree.legal) for tree in recorded)
    actions = max(len(tree.legal) for tree in recorded)
    what = f"{path}: {len(recorded)} trees of up to {nodes:,} nodes are too large"
    npz.check_bytes(what, 4 * edges * (actions + 2))


def _begin(recorded: RecordedTree) -> tuple[reference_tree.Tree, reference_tree.Network]:
    """The host's tree of a recorded search, and the network as its table says."""
    config = dataclasses.replace(recorded.config, noise_fraction=NOISE_FRACTION)
    tree = reference_tree.init(recorded.root_logits, recorded.legal, config, recorded.noise)
    tables = recorded.reward, recorded.value, recorded.logits
    return tree, lambda parent, action, depth: [table[parent, action] for table in tables]


def _search_on_host(recorded: Sequence[RecordedTree]) -> Iterator[tuple[Array, float]]:
    for one in recorded:
        tree, network = _begin(one)
        reference_tree.grow([tree], network)
        yield reference_tree.visit_counts(tree), reference_tree.root_value(tree)


def _search_in_jit(recorded: Sequence[RecordedTree]) -> list[tuple[Array, float]]:
    """Trees of as many actions and one discount are searched as one batch.

    A batch has as many rows as the next power of two, and every tree is as large as the largest, so
    that few programs serve all.
    """
    largest = max((tree.config for tree in recorded), key=lambda one: one.num_simulations)
    config = dataclasses.replace(largest, discount=1.0)  # data to the program

    def batch_of(index: int) -> tuple[int, float]:
        return len(recorded[index].legal), recorded[index].config.discount

    answers: dict[int, tuple[Array, float]] = {}
    for _, group in itertools.groupby(sorted(range(len(recorded)), key=batch_of), key=batch_of):
        indices = list(group)
        batch = [recorded[index] for index in indices]
        discount = np.float32(batch[0].config.discount)
        batch += batch[-1:] * ((1 << (len(batch) - 1).bit_length()) - len(batch))
        table = {
            name: np.stack([_padded(getattr(one, name), config) for one in batch])
            for name in ("reward", "value", "logits")
        }
        prior = _priors(batch)
        visits, values = (np.asarray(x) for x in _grow(prior, table, discount, config=config))
        for row, index in enumerate(indices):
            last = recorded[index].config.num_simulations - 1
            answers[index] = visits[last, row], float(values[last, row])
    return [answers[index] for index in range(len(recorded))]


def _padded(table: Array, config: SearchConfig) -> Array:
    """A table [N, A, ...] of a smaller tree in the size of the largest; nobody reads the rest."""
    missing = config.num_simulations + 1 - len(table)
    return np.pad(table, [(0, missing)] + [(0, 0)] * (table.ndim - 1))


def _priors(batch: Sequence[RecordedTree]) -> jax.Array:
    """Priors [B, A] of the roots, their recorded noise mixed in."""
    logits = np.stack([tree.root_logits for tree in batch])
    legal = np.stack([tree.legal for tree in batch])
    none = np.zeros(legal.shape[1], np.float32)
    noise = np.stack([none if tree.noise is None else tree.noise for tree in batch])
    noisy = np.array([tree.noise is not None for tree in batch])[:, None]
    mixed: jax.Array = _mixed(logits, legal, noise.astype(np.float32), noisy)
    return mixed


@jax.jit
def _mixed(logits: jax.Array, legal: jax.Array, noise: jax.Array, noisy: jax.Array) -> jax.Array:
    prior = puct.softmax(logits, legal)
    mixed = prior * (1 - NOISE_FRACTION) + NOISE_FRACTION * noise
    return jnp.where(legal, jnp.where(noisy, mixed, prior), puct.ILLEGAL)


@functools.partial(jax.jit, static_argnames="config")
def _grow(
    prior: jax.Array, table: dict[str, jax.Array], discount: Any, *, config: SearchConfig
) -> tuple[jax.Array, jax.Array]:
    """Searches B trees from priors [B, A] with the network as tables [B, N, A, ...].

    Returns:
      Visits [N - 1, B, A] and root values [N - 1, B] after each simulation.
    """
    rules, nothing = puct.Rules(config), jax.random.key(0)  # these rules draw nothing

    def simulate(grown: trees.Tree, simulation: jax.Array) -> tuple[trees.Tree, Any]:
        path = trees.select(grown, rules, trees.nowhere(prior.shape[0], config), nothing)
        edge = (jnp.arange(prior.shape[0]), *path.leaf())
        reward, value, logits = (table[name][edge] for name in ("reward", "value", "logits"))
        node = simulation + 1
        below = puct.softmax(logits)
        grown = trees.expand(grown, path, node, reward, value, below, discount)
        return grown, (trees.visit_counts(grown), trees.root_value(grown))

    simulations = jnp.arange(config.num_simulations)
    found: tuple[jax.Array, jax.Array]
    _, found = jax.lax.scan(simulate, trees.init(prior, config), simulations)
    return found
