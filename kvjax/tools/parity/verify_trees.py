"""Replays whole searches that LightZero's tree did, with the network as a table.

Shapes: B trees, A actions, N nodes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import SearchConfig
from kvjax.lightzero.traces import npz
from kvjax.lightzero.traces.search_trace import NOISE_FRACTION, RecordedTree, read_trees
from kvjax.mcts import tree as trees
from kvjax.tools.parity import near_ties, reference_tree

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""Largest relative error of a root value."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A search whose visits are not the recorded ones."""

    where: str
    visits: list[int]
    recorded: list[int]
    margin: float | None  # difference of the two scores of the near tie that explains it


@dataclasses.dataclass(frozen=True)
class TreeReport:
    """What the replay of a tree trace found."""

    trace: str
    route: str
    trees: int
    identical_visits: int
    near_ties: int  # differences that a near tie explains
    max_root_value_error: float  # relative; infinite where a value is not finite
    differences: tuple[Difference, ...]
    ok: bool  # every difference is a near tie and every root value within the tolerance

    def as_json(self) -> dict[str, Any]:
        """Fields for `--json`; an infinite error is null."""
        return as_json(self)


def as_json(report: Any) -> dict[str, Any]:
    """Fields of a report of searches; an infinite error is null."""
    error = report.max_root_value_error
    fields = dataclasses.asdict(report)
    return fields | {"max_root_value_error": error if math.isfinite(error) else None}


def relative_error(ours: float, theirs: float) -> float:
    """Relative to `theirs`; infinite where `ours` is not finite."""
    if not math.isfinite(ours):
        return math.inf
    return abs(ours - theirs) / abs(theirs) if theirs else abs(ours)


def difference(where: str, ours: Array, theirs: Array, tie: near_ties.NearTie | None) -> Difference:
    """A difference of visits [A], and what explains it."""
    margin = tie.margin if tie else None
    return Difference(where, np.asarray(ours).tolist(), np.asarray(theirs).tolist(), margin)


def verify_trees(
    path: str | Path, *, route: str = "tree", tolerance: float = TOLERANCE
) -> TreeReport:
    """Replays a tree trace.

    Args:
      path: see `kvjax.lightzero.traces.search_trace`.
      route: "tree" searches in jit, "store" with the tree of searches that live on the host.
      tolerance: largest relative error of a root value.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no tree trace or is incomplete.
    """
    recorded = read_trees(path)
    _check_size(path, recorded)
    answers = {"tree": _search_in_jit, "store": _search_on_host}[route](recorded)
    worst, differences = 0.0, []
    for index, (tree, (visits, root_value)) in enumerate(zip(recorded, answers, strict=True)):
        if not np.array_equal(visits, tree.visits):
            start = functools.partial(_begin, tree)
            tie = near_ties.find(start, visits, tree.visits) if math.isfinite(root_value) else None
            differences.append(difference(f"tree {index}", visits, tree.visits, tie))
            root_value = tie.root_value if tie else root_value
        worst = max(worst, relative_error(root_value, tree.root_value))
    explained = sum(d.margin is not None for d in differences)
    return TreeReport(
        trace=str(path),
        route=route,
        trees=len(recorded),
        identical_visits=len(recorded) - len(differences),
        near_ties=explained,
        max_root_value_error=worst,
        differences=tuple(differences),
        ok=explained == len(differences) and worst <= tolerance,
    )


def _check_size(path: str | Path, recorded: Sequence[RecordedTree]) -> None:
    """Tables are searched in batches, each tree in the size of the largest."""
    nodes = 1 + max(tree.config.num_simulations for tree in recorded)
    edges = sum(nodes * len(tree.legal) for tree in recorded)
    actions = max(len(tree.legal) for tree in recorded)
    what = f"{path}: {len(recorded)} trees of up to {nodes:,} nodes are too large"
    npz.check_bytes(what, 4 * edges * (actions + 2))


