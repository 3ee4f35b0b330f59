"""The root step of an attached world model: look-up and storage around its own forward pass.

Shapes: B rows, E embedding size, C context_length in tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.base.values import require
from kvjax.lightzero.attach import caches, exact, layout
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.caches import Batch, Rows, make_batch, memory_of
from kvjax.lightzero.attach.shadow import Shadow
from kvjax.model.step import FIRST_STEP


@dataclasses.dataclass(frozen=True)
class RootBatch:
    """The rows of a root step."""

    last: Any  # [B, 1, E] tensor, latents of the last observations
    action: list[Any]  # B actions taken there; -1 in first steps
    current: Any  # [B, 1, E] tensor, latents of the current observations
    start_pos: Any  # B timesteps, or one number
    env_ids: list[int]  # B

    def first_steps(self, *, continuous: bool) -> list[bool]:
        """Which rows start an episode."""
        if continuous:
            return [not isinstance(action, np.ndarray) for action in self.action]
        return [int(action) == FIRST_STEP for action in self.action]

    def rows(self, chosen: Sequence[int]) -> "RootBatch":
        """Some of the rows."""
        index = list(chosen)
        start = self.start_pos
        return RootBatch(
            last=self.last[index],
            action=[self.action[i] for i in index],
            current=self.current[index],
            start_pos=start if np.ndim(start) == 0 else np.asarray(start)[index],
            env_ids=[self.env_ids[i] for i in index],
        )


def make_root_batch(
    last: Any, action: Any, current: Any, start_pos: Any, env_ids: Sequence[int] | None
) -> RootBatch:
    """Cuts what LightZero passes to the rows of `current`.

    Raises:
      ValueError: there are fewer actions, last latents or ids than rows.
    """
    count = len(current)
    ids = list(range(count)) if env_ids is None else [int(env) for env in env_ids]
    if len(action) < count and all(np.ndim(a) == 0 and int(a) == FIRST_STEP for a in action):
        # A collector and an evaluator of other sizes share these lists between their episodes.
        last, action = current, [FIRST_STEP] * count
    require(
        len(action) >= count and len(last) >= count and len(ids) == count,
        f"{count} rows need as many actions, last observations and environment ids, got"
        f" {len(action)}, {len(last)} and {len(ids)}",
    )
    start = start_pos if np.ndim(start_pos) == 0 else np.asarray(start_pos)[:count]
    return RootBatch(last[:count], list(action)[:count], current, start, ids)


def run(wm: Any, bridge: Bridge, shadow: Shadow, batch: RootBatch) -> Any:
    """Pushes what the environments did; returns LightZero's outputs for the observations.

    Batches that mix first and later steps are split, as LightZero's main branch does.
    """
    first = batch.first_steps(continuous=bridge.description.continuous)
    if hasattr(wm, "current_infer_env_ids"):
        wm.current_infer_env_ids = batch.env_ids
    if all(first):
        return _start(wm, bridge, batch)
    if not any(first):
        return _continue(wm, bridge, shadow, batch)
    starting = [row for row, is_first in enumerate(first) if is_first]
    running = [row for row, is_first in enumerate(first) if not is_first]
    outputs = [
        _start(wm, bridge, batch.rows(starting)),
        _continue(wm, bridge, shadow, batch.rows(running)),
    ]
    return _merge(outputs, np.argsort(starting + running))


def _merge(outputs: list[Any], order: Any) -> Any:
    """Concatenates two outputs and puts the rows in order; what does not fit together is None."""
    import torch

    merged = {}
    for field in dataclasses.fields(outputs[0]):
        parts = [getattr(output, field.name) for output in outputs]
        fits = all(p is not None and p.shape[1:] == parts[0].shape[1:] for p in parts)
        merged[field.name] = torch.cat(parts)[torch.as_tensor(order)] if fits else None
    return dataclasses.replace(outputs[0], **merged)


def _start(wm: Any, bridge: Bridge, batch: RootBatch) -> Any:
    """First steps: an empty cache and the current observation."""
    import torch

    count = len(batch.env_ids)
    layers, two, heads, length, size = bridge.description.cache_shape
    shape = layers * two, bridge.capacity(count), heads, layout.slots_of_row(length), size
    memory = memory_of(torch.zeros(math.prod(shape), device=batch.current.device), shape)
    bridge.batch = empty = make_batch(memory, length, [0] * count, [layout.MISSED] * count)
    caches.install(wm.keys_values_wm, empty, 0)
    outputs = wm.forward(
        {"obs_embeddings": batch.current},
        past_keys_values=wm.keys_values_wm,
        is_init_infer=True,
        start_pos=batch.start_pos,
    )
    if bridge.description.keeps_tokens:
        wm.keys_values_wm_token_context_list = list(batch.current.detach())
    wm.update_cache_context(batch.current, is_init_infer=True, env_ids=batch.env_ids)
    return outputs


def _continue(wm: Any, bridge: Bridge, shadow: Shadow, batch: RootBatch) -> Any:
    """Later steps: the last observation's cache, the action and the current observation."""
    import torch

    found = bridge.look_up(batch.last, batch.env_ids, roots_only=True)
    wm.root_total_query_cnt += len(found.lengths)
    wm.root_hit_cnt += found.hits
    if exact.recall(wm, bridge, found, batch.last, batch.env_ids):
        found = bridge.peek(batch.last, batch.env_ids, roots_only=True)
        bridge.batch = found
    fill_missed(wm, found, batch.last, batch.start_pos)
    if shadow.mode:
        shadow.compare_roots(wm, found, batch.last, batch.env_ids)
    hold(wm, found)
    wm.keys_values_wm_size_list_current = wm.trim_and_pad_kv_cache(is_init_infer=True)
    actions = torch.from_numpy(np.asarray(batch.action)).to(batch.last.device).unsqueeze(1)
    if bridge.description.keeps_tokens:
        wm._append_inference_token_context(wm.act_embedding_table(actions.squeeze(1)))
        wm._append_inference_token_context(batch.current)
    _push(wm, bridge, {"act_tokens": actions}, batch.start_pos)
    outputs = _push(wm, bridge, {"obs_embeddings": batch.current}, batch.start_pos)
    # 0.2.0 takes the padding of a batch for context.
    own_lengths = bridge.description.masks_padding or bridge.mask_padding
    wm.update_cache_context(
        batch.current,
        is_init_infer=True,
        valid_context_lengths=wm.keys_values_wm_size_list_current if own_lengths else None,
        env_ids=batch.env_ids,
    )
    return outputs


