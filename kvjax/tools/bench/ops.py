"""`kvjax bench ops`: windows and pools against plain memory copies; look-ups against a dict.

Bytes are the rows read plus the rows written. The yardstick is `np.copyto` of as many bytes, on as
many threads as XLA has, into a buffer that was written before; the ops write into donated buffers
where they return as much as they take.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.config import WindowConfig, WorldModelConfig
from kvjax.mcts.inference import initial_inference, recurrent_inference
from kvjax.model import world_model
from kvjax.ops import hashing
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.store import Store
from kvjax.store import pool as pools
from kvjax.store.pool import Pool
from kvjax.tools.bench import timing
from kvjax.tools.bench.rows import Progress, Row, choose, measured

Run = Callable[[], None]

CONFIG = WindowConfig(context_length=8, num_layers=2, num_heads=8, head_dim=96)
_EMBED = CONFIG.num_heads * CONFIG.head_dim
_FULL_ROWS = 2  # of 8 windows in the batch: how many slide or are the longest


@dataclasses.dataclass(frozen=True)
class Size:
    """How many windows are worked on, and how many slots the pool has."""

    name: str
    rows: int
    slots: int
    repeats: int


SIZES = (
    Size("small", rows=8, slots=400, repeats=200),
    Size("large", rows=2736, slots=4400, repeats=15),  # 269 MiB of windows, 270 MiB of pool
)


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    rows: list[Row] | None = None,
) -> dict[str, Any]:
    """Measures all ops, or those whose name contains `only`.

    Rows are added to `rows` as they are measured.

    Returns:
      The fields of `--json`: machine, versions, one row per op and size, look-ups per second beside
      a dict's, and what a recurrent step takes as the pool grows.

    Raises:
      ValueError: no op is called that.
    """
    cases = {f"{name}, {size.name}": (name, size) for size in SIZES for name in _OPS}
    otherwise = f"no op matches {{}}; ops are {', '.join(_OPS)}"
    chosen = choose(cases, only, otherwise=otherwise, fits=lambda part, at: part in cases[at][0])
    extras: dict[str, Callable[[], Any]]
    extras = {} if only else {"lookups": _lookups, "growth": _growth}
    return measured(chosen, _row, progress=progress, rows=rows, **extras)


def _row(case: tuple[str, Size], progress: Progress) -> Row:
    name, size = case
    op, num_bytes = _OPS[name](size)
    candidates = {"op": op, "copy": _copy(num_bytes)}
    medians = timing.medians_in_turn(candidates, repeats=size.repeats, progress=progress)
    return {
        "op": name,
        "size": size.name,
        "us": 1e3 * medians["op"],
        "bytes": num_bytes,
        "copy_us": 1e3 * medians["copy"],
        "bandwidth_fraction": medians["copy"] / medians["op"],
    }


def _copy(num_bytes: int) -> Run:
    """Copies half as many bytes, so that as many are read and written, on all cores."""
    threads = os.cpu_count() or 1
    source = np.ones(max(num_bytes // 8, 1), np.float32)
    target = np.zeros_like(source)
    if num_bytes < 1 << 20:  # a small copy is done before a second thread has woken up
        return lambda: np.copyto(target, source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    workers = concurrent.futures.ThreadPoolExecutor(threads)

    def copy() -> None:
        for _ in workers.map(lambda part: np.copyto(*part), parts):
            pass

    return copy


def _windows(rows: int) -> Window:
    """Full windows and shorter ones, random."""
    rng = np.random.default_rng(0)
    lengths = np.where(
        np.arange(rows) % 8 < _FULL_ROWS, CONFIG.full_length, 1 + np.arange(rows) % 6
    )
    shape = (rows, CONFIG.context_length, *CONFIG.token_shape)
    valid = np.arange(CONFIG.context_length) < lengths[:, None]
    kv = rng.random(shape, np.float32) * valid[..., None, None, None, None]
    return Window(jnp.asarray(kv, jnp.float32), jnp.asarray(lengths, jnp.int32))


def _moving(op: Callable[..., Any], state: Any, *arguments: Any) -> Run:
    """A step that gives its state away and gets the next one, as a search does."""
    jitted = jax.jit(op, donate_argnums=0, keep_unused=True)

    def step() -> None:
        nonlocal state
        state = timing.finished(jitted(state, *arguments))

    return step


def _reading(op: Callable[..., Any], *arguments: Any) -> Run:
    """A step that leaves its arguments alone and writes where its last result was."""
    return _moving(lambda _, *arguments: op(*arguments), jax.jit(op)(*arguments), *arguments)


def _window_bytes(rows: int, tokens: int = CONFIG.context_length) -> int:
    return rows * tokens * int(np.prod(CONFIG.token_shape)) * 4


def _append(size: Size) -> tuple[Run, int]:
    token = jnp.ones((size.rows, *CONFIG.token_shape))

    def op(window: Window, token: jax.Array) -> Window:
        grown = jax.vmap(windows.append)(window, token)
        return Window(grown.kv, window.length)  # stays as long as it was, to be measured again

    return _moving(op, _windows(size.rows), token), 2 * _window_bytes(size.rows, tokens=1)


def _trim_and_pad(size: Size) -> tuple[Run, int]:
    state = _windows(size.rows)
    return _reading(windows.trim_and_pad, state), 2 * _window_bytes(size.rows)


def _undo_trim_and_pad(size: Size) -> tuple[Run, int]:
    aligned = windows.trim_and_pad(_windows(size.rows))
    return _reading(windows.undo_trim_and_pad, aligned), 2 * _window_bytes(size.rows)


def _slide(size: Size) -> tuple[Run, int]:
    correction = jnp.ones((CONFIG.kept_length, *CONFIG.token_shape))
    op = jax.vmap(windows.slide, in_axes=(0, None))
    return _reading(op, _windows(size.rows), correction), 2 * _window_bytes(size.rows)


def _keys(count: int) -> jax.Array:
    latents = jnp.asarray(np.random.default_rng(1).random((count, _EMBED)), jnp.float32)
    make = jax.vmap(lambda x: hashing.latent_key(x, jnp.int32(0), jnp.uint32(0)))
    keys: jax.Array = jax.jit(make)(latents)
    return keys


def _filled_pool(size: Size) -> tuple[Pool, jax.Array, Any]:
    """A pool that holds `rows` keys, these keys in another order, and their entries."""
    window = _windows(size.rows)
    entry = Window(window.kv[:, : CONFIG.kept_length], window.length)
    keys, segments = _keys(size.rows), jnp.zeros(size.rows, jnp.int32)
    pool = pools.init(jax.tree.map(lambda x: x[0], entry), num_slots=size.slots)
    pool, _, _ = jax.jit(pools.add, donate_argnums=0)(pool, keys, segments, entry)
    order = np.random.default_rng(2).permutation(size.rows)
    return pool, keys[order], entry


def _find(size: Size) -> tuple[Run, int]:
    pool, keys, _ = _filled_pool(size)
    op = jax.vmap(pools.find, in_axes=(None, 0, None))
    return _reading(op, pool, keys, jnp.int32(0)), 2 * keys.nbytes


def _take(size: Size) -> tuple[Run, int]:
    pool, keys, _ = _filled_pool(size)
    slots, _ = jax.jit(jax.vmap(pools.find, in_axes=(None, 0, None)))(pool, keys, jnp.int32(0))
    return _reading(pools.take, pool, slots), 2 * _window_bytes(size.rows, CONFIG.kept_length)


def _add(size: Size) -> tuple[Run, int]:
    pool, keys, entry = _filled_pool(size)
    segments = jnp.zeros(size.rows, jnp.int32)

    def op(pool: Pool, keys: jax.Array, entry: Any) -> Pool:
        # New keys in every call: the pool's clock is folded into them.
        fresh = keys.at[:, 0].add(pool.segments[0, pools.CLOCK])
        return pools.add(pool, fresh, segments, entry)[0]

    num_bytes = 2 * _window_bytes(size.rows, CONFIG.kept_length)
    return _moving(op, pool, keys, entry), num_bytes


_OPS: dict[str, Callable[[Size], tuple[Run, int]]] = {
    op.__name__.removeprefix("_"): op
    for op in (_append, _trim_and_pad, _undo_trim_and_pad, _slide, _find, _take, _add)
}


def _lookups(rows: int = 64, slots: int = 3200, repeats: int = 200) -> dict[str, Any]:
    """Hash a latent, look it up, get its window: kvjax's store beside a dict of torch tensors."""
    config = WorldModelConfig(_EMBED, CONFIG.num_layers, CONFIG.num_heads, 6, 8, 20)
    store = stores.init_store(config, rows, slots // rows, root_slots=1)
    latents = np.random.default_rng(0).random((slots, _EMBED)).astype(np.float32)
    env_id, window = jnp.arange(rows), jax.vmap(windows.slide)(_windows(rows))  # as stored

    @functools.partial(jax.jit, donate_argnums=0)
    def add(store: Store, latent: jax.Array) -> Store:
        return stores.add_nodes(store, stores.latent_keys(store, latent, env_id), window)[0]

    for asked in latents.reshape(-1, rows, _EMBED):
        store = add(store, asked)

    def look_up(store: Store, latent: jax.Array) -> Window:
        found = stores.find(store, stores.latent_keys(store, latent, env_id), env_id)
        return stores.take(store, found)

    candidates = {"kvjax": _reading(look_up, store, asked)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("xxhash"):
        candidates["dict"] = _dict_lookups(latents, asked)
    medians = timing.medians_in_turn(candidates, repeats=repeats)
    result = {f"{name}_per_second": 1e3 * rows / taken for name, taken in medians.items()}
    if "dict" in medians:
        result["ratio"] = medians["dict"] / medians["kvjax"]
    return {"rows": rows, "slots": slots, "embed": _EMBED, **result}


def _dict_lookups(latents: Any, asked: Any) -> Run:
    """As LightZero: xxh64 of each latent, a dict of slots, a copy of each layer's K and V."""
    torch, xxhash = importlib.import_module("torch"), importlib.import_module("xxhash")
    shape = (1, CONFIG.num_heads, CONFIG.context_length, CONFIG.head_dim)

    def caches(count: int) -> Any:
        return [[torch.zeros(shape) for _ in range(2 * CONFIG.num_layers)] for _ in range(count)]

    tensors, work = caches(len(latents)), caches(len(asked))
    slots = {xxhash.xxh64(row.tobytes()).hexdigest(): i for i, row in enumerate(latents)}

    def look_up() -> None:
        for row, mine in zip(asked, work, strict=True):
            held = tensors[slots[xxhash.xxh64(row.tobytes()).hexdigest()]]
            for target, source in zip(mine, held, strict=True):
                target.copy_(source)

    return look_up


def _growth(rows: int = 8, repeats: int = 200) -> list[dict[str, Any]]:
    """Microseconds of a donated recurrent step at embed 64, with 400 slots and with 40,000."""
    config = WorldModelConfig(64, 2, 2, 6, 8, 20)
    params = world_model.init_params(jax.random.key(0), config)
    result = []
    for eviction in pools.EVICTIONS:
        small, large = (_recurrent_step(params, config, rows, s, eviction) for s in (400, 40_000))
        medians = timing.medians_in_turn({"400": small, "40000": large}, repeats=repeats)
        taken = {f"us_{slots}_slots": 1e3 * ms for slots, ms in medians.items()}
        ratio = medians["40000"] / medians["400"]
        result.append({"eviction": eviction, "rows": rows, **taken, "ratio": ratio})
    return result


def _recurrent_step(
    params: Any, config: WorldModelConfig, rows: int, node_slots: int, eviction: Any
) -> Run:
    store = stores.init_store(config, rows, 50, node_slots=node_slots, eviction=eviction)
    env_id, zeros = jnp.arange(rows), jnp.zeros(rows, jnp.int32)
    latent = jnp.asarray(np.random.default_rng(0).random((rows, config.embed_dim)), jnp.float32)
    started = latent, zeros - 1, latent, env_id, zeros
    store, _ = initial_inference(params, store, *started, config=config)

    def search() -> None:
        nonlocal store, latent
        asked = latent, zeros, env_id, zeros, zeros
        store, out = recurrent_inference(params, store, *asked, config=config, full_policy="evict")
        latent = timing.finished(out.latent)

    return search
