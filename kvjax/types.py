"""Pytrees: immutable states of fixed-shape arrays.

Shapes: B rows, C context_length in tokens, L layers, H heads, D head size, E embedding size,
A actions, S support bins. Types hold one item; batches lead every array with B.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from kvjax import display, statistics

Params = Any
"""Flax variables of a world model: {"params": ..., "batch_stats": ...}."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Window(display.Drawn):
    """A context window: tokens are left-aligned, slots past `length` are zero.

    Attributes:
      kv: [C, L, 2, H, D], keys at 0 and values at 1 of the third axis.
      length: [] int32, tokens.
      raw: [C, E], tokens before positions, where a mode keeps them; else None.
    """

    kv: jax.Array
    length: jax.Array
    raw: jax.Array | None = None

    def _picture(self) -> display.Picture | None:
        return display.window("Window", self.kv, self.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class AlignedWindow(display.Drawn):
    """A window behind `pad` empty slots, so that all rows of a batch end at the same slot.

    Attributes:
      kv: [C, L, 2, H, D], as of a `Window`.
      length: [] int32, tokens.
      pad: [] int32, empty slots before the first token.
    """

    kv: jax.Array
    length: jax.Array
    pad: jax.Array

    def _picture(self) -> display.Picture | None:
        return display.window("AlignedWindow", self.kv, self.length, self.pad)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a world model says about one transition.

    Attributes:
      latent: [E], the next latent state.
      reward: [S] logits over the support.
      policy: [A] logits.
      value: [S] logits over the support.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A world model's variables and what a search needs of them, see `kvjax.prepare`.

    Attributes:
      params: the variables.
      folded: `kvjax.fused.Folded`.
    """

    params: Params
    folded: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
    """What environments carry from step to step: their root windows and clocks.

    Attributes:
      window: a batch, `kv` [B, C, L, 2, H, D] and `length` [B].
      timestep: [B] int32, -1 before the first step.
    """

    window: Window
    timestep: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dials:
    """What of a `SearchConfig` is data to a compiled search."""

    temperature: jax.Array  # [] float32
    discount: jax.Array  # [] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SearchOutput(display.Drawn):
    """Result of one search per row.

    Attributes:
      action: [B] int32, what to do.
      visit_counts: [B, A] int32, of the root's actions.
      root_value: [B], mean value of the root.
      q_values: [B, A], of the root's actions, 0 where never visited.
      prior: [B, A], the network's policy over legal actions, noise left out.
      network_value: [B], the network's own value of the root.
      mean_depth: [B], edges below the root, mean over simulations.
      finite: [B] bool, False: the model answered NaN or infinity, or no action is legal; discard
        the row.
      action_weights: [B, A], the policy target: shares of visits, or mctx's improved policy
        ("gumbel").
      kept: `kvjax.Kept` for the next search, with `SearchConfig.kept_nodes`; else None.
    """

    action: jax.Array
    visit_counts: jax.Array
    root_value: jax.Array
    q_values: jax.Array
    prior: jax.Array
    network_value: jax.Array
    mean_depth: jax.Array
    finite: jax.Array
    action_weights: jax.Array
    kept: Any = None

    def _picture(self) -> display.Picture | None:
        return display.search_output(self)


# Columns of a pool's record; the key's lanes follow.
PREVIOUS, NEXT = 0, 1  # neighbours in the chain; the sentinel ends it
BUCKET = 2  # 32 bits of the key
RANK = 3  # eviction order: time of insertion (fifo), of use (lru), or the priority
GENERATION = 4  # how many keys the slot has held; 0 only if it was never filled
ERA = slice(5, 7)  # the segment's era when the slot was filled; another one: it was cleared
KEY = 7

# Columns of a segment's state.
CURSOR, CLOCK = 0, 1
SEGMENT_ERA = slice(2, 4)  # 64 bits, the lower half first: it counts up and never comes back


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("records", "heads", "segments", "entries"),
    meta_fields=("eviction",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Pool(display.Drawn):
    """P segments of S hashed slots, see `kvjax.pool`.

    Attributes:
      records: [P * S + 1, 7 + K] uint32, links, age and key of each slot.
      heads: [P * M + 1] uint32, first slot of each bucket's chain.
      segments: [P, 4] uint32, cursor, clock and era.
      entries: what the slots hold, rows [P * S, ...].
      eviction: "fifo", "lru" or "priority" (static).
    """

    records: jax.Array
    heads: jax.Array
    segments: jax.Array
    entries: Any
    eviction: str

    def _picture(self, name: str = "Pool") -> display.Picture | None:
        records, segments = np.asarray(self.records), np.asarray(self.segments)
        if records.ndim != segments.ndim or records.ndim != 2:
            return None
        era, clock = segments[:, None, SEGMENT_ERA], segments[:, [CLOCK]]
        slots = records[:-1].reshape(len(segments), -1, records.shape[1])
        live, rank = (slots[..., ERA] == era).all(axis=-1), slots[..., RANK]
        if self.eviction != "priority":
            rank = ~(clock - rank)  # ages, as the clock may have wrapped
        return display.pool(name, live, rank, len(segments), self.eviction)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("roots", "nodes", "epoch", "counters", "latest"),
    meta_fields=("verify_keys",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Store(display.Drawn):
    """Windows by latent: one root pool per environment and a shared pool of searched nodes.

    Attributes:
      roots: one segment per environment.
      nodes: a single segment.
      epoch: [] uint32, counts parameter updates.
      counters: [N, 2] uint32, 64 bits each, see `kvjax.stats`.
      latest: [P] int32, slot of each environment's newest root where raw tokens are kept; else
        None.
      verify_keys: whether keys hold the latent itself (static).
    """

    roots: Pool
    nodes: Pool
    epoch: jax.Array
    counters: jax.Array
    latest: jax.Array | None
    verify_keys: bool

    def _picture(self) -> display.Picture | None:
        pools = [self.roots._picture("roots"), self.nodes._picture("nodes")]
        return display.store(pools, self.epoch, statistics.read(self.counters))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inference:
    """Result of one inference step of a store; a `Prediction` per row, and how it was looked up.

    Attributes:
      latent: [B, E], of the new node.
      reward: [B, S] logits over the support, zero at roots.
      policy: [B, A] logits.
      value: [B, S] logits over the support.
      hit: [B] bool, the parent's window was found (a first step needs none: False).
      slot: [B] int32, handle of the new window, -1 if it is not stored.
      valid: [B] bool, False: an id was out of range, the row is NaN and not stored.
      full: [B] bool, the new window is not stored: the node pool has no slot left.
    """

    latent: jax.Array
    reward: jax.Array
    policy: jax.Array
    value: jax.Array
    hit: jax.Array
    slot: jax.Array
    valid: jax.Array
    full: jax.Array
