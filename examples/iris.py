"""A world model that samples what it sees, as IRIS does: an action and its observation's tokens.

    python examples/iris.py

In IRIS (Micheli et al., 2023) an observation is a few discrete tokens. After an action's token the
model says the reward and draws the observation's tokens one after the other, each from what the
last one left; here policy and value are read behind the last of them. Every episode begins with the
action START. The transformer is `decoder.py`'s, the weights are random.

Each node is given a key by the search, draws its observation with it and keeps what it drew as its
state: a node is one sample of what may follow its action. A full window drops its oldest step.
`forward` says the same of tokens that are known, without a cache.

Shapes: B rows, Q steps, M tokens of an observation, V words that each may be.
"""

import decoder
import jax
import jax.numpy as jnp

import kvjax

ACTIONS, START = 3, 3
TOKENS, WORDS = 4, 8  # M, V
BLOCK = 1 + TOKENS
MEMORY = 3  # steps of a full window
WINDOW = MEMORY * BLOCK


def init_params(rng):
    """Random weights of the world model."""
    width, (layers_rng, rng) = decoder.WIDTH, jax.random.split(rng)
    shapes = {"action": (ACTIONS + 1, width), "word": (WORDS, width), "next": (width, WORDS)}
    shapes |= {"reward": (width, 1), "value": (width, 1), "policy": (width, ACTIONS)}
    return decoder.draw(rng, shapes) | {"layers": decoder.init_layers(layers_rng)}


def forward(params, actions, observed):
    """A whole episode at once, without a cache.

    Args:
      params: from `init_params`.
      actions: [B, Q] int32.
      observed: [B, Q, M] int32, the words that followed each.

    Returns:
      Reward [B, Q], logits of the observed words [B, Q, M, V], value [B, Q], policy [B, Q, A];
      keys and values [B, Q * (1 + M), ...].
    """
    rows, steps = actions.shape
    x = jnp.concatenate([params["action"][actions][:, :, None], params["word"][observed]], axis=2)
    place = jnp.arange(steps * BLOCK)
    later = place[:, None] >= place
    near = place[:, None] // BLOCK - place // BLOCK <= MEMORY
    x, tokens = decoder.transformer(
        params["layers"],
        x.reshape(rows, steps * BLOCK, -1),
        jnp.broadcast_to(place, (rows, steps * BLOCK)),
        jnp.zeros((rows, 0, *decoder.TOKEN)),
        jnp.broadcast_to(later & near, (rows, steps * BLOCK, steps * BLOCK)),
    )
    x = x.reshape(rows, steps, BLOCK, -1)
    first, last = x[:, :, 0], x[:, :, -1]
    reward, value = (first @ params["reward"])[..., 0], (last @ params["value"])[..., 0]
    return (reward, x[:, :, :-1] @ params["next"], value, last @ params["policy"]), tokens


def root(params, actions, observed, length):
    """Where a search begins: episodes of `length` [B] of Q steps, at least one."""
    (_, _, value, policy), tokens = forward(params, actions, observed)
    row, first = jnp.arange(len(length)), jnp.maximum(length - MEMORY, 0)
    kept = first[:, None] * BLOCK + jnp.arange(WINDOW)
    return kvjax.Root(
        tokens=tokens[row[:, None], jnp.minimum(kept, tokens.shape[1] - 1)],
        length=(length - first) * BLOCK,
        policy=policy[row, length - 1],
        value=value[row, length - 1],
        state=observed[row, length - 1],
        data=length,  # the number of the first step that is imagined
    )


def step(params, rng, node, action):
    """Imagines a step: its action, and one word after the other."""
    place = (node.root + node.depth) * BLOCK
    seen = jnp.pad(node.valid, ((0, 0), (0, BLOCK)), constant_values=True)

    def read(embedded, number, past):
        """Pushes the step's next token through the transformer, over all before it."""
        x, own = decoder.transformer(
            params["layers"],
            embedded[:, None],
            (place + number)[:, None],
            past,
            seen[:, None, : WINDOW + number + 1],
        )
        return x[:, 0], jnp.concatenate([past, own], axis=1)

    x, past = read(params["action"][action], 0, node.tokens)
    reward, words = (x @ params["reward"])[:, 0], []
    for number, key in enumerate(jax.random.split(rng, TOKENS), start=1):
        words.append(jax.random.categorical(key, x @ params["next"]))
        x, past = read(params["word"][words[-1]], number, past)
    came = kvjax.Transition(reward, (x @ params["value"])[:, 0], x @ params["policy"])
    return jnp.moveaxis(past[:, WINDOW:], 1, 0), jnp.stack(words, axis=1), came


MODEL = kvjax.TreeModel(block=BLOCK, size=WINDOW, step=step)
SEARCH = kvjax.SearchConfig(num_simulations=30, discount=0.95)


def main():
    """Searches from three episodes of unequal length."""
    params_rng, action_rng, word_rng, search_rng = jax.random.split(jax.random.key(0), 4)
    params, length = init_params(params_rng), jnp.asarray([1, 2, 5])
    actions = jax.random.randint(action_rng, (3, 5), 0, ACTIONS).at[:, 0].set(START)
    observed = jax.random.randint(word_rng, (3, 5, TOKENS), 0, WORDS)
    begun = jax.jit(root)(params, actions, observed, length)
    print(kvjax.tree_search(params, search_rng, begun, MODEL, search=SEARCH))


if __name__ == "__main__":
    main()
