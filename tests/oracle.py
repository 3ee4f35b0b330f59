"""Ten obviously right lines for each thing that kvjax does fast. Plain numpy, float64, no cache.

A window is a Python list of tokens; a model's weights are the Flax variables as numpy arrays.
"""

import jax
import numpy as np

from kvjax.config import WorldModelConfig


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def pad(tokens, capacity, shape, left=0):
    """[a b] -> array [a b 0 0], or with left=1 [0 a b 0]."""
    array = np.zeros((capacity, *shape))
    for i, token in enumerate(tokens):
        array[left + i] = token
    return array


def slide(tokens, context_length, correction):
    """Drops the oldest block once C - 1 tokens are there; adds a correction to what moves."""
    if len(tokens) < context_length - 1:
        return list(tokens)
    return [token + correction[i] for i, token in enumerate(tokens[2 : context_length - 1])]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x, p):
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
    )


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def simnorm(x, group):
    return softmax(x.reshape(*x.shape[:-1], -1, group)).reshape(x.shape)


def head(x, p):
    if "input_norm" in p:
        x = layer_norm(dense(layer_norm(x, p["input_norm"]), p["hidden"]), p["hidden_norm"])
    else:
        x = dense(x, p["hidden"])
    return dense(gelu(x), p["output"])


def latent_head(x, params, config):
    latent = head(x, params["latent_head"])
    if config.latent_norm == "simnorm":
        return simnorm(latent, config.simnorm_group)
    return layer_norm(latent, params["latent_final"]["norm"])


def forward(params, tokens, config: WorldModelConfig):
    """A whole sequence [T, E] at positions 0 .. T-1 with causal attention: hidden [T, E]."""
    p = params["params"]
    length = len(tokens)
    x = tokens + p["position_embedding"]["embedding"][:length]
    causal = np.tril(np.ones((length, length), bool))
    for layer in range(config.num_layers):
        block = p[f"blocks_{layer}"]
        normed = layer_norm(x, block["attention_norm"])
        q, k, v = (
            dense(normed, block[name]).reshape(length, config.num_heads, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        weights = softmax(np.where(causal, scores, -np.inf))
        read = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        x = x + dense(read, block["projection"])
        hidden = gelu(dense(layer_norm(x, block["feed_forward_norm"]), block["expand"]))
        x = x + dense(hidden, block["contract"])
    return layer_norm(x, p["final_norm"])
