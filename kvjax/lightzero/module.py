"""What kvjax needs to know of a live torch `WorldModel`, found out from the instance.

Understands LightZero 0.2.0 and its main branch without importing either.

Shapes: C context_length in tokens, K = C - 3, L layers, H heads, D head size, P environments.
"""

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np

from kvjax.base.dlpack import require_shared_device
from kvjax.base.values import require
from kvjax.config import BLOCK, MIN_CONTEXT, WindowMode, WorldModelConfig

Array = np.ndarray[Any, Any]

REPLACED = (
    "wm_forward_for_initial_infererence",  # as LightZero spells it
    "retrieve_or_generate_kvcache",
    "trim_and_pad_kv_cache",
    "update_cache_context",
)
"""The methods that an attached model leaves to kvjax."""

RENEWS = "_prepare_exact_cache_resets"
"""Main's method that computes what a full window keeps anew."""

_NEEDED = (*REPLACED, "clear_caches", "transformer", "keys_values_wm", "context_length", "env_num")
_TABLE_TOLERANCE = 1e-4
_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Description:
    """The shape of a world model's caches and which variant of the code it runs."""

    config: WorldModelConfig  # only what a store reads of it is meant
    num_envs: int  # P
    root_slots: int  # of each environment
    node_slots: int
    num_simulations: int
    rotary: bool  # positions are rotated into keys: a slide corrects nothing
    masks_padding: bool  # main does, 0.2.0 attends to it
    takes_env_ids: bool  # main names the environments of its rows
    continuous: bool

    @functools.cached_property
    def exact(self) -> bool:
        """Whether the module itself computes what a full window keeps, as main can."""
        mode = self.config.mode
        return mode.keeps_raw or mode.carry is not None

    @functools.cached_property
    def kept(self) -> int:
        """Tokens that a full window keeps."""
        carry = self.config.mode.carry
        return self.stored if carry is None else carry

    @functools.cached_property
    def stored(self) -> int:
        """K, tokens of the longest window that is ever stored."""
        return self.config.window.kept_length

    @functools.cached_property
    def keeps_tokens(self) -> bool:
        """Whether raw tokens are kept beside keys and values."""
        return self.config.window.raw_size is not None

    @functools.cached_property
    def cache_shape(self) -> tuple[int, int, int, int, int]:
        """(L, 2, H, C, D)."""
        window = self.config.window
        layers, two, heads, size = window.token_shape
        return layers, two, heads, window.context_length, size


def unwrap(world_model: Any) -> Any:
    """The module behind `torch.compile` and `DistributedDataParallel`, in any order."""
    for wrapper in ("_orig_mod", "module") * 2:
        inner = getattr(world_model, wrapper, None)
        world_model = inner if hasattr(inner, "state_dict") else world_model
    return world_model


def require_world_model(wm: Any) -> None:
    """Raises `ValueError` unless the module is LightZero's `WorldModel`."""
    expected = "expected LightZero's WorldModel, got"
    require(not isinstance(wm, type), f"{expected} the class {wm}: pass an object of it")
    missing = [name for name in _NEEDED if not hasattr(wm, name)]
    if missing:
        hint = ": pass its .world_model" if hasattr(wm, "world_model") else ""
        got = "None" if wm is None else type(wm).__name__
        raise ValueError(f"{expected} {got}, which has no {', '.join(missing)}{hint}")


def describe(wm: Any) -> Description:
    """Reads a world model's sizes and refuses what cannot be attached to.

    Raises:
      ValueError: a variant that is not supported.
    """
    _refuse_variants(wm)
    weight = wm.transformer.blocks[0].attn.key.weight
    if weight.device.type != "cpu":  # to ask jax about that starts it: see `attach`
        require_shared_device(weight.device)
    name = str(weight.dtype).removeprefix("torch.")
    require(name == "float32", f"expected a float32 model and caches, got {name}")
    rotary = bool(getattr(wm.config, "rotary_emb", False))
    length = int(wm.context_length)
    if not rotary:
        table = wm.pos_emb.num_embeddings
        require(
            table >= length - 1,
            f"a window of {length} tokens needs a position table of {length - 1} rows, got {table}",
        )
    envs, simulations = int(wm.env_num), int(getattr(wm, "num_simulations", 50))
    nodes = getattr(wm, "shared_pool_size_recur", getattr(wm, "shared_pool_size", 0))
    return Description(
        config=_config(wm, length),
        num_envs=envs,
        root_slots=max(2, int(getattr(wm, "shared_pool_size_init", 2))),
        node_slots=max(int(nodes), envs * simulations),
        num_simulations=simulations,
        rotary=rotary,
        masks_padding=hasattr(wm, "_variable_context_lengths"),
        takes_env_ids="env_ids" in inspect.signature(wm.update_cache_context).parameters,
        continuous=bool(getattr(wm, "continuous_action_space", False)),
    )


