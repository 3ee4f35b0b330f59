"""Keeps release 0.2.0's attention from reading the padding of its batch.

Its transformer has a causal mask and nothing for rows of unequal length: a pad acts as a key with
score 0. While a forward pass runs, each layer's mask is replaced by one that knows the pads.

Shapes: B rows, T new tokens, S tokens before and with them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


class PadMask:
    """Stands for a causal mask [N, N]: sliced like it, it yields a mask [B, 1, T, S]."""

    def __init__(self, mask: Any, pads: Any) -> None:
        self._mask, self._pads = mask, pads

    def __getitem__(self, key: Any) -> Any:
        import torch

        causal = self._mask[key]
        token = torch.arange(causal.shape[-1], device=causal.device)
        return causal * (token >= self._pads[:, None])[:, None, None]


@contextlib.contextmanager
def masked(wm: Any, pads: list[int]) -> Iterator[None]:
    """No row of a batch attends to its first `pads` slots inside of the block."""
    import torch

    attention = [block.attn for block in wm.transformer.blocks] if any(pads) else []
    for layer in attention:
        # Before the buffer of that name, which state_dict() still finds.
        layer.__dict__["mask"] = PadMask(layer.mask, torch.tensor(pads, device=layer.mask.device))
    try:
        yield
    finally:
        for layer in attention:
            del layer.__dict__["mask"]
