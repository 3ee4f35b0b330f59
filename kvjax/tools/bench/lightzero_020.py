"""Driver of the real LightZero 0.2.0 on the CPU, the reference of benchmarks and parity tests.

LightZero and torch are optional: they are imported on first use (seconds) and kept quiet. A search
step makes the calls that LightZero's UniZero policy makes.

Shape legend: B rows of a batch (environments), O observation size, A actions.
"""

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

__all__ = ["SearchResult", "Searcher", "available", "build_model", "clear", "load_checkpoint"]

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]

FIRST_STEP = -1
ONE_PLAYER = -1
TOKENS_PER_BLOCK = 2
SIM_NORM_GROUP = 8
WEIGHT_NOISE = 0.1
ROOT_NOISE_WEIGHT = 0.25
COMPILED_PREFIX = "_orig_mod."

# What LightZero's world model insists on reading, besides the sizes: off, or of training only.
_OFF = ("rotary_emb", "gru_gating", "continuous_action_space", "analysis_sim_norm", "gamma")
_UNUSED = ("embed_pdrop", "resid_pdrop", "attn_pdrop", "latent_recon_loss_weight", "max_cache_size")
_TRAINING = ("perceptual_loss_weight", "policy_entropy_weight", "predict_latent_loss_type")
_ANALYSIS = ("analysis_dormant_ratio", "dormant_threshold")
_CONFIG = dict.fromkeys((*_OFF, *_UNUSED, *_TRAINING, *_ANALYSIS), 0)


class SearchResult(TypedDict):
    """What one search step of B environments answers."""

    visit_counts: npt.NDArray[np.int64]  # [B, A]
    root_value: npt.NDArray[np.float32]  # [B] mean return over the simulations
    action: npt.NDArray[np.int64]  # [B] most visited, the first one on ties
    policy_logits: npt.NDArray[np.float32]  # [B, A] of the network at the root
    network_value: npt.NDArray[np.float32]  # [B] of the network at the root, as a scalar


def available() -> bool:
    """Whether torch and LightZero are installed; imports neither."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "lzero"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow output and warnings, and undo what LightZero does to the root logger."""
    root, sink = logging.getLogger(), io.StringIO()
    level, handlers = root.level, root.handlers[:]
    out, err = contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink)
    try:
        with out, err, warnings.catch_warnings(action="ignore"):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _load(name: str) -> Any:
    """Import a module that may be missing and that may talk."""
    with _quiet():
        return importlib.import_module(name)


def build_model(
    *,
    observation_size: int | tuple[int, int, int],
    num_actions: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    context_length: int,
    num_envs: int,
    num_simulations: int,
    support: int = 50,
    max_blocks: int = 10,
    seed: int = 0,
    **sampled: Any,
) -> Any:
    """Build a `UniZeroModel` with random weights, in evaluation mode.

    `observation_size` is a vector's size or an image's (channels, height, width).
    `num_envs` bounds the batch of a search. Categories are the integers of `[-support, support]`.
    The position table has `2 * max_blocks` rows; `context_length` counts tokens and must fit.
    Further settings make it a `SampledUniZeroModel`: `continuous_action_space`, `sigma_type`,
    `fixed_sigma_value`, `bound_type`, `num_of_sampled_actions`.
    """
    sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads}
    sizes |= {"context_length": context_length, "max_blocks": max_blocks, "env_num": num_envs}
    sizes |= {"num_simulations": num_simulations, "action_space_size": num_actions}
    sizes |= {"max_tokens": TOKENS_PER_BLOCK * max_blocks, "support_size": 2 * support + 1}
    sizes |= {"tokens_per_block": TOKENS_PER_BLOCK, "group_size": SIM_NORM_GROUP}
    config = _load("easydict").EasyDict(_CONFIG | sizes | sampled, device="cpu")
    config.obs_type = "vector" if isinstance(observation_size, int) else "image"
    return _random_model(observation_size, config, seed)


def _random_model(observation_size: Any, config: Any, seed: int) -> Any:
    """Seed and perturb all weights: a fresh observation head is zero, so all latents coincide."""
    torch, is_sampled = _load("torch"), "num_of_sampled_actions" in config
    name = "SampledUniZeroModel" if is_sampled else "UniZeroModel"
    module = "sampled_unizero_model" if is_sampled else "unizero_model"
    model_type = getattr(_load(f"lzero.model.{module}"), name)
    with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sizes = observation_size, config.action_space_size
        model = model_type(*sizes, world_model_cfg=config, norm_type="BN")
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=WEIGHT_NOISE)
    return _refresh(model)