def _push(wm: Any, bridge: Bridge, tokens: dict[str, Any], start_pos: Any) -> Any:
    lengths = wm.keys_values_wm_size_list_current
    unequal = min(lengths) < max(lengths)
    options: dict[str, Any] = {"is_init_infer": True}
    if bridge.description.masks_padding:
        options["valid_context_lengths"] = lengths if unequal else None
    elif bridge.mask_padding and unequal and not bridge.description.rotary:
        options["is_init_infer"] = False  # where 0.2.0 gives each row the position of its length
    outputs = wm.forward(tokens, past_keys_values=wm.keys_values_wm, start_pos=start_pos, **options)
    wm.keys_values_wm_size_list_current = [length + 1 for length in lengths]
    return outputs


def hold(wm: Any, batch: Batch) -> None:
    """Makes a batch the model's list of caches."""

    def make_empty() -> Any:
        return wm.transformer.generate_empty_keys_values(n=1, max_tokens=wm.context_length)

    state = vars(wm)  # past the module's own setter, as neither is a parameter
    state["keys_values_wm_list"] = Rows(batch, make_empty)
    state["keys_values_wm_size_list"] = list(batch.lengths)
    if batch.tokens is not None:
        wm.keys_values_wm_token_context_list = [x.to(batch.device) for x in batch.tokens]


def let_go(wm: Any, bridge: Bridge) -> None:
    """Undoes `hold`, so that the memory of the batch can be used again."""
    vars(wm)["keys_values_wm_list"], bridge.batch = [], None
    caches.release(wm.keys_values_wm)


def fill_missed(wm: Any, batch: Batch, latent: Any, start_pos: Any) -> None:
    """Gives rows that were not found a context of one token, their latent's.

    Args:
      latent: [B, 1, E] tensor or array.
      start_pos: B timesteps or one number, read by rotary models.
    """
    if batch.hits == len(batch.sources):
        return
    import torch

    missed = [row for row, source in enumerate(batch.sources) if not source]
    embeddings = torch.as_tensor(np.asarray(latent) if not hasattr(latent, "to") else latent)
    embeddings = embeddings[missed].reshape(len(missed), 1, -1).to(batch.device)
    positions = np.asarray(start_pos).reshape(-1)
    positions = positions[missed] if len(positions) > 1 else positions.repeat(len(missed))
    alone = wm.transformer.generate_empty_keys_values(n=len(missed), max_tokens=wm.context_length)
    last = batch.size - 1
    with torch.no_grad():
        wm.forward(
            {"obs_embeddings": embeddings},
            past_keys_values=alone,
            is_init_infer=True,
            start_pos=[int(position) for position in positions],
        )
        for view, cache in zip(batch.views, caches.tensors(alone), strict=True):
            view[missed, :, last] = cache[:, :, 0]
    if batch.tokens is not None:
        for row, embedding in zip(missed, embeddings, strict=True):
            batch.tokens[row] = embedding
