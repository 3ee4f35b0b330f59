"""All windows of one scope, what waits to be filed among them and what is to be forgotten first.

A scope is a value and each function here makes another one. Arrays are moved on to it: if a call
fails that was given them they are gone, and all entries with them, see `is_lost`.

Shapes: B rows, B' = B rounded up to a power of two, E embedding size, C context_length in tokens,
P environments.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import dlpack
from kvjax.base.compilation import on_cpu
from kvjax.config import BLOCK
from kvjax.lightzero.attach import layout
from kvjax.lightzero.attach.caches import Batch, Memory, make_batch, memory_of
from kvjax.lightzero.module import Description
from kvjax.store import pool as pools

Array = np.ndarray[Any, Any]

_GROWTH = 2

_log = logging.getLogger(__name__)


class Scope(NamedTuple):
    """What one scope keeps."""

    description: Description
    structure: Any  # of the arrays
    between: Callable[..., Any]  # `layout.file_and_look_up` of these
    exchanges: Mapping[int, "Exchange"]  # by B'
    arrays: Sequence[jax.Array]  # all windows, see `layout.take_apart`
    room: int  # nodes that surely fit
    pending: tuple["Exchange", tuple[Any, ...]] | None = None  # see `file_later`
    stale_roots: frozenset[int] = frozenset()  # environments
    stale_nodes: bool = False

    @property
    def filed(self) -> layout.Filed:
        """All windows."""
        return layout.put_together(self.arrays, self.structure)

    @property
    def node_slots(self) -> int:
        """How many nodes there is memory for."""
        return pools.total_slots(self.filed.store.nodes)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is pending or stale."""
        return self.pending is None and not (self.stale_roots or self.stale_nodes)

    @property
    def is_lost(self) -> bool:
        """Whether a call failed and gave nothing back of what it took."""
        return self.arrays[0].is_deleted()


def init(description: Description) -> Scope:
    """An empty scope."""
    filed = layout.init(
        description.config,
        description.num_envs,
        description.num_simulations,
        root_slots=description.root_slots,
        node_slots=description.node_slots,
    )
    # Committed and uncommitted arrays compile twice.
    arrays, structure = layout.take_apart(jax.device_put(filed))
    between = layout.file_and_look_up(structure, description.kept)
    return Scope(description, structure, between, {}, arrays, description.node_slots)


def copied(scope: Scope) -> Scope:
    """The same in memory of its own; nothing may be pending."""
    return scope._replace(arrays=[jnp.copy(array) for array in scope.arrays], exchanges={})


def with_filed(scope: Scope, filed: layout.Filed) -> Scope:
    """The same with other windows."""
    return scope._replace(arrays=layout.take_apart(filed)[0])


def _with(scope: Scope, *changing: Any) -> Scope:
    """Another scope in which nothing is stale, in a quarter of the time of `_replace`."""
    return Scope(scope.description, scope.structure, scope.between, *changing)


def forget(scope: Scope, *, roots: Iterable[int] = (), nodes: bool = False) -> Scope:
    """Notes that the roots of environments or all nodes are to be forgotten."""
    stale_roots = scope.stale_roots.union(roots)
    return scope._replace(stale_roots=stale_roots, stale_nodes=scope.stale_nodes or nodes)


def clean(scope: Scope) -> Scope:
    """Files what is pending and forgets what is stale."""
    scope = settle(scope)
    if scope.is_clean:
        return scope
    roots = np.isin(np.arange(scope.description.num_envs), list(scope.stale_roots))
    scope = with_filed(scope, layout.clear(scope.filed, roots, np.bool_(scope.stale_nodes)))
    room = scope.node_slots if scope.stale_nodes else scope.room
    return scope._replace(room=room, stale_roots=frozenset(), stale_nodes=False)


