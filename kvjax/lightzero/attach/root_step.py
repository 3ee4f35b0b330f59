"""The root step of an attached world model: look-up and storage around its own forward pass.

Shapes: B rows, E embedding size, C context_length in tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.base.values import require
from kvjax.lightzero.attach import caches, layout
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.caches import Memory, make_batch, memory_of
from kvjax.lightzero.attach.shadow import Shadow
from kvjax.lightzero.module import RENEWS
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
    flat = torch.zeros(math.prod(shape), device=batch.current.device)
    memory = memory_of(flat, shape, bridge.description.stored)
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
    missed = [row for row, source in enumerate(found.sources) if source == layout.MISSED]
    recalled = [bridge.description.keeps_tokens and _recall(wm, bridge, batch, r) for r in missed]
    if any(recalled):
        found = bridge.batch = bridge.peek(batch.last, batch.env_ids, roots_only=True)
    caches.fill_missed(wm, found, batch.last, batch.start_pos)
    if shadow.mode:
        shadow.compare_roots(wm, found, batch.last, batch.env_ids)
    caches.hold(wm, found)
    wm.keys_values_wm_size_list_current = wm.trim_and_pad_kv_cache(is_init_infer=True)
    actions = torch.from_numpy(np.asarray(batch.action)).to(batch.last.device).unsqueeze(1)
    if bridge.description.keeps_tokens:
        wm._append_inference_token_context(wm.act_embedding_table(actions.squeeze(1)))
        wm._append_inference_token_context(batch.current)
    _push(wm, bridge, {"act_tokens": actions}, batch.start_pos)
    outputs = _push(wm, bridge, {"obs_embeddings": batch.current}, batch.start_pos)
    # 0.2.0 takes the padding of a batch for context.
    own_lengths = bridge.reads_no_pads
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


def _recall(wm: Any, bridge: Bridge, batch: RootBatch, row: int) -> bool:
    """Computes a newest root of older weights again, for a row that missed, and stores it.

    It is stored under the latent of the last observation, which takes the place of its last token.

    Returns:
      Whether there was such a root.
    """
    import torch

    env_id, latent = batch.env_ids[row], batch.last[row : row + 1]
    raw, length = bridge.outdated_tokens(env_id)
    if not length:
        return False
    tokens = torch.tensor(raw, device=latent.device)  # [K, E], zeros behind the last
    tokens[length - 1] = latent.reshape(-1)
    # As if the window were full: attention is causal, so tokens behind the last one change nothing.
    wm.keys_values_wm_token_context_list = [tokens]
    renewed = getattr(wm, RENEWS)(latent, [wm.context_length - 1]).cache
    written = caches.copied(renewed, bridge.capacity(1), bridge.description.stored)
    written = written._replace(end=written.end - renewed.size + length)
    bridge.file(written, [length], latent, [env_id], [tokens[:length]], is_root=True)
    bridge.count_rebuilt()
    return True


def renew_full_rows(wm: Any, written: Memory, latent: Any, lengths: Sequence[int]) -> None:
    """Writes over the last tokens of full rows what the module makes of them without the oldest.

        [a b c d e f g .] -> [a b c' d' e' f' g' .], or [a b c d e f g' .] of the latest latent

    For main's exact windows, which it computes anew of the latest latent or of raw tokens.

    Args:
      wm: the world model.
      written: the rows.
      latent: [B, 1, E] tensor.
      lengths: B, in tokens.
    """
    import torch

    with torch.no_grad():
        resets = getattr(wm, RENEWS)(latent, lengths)
        if resets.cache is None:
            return
        rows, offsets = list(resets.offsets), list(resets.offsets.values())
        end, size = written.end, resets.cache.size
        for view, renewed in zip(written.tensor, caches.tensors(resets.cache), strict=True):
            view[rows, :, end - size : end] = renewed[offsets, :, :size]
