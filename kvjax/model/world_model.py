"""UniZero's transformer world model as a Flax module: its variables, and its formulas as published.

It makes and names the variables, which training changes. What searches and steps run is
`kvjax.model.unizero`, the same function folded. One item at a time; batches come by `jax.vmap`:

    latent = WorldModel(config).apply(params, observation, method="encode")

Shapes: E embedding size, L layers, H heads, D head size, A actions, S support bins.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import WorldModelConfig
from kvjax.model import encoders, gaussian
from kvjax.model.norms import Normalise, layer_norm
from kvjax.ops import attention, position
from kvjax.ops import window as windows
from kvjax.ops.window import Window

Params = Any
"""Flax variables of a world model: {"params": ..., "batch_stats": ...}."""


_EXPANSION = 4
"""Hidden width of the feed-forward layers, in units of E."""


class _Head(nn.Module):
    """Prediction head of release 0.2.0 (E hidden units) or of main (normalised, wider)."""

    config: WorldModelConfig
    size: int

    def setup(self) -> None:
        if self.config.layout == "main":
            self.input_norm = layer_norm()
            self.hidden = nn.Dense(self.config.head_expansion * self.config.embed_dim)
            self.hidden_norm = layer_norm()
        else:
            self.hidden = nn.Dense(self.config.embed_dim)
        self.output = nn.Dense(self.size)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.config.layout == "main":
            hidden = self.hidden_norm(self.hidden(self.input_norm(x)))
        else:
            hidden = self.hidden(x)
        return self.output(nn.gelu(hidden))


class _GaussianHead(nn.Module):
    """Policy of continuous actions, alike in both releases: means and deviations.

    DI-engine's `ReparameterizationHead` of two layers, as LightZero's world model makes it.
    """

    config: WorldModelConfig

    def setup(self) -> None:
        config = self.config
        self.hidden, self.deeper = nn.Dense(config.embed_dim), nn.Dense(config.embed_dim)
        self.mean = nn.Dense(config.num_actions)
        begin = {"independent": nn.initializers.zeros, "happo": nn.initializers.ones}
        log_sigma: Any = None
        if config.sigma_type == "conditioned":
            log_sigma = nn.Dense(config.num_actions)
        elif config.sigma_type in begin:
            log_sigma = self.param("log_sigma", begin[config.sigma_type], (1, config.num_actions))
        self.log_sigma = log_sigma

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(self.deeper(nn.gelu(self.hidden(x))))
        log_sigma = self.log_sigma
        if self.config.sigma_type == "conditioned":
            log_sigma = log_sigma(hidden)
        elif log_sigma is not None:
            log_sigma = log_sigma[0]
        return jnp.concatenate(gaussian.of_head(self.mean(hidden), log_sigma, self.config))


class _Block(nn.Module):
    """Pre-LayerNorm transformer block for one token and its window."""

    config: WorldModelConfig

    def setup(self) -> None:
        width = self.config.embed_dim
        self.attention_norm, self.feed_forward_norm = layer_norm(), layer_norm()
        self.query, self.key = nn.Dense(width), nn.Dense(width)
        self.value, self.projection = nn.Dense(width), nn.Dense(width)
        self.expand, self.contract = nn.Dense(_EXPANSION * width), nn.Dense(width)

    def __call__(
        self,
        x: jax.Array,
        cached: jax.Array,
        valid: jax.Array,
        rotation: jax.Array | None,
        zero_keys: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        query, fresh = self._query_and_fresh(x, rotation)
        read = attention.attend(query, fresh, cached, valid, zero_keys)
        return self._after_attention(x, read.reshape(-1)), fresh

    def sequence(
        self, x: jax.Array, earlier: jax.Array, rotation: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """T tokens at once: x [T, E]; each reads the `earlier` ones [T, T] bool and itself."""
        query, fresh = jax.vmap(self._query_and_fresh)(x, rotation)
        read = jax.vmap(attention.attend, (0, 0, None, 0))(query, fresh, fresh, earlier)
        return self._after_attention(x, read.reshape(len(x), -1)), fresh

    def _query_and_fresh(
        self, x: jax.Array, rotation: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        heads = (self.config.num_heads, -1)
        normed = self.attention_norm(x)
        query, key = self.query(normed).reshape(heads), self.key(normed).reshape(heads)
        if rotation is not None:
            query, key = position.rotate(query, rotation), position.rotate(key, rotation)
        return query, jnp.stack([key, self.value(normed).reshape(heads)])

    def _after_attention(self, x: jax.Array, read: jax.Array) -> jax.Array:
        x = x + self.projection(read)
        return x + self.contract(nn.gelu(self.expand(self.feed_forward_norm(x))))


class WorldModel(nn.Module):
    """The whole model for one item."""

    config: WorldModelConfig

    def setup(self) -> None:  # noqa: D102
        config = self.config
        if config.has_encoder:
            self.encoder = encoders.make(_of_encoder(config))
        if config.task_size:
            self.task_embedding = nn.Embed(1, config.task_size)
        if config.max_tokens is not None:
            self.position_embedding = nn.Embed(config.max_tokens, config.embed_dim)
        embedding: Any = nn.Embed(config.num_actions, config.embed_dim)
        if config.is_continuous:
            embedding = nn.Dense(config.embed_dim, use_bias=False)
            self.action_final = Normalise("simnorm", config.simnorm_group)
        self.action_embedding = embedding
        self.blocks = [_Block(config) for _ in range(config.num_layers)]
        self.final_norm = layer_norm()
        self.reward_head = _Head(config, config.support_size)
        self.latent_head = _Head(config, config.embed_dim)
        self.latent_final = Normalise(config.latent_norm, config.simnorm_group)
        is_continuous = config.is_continuous
        self.policy_head = (
            _GaussianHead(config) if is_continuous else _Head(config, config.num_actions)
        )
        self.value_head = _Head(config, config.support_size)

    def positions(self) -> jax.Array:
        """The position table as far as a window reaches: [C, E]."""
        table = self.position_embedding.embedding
        return position.continue_table(table, self.config.context_length)

    def encode(self, observation: jax.Array) -> jax.Array:
        """One observation -> latent [E]."""
        if not self.config.has_encoder:
            return observation
        latent: jax.Array = self.encoder(observation)
        if self.config.task_size:
            latent = jnp.concatenate([latent, self.task_embedding.embedding[0]])
        return latent

    def embed_action(self, action: jax.Array) -> jax.Array:
        """[] int32, or [A] where actions are continuous -> token [E]."""
        if self.config.is_continuous:
            token: jax.Array = self.action_final(self.action_embedding(action))
            return token
        # Not called, since Flax's layer fails for a table of one row.
        return jnp.take(self.action_embedding.embedding, action, axis=0)

    def token_step(
        self,
        token: jax.Array,
        window: Window,
        position: jax.Array | None = None,
        zero_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one token through the transformer, reading a window.

        Args:
          token: [E], a latent or an embedded action, without position.
          window: what the token may attend to, `kv` [C, L, 2, H, D].
          position: [] int32, where a rotary model places the token; the window's length by default,
            which is where learned positions place it.
          zero_keys: see `kvjax.ops.attention.attend`.

        Returns:
          hidden [E] and the token's own keys and values [L, 2, H, D], ready for `append`.
        """
        valid = windows.valid_mask(window)
        x, rotation = self._place(token, window.length if position is None else position)
        fresh = []
        for layer, block in enumerate(self.blocks):
            x, kv = block(x, window.kv[:, layer], valid, rotation, zero_keys)
            fresh.append(kv)
        return self.final_norm(x), jnp.stack(fresh)

    def sequence(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        earlier: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs T tokens through the transformer at once, without a window.

        Args:
          tokens: [T, E], latents and embedded actions, without positions.
          positions: [T] int32, 0 .. T - 1 by default; learned ones below C.
          earlier: [T, T] bool, which tokens each one may attend to besides itself; all before it by
            default.

        Returns:
          hidden [T, E] and keys and values [T, L, 2, H, D].
        """
        length = len(tokens)
        positions = jnp.arange(length, dtype=jnp.int32) if positions is None else positions
        earlier = jnp.tril(jnp.ones((length, length), bool), k=-1) if earlier is None else earlier
        x, rotation = jax.vmap(self._place)(tokens, positions)
        fresh = []
        for block in self.blocks:
            x, kv = block.sequence(x, earlier, rotation)
            fresh.append(kv)
        return self.final_norm(x), jnp.stack(fresh, axis=1)

    def _place(
        self, token: jax.Array, token_position: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds a learned position to a token [E], or says how to rotate its query and key."""
        config = self.config
        if not config.is_rotary:
            return token + self.positions()[token_position], None
        head_dim = config.window.head_dim
        return token, position.rotation(token_position, head_dim, config.rope_theta)

    def at_action(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads read at an action token: reward logits [S] and next latent [E]."""
        return self.reward_head(hidden), self.latent_final(self.latent_head(hidden))

    def at_observation(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads read at an observation token: policy logits [A] and value logits [S].

        A Gaussian policy is its means and deviations, [2A].
        """
        return self.policy_head(hidden), self.value_head(hidden)

    def __call__(self, observation: jax.Array, action: jax.Array, window: Window) -> Any:
        """Touches every parameter once: what `init` needs."""
        hidden, _ = self.token_step(self.encode(observation), window, None)
        return self.embed_action(action), self.at_action(hidden), self.at_observation(hidden)


def _of_encoder(config: WorldModelConfig) -> WorldModelConfig:
    """The configuration with the width that is left to the encoder."""
    if not config.task_size:
        return config
    width = config.embed_dim - config.task_size
    return dataclasses.replace(config, embed_dim=width, num_heads=1, task_size=0)


def init_params(rng: jax.Array, config: WorldModelConfig) -> Params:
    """Fresh random parameters of a world model.

    Args:
      rng: a JAX PRNG key.
      config: the model's configuration.

    Returns:
      Flax variables.
    """
    params: Params = _init(rng, config=config)
    return params


@functools.partial(jax.jit, static_argnames="config")
def _init(rng: jax.Array, *, config: WorldModelConfig) -> Params:
    """One program, and traced once for a configuration, of which shapes are often asked."""
    window = windows.init(config.window)
    observation = jnp.zeros(config.observation_shape, jnp.float32)
    action = jnp.zeros(config.action_shape, jnp.float32 if config.is_continuous else jnp.int32)
    return WorldModel(config).init(rng, observation, action, window)


def params_shapes(config: WorldModelConfig) -> Params:
    """Shapes and dtypes of a model's variables, as `jax.ShapeDtypeStruct` leaves."""
    shapes: Params = _init.eval_shape(jax.random.key(0), config=config)  # type: ignore[no-untyped-call]
    return shapes


def check_parameter(name: str, value: np.ndarray[Any, Any], shape: tuple[int, ...]) -> None:
    """Refuses a weight that has another shape, is no floating-point number or is not finite.

    Raises:
      ValueError: with the weight's name, what was expected and what came.
    """
    check_kind(name, value.dtype)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
    if not np.isfinite(value).all():
        count = int((~np.isfinite(value)).sum())
        raise ValueError(f"{name} holds {count} values that are NaN or infinite")


def check_kind(name: str, dtype: Any) -> None:
    """Refuses weights that are complex, integers or booleans.

    Raises:
      ValueError: with the weight's name and what it holds.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} holds {dtype}, expected floating-point numbers")
