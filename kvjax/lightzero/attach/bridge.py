"""The state of an attached world model: its stores, what has to be forgotten, its correction.

Shapes: B rows, B' = B rounded up to a power of two, E embedding size, P environments.
"""

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.base import dlpack, interrupts
from kvjax.base.compilation import on_cpu
from kvjax.base.values import require
from kvjax.lightzero import module
from kvjax.lightzero.attach import caches, layout
from kvjax.lightzero.attach.caches import Batch, Written, make_batch, memory_of
from kvjax.lightzero.attach.exchange import Exchange, as_argument
from kvjax.store import pool as pools
from kvjax.store.statistics import Statistics

Array = np.ndarray[Any, Any]

DEFAULT_SCOPE = "default"

_GROWTH = 2
_HALF_BYTES = 2

_replace = dataclasses.replace

_log = logging.getLogger(__name__)


class Scope:
    """One store, what must be filed and what must be forgotten before it is used again."""

    def __init__(self, description: module.Description) -> None:
        self._description = description
        self.filed = _nothing_filed(description)
        self._room = self.node_slots  # rows that surely fit
        self.pending: tuple[Exchange, tuple[Any, ...]] | None = None  # see `file_later`
        self._exchanges: dict[int, Exchange] = {}  # by B'
        self._stale_roots = np.zeros(description.num_envs, bool)
        self._stale_nodes = self._is_stale = False
        # Environments whose newest root was made with older weights and can be computed again.
        self.outdated = np.zeros(description.num_envs, bool)

    @property
    def filed(self) -> layout.Filed:
        """All windows; none if a call failed and gave nothing back of what it took."""
        return layout.put_together(self._arrays(), self._structure)

    @filed.setter
    def filed(self, filed: layout.Filed) -> None:
        self._parts, self._structure = layout.take_apart(filed)
        self.node_slots = pools.total_slots(filed.store.nodes)
        self._between = layout.file_and_look_up(self._structure, self._description.kept)

    def _arrays(self) -> list[jax.Array]:
        if self._parts[0].is_deleted():
            self.filed = _nothing_filed(self._description)
            self._room = self.node_slots
        return self._parts

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        # A store is donated by whoever writes to it: two owners cannot share one.
        self.settle()
        twin = copy.copy(self)
        twin.filed, twin._exchanges = jax.tree.map(jnp.copy, self.filed), {}
        twin._stale_roots, twin.outdated = self._stale_roots.copy(), self.outdated.copy()
        return twin

    def forget(
        self, *, env_id: int | None = None, roots: bool = False, nodes: bool = False
    ) -> None:
        """Notes that the roots of one environment, all roots or all nodes are to be forgotten."""
        self._is_stale = True  # first, for whoever interrupts this
        self._stale_roots[slice(None) if env_id is None else env_id] |= roots
        self._stale_nodes |= nodes

    def make_room(self, rows: int) -> None:
        """Lets the pool of nodes grow before rows to be filed push out others; nothing is pending.

        Rows are counted here, which waits for nothing; only when they might be too many is the pool
        asked. It is emptied at each root step, so what it holds is one search's.
        """
        self._room -= rows
        if self._room >= 0:
            return
        stored = int(pools.is_live(self.filed.store.nodes).sum())
        if stored + rows > self.node_slots:
            self._grow(stored + rows)
        self._room = self.node_slots - stored - rows

    def _grow(self, needed: int) -> None:
        grown = max(_GROWTH * self.node_slots, needed)
        _log.warning(
            "a search has more than %d nodes, the world model is configured for num_simulations=%d"
            " of env_num=%d: there is room for %d from now on, for which kvjax compiles once more."
            " Set world_model_cfg.num_simulations to the most simulations that any policy makes",
            self.node_slots,
            self._description.num_simulations,
            self._description.num_envs,
            grown,
        )
        self.filed = layout.with_node_slots(self.filed, node_slots=grown)

    def settle(self) -> None:
        """Files what is pending, and waits until that is done."""
        if self.pending is not None:
            with interrupts.held():
                (exchange, rest), self.pending = self.pending, None
                self._file(exchange.batch, self._grown_end, *exchange.filed(), *rest)

    def file(self, windows: Written, *filing: Any, is_root: bool) -> None:
        """Files windows and waits until that is done; see `layout.file`."""
        self._file(as_argument(windows.memory), windows.end, *filing, is_root=is_root)

    def _file(self, batch: Any, end: int, *filing: Any, is_root: bool = False) -> None:
        options = {"is_root": is_root, "keep": self._description.kept}
        with interrupts.held():
            self.filed = layout.file(self.filed, batch, np.int32(end), *filing, **options)
            # One computation: when one of its results is there it no longer reads what torch lent.
            self.filed.kv.block_until_ready()

    @property
    def _grown_end(self) -> int:
        """Where the rows of a batch end that grew by a block."""
        return self._description.config.context_length - 1

    def can_file_later(self, windows: Written, rows: Array, lengths: Sequence[int]) -> bool:
        """Whether these are the rows that were looked up last, grown by a block."""
        exchange = self._exchanges.get(rows.shape[1])
        is_grown = exchange is not None and exchange.is_grown(windows.memory, list(lengths))
        return is_grown and windows.end == self._grown_end

    def file_later(self, latent: Any, rows: Array, *rest: Any) -> None:
        """Files a simulation's windows with the next look-up, since one call is cheaper than two.

        Until then, or until `settle`, the memory must stay as it is; latents may change.
        """
        exchange = self._exchanges[rows.shape[1]]
        exchange.note_filed(latent, rows)
        self.pending = exchange, rest

    def look_up(
        self, latent: Array, rows: Array, correction: jax.Array, *, roots_only: bool
    ) -> Batch:
        """Finds and aligns the windows of latents [B, E].

        No tensor should hold the memory of the last simulation's batch any more, or XLA copies it.
        """
        if roots_only or not on_cpu():
            batch, raw = self._look_up_apart(latent, rows, roots_only=roots_only)
        else:
            batch, raw = self._file_and_look_up(latent, rows, correction)
        return batch if raw is None else _replace(batch, tokens=_unpad(raw, batch.lengths))

    def _look_up_apart(
        self, latent: Array, rows: Array, *, roots_only: bool
    ) -> tuple[Batch, jax.Array | None]:
        self.clean()
        counters, found, info, raw = layout.look_up(
            self.filed, _padded(latent, rows.shape[1]), rows, roots_only=roots_only
        )
        self.filed = layout.with_counters(self.filed, counters)
        lengths, sources = np.asarray(info)[:, : len(latent)].tolist()
        layers, two, *shape = found.shape
        memory = memory_of(dlpack.hand_over(found).flatten(), (layers * two, *shape))
        length = self._description.config.context_length
        return make_batch(memory, length, lengths, sources), raw

    def _file_and_look_up(
        self, latent: Array, rows: Array, correction: jax.Array
    ) -> tuple[Batch, jax.Array | None]:
        if self._is_stale or (self.pending is not None and not self.pending[0].are_filed(rows)):
            self.clean()
        with interrupts.held():
            return self._exchange(latent, rows, correction)

    def _exchange(
        self, latent: Array, rows: Array, correction: jax.Array
    ) -> tuple[Batch, jax.Array | None]:
        capacity = rows.shape[1]
        pending, self.pending = self.pending, None
        # Whatever fails here leaves no half of an exchange behind.
        exchange = self._exchanges.pop(capacity, None)
        if pending is not None:
            exchange, rest = pending
        else:
            exchange = exchange or self._new_exchange(capacity)
            exchange.note_nothing_filed()
            rest = correction, self._no_tokens(capacity)
        exchange.note_asked(latent, rows)
        changed, raw = self._between(*exchange.lend(), *self._arrays(), *rest, exchange.notes)
        found, known, *arrays = changed
        self._parts[: len(arrays)] = arrays
        batch = exchange.take((found, known), len(latent))
        self._exchanges[capacity] = exchange
        return batch, raw

    def _new_exchange(self, capacity: int) -> Exchange:
        embed_dim = self._description.config.embed_dim
        return Exchange(self._description.cache_shape, capacity, embed_dim)

    def _no_tokens(self, capacity: int) -> Array | None:
        description = self._description
        if not description.keeps_tokens:
            return None
        return np.zeros((capacity, description.kept, description.config.embed_dim), np.float32)

    def clean(self) -> None:
        """Files what is pending and forgets what is stale."""
        self.settle()
        if self._is_stale:
            with interrupts.held():
                self._clear()

    def _clear(self) -> None:
        self.filed = layout.clear(self.filed, self._stale_roots, np.bool_(self._stale_nodes))
        self._room = self.node_slots if self._stale_nodes else self._room
        # Others, as the call may still read these.
        self._stale_roots = np.zeros_like(self._stale_roots)
        self._stale_nodes = self._is_stale = False

    def new_epoch(self) -> None:
        """Forgets everything but raw tokens because the weights changed."""
        with interrupts.held():
            self.pending = None
            self.filed = layout.new_epoch(self.filed)
            self._room = self.node_slots
            self.outdated[:] = self.filed.store.latest is not None

    def count_rebuilt(self) -> None:
        """Counts one window that was computed again after a miss."""
        with interrupts.held():
            self.filed = layout.count_rebuilt(self.filed)


