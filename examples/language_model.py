"""Greedy decoding of a small language model fails where a search over its tokens succeeds.

    python examples/language_model.py change.png

The model has read receipts (`receipts.py`) and its likeliest word is the largest coin that fits:
"24 15", which no three more coins make good. In the tree an action is the next coin. A node keeps
its coin's keys and values and, as its state, what is left to pay; coins that are too large are
illegal, and nothing counts behind the end of a receipt. Paid to the full, a receipt is worth 1; the
value of an open one is what the model's second head has learned. The picture shows which amounts
are paid, and a tree.

Shapes: B texts, one for each amount.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from receipts import AMOUNTS, COINS, LENGTH, LIMIT, MOST, Reader, train, whole

import kvjax


@jax.jit
def root(params, texts, length, left):
    """Where a search begins: texts [B, LENGTH] of `length` [] words; what is `left` to pay [B]."""
    policy, value, tokens = Reader().apply(params, *whole(texts))
    lengths = jnp.full(len(left), length)
    value, legal = nn.sigmoid(value[:, length - 1]), (left == 0)[:, None] | (left[:, None] >= COINS)
    return kvjax.Root(tokens, lengths, policy[:, length - 1], value, state=left, legal=legal)


def step(params, rng, node, action):
    """Reads one more coin."""
    del rng
    seen = jnp.pad(node.valid, ((0, 0), (0, 1)), constant_values=True)[:, None]
    word, place = (MOST + 1 + action)[:, None], node.length[:, None]
    policy, value, tokens = Reader().apply(params, word, place, node.tokens, seen)
    left = node.state - jnp.asarray(COINS)[action]
    over = (left <= 0) | (node.length >= LIMIT)
    came = kvjax.Transition(
        reward=jnp.where(left == 0, 1.0, 0.0),
        value=nn.sigmoid(value[:, 0]),
        policy=policy[:, 0],
        discount=jnp.where(over, 0.0, 1.0),
        legal=(left[:, None] >= COINS) & ~over[:, None],
    )
    return jnp.moveaxis(tokens, 1, 0), left, came


MODEL = kvjax.TreeModel(block=1, size=LENGTH, step=step)
SEARCH = kvjax.SearchConfig(num_simulations=64, tree="gumbel")


def pay(params, choose):
    """Writes all receipts, coin by coin; returns which amounts were paid [B]."""
    texts, left = np.zeros((len(AMOUNTS), LENGTH), np.int32), AMOUNTS.astype(np.int32)
    texts[:, 0] = left
    for length in range(1, LENGTH):
        coin = np.asarray(choose(root(params, texts, length, left)))
        texts[:, length] = MOST + 1 + coin
        left = np.where(left == 0, 0, left - COINS[coin].astype(np.int32))
    return left == 0


def greedily(begun):
    """The likeliest coin."""
    return jnp.argmax(jnp.where(begun.legal, begun.policy, -jnp.inf), axis=1)


def main():
    """Trains a reader, pays all amounts in both ways and draws."""
    params_rng, rng = jax.random.split(jax.random.key(0))
    params, outputs = train(params_rng), []

    def by_search(begun):
        outputs.append(
            kvjax.tree_search(params, rng, begun, MODEL, search=SEARCH, return_tree=True)
        )
        return outputs[-1].action

    paid = {"greedily": pay(params, greedily), "by search": pay(params, by_search)}
    for name, of in paid.items():
        print(f"{name}: {of.sum()} of {len(of)} amounts are paid")
    draw(paid, jax.device_get(outputs[0].tree), sys.argv[1])


def draw(paid, tree, output):
    """Amounts that are paid and others; the tree of the last that is paid by search alone."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        2, figsize=(9, 7), height_ratios=(1, 4), layout="constrained"
    )
    for height, of in enumerate(paid.values()):
        left.scatter(AMOUNTS[of], np.full(of.sum(), height), color="tab:green", marker="o")
        left.scatter(AMOUNTS[~of], np.full((~of).sum(), height), color="tab:red", marker="x")
    left.set(yticks=range(len(paid)), ylim=(-0.5, 1.5), xlabel="amount")
    left.set_yticklabels([f"{name}: {of.sum()} of {len(of)}" for name, of in paid.items()])
    row = np.flatnonzero(paid["by search"] & ~paid["greedily"])[-1]
    draw_tree(right, tree, row)
    right.set_title(f"{AMOUNTS[row]}: coins and, as width, visits; green: paid", fontsize="medium")
    figure.savefig(output, dpi=110, bbox_inches="tight")


def draw_tree(axis, tree, row):
    """Nodes by depth, without what lies behind the end of a receipt."""
    parent, left, places, leaves = tree.parent[row], tree.state[row], {}, []

    def place(node):
        ended = left[node] <= 0 or tree.depth[row, node] == LIMIT
        below = [] if ended else [place(child) for child in np.flatnonzero(parent == node)]
        if not below:
            leaves.append(node)
        x = np.mean(below) if below else len(leaves)
        places[node] = x, -tree.depth[row, node]
        return x

    place(0)
    for node in sorted(set(places) - {0}):
        (x, y), (above, top) = places[node], places[parent[node]]
        color = "tab:green" if left[node] == 0 else "grey"
        axis.plot([above, x], [top, y], color=color, linewidth=0.5 + tree.visits[row, node] / 8)
        axis.text(x, y, COINS[tree.action[row, node]], ha="center", va="top", fontsize="small")
    axis.axis("off")


if __name__ == "__main__":
    main()