def _refuse_variants(wm: Any) -> None:
    length = int(wm.context_length)
    require(
        length % BLOCK == 0 and length >= MIN_CONTEXT,
        f"context_length must be even and at least {MIN_CONTEXT}, got {length}: an odd window loses"
        " its newest observation when it slides, a shorter one keeps nothing",
    )
    tokens = getattr(wm, "num_observations_tokens", 1)
    require(tokens == 1, f"expected 1 token per observation, got {tokens}")
    require(
        _window_mode(wm) == "learned" or hasattr(wm, RENEWS),
        f"exact windows need a model that computes them: {type(wm).__name__} has no {RENEWS}",
    )
    for name in REPLACED:
        parameters = inspect.signature(getattr(wm, name)).parameters
        require("task_id" not in parameters, f"multi-task models are not supported ({name})")


def _config(wm: Any, length: int) -> WorldModelConfig:
    return WorldModelConfig(
        embed_dim=int(wm.config.embed_dim),
        num_layers=int(wm.config.num_layers),
        num_heads=int(wm.config.num_heads),
        num_actions=max(1, int(getattr(wm, "action_space_size", 1))),
        context_length=length,
        max_tokens=length,
        encoder_norm="layernorm",
        latent_norm="layernorm",
        window_mode=_window_mode(wm),
    )


def _window_mode(wm: Any) -> WindowMode:
    if getattr(wm, "exact_kv_window_reset", False):
        return "reset"
    return "rebuild" if getattr(wm, "rebuild_kv_window_from_tokens", False) else "learned"


def slide_correction(wm: Any, description: Description) -> Array:
    """What a slide adds, from the weights as they are now: [L, 2, H, K, D].

    Zeros with RoPE and where the module computes windows anew.
    """
    import torch

    layers, two, heads, length, size = description.cache_shape
    kept = description.stored
    if description.rotary or description.exact:
        return np.zeros((layers, two, heads, kept, size), np.float32)
    with torch.no_grad():
        table = wm.pos_emb.weight[: length - 1]
        attention = [block.attn for block in wm.transformer.blocks]
        projected = torch.stack([torch.stack([a.key(table), a.value(table)]) for a in attention])
        projected = projected.reshape(layers, two, length - 1, heads, size).transpose(2, 3)
        difference = projected[..., :kept, :] - projected[..., BLOCK:, :]
    return np.ascontiguousarray(difference.cpu().numpy())


def table_error(wm: Any, correction: Array) -> float:
    """How far the module's own precomputed table is from `correction`: 0 if it has none."""
    if not hasattr(wm, "pos_emb_diff_k"):
        return 0.0
    layers = zip(wm.pos_emb_diff_k, wm.pos_emb_diff_v, strict=True)
    own = np.stack([np.stack([_only_entry(table) for table in layer]) for layer in layers])
    error = float(np.abs(own - correction).max())
    return error if error > _TABLE_TOLERANCE * max(1.0, float(np.abs(correction).max())) else 0.0


def _only_entry(tables: dict[Any, Any]) -> Array:
    (table,) = tables.values()
    entry: Array = np.asarray(table.detach().cpu())[0]
    return entry


@dataclasses.dataclass(frozen=True)
class Weights:
    """How a world model's weights looked, to notice when they change."""

    watched: list[Any]  # the parameters that `slide_correction` reads
    versions: tuple[int, ...]  # of these
    all: tuple[Any, ...]  # versions of all parameters, and some of their numbers


def look_at_weights(wm: Any, description: Description) -> Weights:
    """How a world model's weights look now."""
    watched = []
    if not (description.rotary or description.exact):
        layers = [layer for b in wm.transformer.blocks for layer in (b.attn.key, b.attn.value)]
        watched = [wm.pos_emb.weight, *(p for layer in layers for p in layer.parameters())]
    return Weights(watched, _versions(watched), _fingerprint(wm))


def have_changed(weights: Weights, wm: Any, *, thorough: bool) -> bool:
    """Whether the weights that a correction reads, or if `thorough` any, are others by now."""
    if thorough:
        return _fingerprint(wm) != weights.all
    return _versions(weights.watched) != weights.versions


def _versions(parameters: list[Any]) -> tuple[int, ...]:
    """Changes when a parameter is written to in place or gets other memory."""
    return tuple(x for p in parameters for x in (p.data_ptr(), _version(p)))


def _version(parameter: Any) -> int:
    # Parameters that were made in inference mode count nothing.
    return 0 if parameter.is_inference() else parameter._version


def _fingerprint(wm: Any) -> tuple[Any, ...]:
    """Versions, and a few numbers of each parameter: writes through `.data` count no version."""
    import torch

    parameters = list(wm.parameters())
    with torch.no_grad():
        few = [p.detach().reshape(-1)[:_SAMPLES] for p in parameters if p.numel()]
        numbers = torch.cat(few).cpu().numpy().tobytes() if few else b""
    return _versions(parameters), numbers
