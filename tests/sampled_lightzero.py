"""LightZero 0.2.0's sampled C++ tree, with everything that it draws and is told written down.

The tree draws actions and breaks ties with engines of its own. What it drew is read off the actions
that it asks the network for; a node's actions are then listed in the order in which they were first
tried, so that among untried ones "the first" is what the tree took.

Shapes: T trees, S simulations, K actions of a node.
"""

import contextlib
import dataclasses

import numpy as np

from kvjax.config import SearchConfig
from kvjax.tools.parity import reference_tree, sampled_tree

NEAR = 1e-5
"""Scores closer together than this are a tie to one of the two float32 programs."""


@dataclasses.dataclass
class Recorder:
    """Stands in for the module of the C++ tree, and notes what goes through it."""

    parents: list = dataclasses.field(default_factory=list)  # [T] of each simulation
    actions: list = dataclasses.field(default_factory=list)  # [T, ...]
    rewards: list = dataclasses.field(default_factory=list)  # [T]
    values: list = dataclasses.field(default_factory=list)
    policies: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        from lzero.mcts.ctree.ctree_sampled_muzero import smz_tree

        self.tree = smz_tree

    def __getattr__(self, name):
        return getattr(self.tree, name)

    def batch_traverse(self, *args):
        parents, rows, actions, players = self.tree.batch_traverse(*args)
        self.parents.append(list(parents))
        self.actions.append(np.array(actions, np.float32))
        return parents, rows, actions, players

    def batch_backpropagate(self, index, discount, rewards, values, policies, *args):
        self.rewards.append(np.array(rewards, np.float32))
        self.values.append(np.array(values, np.float32))
        self.policies.append(np.array(policies, np.float32))
        self.tree.batch_backpropagate(index, discount, rewards, values, policies, *args)


@contextlib.contextmanager
def recording(monkeypatch):
    """A recorder of what LightZero's Sampled UniZero search does in the meantime."""
    from lzero.mcts.tree_search import mcts_ctree_sampled

    with monkeypatch.context() as patch:
        recorder = Recorder()
        patch.setattr(mcts_ctree_sampled, "tree_sampled_muzero", recorder)
        yield recorder


@dataclasses.dataclass
class Recorded:
    """One searched tree."""

    draws: np.ndarray  # [S + 1, K, ...]; what was never tried is 0 below the root
    visits: np.ndarray  # [K] of the root's
    value: float
    chosen: list  # parent and place of each simulation
    rewards: np.ndarray  # [S]
    values: np.ndarray  # [S]


def recorded_trees(recorder, roots):
    """Each tree of a batch of searched roots; None where actions alike share a child."""
    sampled, visits = roots.get_sampled_actions(), roots.get_distributions()
    for tree, value in enumerate(roots.get_values()):
        actions = [tuple(a[tree].tolist()) for a in recorder.actions]
        parents = [p[tree] for p in recorder.parents]
        tried = [[] for _ in range(len(actions) + 1)]
        chosen = []
        for parent, action in zip(parents, actions, strict=True):
            if action not in tried[parent]:
                tried[parent].append(action)
            chosen.append((parent, tried[parent].index(action)))
        root = [tuple(np.float32(a).tolist()) for a in sampled[tree]]
        if len(set(root)) < len(root) or len(set(chosen)) < len(chosen):
            yield None
            continue
        nothing = (0.0,) * len(root[0])
        tried[0] += [action for action in root if action not in tried[0]]
        draws = [node + [nothing] * (len(root) - len(node)) for node in tried]
        yield Recorded(
            draws=np.array(draws, np.float32),
            visits=np.array([visits[tree][root.index(action)] for action in tried[0]]),
            value=np.float32(value),
            chosen=chosen,
            rewards=np.array([r[tree] for r in recorder.rewards]),
            values=np.array([v[tree] for v in recorder.values]),
        )


def follow(recorded):
    """Walks numpy's tree along a recorded search: the tree, and how many ties fell the other way.

    Every recorded choice must be a best one, or so near to it that float32 cannot tell.
    """
    tree = sampled_tree.init(recorded.draws[0], SearchConfig(num_simulations=len(recorded.values)))
    ties = 0
    for simulation, (parent, place) in enumerate(recorded.chosen):
        ahead = way_to(tree.tree, parent, place)

        def choose(node, scores, ahead=ahead):
            nonlocal ties
            best, wanted = int(np.argmax(scores)), ahead[node]
            assert scores[best] - scores[wanted] < NEAR, (node, scores, wanted)
            ties += best != wanted
            return wanted

        sampled_tree.select(tree, choose)
        answer = recorded.rewards[simulation], recorded.values[simulation]
        sampled_tree.expand(tree, *answer, recorded.draws[simulation + 1])
    return tree.tree, ties


def way_to(tree, node, place):
    """Places that lead from the root through a node to an edge of it."""
    ahead = {node: place}
    while node != reference_tree.ROOT:
        parents, places = np.nonzero(tree.children == node)
        node = int(parents[0])
        ahead[node] = int(places[0])
    return ahead


def random_search(rng, rows, simulations, draws, policy, *, noise=False, scale=1.0):
    """Searches by the C++ tree alone, with random answers in a network's place.

    Args:
      draws: K.
      policy: numbers of a policy; of Gaussians an even number, or logits with a minus.
    """
    recorder, is_continuous = Recorder(), policy > 0
    size = policy // 2 if is_continuous else -policy

    def policies():
        said = rng.normal(size=(rows, abs(policy)))
        if is_continuous:
            said[:, size:] = 0.3 * np.exp(0.3 * said[:, size:])  # so that few meet the clip
        return said.tolist()

    roots = recorder.Roots(rows, [[-1] * draws] * rows, size, draws, is_continuous)
    begin, players = [[0.0] * rows, policies()], [-1] * rows
    if noise:
        roots.prepare(0.25, rng.dirichlet([0.3] * draws, size=rows).tolist(), *begin, players)
    else:
        roots.prepare_no_noise(*begin, players)
    extremes = recorder.MinMaxStatsList(rows)
    extremes.set_delta(0.01)
    for simulation in range(simulations):
        results = recorder.ResultsWrapper(num=rows)
        constants = (19652, 1.25, 0.997, extremes, results, [-1] * rows, is_continuous)
        *_, players = recorder.batch_traverse(roots, *constants)
        answers = (scale * rng.normal(size=(2, rows))).astype(np.float32).tolist()
        told = (simulation + 1, 0.997, *answers, policies(), extremes, results, players)
        recorder.batch_backpropagate(*told)
    return list(recorded_trees(recorder, roots))


def search_of(model, simulations, discount=0.997):
    """LightZero's Sampled UniZero search for a model; the types are those of its configuration."""
    from easydict import EasyDict
    from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree

    wm = model.world_model
    config = EasyDict(device="cpu", discount_factor=discount, num_simulations=simulations)
    config.model = {
        "support_scale": wm.support_size // 2,
        "categorical_distribution": True,
        "continuous_action_space": wm.continuous_action_space,
    }
    return SampledUniZeroMCTSCtree(config)