def settle(scope: Scope) -> Scope:
    """Files what is pending, and waits until that is done."""
    if scope.pending is None:
        return scope
    exchange, rest = scope.pending
    filing = exchange.batch, _grown_end(scope), *exchange.filed(), *rest
    return _file(scope._replace(pending=None), *filing, is_root=False)


def new_epoch(scope: Scope) -> Scope:
    """Forgets everything but raw tokens because the weights changed."""
    scope = with_filed(scope, layout.new_epoch(scope.filed))
    return scope._replace(pending=None, room=scope.node_slots)


def count_rebuilt(scope: Scope) -> Scope:
    """Counts one window that was computed again after a miss."""
    return with_filed(scope, layout.count_rebuilt(scope.filed))


def make_room(scope: Scope, rows: int) -> Scope:
    """Lets the pool of nodes grow before rows to be filed push out others; nothing is pending.

    Rows are counted here, which waits for nothing; only when they might be too many is the pool
    asked. It is emptied at each root step, so what it holds is one search's.
    """
    if scope.room >= rows:
        return scope
    slots, stored = scope.node_slots, int(pools.is_live(scope.filed.store.nodes).sum())
    if stored + rows > slots:
        slots, before = max(_GROWTH * slots, stored + rows), slots
        is_first = before == scope.description.node_slots
        _log.log(
            logging.WARNING if is_first else logging.INFO,
            "a search has more than %d nodes, the world model is configured for num_simulations=%d"
            " of env_num=%d: there is room for %d from now on, for which kvjax compiles once more."
            " Set world_model_cfg.num_simulations to the most simulations that any policy makes",
            before,
            scope.description.num_simulations,
            scope.description.num_envs,
            slots,
        )
        scope = with_filed(scope, layout.with_node_slots(scope.filed, node_slots=slots))
    return scope._replace(room=slots - stored)


def file(
    scope: Scope,
    windows: Memory,
    latent: Array,
    rows: Array,
    lengths: Sequence[int],
    *rest: Any,
    is_root: bool,
) -> Scope:
    """Files windows under latents [B, E] and waits until that is done; see `layout.file`."""
    count, capacity = len(latent), rows.shape[1]
    length = np.zeros(capacity, np.int32)
    length[:count] = lengths[:count]
    filing = windows.end, _padded(latent, capacity), rows, length, *rest
    scope = scope if is_root else scope._replace(room=scope.room - count)
    return _file(scope, windows.as_argument(), *filing, is_root=is_root)


def _padded(latent: Array, capacity: int) -> Array:
    """[B', E] float32: rows and zeros behind them."""
    return np.pad(latent.astype(np.float32), ((0, capacity - len(latent)), (0, 0)))


def _file(scope: Scope, batch: Any, end: int, *filing: Any, is_root: bool) -> Scope:
    options = {"is_root": is_root, "keep": scope.description.kept}
    filed = layout.file(scope.filed, batch, np.int32(end), *filing, **options)
    # One computation: when one of its results is there it no longer reads what torch lent.
    filed.kv.block_until_ready()
    return with_filed(scope, filed)


def _grown_end(scope: Scope) -> int:
    """Where the rows of a batch end that grew by a block."""
    return scope.description.config.context_length - 1


def can_file_later(scope: Scope, windows: Memory, rows: Array, lengths: Sequence[int]) -> bool:
    """Whether these are the rows that were looked up last, grown by a block."""
    exchange = scope.exchanges.get(rows.shape[1])
    is_grown = exchange is not None and exchange.is_grown(windows, list(lengths))
    return is_grown and windows.end == _grown_end(scope)


def file_later(scope: Scope, latent: Any, rows: Array, *rest: Any) -> Scope:
    """Files a simulation's windows with the next look-up, since one call is cheaper than two.

    Until then, or until `settle`, the memory must stay as it is; latents [B, 1, E] may change. The
    scope is clean.
    """
    exchange = scope.exchanges[rows.shape[1]]
    exchange.note_filed(latent, rows)
    room = scope.room - len(latent)
    return _with(scope, scope.exchanges, scope.arrays, room, (exchange, rest))


