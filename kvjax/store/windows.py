"""Windows by latent: a root pool per environment, then one shared pool of searched nodes.

The store knows windows and keys, but no model. A window is kept without the slots that no stored
window ever uses (the longest has C - 3 tokens).

Handles name a window exactly: an index over both pools, and how often that slot was given to a new
key. A handle whose slot was given away or cleared is recognised and misses.

Shapes: B rows, E embedding size, C context_length in tokens, P environments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import display, loops
from kvjax.base.arrays import is_deleted
from kvjax.base.values import require, require_count, require_one_of, require_type
from kvjax.config import WorldModelConfig
from kvjax.ops import hashing
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.store import pool as pools
from kvjax.store import statistics
from kvjax.store.pool import NO_SLOT, Pool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("roots", "nodes", "epoch", "counters", "latest"),
    meta_fields=("verify_keys", "spare"),
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
      spare: slots at a window's end that no stored window uses, which are left out (static).
    """

    roots: Pool
    nodes: Pool
    epoch: jax.Array
    counters: jax.Array
    latest: jax.Array | None
    verify_keys: bool
    spare: int

    def _picture(self) -> display.Picture | None:
        pools = [self.roots._picture("roots"), self.nodes._picture("nodes")]
        return display.store(pools, self.epoch, statistics.read(self.counters))


_MIN_ROOT_SLOTS = 256
_MAX_ROOT_SLOTS = 5000
_HANDLES = np.uint32(1 << 31)  # handles are not negative

_replace = dataclasses.replace


def init_store(
    config: WorldModelConfig,
    num_envs: int,
    num_simulations: int,
    *,
    root_slots: int | None = None,
    node_slots: int | None = None,
    eviction: pools.Eviction = "fifo",
    verify_keys: bool = False,
) -> Store:
    """An empty store.

    Args:
      config: whose windows are stored; `config.dtype` is the entries' dtype.
      num_envs: P, environments, each with a root pool of its own.
      num_simulations: simulations of one search.
      root_slots: slots of each root pool; LightZero's `min(5000, max(256, 2 * num_simulations))` by
        default.
      node_slots: slots of the shared pool; `num_simulations * num_envs` by default, and no fewer,
        so that a search never evicts its own nodes.
      eviction: policy of all pools, see `kvjax.store.pool.init`.
      verify_keys: keys hold the latent itself, so that two latents are never taken for one.

    Returns:
      A `Store` whose entries are windows [slots, C - 3, L, 2, H, D].

    Raises:
      TypeError: `config` is no `WorldModelConfig`.
      ValueError: a size is not a positive integer, a node pool smaller than a search, or an unknown
        policy.
    """
    require_type("config", config, WorldModelConfig, "kvjax.WorldModelConfig")
    num_envs = require_count("num_envs", num_envs)
    num_simulations = require_count("num_simulations", num_simulations)
    search_size = num_simulations * num_envs
    if root_slots is None:
        root_slots = min(_MAX_ROOT_SLOTS, max(_MIN_ROOT_SLOTS, 2 * num_simulations))
    root_slots = require_count("root_slots", root_slots)
    node_slots = require_count("node_slots", search_size if node_slots is None else node_slots)
    require(
        node_slots >= search_size,
        f"node_slots {node_slots} cannot hold a search of {num_envs} environments and"
        f" {num_simulations} simulations: at least {search_size} are needed",
    )
    require_one_of("eviction", eviction, pools.EVICTIONS)
    store: Store = _empty(config, num_envs, root_slots, node_slots, eviction, bool(verify_keys))
    return store


@functools.partial(jax.jit, static_argnums=range(6))
def _empty(
    config: WorldModelConfig,
    num_envs: int,
    root_slots: int,
    node_slots: int,
    eviction: pools.Eviction,
    verify_keys: bool,
) -> Store:
    """See `init_store`; one program makes all arrays."""
    spare = config.window.context_length - config.window.kept_length
    entry = _pack(windows.init(config.window), spare)
    key_lanes = hashing.KEY_LANES + (config.embed_dim if verify_keys else 0)

    def make(num_slots: int, num_segments: int) -> Pool:
        return pools.init(
            entry,
            num_slots=num_slots,
            num_segments=num_segments,
            key_lanes=key_lanes,
            eviction=eviction,
        )

    return Store(
        roots=make(root_slots, num_envs),
        nodes=make(node_slots, 1),
        epoch=jnp.zeros((), jnp.uint32),
        counters=statistics.init(),
        latest=None if config.window.raw_size is None else jnp.full(num_envs, NO_SLOT, jnp.int32),
        verify_keys=verify_keys,
        spare=spare,
    )


