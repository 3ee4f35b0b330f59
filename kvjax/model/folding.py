"""UniZero's weights as everything here reads them: folded once, feature-major.

Folding moves out of every loop what does not depend on the activations. The matrices that write
the residual stream keep it centred; LayerNorm's scale and shift sit in the matrix that follows, and
what is left of it is one sum of squares, applied after the product. Query, key and value are one
matrix, and the two heads that read the same token are one pair.

Shapes: E embedding size, L layers, H heads, D head size, A actions, K hidden units of a head.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.base.values import require, require_one_of
from kvjax.config import WorldModelConfig
from kvjax.model.checks import validate_model
from kvjax.model.norms import centre
from kvjax.model.world_model import Params
from kvjax.ops import position

WEIGHT_DTYPES = ("float32", "bfloat16")
"""Of matrices, see `prepare`."""

_replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """`weight @ x + bias`, feature-major."""

    weight: jax.Array  # [out, in]
    bias: jax.Array  # [out]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer layer."""

    qkv: Linear  # [3E, E], reads the normalised stream; the query is scaled by 1 / sqrt(D)
    projection: Linear  # [E, E], writes the stream
    expand: Linear  # [4E, E]
    contract: Linear  # [E, 4E], writes the stream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads that read the same token: two of them, or one."""

    hidden: Linear  # [2K, E]
    norm: Linear | None  # scale and shift [2, K] of main's second LayerNorm
    outputs: tuple[Linear, ...]  # [out, K] each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianHead:
    """The policy of continuous actions."""

    hidden: Linear  # [E, E], reads the normalised stream
    deeper: Linear  # [E, E]
    mean: Linear  # [A, E]
    log_sigma: Linear | jax.Array | None  # [A, E] of "conditioned"; [A, 1]; None of "fixed"
    config: WorldModelConfig = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniZero:
    """A world model's variables, and what the steps of a search read of them.

    Attributes:
      params: the variables, of which the encoder is read.
    """

    params: Params
    blocks: tuple[Block, ...]
    final_norm: Linear | None  # [E] scale and shift; None where the heads hold them
    at_action: Heads  # reward, latent
    at_observation: Heads  # policy, value; value alone beside a Gaussian policy
    latent_norm: Linear | None  # [E], of an observation head that ends in LayerNorm
    actions: jax.Array  # [A, E] centred; of continuous actions the matrix as it is
    positions: jax.Array | None  # [C, E] centred; None if positions are rotary
    projected: jax.Array | None  # [C, L, 2, H, D], what each position adds to keys and values
    gaussian: GaussianHead | None  # the policy of continuous actions
    num_heads: int = dataclasses.field(metadata={"static": True})  # H, in the queries' scale

    @property
    def dtype(self) -> Any:
        """In which the model computes."""
        return jnp.promote_types(self.blocks[0].qkv.weight.dtype, jnp.float32)


def prepare(
    params: Params | UniZero, *, config: WorldModelConfig, dtype: str | None = None
) -> UniZero:
    """Folds a model's variables once, instead of in every call that is given variables.

    Worth it for wide models: their [E, 4E] matrices are then rewritten once. Prepare again whenever
    the variables change.

    Args:
      params: the variables, or what was prepared of them.
      config: the model's configuration.
      dtype: "bfloat16" keeps the transformer's and the heads' matrices so. Activations are rounded
        to it where they meet them, sums are float32, and so is all else: norms, embeddings,
        attention, the encoder. By default matrices are as the variables are.

    Raises:
      TypeError, ValueError: the variables are not a model's of this configuration, or a dtype other
        than these.
    """
    validate(params, config)
    if dtype is not None:
        require_one_of("dtype", dtype, WEIGHT_DTYPES)
    if isinstance(params, UniZero):
        if dtype is None:
            return params
        params = params.params
    model: UniZero = _prepare(params, config=config, dtype=dtype)
    return model


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _prepare(params: Params, *, config: WorldModelConfig, dtype: str | None) -> UniZero:
    model = fold(params, config=config)
    return model if dtype in (None, "float32") else _rounded(model, dtype)


def _rounded(model: UniZero, dtype: str | None) -> UniZero:
    """With the matrices of its blocks and heads in another dtype."""

    def matrices(part: Any) -> Any:
        return jax.tree.map(round_one, part, is_leaf=lambda x: isinstance(x, Linear))

    def round_one(layer: Any) -> Any:
        is_matrix = isinstance(layer, Linear) and layer.weight.ndim > 1
        return _replace(layer, weight=layer.weight.astype(dtype)) if is_matrix else layer

    heads = [
        Heads(matrices(pair.hidden), pair.norm, matrices(pair.outputs))
        for pair in (model.at_action, model.at_observation)
    ]
    return _replace(
        model,
        blocks=matrices(model.blocks),
        at_action=heads[0],
        at_observation=heads[1],
        gaussian=matrices(model.gaussian),
    )