def _begin(recorded: RecordedTree) -> tuple[reference_tree.Tree, near_ties.Network]:
    """The host's tree of a recorded search, and the network as its table says."""
    config = dataclasses.replace(recorded.config, noise_fraction=NOISE_FRACTION)
    tree = reference_tree.init(recorded.root_logits, recorded.legal, config, recorded.noise)

    def network(node: int, action: int) -> tuple[float, float, Array]:
        edge = node, action
        return recorded.reward[edge], recorded.value[edge], recorded.logits[edge]

    return tree, network


def _search_on_host(recorded: Sequence[RecordedTree]) -> Iterator[tuple[Array, float]]:
    for one in recorded:
        tree, network = _begin(one)
        for _ in range(one.config.num_simulations):
            edge = reference_tree.select(tree)
            reference_tree.expand(tree, *network(*edge))
        yield reference_tree.visit_counts(tree), reference_tree.root_value(tree)


def _search_in_jit(recorded: Sequence[RecordedTree]) -> list[tuple[Array, float]]:
    """Trees of as many actions and one discount are searched as one batch."""

    def batch_of(index: int) -> tuple[int, float]:
        return len(recorded[index].legal), recorded[index].config.discount

    answers: dict[int, tuple[Array, float]] = {}
    for _, group in itertools.groupby(sorted(range(len(recorded)), key=batch_of), key=batch_of):
        indices = list(group)
        batch = [recorded[index] for index in indices]
        config = max((tree.config for tree in batch), key=lambda one: one.num_simulations)
        table = {
            name: jnp.stack([_padded(getattr(tree, name), config) for tree in batch])
            for name in ("reward", "value", "logits")
        }
        prior = jnp.stack([_prior(tree) for tree in batch])
        visits, values = (np.asarray(x) for x in _grow(prior, table, config=config))
        for row, index in enumerate(indices):
            last = recorded[index].config.num_simulations - 1
            answers[index] = visits[last, row], float(values[last, row])
    return [answers[index] for index in range(len(recorded))]


def _padded(table: Array, config: SearchConfig) -> Array:
    """A table [N, A, ...] of a smaller tree in the size of the largest; nobody reads the rest."""
    missing = config.num_simulations + 1 - len(table)
    return np.pad(table, [(0, missing)] + [(0, 0)] * (table.ndim - 1))


def _prior(recorded: RecordedTree) -> jax.Array:
    prior = trees.softmax(
        jnp.asarray(recorded.root_logits)[None], jnp.asarray(recorded.legal)[None]
    )[0]
    if recorded.noise is None:
        return prior
    mixed = prior * (1 - NOISE_FRACTION) + NOISE_FRACTION * recorded.noise.astype(np.float32)
    return jnp.where(recorded.legal, mixed, trees.ILLEGAL)


@functools.partial(jax.jit, static_argnames="config")
def _grow(
    prior: jax.Array, table: dict[str, jax.Array], *, config: SearchConfig
) -> tuple[jax.Array, jax.Array]:
    """Searches B trees from priors [B, A] with the network as tables [B, N, A, ...].

    Returns:
      Visits [N - 1, B, A] and root values [N - 1, B] after each simulation.
    """

    def simulate(grown: trees.Tree, simulation: jax.Array) -> tuple[trees.Tree, Any]:
        path = trees.select(grown, config)
        edge = (jnp.arange(prior.shape[0]), *path.leaf())
        reward, value, logits = (table[name][edge] for name in ("reward", "value", "logits"))
        node = simulation + 1
        below = trees.softmax(logits)
        grown = trees.expand(grown, path, node, reward, value, below, config.discount)
        return grown, (trees.visit_counts(grown), trees.root_value(grown))

    simulations = jnp.arange(config.num_simulations)
    found: tuple[jax.Array, jax.Array]
    _, found = jax.lax.scan(simulate, trees.init(prior, config), simulations)
    return found