def require_store(store: Store) -> None:
    """Refuses what is no store, and one whose buffers are gone.

    Raises:
      TypeError: another type.
      ValueError: the store was moved.
    """
    require_type("store", store, Store, "kvjax.init_store")
    gone = is_deleted(store.counters)
    require(not gone, "the store was moved by an earlier call: use the one that came back from it")


def num_envs(store: Store) -> int:
    """P, environments of a store."""
    return store.roots.segments.shape[0]


def _pack(window: Window, spare: int) -> Window:
    """Leaves out slots that no stored window uses: C becomes C - 3."""
    raw = None if window.raw is None else window.raw[..., :-spare, :]
    return _replace(window, kv=window.kv[..., :-spare, :, :, :, :], raw=raw)


def _unpack(window: Window, spare: int) -> Window:
    """Undoes `_pack`."""

    def pad(rows: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * rows.ndim
        widths[axis] = (0, spare)
        return jnp.pad(rows, widths)

    raw = None if window.raw is None else pad(window.raw, -2)
    return _replace(window, kv=pad(window.kv, -5), raw=raw)


def latent_keys(store: Store, latent: jax.Array, env_id: jax.Array) -> jax.Array:
    """Keys of latents [B, E] in environments [B] under the current epoch: [B, K] uint32."""
    return jax.vmap(
        lambda x, env: hashing.latent_key(x, env, store.epoch, verify=store.verify_keys)
    )(latent, env_id)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """Where rows were found; at most one of the two is a slot."""

    root: jax.Array  # [B] int32 slot of the root pools, or NO_SLOT
    node: jax.Array  # [B] int32 slot of the node pool, or NO_SLOT
    false_match: jax.Array  # [B] bool, another key with the same 32 bits was met

    @property
    def hit(self) -> jax.Array:
        """Whether the row was found at all: [B] bool."""
        return (self.root != NO_SLOT) | (self.node != NO_SLOT)


def only(found: Found, rows: jax.Array) -> Found:
    """Leaves out all rows but those of `rows` [B] bool."""
    return Found(
        root=jnp.where(rows, found.root, NO_SLOT),
        node=jnp.where(rows, found.node, NO_SLOT),
        false_match=found.false_match & rows,
    )


def find(store: Store, keys: jax.Array, env_id: jax.Array, *, roots_only: bool = False) -> Found:
    """Looks keys up in their environment's root pool, then in the node pool.

    Args:
      keys: [B, K] uint32.
      env_id: [B] int32 in 0 .. P - 1.
      roots_only: as LightZero does at root steps.
    """
    lookup = jax.vmap(pools.find, in_axes=(None, 0, 0))
    root, false_root = lookup(store.roots, keys, env_id)
    if roots_only:
        return Found(root, jnp.full_like(root, NO_SLOT), false_root)
    node, false_node = lookup(store.nodes, keys, jnp.zeros_like(env_id))
    found_root = root != NO_SLOT
    return Found(
        root, jnp.where(found_root, NO_SLOT, node), false_root | (false_node & ~found_root)
    )


def take(store: Store, found: Found) -> Window:
    """Windows of found rows, empty ones for the others: `kv` [B, C, L, 2, H, D], `length` [B]."""
    in_root = found.root != NO_SLOT

    def from_both() -> Window:
        both = pools.take(store.roots, found.root), pools.take(store.nodes, found.node)
        return _unpack(jax.vmap(windows.where)(in_root, *both), store.spare)

    def from_nodes() -> Window:
        return _unpack(pools.take(store.nodes, found.node), store.spare)

    # Below the first level of a tree no row is a root: that pool need not be read.
    window: Window = loops.cond(jnp.any(in_root), from_both, from_nodes)
    return window


def touch(store: Store, found: Found) -> Store:
    """Renews the age of found rows, in row order; only LRU minds."""
    return _replace(
        store,
        roots=pools.touch(store.roots, found.root),
        nodes=pools.touch(store.nodes, found.node),
    )


def add_roots(
    store: Store,
    keys: jax.Array,
    env_id: jax.Array,
    window: Window,
    *,
    priority: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[Store, jax.Array]:
    """Stores root windows in their environments' pools; the store and handles [B] int32."""
    priority = priority if store.roots.eviction == "priority" else None
    roots, slot, evicted = pools.add(
        store.roots, keys, env_id, _pack(window, store.spare), priorities=priority, valid=valid
    )
    lost = slot == NO_SLOT if valid is None else valid & (slot == NO_SLOT)
    store = _replace(store, roots=roots, latest=with_latest(store, env_id, slot))
    store = _count(store, root_evictions=evicted, not_stored=lost)
    return store, _handle(store, roots, slot, 0)


def with_latest(store: Store, env_id: jax.Array, slot: jax.Array) -> jax.Array | None:
    """`store.latest` after roots of environments [B] went to slots [B]; NO_SLOT changes nothing."""
    if store.latest is None:
        return None
    row = jnp.where(slot == NO_SLOT, num_envs(store), env_id)
    return store.latest.at[row].set(slot, mode="drop")


def latest_roots(store: Store, env_id: jax.Array) -> Window:
    """Each environment's newest root window, also across `new_epoch`; empty where there is none.

    For a store of windows with raw tokens: keys and values may be of older parameters.
    """
    return _unpack(pools.take(store.roots, jnp.asarray(store.latest)[env_id]), store.spare)


def add_nodes(
    store: Store,
    keys: jax.Array,
    window: Window,
    *,
    priority: jax.Array | None = None,
    valid: jax.Array | None = None,
    may_evict: bool = True,
) -> tuple[Store, jax.Array]:
    """Stores searched windows in the shared pool; the store and handles [B] int32.

    Nodes are forgotten after each root step, so that an evicted one is of the running search.
    Without `may_evict` windows for which there is no room are not stored.
    """
    priority = priority if store.nodes.eviction == "priority" else None
    segment = jnp.zeros(keys.shape[0], jnp.int32)
    nodes, slot, evicted = pools.add(
        store.nodes,
        keys,
        segment,
        _pack(window, store.spare),
        priorities=priority,
        valid=valid,
        may_evict=may_evict,
    )
    lost = slot == NO_SLOT if valid is None else valid & (slot == NO_SLOT)
    store = _replace(store, nodes=nodes)
    store = _count(store, node_evictions=evicted, not_stored=lost)
    return store, _handle(store, nodes, slot, pools.total_slots(store.roots))


def _all_slots(store: Store) -> int:
    return pools.total_slots(store.roots) + pools.total_slots(store.nodes)


def _generations(store: Store) -> np.uint32:
    """How many generations of a slot a handle tells apart."""
    return np.uint32(_HANDLES // np.uint32(_all_slots(store)))


def _handle(store: Store, pool: Pool, slot: jax.Array, offset: int) -> jax.Array:
    generation = pool.records[slot, pools.GENERATION] % _generations(store)
    index = slot.astype(jnp.uint32) + np.uint32(offset)
    handle = generation * np.uint32(_all_slots(store)) + index
    return jnp.where(slot == NO_SLOT, NO_SLOT, handle.astype(jnp.int32))


def resolve(store: Store, handle: jax.Array, env_id: jax.Array) -> Found:
    """Finds windows by handle; one that is no longer that window, or another's, misses.

    Args:
      handle: [B] int32 from `add_roots` or `add_nodes`.
      env_id: [B] int32, whose windows the handles must be.
    """
    index = jnp.where(handle < 0, 0, handle) % _all_slots(store)
    offset = pools.total_slots(store.roots)

    def check(pool: Pool, slot: jax.Array, start: int) -> jax.Array:
        inside = (handle >= 0) & (slot >= 0) & (slot < pools.total_slots(pool))
        slot = jnp.where(inside, slot, 0)
        lanes = pool.records[slot, pools.KEY :]
        same = (lanes[:, hashing.ENV_LANE] == env_id.astype(jnp.uint32)) & (
            lanes[:, hashing.EPOCH_LANE] == store.epoch
        )
        same &= _handle(store, pool, slot, start) == handle
        return jnp.where(inside & pools.is_live(pool, slot) & same, slot, NO_SLOT)

    return Found(
        root=check(store.roots, index, 0),
        node=check(store.nodes, index - offset, offset),
        false_match=jnp.zeros(handle.shape, bool),
    )


def keys_of(store: Store, found: Found) -> jax.Array:
    """Keys under which found rows are stored: [B, K] uint32, zeros for the others."""
    root = store.roots.records[found.root, pools.KEY :]
    node = store.nodes.records[found.node, pools.KEY :]
    keys = jnp.where((found.root != NO_SLOT)[:, None], root, node)
    return jnp.where(found.hit[:, None], keys, 0)


def clear_nodes(store: Store, when: jax.Array | bool = True) -> Store:
    """Forgets all searched nodes, as after every root step; only `when` [] bool holds."""
    cleared = pools.clear(store.nodes)
    segments = jnp.where(when, cleared.segments, store.nodes.segments)
    return _replace(store, nodes=_replace(cleared, segments=segments))


def clear_environment(store: Store, env_id: jax.Array | int) -> Store:
    """Forgets one environment's roots and nodes, as at the end of its episode.

    Args:
      env_id: [] integer in 0 .. P - 1.
    """
    owner = store.nodes.records[:-1, pools.KEY + hashing.ENV_LANE]
    theirs = owner == jnp.asarray(env_id).astype(jnp.uint32)
    latest = None if store.latest is None else store.latest.at[env_id].set(NO_SLOT)
    return _replace(
        store,
        roots=pools.clear(store.roots, env_id),
        nodes=pools.remove(store.nodes, theirs),
        latest=latest,
    )


def clear(store: Store) -> Store:
    """Forgets everything but the counters and the epoch."""
    latest = None if store.latest is None else jnp.full_like(store.latest, NO_SLOT)
    return _replace(
        store, roots=pools.clear(store.roots), nodes=pools.clear(store.nodes), latest=latest
    )


def new_epoch(store: Store) -> Store:
    """Says that the parameters changed: what was stored before can never be found again.

    Only `latest_roots` still names the newest roots, for the sake of their raw tokens.
    """
    return _replace(clear(store), epoch=store.epoch + 1, latest=store.latest)


def _count(store: Store, **amounts: jax.Array) -> Store:
    return _replace(store, counters=statistics.add(store.counters, **amounts))


def count_lookups(
    store: Store, found: Found, asked: jax.Array, *, roots_only: bool = False
) -> Store:
    """Takes a batch of look-ups into the statistics; `asked` [B] bool are the rows that looked."""
    hits = {"root_pool_hits": found.root, "node_pool_hits": found.node}
    amounts = {name: asked & (slot != NO_SLOT) for name, slot in hits.items()}
    amounts |= {"queries": asked, "misses": asked & ~found.hit}
    amounts |= {"false_matches": asked & found.false_match}
    if roots_only:
        amounts |= {"root_queries": asked, "root_hits": asked & found.hit}
    return _count(store, **amounts)


def count_rebuilt(store: Store, rows: jax.Array) -> Store:
    """Counts windows that were computed again after a miss: `rows` [B] bool."""
    return _count(store, rebuilt=rows)


def count_padding(store: Store, length: jax.Array, rows: jax.Array) -> Store:
    """Counts the padding that aligning the chosen `rows` [B] bool of lengths [B] would take."""
    pads = jnp.where(rows, jnp.max(jnp.where(rows, length, 0)) - length, 0)
    store = _count(store, padded_rows=pads > 0, pad_tokens=pads)
    store = _count(store, batches=jnp.any(rows), unequal_batches=jnp.any(pads > 0))
    counters = statistics.maximum(store.counters, largest_pad=jnp.max(pads))
    return _replace(store, counters=counters)


def stats(store: Store) -> statistics.Statistics:
    """The statistics of a store, on the host.

    Raises:
      ValueError: the store was moved.
    """
    require_store(store)
    counted = statistics.Statistics(statistics.read(store.counters))
    for name, pool in {"roots": store.roots, "nodes": store.nodes}.items():
        counted[f"{name}_stored"] = int(np.sum(np.asarray(pools.is_live(pool))))
        counted[f"{name}_slots"] = pools.total_slots(pool)
    return counted