class Bridge:
    """What one attached module keeps; it holds no reference to the module, so copies are easy."""

    def __init__(self, wm: Any, description: module.Description, *, mask_padding: bool) -> None:
        self.description = description
        self.enabled = True
        self.mask_padding = mask_padding
        self.in_original = 0
        self.batch: Batch | None = None
        self._scopes = {DEFAULT_SCOPE: Scope(description)}
        self._active: str | None = None
        self._rows: dict[tuple[int, ...], Array] = {}
        self._seen: tuple[Any, ...] | None = None
        self._watched: list[Any] = []
        self._versions: tuple[int, ...] = ()
        self._warned = False
        self._correction: Any = None
        self.refresh(wm)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bridge":
        twin: Bridge = copy.copy(self)
        memo[id(self)] = twin
        twin._scopes = copy.deepcopy(self._scopes, memo)
        twin._rows, twin.batch, twin._active = dict(self._rows), None, None
        # The copied module has other parameters of the same values: they are no update.
        twin._seen, twin._watched, twin._versions = None, [], ()
        return twin

    @property
    def scope(self) -> Scope:
        """The store in use."""
        return self._scopes[self._active or DEFAULT_SCOPE]

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Uses a store of its own, made on first use, for the length of a `with` block."""
        if name not in self._scopes:
            self._scopes[name] = Scope(self.description)
        before, self._active = self._active, name
        try:
            yield
        finally:
            self._active = before

    def _affected(self) -> list[Scope]:
        return list(self._scopes.values()) if self._active is None else [self.scope]

    def forget_roots(self, env_id: int) -> None:
        """One environment's roots go: of the scope in use, outside of any of all scopes."""
        for scope in self._affected():
            scope.forget(env_id=env_id, roots=True)

    def forget_nodes(self) -> None:
        """All searched nodes go: of the scope in use, outside of any of all scopes."""
        for scope in self._affected():
            scope.forget(nodes=True)

    def forget(self) -> None:
        """Everything goes, in all scopes."""
        for scope in self._scopes.values():
            scope.forget(roots=True, nodes=True)

    def refresh(self, wm: Any) -> None:
        """Takes the weights as they are now: the correction is computed anew."""
        correction = module.slide_correction(wm, self.description)
        self._correction = jax.device_put(correction)
        self._watched = module.correction_weights(wm, self.description)
        self._versions = module.versions(self._watched)
        self._seen = self._fingerprint(wm)
        error = module.table_error(wm, correction) if self._watched else 0.0
        if error and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's own table of position corrections is {error:.3g} off: it was computed"
                " from other weights. kvjax uses the weights as they are; for LightZero's own"
                " caches call world_model.precompute_pos_emb_diff_kv()",
                stacklevel=3,
            )

    def _fingerprint(self, wm: Any) -> tuple[Any, ...]:
        parameters = list(wm.parameters())
        return module.versions(parameters), module.samples(parameters)

    def follow_weights(self, wm: Any, *, thorough: bool) -> None:
        """Drops all entries if the weights changed since they were made.

        Each call looks at the weights that the correction reads. `thorough` looks at all of them,
        and at some of their numbers: once per search, which no update interrupts.
        """
        if self._seen is None:
            self.refresh(wm)
            return
        if thorough:
            changed = self._fingerprint(wm) != self._seen
        else:
            changed = module.versions(self._watched) != self._versions
        if changed:
            self.on_params_update(wm)

    def on_params_update(self, wm: Any) -> None:
        """The weights changed: nothing that was stored before can be found again."""
        for scope in self._scopes.values():
            scope.new_epoch()
        self.refresh(wm)

    def look_up(self, latent: Any, env_ids: Sequence[int], *, roots_only: bool) -> Batch:
        """Finds and aligns the windows of latents [B, 1, E]; torch owns what comes back."""
        rows, on_host = self._rows_of(env_ids), _on_host(latent)
        size = self.description.config.embed_dim
        if on_host.shape[1] != size:
            raise ValueError(f"expected latents of {size} numbers, got {on_host.shape[1]}")
        found = self.scope.look_up(on_host, rows, self._correction, roots_only=roots_only)
        self.batch = found
        return found

    def peek(self, latent: Any, env_ids: Sequence[int], *, roots_only: bool) -> Batch:
        """As `look_up`, counted nowhere."""
        self.scope.clean()
        counters, batch = jnp.copy(self.scope.filed.store.counters), self.batch
        found = self.look_up(latent, env_ids, roots_only=roots_only)
        self.scope.filed = layout.with_counters(self.scope.filed, counters)
        self.batch = batch
        return found

    def file(
        self,
        windows: Written,
        lengths: Sequence[int],
        latent: Any,
        env_ids: Sequence[int],
        tokens: Sequence[Any] | None = None,
        *,
        is_root: bool,
    ) -> None:
        """Stores rows under latents [B, 1, E].

        Those of a simulation wait, see `Scope.file_later`.

        `tokens` are the raw ones of each row, [length, E] tensors, where they are kept.
        """
        scope, kept, rows = self.scope, self.description.kept, self._rows_of(env_ids)
        capacity = rows.shape[1]
        raw = None if tokens is None else _raw_tokens(tokens, kept, capacity)
        scope.clean()
        if not is_root:
            scope.make_room(len(env_ids))
        if not is_root and scope.can_file_later(windows, rows, lengths):
            scope.file_later(latent, rows, self._correction, raw)
            return
        length = np.zeros(capacity, np.int32)
        length[: len(latent)] = lengths[: len(latent)]
        filing = _padded(_on_host(latent), capacity), rows, length, self._correction, raw
        scope.file(windows, *filing, is_root=is_root)
        if is_root:
            scope.outdated[list(env_ids)] = False

    def settle(self) -> None:
        """Files what is pending, before somebody writes to its memory."""
        for scope in self._scopes.values():
            scope.settle()

    def written(self, keys_values: Any, rows: int) -> Written:
        """What a `KeysValues` holds, to be filed.

        Raises:
          ValueError: the caches are not float32, or there are more rows than environments.
        """
        batch, length = self.batch, self.description.config.context_length
        if batch is not None and caches.holds(keys_values, batch):
            return caches.written(keys_values, batch, length)
        return caches.copied(keys_values, self.capacity(rows), length)

    @property
    def outgrown(self) -> str:
        """What to say of LightZero's own pool of nodes once a search was too large for it."""
        own = self.description.node_slots
        if self.scope.node_slots == own:
            return ""
        return f"; LightZero's own pool holds {own} nodes and overwrites those of a larger search"

    def capacity(self, rows: int) -> int:
        """B' of a batch: few different sizes, so that little is compiled.

        Raises:
          ValueError: more rows than environments.
        """
        most = self.description.num_envs
        if rows > most:
            raise ValueError(f"{rows} rows do not fit into {most} environments")
        return min(most, 1 << (rows - 1).bit_length())

    def _rows_of(self, env_ids: Sequence[int]) -> Array:
        """The integers that describe a batch: [2, B'] int32, see `layout.ENV`.

        Raises:
          ValueError: more rows than environments, or an environment that there is not.
        """
        key = tuple(env_ids)
        if key not in self._rows:
            rows = np.zeros((2, self.capacity(len(key))), np.int32)
            most = self.description.num_envs
            require(
                all(0 <= env < most for env in key),
                f"environment ids must be in 0 .. {most - 1}, got {list(key)}",
            )
            rows[layout.ENV, : len(key)] = key
            rows[layout.VALID, : len(key)] = 1
            if len(set(key)) < len(key):
                # Made anew, these are never the rows that wait: see `Exchange.are_filed`.
                return rows
            self._rows[key] = rows
        return self._rows[key]

    def stats(self, scope: str | None = None) -> Statistics:
        """Statistics of one scope's store, by default of the one in use.

        Raises:
          ValueError: there is no such scope.
        """
        name = scope or self._active or DEFAULT_SCOPE
        require(name in self._scopes, f"no scope {name!r}, there are {', '.join(self._scopes)}")
        self._scopes[name].clean()
        return stores.stats(self._scopes[name].filed.store)