def load_checkpoint(model: Any, path: str | os.PathLike[str]) -> Any:
    """Load a learner's `.pth.tar` strictly into a model of the same sizes, and return the model."""
    weights = _load("torch").load(path, map_location="cpu", weights_only=True)["model"]
    model.load_state_dict({name.removeprefix(COMPILED_PREFIX): w for name, w in weights.items()})
    return _refresh(model)


def _refresh(model: Any) -> Any:
    """Make a model whose weights changed ready for inference."""
    # LightZero computes this table before it initialises the weights, and then keeps it.
    model.world_model.precompute_pos_emb_diff_kv()
    clear(model)
    return model.eval()


def clear(model: Any) -> None:
    """Forget every cached context, as the policy does; the next step should be a first step."""
    wm = model.world_model
    for pool in (*wm.past_kv_cache_init_infer_envs, wm.past_kv_cache_recurrent_infer):
        pool.clear()
    wm.keys_values_wm_list.clear()


class Searcher:
    """LightZero's root inference and C++ tree search, step by step.

    Keeps the policy's last observations and time steps; simulations and support are the model's.
    """

    def __init__(self, model: Any, *, discount: float = 0.997) -> None:
        world_model = model.world_model
        self._model, self._max_rows, self._torch = model, world_model.env_num, _load("torch")
        self._previous: Any = None  # [B, O] tensor
        self._timestep = np.zeros(0, np.int64)  # [B]
        config = _load("easydict").EasyDict(device="cpu", discount_factor=discount)
        config.num_simulations, support = world_model.num_simulations, world_model.support_size // 2
        config.model = {"support_scale": support, "categorical_distribution": True}
        self._tree = _load("lzero.mcts").UniZeroMCTSCtree(config)

    def step(self, observation: Floats, action: Ints, noise: Floats | None = None) -> SearchResult:
        """Search once from `observation [B, O]`, reached by the last `action [B]`.

        Action -1 starts an episode, in all rows at once since 0.2.0 cannot mix first and later
        steps; between starts B is fixed (else ValueError). `noise [B, A]` joins the root's prior
        with weight 0.25. The tree breaks ties at random, seeded by the clock.
        """
        output = self.push(observation, action)
        value = self._tree.inverse_scalar_transform_handle(output.value)
        roots = self._search(output, noise)
        visits = np.asarray(roots.get_distributions(), np.int64)
        return SearchResult(
            visit_counts=visits,
            root_value=np.asarray(roots.get_values(), np.float32),
            action=visits.argmax(axis=1),
            policy_logits=output.policy_logits.numpy(),
            network_value=value.numpy()[:, 0].astype(np.float32),
        )

    def push(self, observation: Floats, action: Ints) -> Any:
        """Advance the contexts as `step` does, without a search: the network's root output."""
        self._admit(observation, action)
        previous, self._previous = self._previous, self._torch.tensor(observation).float()
        batch = previous, action.tolist(), self._previous
        return self._model.initial_inference(*batch, self._timestep)

    def _admit(self, observation: Floats, action: Ints) -> None:
        """Check a step's batch and advance the time steps; a first step forgets the past."""
        rows, most = len(observation), self._max_rows
        if action.shape != (rows,) or rows > most:
            raise ValueError(f"expected action [{rows}] and B <= {most}, got {action.shape}")
        first, before = action == FIRST_STEP, len(self._timestep)
        if not first.all() and (first.any() or rows != before):
            raise ValueError(f"expected action -1 in all rows or in none of {before}, got {action}")
        if first.all():
            self._previous = self._torch.zeros(observation.shape)
        self._timestep = np.zeros(rows, np.int64) if first.all() else self._timestep + 1

    def _search(self, output: Any, noise: Floats | None) -> Any:
        """Grow one tree per row from a root inference and return the searched roots."""
        rows, num_actions = output.policy_logits.shape
        prior, players = output.policy_logits.tolist(), [ONE_PLAYER] * rows
        roots = self._tree.roots(rows, [list(range(num_actions))] * rows)
        if noise is None:
            roots.prepare_no_noise(output.reward, prior, players)
        else:
            roots.prepare(ROOT_NOISE_WEIGHT, noise.tolist(), output.reward, prior, players)
        self._tree.search(roots, self._model, output.latent_state.numpy(), players, self._timestep)
        return roots
