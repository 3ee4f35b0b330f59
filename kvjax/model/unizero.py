"""UniZero's transformer as everything here runs it, with folded weights (`folding`).

Rows are batched by hand, because `W[out, in] @ x[in, B]` is what a CPU multiplies fastest when B is
small. The model reads keys and values and returns a token's own; it never writes a cache.

Shapes: B rows, E embedding size, L layers, H heads, D head size, A actions, R support bins, T slots
of a window, K hidden units of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require_shape
from kvjax.config import WorldModelConfig
from kvjax.model import gaussian
from kvjax.model.folding import GaussianHead, Heads, Linear, UniZero
from kvjax.model.norms import EPSILON, centre
from kvjax.model.root_window import View
from kvjax.model.world_model import WorldModel
from kvjax.ops import position

_UNROLLED = 32
"""The largest SimNorm group that is written out, which is faster; it takes time to compile."""

Cached = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values [B, T, E] of each layer."""
Fresh = tuple[jax.Array, ...]
"""One token's keys and values [B, 2, E] of each layer."""


def _rstd(centred: jax.Array, axis: int = 0) -> jax.Array:
    """What LayerNorm multiplies a centred vector with: [E, B] to [1, B]."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axis, keepdims=True) + EPSILON)


def _apply(layer: Linear, x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """`weight @ (scale * x) + bias` with the scale [1, B] applied after the product."""
    return product(layer.weight, x) * scale + layer.bias[:, None]


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight @ x`; of bfloat16 weights in one multiplication of bfloat16 with float32 sums."""
    if weight.dtype != jnp.bfloat16:
        return weight @ x
    return jnp.matmul(weight, x.astype(weight.dtype), preferred_element_type=jnp.float32)


def token_step(
    model: UniZero,
    x: jax.Array,
    cached: Cached,
    valid: jax.Array,
    fresh: tuple[Fresh, ...] = (),
    rotation: jax.Array | None = None,
    *,
    config: WorldModelConfig,
    zero_keys: jax.Array | None = None,
    at_root: View | None = None,
) -> tuple[jax.Array, Fresh]:
    """Runs one token of each row through the transformer.

    Args:
      x: [E, B], centred, position included.
      cached: keys and values of the windows as they are read, positions included.
      valid: [B, T] bool.
      fresh: tokens pushed after the window, as this function returned them.
      rotation: [B, 2, D / 2] of the token, see `kvjax.ops.position.rotation`.
      zero_keys: [B] int32, extra keys with score 0 and value 0. LightZero 0.2.0 reads its padding
        that way; for parity with it and for nothing else.
      at_root: of windows whose first tokens are read where they lie; `cached` then lacks positions.

    Returns:
      The stream [E, B] behind the last layer, centred and not normalised, and the token's own keys
      and values.
    """
    require_shape("x", x, ("E", "B"))
    require_shape("valid", valid, (x.shape[1], "T"))
    width, batch = x.shape
    own = []
    for layer, block in enumerate(model.blocks):
        qkv = _apply(block.qkv, x, _rstd(x)).T.reshape(batch, 3, width)
        qkv = qkv if rotation is None else _rotate(qkv, rotation, config)
        behind = jnp.stack([*(token[layer] for token in fresh), qkv[:, 1:]], axis=1)
        if at_root is None:
            read = _attend(qkv[:, 0], cached[layer], valid, behind, config.num_heads, zero_keys)
        else:
            read = at_root.attend(layer, qkv[:, 0], cached[layer], valid, behind)
        x = x + _apply(block.projection, read.T)
        x = x + _apply(block.contract, jax.nn.gelu(_apply(block.expand, x, _rstd(x))))
        own.append(qkv[:, 1:])
    return x, tuple(own)


def _rotate(qkv: jax.Array, rotation: jax.Array, config: WorldModelConfig) -> jax.Array:
    """Rotates queries and keys of [B, 3, E] by [B, 2, D / 2]."""
    heads = qkv[:, :2].reshape(qkv.shape[0], 2 * config.num_heads, -1)
    turned = jax.vmap(position.rotate)(heads, rotation).reshape(qkv[:, :2].shape)
    return jnp.concatenate([turned, qkv[:, 2:]], axis=1)


def sequence(model: UniZero, x: jax.Array, *, config: WorldModelConfig) -> Cached:
    """Keys and values of whole sequences at positions 0, 1, .., each token reading those before it.

    Args:
      x: [E, B, T], centred, without positions.
    """
    return sequence_stream(model, x, config=config)[1]


