"""Every node of a searched tree as the whole episode that leads to it.

Shapes: B rows, N nodes, S steps of the longest episode.
"""

import jax
import numpy as np

TOLERANCE = 2e-5
"""Of numbers about 1. What a broken cache does is a thousand times as large."""


def paths(tree):
    """The nodes on the way to each node, the root left out: a list of B * N lists."""
    ways = []
    for row, node in np.ndindex(tree.parent.shape):
        way = []
        while tree.parent[row, node] >= 0:
            way.insert(0, node)
            node = tree.parent[row, node]
        ways.append(way)
    assert [len(way) for way in ways] == tree.depth.ravel().tolist()
    return ways


def continued(tree, begun, length, of_nodes):
    """What had happened, and what the nodes on the way to each node add.

    Args:
      tree: of a search in which every node was made.
      begun: [B, Q, ...], of which `length` [B] steps happened.
      of_nodes: [B, N, ...], one step each.

    Returns:
      [B * N, S, ...], zeros at the end; and the steps of each, [B * N].
    """
    rows = np.repeat(np.arange(len(length)), tree.parent.shape[1])
    episodes = [
        [*begun[row, : length[row]], *of_nodes[row, way]]
        for row, way in zip(rows, paths(tree), strict=True)
    ]
    lengths = np.array([len(episode) for episode in episodes])
    padded = np.zeros((len(episodes), lengths.max(), *begun.shape[2:]), begun.dtype)
    for whole, episode in zip(padded, episodes, strict=True):
        whole[: len(episode)] = episode
    return padded, lengths


def last(lengths, *said):
    """What was said [B * N, S, ...] of each episode's last step."""
    return [np.asarray(of)[np.arange(len(lengths)), lengths - 1] for of in said]


def largest_errors(tree, reward, value, policy):
    """The largest differences between a tree's nodes and what was said of their episodes.

    Args:
      tree: of a search.
      reward: [B * N], and `value`; what is said of a root's reward is not looked at.
      policy: [B * N, A] logits.
    """
    new = tree.parent.ravel() >= 0
    errors = {
        "reward": np.where(new, tree.reward.ravel() - reward, 0.0),
        "value": tree.value.ravel() - value,
        "policy": tree.prior.reshape(policy.shape) - np.asarray(jax.nn.softmax(policy)),
    }
    return {name: float(np.abs(error).max()) for name, error in errors.items()}


def window_error(tree, tokens, lengths):
    """The largest difference between the nodes' windows and the ends of whole episodes' tokens.

    Args:
      tree: of a search.
      tokens: [B * N, tokens, ...].
      lengths: [B * N], tokens of each episode.
    """
    held, size = np.asarray(tree.tokens), tree.slots.shape[-1]
    held, kept = held.reshape(-1, *held.shape[2:]), np.minimum(lengths, size)
    np.testing.assert_array_equal(tree.length.ravel(), kept)
    ends = zip(held, np.asarray(tokens), kept, lengths, strict=True)
    return max(float(np.abs(h[:n] - whole[end - n : end]).max()) for h, whole, n, end in ends)
