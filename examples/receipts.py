"""A language model of receipts, in Flax: "24 12 12" is an amount and at most LIMIT coins for it.

    python examples/receipts.py

The cashiers who wrote them mostly take the largest coin that fits, "24 15", and so does who has
read them, though it is a dead end. A second head learns how often receipts end well from here.
Training takes some seconds of one core. `language_model.py` searches over the model's words.

Shapes: B texts, Q new words, S cached ones, C kinds of coins, L layers, H heads, D head size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

COINS, LIMIT, MOST = np.array([1, 11, 12, 15, 25]), 4, 60  # MOST is the largest amount
SUMS = np.sum(np.meshgrid(*[[0, *COINS]] * LIMIT), axis=0)
AMOUNTS = np.intersect1d(SUMS, np.arange(1, MOST + 1))  # which LIMIT coins can pay
LENGTH, LAYERS, HEADS, HEAD_SIZE = 1 + LIMIT, 2, 2, 16
STEPS, BATCH, RATE = 300, 64, 5e-3


class Reader(nn.Module):
    """A decoder. Its words are the amounts 0 .. MOST, and behind them the coins."""

    @nn.compact
    def __call__(self, words, place, past, seen):
        """Logits of the next coin [B, Q, C] and of a good end [B, Q]; keys and values of the words.

        Of words [B, Q] at their `place` [B, Q], behind `past` [B, S, L, 2, H, D].
        """
        width, new = HEADS * HEAD_SIZE, []
        x = nn.Embed(MOST + 1 + len(COINS), width)(words) + nn.Embed(LENGTH + 1, width)(place)
        for layer in range(LAYERS):
            qkv = nn.DenseGeneral((3, HEADS, HEAD_SIZE))(nn.LayerNorm()(x))
            new.append(qkv[:, :, 1:])
            keys, values = jnp.moveaxis(jnp.concatenate([past[:, :, layer], new[-1]], 1), 2, 0)
            read = nn.dot_product_attention(qkv[:, :, 0], keys, values, mask=seen[:, None])
            x = x + nn.DenseGeneral(width, axis=(-2, -1))(read)
            x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        return nn.Dense(len(COINS))(x), nn.Dense(1)(x)[..., 0], jnp.stack(new, axis=2)


def whole(texts):
    """What the reader is given of whole texts [B, Q], without a cache."""
    place = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    nothing = jnp.zeros((len(texts), 0, LAYERS, 2, HEADS, HEAD_SIZE))
    return texts, place, nothing, place[:, :, None] >= place[:, None]


def loss(params, rng):
    """Of the next coin and of the end, over receipts that are drawn.

    Half of a cashier's coins are the largest that fits, and half are any that fits.
    """
    amount_rng, rng = jax.random.split(rng)
    texts, unpaid = [jax.random.choice(amount_rng, AMOUNTS, (BATCH,))], []
    left = texts[0]
    for key in jax.random.split(rng, LIMIT):
        fits = jnp.maximum(left, 1)[:, None] >= COINS
        largest = jax.nn.one_hot(jnp.sum(fits, axis=1) - 1, len(COINS))
        chances = fits / jnp.sum(fits, axis=1, keepdims=True) + largest
        texts.append(MOST + 1 + jax.random.categorical(key, jnp.log(chances)))
        unpaid.append(left > 0)
        left = left - unpaid[-1] * jnp.asarray(COINS)[texts[-1] - MOST - 1]
    texts = jnp.stack(texts, axis=1)
    policy, value, _ = Reader().apply(params, *whole(texts[:, :-1]))
    coins = jax.nn.one_hot(texts[:, 1:] - MOST - 1, len(COINS))
    of_coins = -jnp.sum(coins * jax.nn.log_softmax(policy), axis=-1)
    of_end = jax.nn.softplus(jnp.where(left[:, None] == 0, -value, value))
    return jnp.mean((of_coins + of_end) * jnp.stack(unpaid, axis=1))


@jax.jit
def train(rng):
    """A reader's parameters after some receipts, by Adam."""
    init_rng, rng = jax.random.split(rng)
    params = Reader().init(init_rng, *whole(jnp.zeros((1, 1), int)))

    def update(state, now):
        (params, mean, square), (number, key) = state, now
        grads = jax.grad(loss)(params, key)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, square, grads)
        rate = RATE * jnp.sqrt(1 - 0.99**number) / (1 - 0.9**number) * (1 - number / STEPS)
        moved = jax.tree.map(
            lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-8), params, mean, square
        )
        return (moved, mean, square), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    steps = jnp.arange(1.0, STEPS + 1), jax.random.split(rng, STEPS)
    return jax.lax.scan(update, (params, zeros, zeros), steps)[0][0]


if __name__ == "__main__":
    trained, amounts = train(jax.random.key(0)), np.array([[24], [25], [34]])
    coins, ends, _ = Reader().apply(trained, *whole(amounts))
    for amount, coin, end in zip(amounts[:, 0], coins[:, 0], nn.sigmoid(ends[:, 0]), strict=True):
        shares = ", ".join(f"{c} {p:.2f}" for c, p in zip(COINS, nn.softmax(coin), strict=True))
        print(f"{amount}: the next coin is {shares}; the receipt ends well: {end:.2f}")