def _nothing_filed(description: module.Description) -> layout.Filed:
    filed = layout.init(
        description.config,
        description.num_envs,
        description.num_simulations,
        root_slots=description.root_slots,
        node_slots=description.node_slots,
    )
    # Committed and uncommitted arrays compile twice.
    placed: layout.Filed = jax.device_put(filed)
    return placed


def _on_host(latent: Any) -> Array:
    """Rows [B, 1, E] of a tensor or an array as [B, E]; the memory may be torch's."""
    if isinstance(latent, np.ndarray):
        array: Array = latent
    else:  # numpy has no bfloat16; all others become float32 where they are written down
        array = (latent if latent.itemsize > _HALF_BYTES else latent.float()).numpy(force=True)
    return array.reshape(len(array), -1)


def _padded(latent: Array, capacity: int) -> Array:
    """[B', E] float32: rows and zeros behind them."""
    return np.pad(latent.astype(np.float32), ((0, capacity - len(latent)), (0, 0)))


def _unpad(raw: jax.Array, lengths: list[int]) -> list[Any]:
    """Raw tokens [B', K, E] as a tensor [length, E] per row."""
    import torch

    rows = torch.tensor(np.asarray(raw))  # a copy: what jax owns is not to be written to
    return [row[:length] for row, length in zip(rows, lengths, strict=False)]


def _raw_tokens(tokens: Sequence[Any], kept: int, capacity: int) -> Array:
    """The last `kept` raw tokens of each row, zeros behind them: [B', kept, E]."""
    raw = np.zeros((capacity, kept, tokens[0].shape[-1]), np.float32)
    for row, sequence in zip(raw, tokens, strict=False):
        last = sequence[-kept:].detach().cpu().numpy()
        row[: len(last)] = last
    return raw
