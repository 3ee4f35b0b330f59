"""LightZero's sampled tree search in plain numpy: nodes have K drawn actions instead of all.

The tree is that of `reference_tree`, whose A actions are here the K places of a node's drawn ones.
The rules are those of the C++ tree that Sampled UniZero walks (`ctree_sampled_muzero`, alike in
0.2.0 and main):

* A Gaussian policy is drawn from, clipped to -4 .. 4 and squashed by a tanh. Discrete actions are
  drawn without replacement, in proportion to their probabilities.
* The score's prior is uniform, 1 / K, whatever the policy says of an action: it has been drawn by
  the policy. Root noise is mixed into the log-probabilities there, which no score reads.
* Everything else is as in the tree of all actions, except that ties are broken at random; here the
  first action wins.

LightZero makes one child of actions that are alike to six decimals; here each has its own.

Shapes: A actions or numbers of an action, P numbers of a policy (2A of a Gaussian, else A), K.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.tools.parity import reference_tree as trees
from kvjax.tools.parity.reference_tree import Choice, Network, first_best

Array = np.ndarray[Any, Any]

CLIP = 4.0

Draw = Callable[[Array], Array]
"""A node's policy [P] to its actions [K, ...]."""


@dataclasses.dataclass
class SampledTree:
    """One search: a tree of places, and what stands in them."""

    tree: trees.Tree
    actions: list[Array]  # [K, ...] of each node


def draw(rng: np.random.Generator, policy: Array, config: WorldModelConfig) -> Array:
    """K actions of a policy [P]: [K, A] float32 or [K] int."""
    count = config.num_edges
    if not config.is_continuous:
        race = np.log(rng.uniform(size=policy.shape)) / trees.softmax(policy)
        return np.argsort(-race)[:count]
    mean, sigma = np.split(policy, 2)
    drawn = rng.normal(mean, sigma, size=(count, len(mean)))
    squashed: Array = np.tanh(np.clip(drawn, -CLIP, CLIP)).astype(np.float32)
    return squashed


def init(actions: Array, config: SearchConfig) -> SampledTree:
    """A tree that holds a root with actions [K, ...]."""
    count = len(actions)
    tree = trees.init(np.zeros(count), np.ones(count, bool), config)
    return SampledTree(tree, [actions])


def select(sampled: SampledTree, choose: Choice = first_best) -> tuple[int, Any]:
    """Walks down from the root to an edge without a node: its parent and its action."""
    parent, place = trees.select(sampled.tree, choose)
    return parent, sampled.actions[parent][place]


def grow(forest: Sequence[SampledTree], network: Network, draw_from: Draw) -> None:
    """Searches trees side by side, as `reference_tree.grow` does; policies are drawn from."""
    for _ in range(forest[0].tree.config.num_simulations):
        parent, action = (np.stack(x) for x in zip(*map(select, forest), strict=True))
        depth = np.array([len(sampled.tree.path) for sampled in forest])
        for sampled, *answer in zip(forest, *network(parent, action, depth), strict=True):
            reward, value, policy = answer
            expand(sampled, reward, value, draw_from(policy))


def best(sampled: SampledTree) -> Array:
    """The root's most visited action, the first on ties."""
    action: Array = sampled.actions[trees.ROOT][trees.visit_counts(sampled.tree).argmax()]
    return action


def expand(sampled: SampledTree, reward: float, value: float, actions: Array) -> None:
    """Adds a node with actions [K, ...] at the selected edge, and backs its value up."""
    trees.expand(sampled.tree, reward, value, np.zeros(len(actions)))
    sampled.actions.append(actions)