def validate(params: Params | UniZero, config: WorldModelConfig) -> None:
    """Refuses what is neither a model of this configuration nor its variables.

    Raises:
      TypeError, ValueError: as `validate_model`; or the model was prepared for other heads,
        another context or other positions than the configuration's, which are folded in.
    """
    if not isinstance(params, UniZero):
        validate_model(params, config)
        return
    validate_model(params.params, config)
    came = params.num_heads, None if params.positions is None else len(params.positions)
    wanted = config.num_heads, None if config.is_rotary else config.context_length
    require(
        came == wanted,
        f"the model was prepared for (heads, positions) {came}, this config has {wanted}: call"
        " kvjax.prepare with it",
    )


def fold(params: Params | UniZero, *, config: WorldModelConfig) -> UniZero:
    """The model of these variables; what is one already is handed back."""
    if isinstance(params, UniZero):
        return params
    p = params["params"]
    blocks = [p[f"blocks_{layer}"] for layer in range(config.num_layers)]
    table, projected = None, None
    if not config.is_rotary:
        embedding = jnp.asarray(p["position_embedding"]["embedding"])
        table = position.continue_table(embedding, config.context_length)
        kernels = [[block["key"]["kernel"], block["value"]["kernel"]] for block in blocks]
        stacked = jnp.stack([jnp.stack(pair) for pair in kernels])
        projected = position.project(table, stacked, config.num_heads)
        table = centre(table, axis=1)
    heads = {name: p[f"{name}_head"] for name in ("reward", "latent", "policy", "value")}
    policy = () if config.is_continuous else (heads["policy"],)
    actions = p["action_embedding"]
    final = p["final_norm"]
    latent_norm = p.get("latent_final", {}).get("norm")
    return UniZero(
        params=params,
        blocks=tuple(_fold_block(block, config) for block in blocks),
        final_norm=_affine(final) if config.layout == "main" else None,
        at_action=_fold_heads(final, heads["reward"], heads["latent"]),
        at_observation=_fold_heads(final, *policy, heads["value"]),
        latent_norm=None if latent_norm is None else _affine(latent_norm),
        actions=actions["kernel"] if config.is_continuous else centre(actions["embedding"], axis=1),
        positions=table,
        projected=projected,
        gaussian=_fold_gaussian(heads["policy"], final, config) if config.is_continuous else None,
        num_heads=config.num_heads,
    )


def _affine(norm: Params) -> Linear:
    return Linear(weight=norm["scale"], bias=norm["bias"])


def _reading(dense: Params, norm: Params) -> Linear:
    """A dense layer behind a LayerNorm, whose scale and shift it takes over."""
    weight = dense["kernel"].T
    return Linear(weight * norm["scale"][None], weight @ norm["bias"] + dense["bias"])


def _writing(dense: Params) -> Linear:
    """A dense layer whose outputs have mean zero."""
    return Linear(centre(dense["kernel"].T, axis=0), centre(dense["bias"], axis=0))


def _plain(dense: Params) -> Linear:
    return Linear(dense["kernel"].T, dense["bias"])


def _stacked(*layers: Linear) -> Linear:
    stacked: Linear = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    return stacked


def _fold_block(block: Params, config: WorldModelConfig) -> Block:
    norm = block["attention_norm"]
    query, key, value = (_reading(block[name], norm) for name in ("query", "key", "value"))
    scale = config.window.head_dim**-0.5
    return Block(
        qkv=_stacked(Linear(query.weight * scale, query.bias * scale), key, value),
        projection=_writing(block["projection"]),
        expand=_reading(block["expand"], block["feed_forward_norm"]),
        contract=_writing(block["contract"]),
    )


def _fold_heads(final_norm: Params, *heads: Params) -> Heads:
    """Release 0.2.0's heads take the final norm over; main's have norms of their own."""
    has_norms = "input_norm" in heads[0]
    hidden = [_reading(h["hidden"], h["input_norm"] if has_norms else final_norm) for h in heads]
    norm = None
    if has_norms:
        hidden = [Linear(centre(h.weight, 0), centre(h.bias, 0)) for h in hidden]
        norms = [_affine(h["hidden_norm"]) for h in heads]
        norm = jax.tree.map(lambda *parts: jnp.stack(parts), *norms)
    return Heads(_stacked(*hidden), norm, tuple(_plain(h["output"]) for h in heads))


def _fold_gaussian(head: Params, final_norm: Params, config: WorldModelConfig) -> GaussianHead:
    """It reads the final norm's output in both releases."""
    sigma = head.get("log_sigma")
    is_layer = isinstance(sigma, Mapping)
    return GaussianHead(
        hidden=_reading(head["hidden"], final_norm),
        deeper=_plain(head["deeper"]),
        mean=_plain(head["mean"]),
        log_sigma=None if sigma is None else _plain(sigma) if is_layer else jnp.asarray(sigma).T,
        config=config,
    )
