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


def rotate(heads, positions, theta):
    """Pairs (2i, 2i + 1) of [T, H, D] as complex numbers, turned by position / theta^(2i/D)."""
    size = heads.shape[-1]
    angles = np.asarray(positions)[:, None] / theta ** (np.arange(0, size, 2) / size)
    turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(heads.shape)


def forward(params, tokens, config: WorldModelConfig, positions=None, sees=None):
    """A whole sequence [T, E]: hidden [T, E]. Causal, at positions 0 .. T-1, unless said otherwise.

    `sees` [T, T] bool: which tokens each one attends to, itself included.
    """
    return forward_with_kv(params, tokens, config, positions, sees)[0]


def forward_with_kv(params, tokens, config, positions=None, sees=None):
    """The same, and keys and values [T, L, 2, H, D]."""
    p = params["params"]
    length = len(tokens)
    positions = np.arange(length) if positions is None else np.asarray(positions)
    sees = np.tril(np.ones((length, length), bool)) if sees is None else sees
    x = np.asarray(tokens, np.float64)
    if not config.is_rotary:
        x = x + p["position_embedding"]["embedding"][positions]
    kv = []
    for layer in range(config.num_layers):
        block = p[f"blocks_{layer}"]
        normed = layer_norm(x, block["attention_norm"])
        q, k, v = (
            dense(normed, block[name]).reshape(length, config.num_heads, -1)
            for name in ("query", "key", "value")
        )
        if config.is_rotary:
            q, k = (rotate(heads, positions, config.rope_theta) for heads in (q, k))
        kv.append(np.stack([k, v], axis=1))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        weights = softmax(np.where(sees, scores, -np.inf))
        read = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        x = x + dense(read, block["projection"])
        hidden = gelu(dense(layer_norm(x, block["feed_forward_norm"]), block["expand"]))
        x = x + dense(hidden, block["contract"])
    return layer_norm(x, p["final_norm"]), np.stack(kv, axis=1)


class History:
    """An episode as a plain list of tokens, and which of them were in the window at each push."""

    def __init__(self, config):
        self.config, self.tokens, self.positions, self.sees = config, [], [], []
        self.window = []

    def push(self, token, position):
        self.window.append(len(self.tokens))
        self.tokens.append(token)
        self.positions.append(position)
        self.sees.append(list(self.window))

    def make_room(self):
        if len(self.window) >= self.config.context_length - 1:
            drops_all = self.config.window_mode == "reset"
            self.window = self.window[-1:] if drops_all else self.window[2:]

    def mask(self):
        mask = np.zeros((len(self.tokens), len(self.tokens)), bool)
        for row, seen in enumerate(self.sees):
            mask[row, seen] = True
        return mask
