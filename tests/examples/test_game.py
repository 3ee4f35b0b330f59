"""The example of a game: mctx's policies on the same boards and key; mates that are found."""

import dataclasses
import functools

import game
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import in_full

import kvjax

POSITIONS = 300
KEY = jax.random.key(3)
NEVER = np.finfo(np.float32).min
SEARCHES = {
    "muzero": game.SEARCH,
    "mix_value": dataclasses.replace(game.SEARCH, q_transform="mix_value", num_simulations=24),
    "gumbel": dataclasses.replace(game.SEARCH, tree="gumbel", noise_fraction=1.0),
}
play = jax.jit(game.play)


def positions(seed, wanted, least=0):
    """Boards [POSITIONS, 9] of games that go on after up to 7 random moves, if wanted."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < POSITIONS:
        board = np.zeros((POSITIONS, game.SQUARES), np.int32)
        over = np.zeros(POSITIONS, bool)
        moves = rng.integers(least, 8, POSITIONS)
        for number in range(7):
            order = np.where(board == 0, rng.random(board.shape), -1.0)
            turned, _, ended = jax.device_get(play(board, order.argmax(axis=1)))
            goes_on = (number < moves) & ~over
            board, over = np.where(goes_on[:, None], turned, board), over | (goes_on & ended)
        found += [of for of in board[~over] if wanted(of)]
    return np.stack(found[:POSITIONS])


def mates(board, of=1):
    """Squares that complete a line of a player's: {int}."""
    lines = [line for line in game.LINES if board[line].sum() == 2 * of]
    return {int(line[board[line] == 0][0]) for line in lines}


def searched(board, name, **changes):
    search = dataclasses.replace(SEARCHES[name], **changes)
    out = kvjax.tree_search(None, KEY, game.root(board), game.MODEL, search=search)
    assert out.finite.all()
    return jax.device_get(out)


def by_mctx(board, name):
    """What mctx answers where it is shown the whole board as its embedding."""
    root = game.root(board)

    def recurrent_fn(params, rng, action, board):
        node = kvjax.Node((), None, None, board, None, None)
        _, board, came = game.step(params, rng, node, action)
        logits = jnp.where(came.legal, came.policy, NEVER)
        said = {"reward": came.reward, "discount": came.discount, "value": came.value}
        return mctx.RecurrentFnOutput(prior_logits=logits, **said), board

    begun = mctx.RootFnOutput(
        prior_logits=jnp.asarray(root.policy), value=jnp.asarray(root.value), embedding=board
    )
    policy = mctx.gumbel_muzero_policy
    if name != "gumbel":
        plain = {"dirichlet_fraction": 0.0, "temperature": 0.0}
        policy = functools.partial(mctx.muzero_policy, qtransform=Q_OF_LEGAL[name], **plain)
    simulations = SEARCHES[name].num_simulations
    out = policy(None, KEY, begun, recurrent_fn, simulations, invalid_actions=~root.legal)
    return out.action, out.search_tree.summary().visit_counts, out.action_weights


def of_legal(transform):
    """Q values of mctx, which knows no illegal actions below the root and would try them."""

    def transformed(tree, node):
        illegal = tree.children_prior_logits[node] <= NEVER
        return jnp.where(illegal, -jnp.inf, transform(tree, node))

    return transformed


Q_OF_LEGAL = {
    "muzero": of_legal(mctx.qtransform_by_parent_and_siblings),
    "mix_value": of_legal(mctx.qtransform_completed_by_mix_value),
}


@pytest.mark.parametrize("name", ["gumbel", *in_full("muzero", "mix_value")])
def test_the_search_is_mctxs(name):
    board = positions(0, wanted=lambda board: True)
    assert {int(np.sum(of == 0)) for of in board} == set(range(2, 10))
    out = searched(board, name)
    action, visits, weights = jax.jit(by_mctx, static_argnums=1)(board, name)
    np.testing.assert_array_equal(out.visit_counts, visits)
    np.testing.assert_array_equal(out.action, action)
    np.testing.assert_allclose(out.action_weights, weights, atol=2e-6)
    print(name, np.abs(out.action_weights - weights).max())


def share_played(board, of, simulations):
    """How many of a player's mates are played by the mover, who makes or stops them."""
    action = searched(board, "muzero", num_simulations=simulations).action
    return np.mean([a in mates(b, of) for a, b in zip(action, board, strict=True)])


def test_more_simulations_mate_and_stop_a_mate():
    mate = positions(1, mates, least=4)
    threat = positions(2, lambda board: len(mates(board, of=-1)) == 1 and not mates(board), least=3)
    few, many = (
        [share_played(mate, 1, simulations), share_played(threat, -1, simulations)]
        for simulations in (4, game.SEARCH.num_simulations)
    )
    print(few, many)
    assert max(few) < 0.9
    assert many == [1.0, 1.0]


def test_it_beats_random_moves(capsys):
    game.main()
    said = capsys.readouterr().out
    print(said)
    won, drawn, lost = (int(word) for word in said.split() if word.isdigit())
    assert won + drawn + lost == 60
    assert won > 50
    assert lost < 4
