"""A game for two, searched: tic-tac-toe, whose rules are the model and whose positions the nodes.

    python examples/game.py

A model need not have tokens: `tokens` is `()`, and a node is its state, here the board. The players
take turns, so what a position is worth to its mover counts against the one who led there: the
discount of a step is -1, and 0 once the game is over. Occupied squares are illegal in every node.
The model knows the rules and no more: all moves are alike to it, and so are all positions.

Shapes: B boards of 9 squares: 1 the mover's, -1 the other's, 0 empty.
"""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax

SQUARES = 9
ROWS = np.arange(SQUARES).reshape(3, 3)
LINES = np.array([*ROWS, *ROWS.T, ROWS.diagonal(), ROWS[::-1].diagonal()])


def play(board, action):
    """The mover marks a square, and the board turns to the other.

    Args:
      board: [B, 9] int32.
      action: [B] int32, an empty square.

    Returns:
      The other's board; whether the mover has won and whether the game is over, [B] bool each.
    """
    marked = board + jax.nn.one_hot(action, SQUARES, dtype=board.dtype)
    won = jnp.any(jnp.all(marked[:, LINES] == 1, axis=2), axis=1)
    return -marked, won, won | jnp.all(marked != 0, axis=1)


def root(board):
    """Where a search begins: boards [B, 9] of games that are not over."""
    rows = len(board)
    return kvjax.Root(
        tokens=(),
        length=np.zeros(rows, np.int32),
        policy=np.zeros((rows, SQUARES), np.float32),
        value=np.zeros(rows, np.float32),
        state=board,
        legal=board == 0,
    )


def step(params, rng, node, action):
    """Plays a move."""
    del params, rng
    board, won, over = play(node.state, action)
    return (
        (),
        board,
        kvjax.Transition(
            reward=won.astype(jnp.float32),
            value=jnp.zeros(len(board)),
            policy=jnp.zeros(board.shape),
            discount=jnp.where(over, 0.0, -1.0),
            legal=(board == 0) & ~over[:, None],
        ),
    )


MODEL = kvjax.TreeModel(block=1, size=1, step=step)
SEARCH = kvjax.SearchConfig(num_simulations=64, tree="muzero")


def match(rng, games):
    """Plays games against random moves, every second one after them.

    Returns:
      [games] float32: 1 where the search has won, -1 where it has lost, 0 where nobody has.
    """
    board, over = jnp.zeros((games, SQUARES), jnp.int32), jnp.zeros(games, bool)
    result, searches = jnp.zeros(games), jnp.arange(games) % 2 == 0
    for _ in range(SQUARES):
        search_rng, random_rng, rng = jax.random.split(rng, 3)
        searched = kvjax.tree_search(None, search_rng, root(board), MODEL, search=SEARCH).action
        drawn = jax.random.categorical(random_rng, jnp.where(board == 0, 0.0, -jnp.inf))
        turned, won, ended = play(board, jnp.where(searches, searched, drawn))
        result = jnp.where(won & ~over, jnp.where(searches, 1.0, -1.0), result)
        over, searches = over | ended, ~searches
        board = jnp.where(over[:, None], 0, turned)  # nobody looks at what is played behind the end
    return result


def main():
    """Plays sixty games."""
    result = match(jax.random.key(0), 60)
    won, drawn, lost = (int(jnp.sum(result == of)) for of in (1, 0, -1))
    print(f"against random moves: {won} won, {drawn} drawn, {lost} lost")


if __name__ == "__main__":
    main()
