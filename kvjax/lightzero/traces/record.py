"""Records a live LightZero model's answers, so that `kvjax verify` can replay them.

The model is driven at latent level by random walks: latents and actions are drawn, trees grow at
random, episodes restart on the way. All of it happens on a copy of the model.

Shapes: B environments, E embedding size, L layers, H heads, D head size, N simulations per step.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.base import files
from kvjax.base.dlpack import to_torch
from kvjax.base.values import require, require_count
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint import load
from kvjax.lightzero.traces import clip, one_task, trace, walks
from kvjax.lightzero.traces.recording import CONFIG, Array, Arrays
from kvjax.lightzero.traces.trace import ASKED, GAUSSIAN, POLICY_CLIP, SIZES, Trace

_MOST_ROWS = 8
_DEFAULT_SIMULATIONS = 50  # of LightZero's pools, where the configuration says nothing
_NOT_ITS_OWN = (
    "the model stored no root window: something else manages its caches, detach that first"
)
_LEFT_OUT = ("tokenizer.", "representation_network.", "policy_logits_running_", "head_dict.")


def record_trace(
    world_model: Any,
    path: str | Path,
    *,
    steps: int = 12,
    simulations: int = 10,
    rows: int | None = None,
    seed: int = 0,
    task_id: int | None = None,
) -> Trace:
    """Asks a torch world model and writes questions, answers and weights as a trace.

    The given model is left as it is: what is asked is a copy, in evaluation mode, with empty caches
    and with its table of position corrections computed of the weights as they are (release 0.2.0
    does not do that by itself, and then plays with a table of other weights).

    What is recorded begins with latents: the encoder is neither read nor asked nor copied, and may
    be one that kvjax does not have. Where main clips the logits of policies, the trace says how.

    Args:
      world_model: LightZero's `WorldModel` or `UniZeroModel`, of release 0.2.0 or of main; or the
        multi-task ones of main.
      path: the file, `.npz`.
      steps: environment steps; episodes restart half way, with 0.2.0, continuous actions and in
        multi-task models in all rows at once.
      simulations: N, of each step.
      rows: B, at most the model's `env_num`; up to 8 of these by default.
      seed: of the walks.
      task_id: which task of a multi-task model to ask.

    Returns:
      The trace as `kvjax verify` reads it.

    Raises:
      OSError: the file cannot be written; said before the model is asked.
      ValueError: a model that kvjax does not read, sizes that do not fit it, a model whose caches
        something else manages, or one that gives two nodes of a step the same latent, which
        LightZero then takes for each other (an untrained observation head, all zeros, does).
    """
    model = getattr(world_model, "world_model", world_model)
    config, _ = load(model, task_id=task_id, encoder=None, use_policy_logits_clip="ignore")
    path = Path(path)
    require(path.suffix == ".npz", f"a trace's name must end in .npz, got {path}")
    rows = min(model.env_num, _MOST_ROWS) if rows is None else rows
    sizes = _checked_sizes(model, envs=rows, steps=steps, sims=simulations)
    files.require_writable(path)
    twin = one_task.of(_private_copy(model), task_id)
    arrays = _Session(twin, config, np.random.default_rng(seed), **sizes).run()
    arrays |= _weights(model)
    described = _description(model, config) | one_task.described(model, task_id) | sizes
    arrays[CONFIG] = np.array(json.dumps(described))
    with files.replacing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return trace.read(path)


def _checked_sizes(model: Any, envs: int, steps: int, sims: int) -> dict[str, int]:
    """B, the steps and N by their names in a trace."""
    envs, steps = require_count("rows", envs), require_count("steps", steps)
    sims = require_count("simulations", sims)
    held = int(model.env_num)
    require(envs <= held, f"rows must be at most the model's env_num {held}, got {envs}")
    most = int(getattr(model.config, "num_simulations", _DEFAULT_SIMULATIONS))
    require(
        sims <= most,
        f"simulations must be at most the model's num_simulations {most} (its pools hold no more),"
        f" got {sims}",
    )
    return {"envs": envs, "steps": steps, "sims": sims}


def _is_main(model: Any) -> bool:
    return hasattr(model, "current_infer_env_ids")


def _weights(model: Any) -> Arrays:
    """What `kvjax.lightzero.load` reads, without the encoder, and without what clips logits."""
    return {
        f"weights/{name}": tensor.detach().float().cpu().numpy()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in _LEFT_OUT)
    }


def _description(model: Any, config: WorldModelConfig) -> dict[str, Any]:
    """What a trace says of its model."""
    modes = {"reset": "exact_kv_window_reset", "rebuild": "rebuild_kv_window_from_tokens"}
    described = {name: getattr(config, field) for name, field in (ASKED | SIZES).items()}
    if config.is_continuous:
        described |= {name: getattr(config, name) for name in GAUSSIAN}
    described |= {"blocks": int(model.config.max_blocks), "rope": config.is_rotary}
    if (policy_clip := clip.of_model(model)) is not None:
        described[POLICY_CLIP] = dataclasses.asdict(policy_clip)
    described |= {"source": f"lightzero-{'main' if _is_main(model) else '0.2.0'}"}
    return described | {name: True for name, flag in modes.items() if getattr(model, flag, False)}


def _private_copy(model: Any) -> Any:
    """A copy to ask: evaluation mode, empty caches, corrections of the present weights."""
    import torch

    known = {  # what training left behind cannot be copied with its graph
        id(x): x.detach().clone()
        for module in model.modules()
        for x in vars(module).values()
        if isinstance(x, torch.Tensor) and not x.is_leaf
    }
    known[id(model.tokenizer)] = torch.nn.Identity()  # the encoder may be huge, and is not asked
    with contextlib.redirect_stdout(io.StringIO()):  # LightZero prints
        twin = copy.deepcopy(model, known).eval()
        twin.clear_caches()
        if not twin.config.rotary_emb:
            twin.precompute_pos_emb_diff_kv()
    twin.reanalyze_phase = False
    return twin


class _Session:
    """A copied model and the walks of its B environments."""

    def __init__(
        self,
        model: Any,
        config: WorldModelConfig,
        rng: np.random.Generator,
        *,
        envs: int,
        steps: int,
        sims: int,
    ) -> None:
        self._model = model
        self._envs, self._steps, self._sims = envs, steps, sims
        starts_alone = _is_main(model) and not one_task.has_tasks(model)
        self._mixes_restarts = starts_alone and not config.is_continuous
        self._walks = walks.Walks(rng, config, envs)
        self._latent = self._walks.latents()
        self._timestep = np.zeros(envs, np.int64)
        self._windows: dict[int, Array] = {}  # [2, L, H, length, D] by environment
        self._watch_roots()

    def run(self) -> Arrays:
        import torch

        arrays: Arrays = {}
        with torch.no_grad():
            for step in range(self._steps):
                recorded = self._root(step)
                recorded |= self._simulate(_rows_of(self._model.latent_state))
                arrays |= {f"step{step}/{name}": array for name, array in recorded.items()}
        return arrays

    def _watch_roots(self) -> None:
        """Notes every window that the model stores for a root, whatever it stores it in."""
        model, manager = self._model, getattr(self._model, "kv_cache_manager", None)
        owner, name, window = model, "custom_copy_kv_cache_to_shared_init_envs", "src_kv"
        if manager is not None and getattr(model, "use_new_cache_manager", False):
            owner, name, window = manager, "set_init_cache", "kv_cache"
        require(getattr(owner, name, None) is not None, _NOT_ITS_OWN)  # attached, had no manager
        store = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(store).bind(*args, **kwargs).arguments
            self._windows[int(given["env_id"])] = _window(given[window])
            return store(*args, **kwargs)

        setattr(owner, name, noted)

    def _root(self, step: int) -> Arrays:
        rows = np.arange(self._envs)
        restarts = np.full(len(rows), step == 0)
        if step == max(self._steps // 2, 1):
            restarts |= rows % 2 == 0 if self._mixes_restarts else True
        action = self._walks.actions(restarts)
        self._timestep = np.where(restarts, 0, self._timestep + 1)
        before, self._latent = self._latent, self._walks.latents()
        self._windows.clear()
        said, latent = walks.as_lightzero_says(action), self._tokens(self._latent)
        out = self._model.wm_forward_for_initial_infererence(
            self._tokens(before), said, latent, self._timestep
        )
        if not one_task.has_tasks(self._model):
            self._model.latent_state = self._tokens(self._latent)  # its next step deletes that
        self._forget_nodes()
        recorded = {
            "prev_latent": self._whole(before),
            "action": action,
            "latent": self._whole(self._latent),
            "timestep": self._timestep,
            "policy_logits": _rows_of(out.logits_policy),
            "value_logits": _rows_of(out.logits_value),
        }
        return recorded | self._stored_windows()

    def _whole(self, latent: Array) -> Array:
        """With the task's embedding, where that ends latents."""
        rest = _rows_of(self._model.latent_state)[:, latent.shape[1] :]
        return np.concatenate([latent, rest], axis=1)

    def _stored_windows(self) -> Arrays:
        require(len(self._windows) >= self._envs, _NOT_ITS_OWN)
        windows = [self._windows[env] for env in range(self._envs)]
        stored = {"length": np.array([window.shape[3] for window in windows])}
        for env, (keys, values) in enumerate(windows):
            stored |= {f"k{env}": keys, f"v{env}": values}
        return stored

    def _forget_nodes(self) -> None:
        model = self._model
        if getattr(model, "use_new_cache_manager", False):
            model.kv_cache_manager.clear_recur_cache()
        else:
            model.past_kv_cache_recurrent_infer.clear()
        getattr(model, "past_token_context_recurrent_infer", {}).clear()

    def _tokens(self, latent: Array) -> Any:
        return self._on_device(latent)[:, None]

    def _on_device(self, array: Array) -> Any:
        return to_torch(array).to(self._model.device)

    def _simulate(self, root: Array) -> Arrays:
        """Grows a random tree in every row."""
        rows = np.arange(self._envs)
        parents, actions = self._walks.trees(self._sims)
        depths = np.zeros((self._sims + 1, len(rows)), np.int64)
        latents, answers = [root], []
        for index, (parent, action) in enumerate(zip(parents, actions, strict=True)):
            depths[index + 1] = depths[parent, rows] + 1
            asked = np.stack(latents)[parent, rows][:, None]
            _, latent, reward, policy, value = self._model.forward_recurrent_inference(
                [(asked, self._on_device(action))],
                index,
                depths[index + 1].tolist(),
                self._timestep,
            )
            answers.append([_rows_of(x) for x in (latent, reward, policy, value)])
            latents.append(answers[-1][0])
        _require_distinct(np.stack(latents))
        names = ("next_latent", "reward_logits", "sim_policy_logits", "sim_value_logits")
        recorded = dict(zip(names, map(np.stack, zip(*answers, strict=True)), strict=True))
        return recorded | {"parent": parents, "sim_action": actions, "depth": depths[1:]}


def _require_distinct(latents: Array) -> None:
    """Refuses equal latents [N + 1, B, E]: the shared pool of nodes finds windows by them."""
    flat = latents.reshape(-1, latents.shape[-1])
    if len(np.unique(flat, axis=0)) < len(flat):
        raise ValueError(
            "two nodes of one step have the same latent, and LightZero takes one for the other: is"
            " the observation head untrained (all zeros)?"
        )


def _rows_of(tensor: Any) -> Array:
    """[B, 1, X] or [B, X] in torch -> [B, X]."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array.reshape(len(array), -1).copy()


def _window(keys_values: Any) -> Array:
    """What a `KeysValues` of one row holds: [2, L, H, length, D], keys and values."""

    def tokens(cache: Any) -> Array:
        array: Array = cache._cache[0, :, : cache._size].float().cpu().numpy()
        return array

    layers = keys_values._keys_values
    keys = [tokens(layer._k_cache) for layer in layers]
    return np.array([keys, [tokens(layer._v_cache) for layer in layers]])
