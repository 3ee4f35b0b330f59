"""Windows that the module computes anew: main's exact ones, of the latest latent or of raw tokens.

Shapes: B rows, C context_length in tokens, K = C - 3, L layers, H heads, D head size, E embedding
size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.lightzero.attach import caches, layout
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.caches import Batch, Written


def renew_full_rows(wm: Any, written: Written, latent: Any, lengths: Sequence[int]) -> None:
    """Writes over the last tokens of full rows what the module makes of them without the oldest.

        [a b c d e f g .] -> [a b c' d' e' f' g' .], or [a b c d e f g' .] of the latest latent

    Args:
      written: the rows.
      latent: [B, 1, E] tensor.
      lengths: B, in tokens.
    """
    import torch

    with torch.no_grad():
        resets = wm._prepare_exact_cache_resets(latent, lengths)
        if resets.cache is None:
            return
        rows, offsets = list(resets.offsets), list(resets.offsets.values())
        end, size = written.end, resets.cache.size
        for view, renewed in zip(written.memory.tensor, caches.tensors(resets.cache), strict=True):
            view[rows, :, end - size : end] = renewed[offsets, :, :size]


def recall(wm: Any, bridge: Bridge, found: Batch, latent: Any, env_ids: Sequence[int]) -> bool:
    """Computes newest roots of older weights again, for rows that missed; whether there were any.

    They are stored under `latent` [B, 1, E], which takes the place of their last token.
    """
    outdated = bridge.scope.outdated
    rows = [
        row
        for row, (env, source) in enumerate(zip(env_ids, found.sources, strict=True))
        if outdated[env] and source == layout.MISSED
    ]
    recalled = [_recall(wm, bridge, latent[row : row + 1], env_ids[row]) for row in rows]
    return any(recalled)


def _recall(wm: Any, bridge: Bridge, latent: Any, env_id: int) -> bool:
    import torch

    scope = bridge.scope
    scope.clean()
    raw, count = layout.latest_tokens(scope.filed.store, np.int32(env_id))
    length = int(count)
    if not length:
        return False
    tokens = torch.tensor(np.asarray(raw), device=latent.device)  # [K, E], zeros behind the last
    tokens[length - 1] = latent.reshape(-1)
    full = wm.context_length - 1
    # As if the window were full: attention is causal, so tokens behind the last one change nothing.
    wm.keys_values_wm_token_context_list = [tokens]
    renewed = wm._prepare_exact_cache_resets(latent, [full]).cache
    written = caches.copied(renewed, bridge.capacity(1), wm.context_length)
    written = dataclasses.replace(written, end=written.end - renewed.size + length)
    bridge.file(written, [length], latent, [env_id], [tokens[:length]], is_root=True)
    scope.count_rebuilt()
    return True