def ready(scope: Scope, rows: Array, *, roots_only: bool) -> Scope:
    """Clean, but for what the call that looks these rows up can file."""
    at_once = scope.pending is None or scope.pending[0].are_filed(rows)
    if roots_only or not at_once or not on_cpu() or scope.stale_roots or scope.stale_nodes:
        return clean(scope)
    return scope


def look_up(
    scope: Scope, latent: Array, rows: Array, correction: jax.Array, *, roots_only: bool
) -> tuple[Scope, Batch]:
    """Finds and aligns the windows of latents [B, E] in a scope that is ready for that.

    No tensor should hold the memory of the last simulation's batch any more, or XLA copies it.
    """
    if not roots_only and on_cpu():
        return _file_and_look_up(scope, latent, rows, correction)
    counters, batch = peek(scope, latent, rows, roots_only=roots_only)
    return with_filed(scope, layout.with_counters(scope.filed, counters)), batch


def peek(scope: Scope, latent: Array, rows: Array, *, roots_only: bool) -> tuple[jax.Array, Batch]:
    """As `look_up` of a clean scope, and the counters that it would have then."""
    padded, length = _padded(latent, rows.shape[1]), scope.description.config.context_length
    counters, found, info, raw = layout.look_up(scope.filed, padded, rows, roots_only=roots_only)
    lengths, sources = np.asarray(info)[:, : len(latent)].tolist()
    layers, two, *shape = found.shape
    flat, stored = dlpack.hand_over(found).flatten(), scope.description.stored
    memory = memory_of(flat, (layers * two, *shape), stored)
    return counters, _with_tokens(make_batch(memory, length, lengths, sources), raw)


def _file_and_look_up(
    scope: Scope, latent: Array, rows: Array, correction: jax.Array
) -> tuple[Scope, Batch]:
    capacity, exchanges = rows.shape[1], scope.exchanges
    if scope.pending is not None:
        exchange, rest = scope.pending
    else:
        if capacity not in exchanges:
            shape, embed_dim = scope.description.cache_shape, scope.description.config.embed_dim
            exchanges = {**exchanges, capacity: Exchange(shape, capacity, embed_dim)}
        exchange, rest = exchanges[capacity], (correction, _no_tokens(scope, capacity))
        exchange.note_nothing_filed()
    exchange.note_asked(latent, rows)
    changed, raw = scope.between(*exchange.lend(), *scope.arrays, *rest, exchange.notes)
    found, known, *arrays = changed
    batch = _with_tokens(exchange.take(found, known, len(latent)), raw)
    arrays += scope.arrays[len(arrays) :]
    return _with(scope, exchanges, arrays, scope.room), batch


def _no_tokens(scope: Scope, capacity: int) -> Array | None:
    description = scope.description
    if not description.keeps_tokens:
        return None
    return np.zeros((capacity, description.kept, description.config.embed_dim), np.float32)


def _with_tokens(batch: Batch, raw: jax.Array | None) -> Batch:
    """A batch with raw tokens [B', K, E], as a tensor [length, E] per row."""
    if raw is None:
        return batch
    import torch

    rows = torch.tensor(np.asarray(raw))  # a copy: what jax owns is not to be written to
    tokens = [row[:length] for row, length in zip(rows, batch.lengths, strict=False)]
    return batch._replace(tokens=tokens)


