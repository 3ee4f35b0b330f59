"""Latents to keys, on the device, in uint32 lanes (64-bit integers stay off).

A key is exact about whose it is and a digest of what it is: four digest lanes, the environment, the
epoch of the parameters, and on request the latent itself. Two different latents share a digest with
probability 2**-128 if the digest behaves as a random function, so n stored latents collide with
probability below n**2 / 2**129. That bound is heuristic and holds for latents that nobody crafted;
`verify` makes equality exact.

Shapes: E embedding size, K lanes of a key.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.base.values import require_shape

DIGEST_LANES = 4
ENV_LANE = DIGEST_LANES
EPOCH_LANE = DIGEST_LANES + 1
KEY_LANES = DIGEST_LANES + 2
"""Lanes of a key without the latent: digest, environment, epoch."""

_LANE_BITS = 32
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)
_GOLDEN = np.uint32(0x9E3779B9)
_CHUNK = 64  # entries that are mixed at a time: their lanes, of a whole batch, stay in fast memory
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # murmur3's finaliser


def _mix(x: Any) -> Any:
    """A bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 13)) * _MIX_2
    return x ^ (x >> 16)


def _salts(size: int) -> np.ndarray[Any, Any]:
    """A different constant for every entry and lane: [size, 4] uint32."""
    counter = np.arange(1, size * DIGEST_LANES + 1, dtype=np.uint32)
    return np.asarray(_mix(counter * _GOLDEN)).reshape(size, DIGEST_LANES)


def _lanes(bits: jax.Array, salts: Any) -> jax.Array:
    """Sums of bits [N], mixed with salts [N, 4]: [4] uint32."""
    return jnp.sum(_mix(bits[:, None] ^ salts), axis=0, dtype=jnp.uint32)


def canonical_bits(latent: jax.Array) -> jax.Array:
    """Bit patterns in which equal numbers are equal: one zero, one NaN.

    Args:
      latent: [E] float32.

    Returns:
      [E] uint32.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(latent, jnp.float32), jnp.uint32)
    magnitude = bits & ~_SIGN
    nan_or_bits = jnp.where(magnitude > _INFINITY, _NAN, bits)
    return jnp.where(magnitude == 0, 0, nan_or_bits)


def digest(bits: jax.Array) -> jax.Array:
    """128 bits that depend on every entry and its place.

    Args:
      bits: [N] uint32.

    Returns:
      [4] uint32.
    """
    require_shape("bits", bits, ("N",))
    size = bits.shape[0]
    chunks, padding = -(-size // _CHUNK), -size % _CHUNK
    if chunks > 1:  # what is behind the last entry has no salt and counts nothing, as _mix(0) is 0
        bits = jnp.pad(bits, (0, padding)).reshape(chunks, _CHUNK)
        salts = jnp.pad(_salts(size), ((0, padding), (0, 0))).reshape(chunks, _CHUNK, DIGEST_LANES)
        start = jnp.zeros(DIGEST_LANES, jnp.uint32)
        lanes = loops.fori_loop(0, chunks, lambda i, x: x + _lanes(bits[i], salts[i]), start)
    else:
        lanes = _lanes(bits, _salts(size))
    mixed: jax.Array = _mix(lanes ^ _mix(jnp.roll(lanes, 1) + _GOLDEN))
    return mixed


def latent_key(
    latent: jax.Array, env_id: jax.Array, epoch: jax.Array, *, verify: bool = False
) -> jax.Array:
    """Key of a latent in one environment and under one set of parameters.

    Args:
      latent: [E] float32.
      env_id: [] integer.
      epoch: [] integer, counts parameter updates.
      verify: whether the latent itself is part of the key, so that equality is exact.

    Returns:
      [6] uint32, or [6 + E] with `verify`.
    """
    require_shape("latent", latent, ("E",))
    bits = canonical_bits(latent)
    return key(digest(bits), env_id, epoch, bits if verify else None)


def path_key(parent_key: jax.Array, action: jax.Array) -> jax.Array:
    """Key of the node that an action makes of a parent, whatever its latent: [K] like the parent's.

    Equal latents that were reached by different paths get different keys.

    Args:
      parent_key: [K] uint32.
      action: [] integer, or [A] float32.
    """
    require_shape("parent_key", parent_key, ("K",))
    is_vector = jnp.issubdtype(action.dtype, jnp.floating)
    require_shape("action", action, ("A",) if is_vector else ())
    lanes = parent_key[:DIGEST_LANES]
    bits = canonical_bits(action) if is_vector else action.astype(jnp.uint32)
    digested = digest(jnp.append(lanes, bits))
    rest = jnp.zeros_like(parent_key[KEY_LANES:])  # the path takes the latent's place
    return jnp.concatenate([digested, parent_key[DIGEST_LANES:KEY_LANES], rest])


def key(
    digest_lanes: jax.Array,
    env_id: jax.Array,
    epoch: jax.Array,
    latent_bits: jax.Array | None = None,
) -> jax.Array:
    """Assembles a key of a digest [4], an environment, an epoch and perhaps latent bits [E]."""
    require_shape("digest_lanes", digest_lanes, (DIGEST_LANES,))
    for name, lane in {"env_id": env_id, "epoch": epoch}.items():
        require_shape(name, lane, ())
    owner = [jnp.asarray(lane).astype(jnp.uint32)[None] for lane in (env_id, epoch)]
    tail = [] if latent_bits is None else [latent_bits]
    return jnp.concatenate([digest_lanes, *owner, *tail])


def integer_digests(keys: Sequence[int]) -> np.ndarray[Any, Any]:
    """Digests of ready-made integer keys, such as LightZero's xxh64: [B, 4] uint32, on the host.

    Raises:
      ValueError: a key is negative or has more than 128 bits.
    """
    limit = 1 << (_LANE_BITS * DIGEST_LANES)
    for value in keys:
        if not 0 <= int(value) < limit:
            raise ValueError(f"an integer key must be in 0 .. 2**128 - 1, got {value}")
    mask = (1 << _LANE_BITS) - 1
    lanes = [[int(v) >> (_LANE_BITS * i) & mask for i in range(DIGEST_LANES)] for v in keys]
    return np.asarray(lanes, np.uint32).reshape(len(lanes), DIGEST_LANES)


def bucket(key_lanes: jax.Array) -> jax.Array:
    """32 bits of a key, by which a pool files it: [K] uint32 -> [] uint32."""
    require_shape("key_lanes", key_lanes, ("K",))
    folded = jnp.asarray(_GOLDEN)
    for lane in range(KEY_LANES):
        folded = _mix(folded ^ key_lanes[lane])
    return folded
