"""A decoder as a world model: a step is one token, and a node keeps that token's keys and values.

    python examples/decoder.py

A token is an action; those that were really taken carry the observation that followed. Reward,
value and policy are read at the last token. The weights are random: what is shown is what
`kvjax.tree_search` asks of a model. `step` reads the keys and values of a node's window and hands
back those of one more token.

Keys are stored rotated at their token's place in the episode, so that nothing needs correcting when
a full window drops its oldest token. A token then sees itself and the `WINDOW` tokens before it,
which `forward` says without a cache: attention in a band.

Shapes: B rows, Q new tokens, S cached ones, E width, L layers, H heads, D head size.
"""

import jax
import jax.numpy as jnp

import kvjax

ACTIONS, OBSERVATION = 4, 3
LAYERS, HEADS, HEAD_SIZE = 2, 2, 8
WIDTH = HEADS * HEAD_SIZE
TOKEN = LAYERS, 2, HEADS, HEAD_SIZE  # keys and values
WINDOW = 6


def init_params(rng):
    """Random weights of the world model."""
    layers_rng, rng = jax.random.split(rng)
    shapes = {"action": (ACTIONS, WIDTH), "observation": (OBSERVATION, WIDTH)}
    shapes |= {"reward": (WIDTH, 1), "value": (WIDTH, 1), "policy": (WIDTH, ACTIONS)}
    return draw(rng, shapes) | {"layers": init_layers(layers_rng)}


def init_layers(rng):
    """Random weights of a transformer: a list of L layers."""
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    return [draw(key, shapes) for key in jax.random.split(rng, LAYERS)]


def draw(rng, shapes):
    """Random matrices of these shapes."""
    keys = dict(zip(shapes, jax.random.split(rng, len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], s) / jnp.sqrt(s[0]) for name, s in shapes.items()}


def transformer(layers, x, place, past, seen):
    """Runs new tokens through `layers`, over cached ones.

    Args:
      x: [B, Q, E], the new tokens' embeddings.
      place: [B, Q] int32, where in the episode they are.
      past: [B, S, L, 2, H, D], the cached tokens' keys and values.
      seen: [B, Q, S + Q] bool, whom each new token sees.

    Returns:
      [B, Q, E], and the new tokens' own keys and values [B, Q, L, 2, H, D].
    """
    new = []
    for number, layer in enumerate(layers):
        q, k, v = jnp.split(norm(x) @ layer["qkv"], 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], HEADS, HEAD_SIZE) for part in (q, k, v))
        own = jnp.stack([rotated(k, place), v], axis=2)
        keys, values = jnp.moveaxis(jnp.concatenate([past[:, :, number], own], axis=1), 2, 0)
        scores = jnp.einsum("bqhd,bshd->bhqs", rotated(q, place), keys) / jnp.sqrt(HEAD_SIZE)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        x = x + jnp.einsum("bhqs,bshd->bqhd", weights, values).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
        new.append(own)
    return norm(x), jnp.stack(new, axis=2)


def norm(x):
    """Root mean square 1."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotated(x, place):
    """Rotary positions: x [B, Q, H, D] turned by `place` [B, Q]."""
    angle = place[..., None, None] / 100.0 ** jnp.linspace(0.0, 1.0, HEAD_SIZE // 2)
    left, right = jnp.split(x, 2, axis=-1)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=-1)


def heads(params, x):
    """Reward [B, Q], value [B, Q] and policy logits [B, Q, A] of tokens [B, Q, E]."""
    return (x @ params["reward"])[..., 0], (x @ params["value"])[..., 0], x @ params["policy"]


def forward(params, actions, observations):
    """Whole episodes at once: actions [B, Q], observations [B, Q, O] or zeros where none was seen.

    Returns:
      What `heads` says of every token; keys and values [B, Q, L, 2, H, D].
    """
    rows, length = actions.shape
    place = jnp.broadcast_to(jnp.arange(length), (rows, length))
    back = place[:, :, None] - place[:, None, :]
    seen = (back >= 0) & (back <= WINDOW)
    x = params["action"][actions] + observations @ params["observation"]
    x, tokens = transformer(params["layers"], x, place, jnp.zeros((rows, 0, *TOKEN)), seen)
    return heads(params, x), tokens


def root(params, actions, observations, length):
    """Where a search begins: episodes [B, Q] of `length` [B] tokens, at least one."""
    (_, value, policy), tokens = forward(params, actions, observations)
    row, first = jnp.arange(len(length)), jnp.maximum(length - WINDOW, 0)
    kept = jnp.minimum(first[:, None] + jnp.arange(WINDOW), actions.shape[1] - 1)
    return kvjax.Root(
        tokens=tokens[row[:, None], kept],
        length=length - first,
        policy=policy[row, length - 1],
        value=value[row, length - 1],
        data=length,  # the place of the first token that is imagined
    )


def step(params, rng, node, action):
    """Imagines a step: one token over the node's window."""
    del rng
    seen = jnp.pad(node.valid, ((0, 0), (0, 1)), constant_values=True)[:, None]
    place = (node.root + node.depth)[:, None]
    x = params["action"][action][:, None]
    x, tokens = transformer(params["layers"], x, place, node.tokens, seen)
    reward, value, policy = (part[:, 0] for part in heads(params, x))
    return jnp.moveaxis(tokens, 1, 0), None, kvjax.Transition(reward, value, policy)


MODEL = kvjax.TreeModel(block=1, size=WINDOW, step=step)
SEARCH = kvjax.SearchConfig(num_simulations=40, discount=0.95)


def main():
    """Searches from three episodes of unequal length."""
    params_rng, rng, search_rng = jax.random.split(jax.random.key(0), 3)
    params, length = init_params(params_rng), jnp.asarray([1, 4, 9])
    actions = jax.random.randint(rng, (3, 9), 0, ACTIONS)
    observations = jax.random.normal(rng, (3, 9, OBSERVATION))
    begun = jax.jit(root)(params, actions, observations, length)
    print(kvjax.tree_search(params, search_rng, begun, MODEL, search=SEARCH))


if __name__ == "__main__":
    main()