class Exchange:
    """A batch of caches and notes about its rows, see `kvjax.lightzero.attach.layout`.

    Torch has the batch, to write its new tokens into, until the next one takes its place. If a
    tensor still holds it then, XLA leaves that memory as it is and takes other. Notes, and what is
    known of a batch, stay here: numpy reads and writes them in place.
    """

    def __init__(self, cache_shape: tuple[int, ...], rows: int, embed_dim: int) -> None:
        """`cache_shape` is (L, 2, H, C, D)."""
        import torch

        layers, two, heads, self._context_length, size = cache_shape
        shape = layers, two, rows, heads, layout.slots_of_row(self._context_length), size
        self.batch, self._shape = _zeros(shape), (layers * two, *shape[2:])
        self.notes = _zeros((2, rows, embed_dim + 2)).block_until_ready()
        self._filed, self._asked = dlpack.writable_view(self.notes)
        with torch.inference_mode(False):  # else only inference mode could write to it
            latents = torch.from_numpy(self._filed[:, None, : layout.ROWS.start])
            self._filed_latents = [latents[:count] for count in range(rows + 1)]
        self._filed_rows = self._asked_rows = np.empty(0)
        self._place = self._known_place = 0
        self._lengths: list[int] = []
        self._hold(_zeros((2, rows), jnp.int32).block_until_ready())

    def _hold(self, known: jax.Array) -> None:
        """Looks at the memory of what is known; it is the old one if that was donated."""
        self._known, place = known, known.unsafe_buffer_pointer()
        if place != self._known_place:
            self._known_place, self._seen = place, dlpack.writable_view(known)

    def note_filed(self, latent: Any, rows: Array) -> None:
        """Says under which latents a batch is to be filed, and whose its rows are.

        Latents are [B, 1, E], in any shape. `rows` [2, B'] is not changed by its owner.
        """
        if isinstance(latent, np.ndarray):
            self._filed[: len(latent), : layout.ROWS.start] = latent.reshape(len(latent), -1)
        else:  # torch copies in half of the time that it takes to show numpy the latents
            latent = latent.detach() if latent.requires_grad else latent
            noted = self._filed_latents[len(latent)]
            noted.copy_(latent if latent.shape == noted.shape else latent.reshape(noted.shape))
        if rows is not self._filed_rows:
            self._filed[:, layout.ROWS], self._filed_rows = rows.T, rows

    def note_nothing_filed(self) -> None:
        """Says that no row of the batch is to be filed."""
        self._filed[:, layout.ROWS], self._filed_rows = 0, np.empty(0)

    def note_asked(self, latent: Array, rows: Array) -> None:
        """Says which latents [B, E] are looked up next, and whose they are."""
        self._asked[: len(latent), : layout.ROWS.start] = latent
        if rows is not self._asked_rows:
            self._asked[:, layout.ROWS], self._asked_rows = rows.T, rows

    def are_filed(self, rows: Array) -> bool:
        """Whether just these rows [2, B'] are to be filed, so that one call can look them up too.

        It looks a row up before it files the next one, so no row may ask for what another files.
        """
        return rows is self._filed_rows

    def filed(self) -> tuple[Array, Array, Array]:
        """What is to be filed: latents [B', E], rows [2, B'] and lengths [B'] int32."""
        latent = self._filed[:, : layout.ROWS.start].copy()
        return latent, self._filed_rows, self._seen[0] + np.int32(BLOCK)

    def is_grown(self, memory: Memory, lengths: list[int]) -> bool:
        """Whether a memory is the batch that torch was given, its rows a block longer."""
        return memory.place == self._place and lengths == [n + BLOCK for n in self._lengths]

    def lend(self) -> tuple[jax.Array, jax.Array]:
        """The batch and memory for what is known of the next one; both are donated."""
        return self.batch, self._known

    def take(self, batch: jax.Array, known: jax.Array, rows: int) -> Batch:
        """Gives torch the batch that a call made of what `lend` gave it, with its first rows."""
        self.batch = batch
        memory = memory_of(dlpack.share(batch), self._shape, self._context_length - 1 - BLOCK)
        self._hold(known)
        lengths, sources = self._seen[:, :rows].tolist()
        self._place, self._lengths = memory.place, lengths
        return make_batch(memory, self._context_length, lengths, sources)


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    zeros: jax.Array = jax.device_put(jnp.zeros(shape, dtype))
    return zeros