def sequence_stream(
    model: UniZero, x: jax.Array, *, config: WorldModelConfig
) -> tuple[jax.Array, Cached]:
    """As `sequence`, and the stream [E, B, T] behind the last layer, centred and not normalised.

    Tokens of a rotary model are turned by their positions, too.
    """
    embed_dim, batch, length = x.shape
    heads = (3, config.num_heads, config.window.head_dim, batch, length)
    causal = jnp.tril(jnp.ones((length, length), bool))
    if model.positions is not None:
        x = x + model.positions[:length].T[:, None]
    x, own = x.reshape(embed_dim, -1), []
    for block in model.blocks:
        query, key, value = _apply(block.qkv, x, _rstd(x)).reshape(heads)  # [H, D, B, T] each
        if config.is_rotary:
            query, key = (_rotate_sequence(part, config) for part in (query, key))
        scores = jnp.einsum("hdbq,hdbk->bhqk", query, key)
        weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf), axis=-1)
        read = jnp.einsum("bhqk,hdbk->hdbq", weights, value).reshape(embed_dim, -1)
        x = x + _apply(block.projection, read)
        x = x + _apply(block.contract, jax.nn.gelu(_apply(block.expand, x, _rstd(x))))
        keys, values = (
            part.transpose(2, 3, 0, 1).reshape(batch, length, -1) for part in (key, value)
        )
        own.append((keys, values))
    return x.reshape(embed_dim, batch, length), tuple(own)


def _rotate_sequence(part: jax.Array, config: WorldModelConfig) -> jax.Array:
    """Turns queries or keys [H, D, B, T] by positions 0 .. T - 1."""
    head_dim, length = part.shape[1], part.shape[-1]
    turn = functools.partial(position.rotation, head_dim=head_dim, theta=config.rope_theta)
    rotations = jax.vmap(turn)(jnp.arange(length, dtype=jnp.int32))  # [T, 2, D / 2]
    heads = part.transpose(2, 3, 0, 1)
    turned = jax.vmap(jax.vmap(position.rotate), in_axes=(0, None))(heads, rotations)
    return turned.transpose(2, 3, 0, 1)


def _attend(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    valid: jax.Array,
    fresh: jax.Array,
    heads: int,
    zero_keys: jax.Array | None,
) -> jax.Array:
    """Reads [B, E]: query [B, E] (scaled), cached keys and values [B, T, E], fresh [B, F, 2, E].

    The softmax divides last, where its sum is small.
    """
    keys, values = cached
    spread = functools.partial(jnp.repeat, repeats=query.shape[1] // heads, axis=-1)
    cached_scores = _by_head(query[:, None] * keys, heads)  # [B, T, H]
    cached_scores = jnp.where(valid[..., None], cached_scores, -jnp.inf)
    fresh_scores = _by_head(query[:, None] * fresh[:, :, 0], heads)
    largest = jnp.maximum(jnp.max(cached_scores, axis=1), jnp.max(fresh_scores, axis=1))[:, None]
    largest = jax.lax.stop_gradient(largest)
    if zero_keys is not None:
        largest = jnp.where(zero_keys[:, None, None] > 0, jnp.maximum(largest, 0.0), largest)
    cached_weights = jnp.exp(cached_scores - largest)
    fresh_weights = jnp.exp(fresh_scores - largest)
    total = jnp.sum(cached_weights, axis=1) + jnp.sum(fresh_weights, axis=1)
    if zero_keys is not None:
        padded = zero_keys[:, None].astype(total.dtype) * jnp.exp(-largest[:, 0])
        total = jnp.where(zero_keys[:, None] > 0, total + padded, total)
    read = jnp.sum(spread(cached_weights) * values, axis=1)
    read = read + jnp.sum(spread(fresh_weights) * fresh[:, :, 1], axis=1)
    return read / spread(total)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    """Sums [.., E] within each head: [.., H]."""
    return jnp.sum(x.reshape(*x.shape[:-1], heads, -1), axis=-1)


def _read_heads(model: UniZero, heads: Heads, x: jax.Array) -> list[jax.Array]:
    """The heads' outputs [out, B] of the stream [E, B]."""
    if model.final_norm is None:
        hidden = _apply(heads.hidden, x, _rstd(x))
    else:
        normed = x * _rstd(x) * model.final_norm.weight[:, None] + model.final_norm.bias[:, None]
        centred = centre(normed, axis=0)
        hidden = _apply(heads.hidden, centred, _rstd(centred))
    parts = hidden.reshape(len(heads.outputs), -1, hidden.shape[-1])
    if heads.norm is not None:
        parts = parts * _rstd(parts, axis=1) * heads.norm.weight[..., None]
        parts = parts + heads.norm.bias[..., None]
    read = zip(heads.outputs, list(jax.nn.gelu(parts)), strict=True)
    return [_apply(output, part) for output, part in read]


def at_action(model: UniZero, x: jax.Array, *, config: WorldModelConfig) -> tuple[Any, Any]:
    """Stream [E, B] of action tokens to reward logits [R, B] and next latents [E, B]."""
    reward, latent = _read_heads(model, model.at_action, x)
    if model.latent_norm is None:
        return reward, _simnorm(latent, config.simnorm_group)
    centred = centre(latent, axis=0)
    norm = model.latent_norm
    return reward, centred * _rstd(centred) * norm.weight[:, None] + norm.bias[:, None]


def at_observation(model: UniZero, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stream [E, B] of observation tokens to policy logits [A, B] and value logits [R, B].

    A Gaussian policy is its means and deviations, [2A, B].
    """
    if model.gaussian is not None:
        (value,) = _read_heads(model, model.at_observation, x)
        return _read_gaussian(model.gaussian, x), value
    policy, value = _read_heads(model, model.at_observation, x)
    return policy, value


def _read_gaussian(head: GaussianHead, x: jax.Array) -> jax.Array:
    """Means and deviations [2A, B] of the stream [E, B]."""
    hidden = jax.nn.gelu(_apply(head.hidden, x, _rstd(x)))
    hidden = jax.nn.gelu(_apply(head.deeper, hidden))
    log_sigma = head.log_sigma
    if isinstance(log_sigma, Linear):
        log_sigma = _apply(log_sigma, hidden)
    return jnp.concatenate(gaussian.of_head(_apply(head.mean, hidden), log_sigma, head.config))


def _simnorm(x: jax.Array, group: int) -> jax.Array:
    """Softmax over groups of rows of [E, B]; the few entries of a usual group are unrolled."""
    grouped = x.reshape(-1, group, x.shape[-1])
    if group > _UNROLLED:
        return jax.nn.softmax(grouped, axis=1).reshape(x.shape)
    largest = grouped[:, 0]
    for entry in range(1, group):
        largest = jnp.maximum(largest, grouped[:, entry])
    largest = jax.lax.stop_gradient(largest)
    exponents = jnp.exp(grouped - largest[:, None])
    total = exponents[:, 0]
    for entry in range(1, group):
        total = total + exponents[:, entry]
    return (exponents / total[:, None]).reshape(x.shape)


def encode(model: UniZero, observation: jax.Array, *, config: WorldModelConfig) -> jax.Array:
    """Observations [B, *observation_shape] to latents [B, E]; they are the same without encoder."""
    require_shape("observation", observation, ("B", *config.observation_shape))
    if not config.has_encoder:
        return observation
    apply = functools.partial(WorldModel(config).apply, model.params, method="encode")
    return jnp.asarray(jax.vmap(apply)(observation))


def raw_action(model: UniZero, action: jax.Array) -> jax.Array:
    """Actions [B] int32 or [B, A] to raw tokens [B, E]; a latent is a raw token as it is."""
    if model.gaussian is not None:
        return _weighed_action(model, action, model.gaussian).T
    return jnp.take(model.params["params"]["action_embedding"]["embedding"], action, axis=0)


def embed_action(model: UniZero, action: jax.Array) -> jax.Array:
    """Actions [B] int32 or [B, A] to tokens [E, B], centred, without positions."""
    if model.gaussian is not None:
        return centre(_weighed_action(model, action, model.gaussian), axis=0)
    return model.actions[action].T


def _weighed_action(model: UniZero, action: jax.Array, policy: GaussianHead) -> jax.Array:
    """Continuous actions [B, A] to tokens [E, B]."""
    weighed = model.actions.T @ action.astype(model.dtype).T
    return _simnorm(weighed, policy.config.simnorm_group)


def embed_latent(latent: jax.Array) -> jax.Array:
    """Latents [E, B] to tokens [E, B], centred, without positions."""
    return centre(latent, axis=0)


def place(model: UniZero, token: jax.Array, slot: jax.Array) -> jax.Array:
    """Adds learned positions, if there are any, to tokens [E, B] in slots [B]."""
    return token if model.positions is None else token + model.positions[slot].T
