"""Shadow mode: LightZero's own caches beside kvjax's, compared on every call.

Both see the same calls and the same new tokens; each keeps, finds and slides its own windows.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.lightzero.attach import caches, layout
from kvjax.lightzero.attach.caches import Batch

_TOLERANCE = 1e-5

_log = logging.getLogger(__name__)


class ShadowError(RuntimeError):
    """LightZero's caches and kvjax's disagree."""


@dataclasses.dataclass
class Shadow:
    """What was compared so far. `mode` False: nothing, True: raise, "log": go on."""

    mode: bool | str
    disagreements: list[str] = dataclasses.field(default_factory=list)
    comparisons: int = 0
    rows: list[Any] | None = None  # LightZero's own `keys_values_wm_list` of the running step
    remark: str = ""  # ends every report

    def report(self, text: str) -> None:
        """Raises or logs one disagreement."""
        text += self.remark
        self.disagreements.append(text)
        if self.mode is True:
            raise ShadowError(text)
        _log.warning("shadow: %s", text)

    def check(self, where: str, what: str, old: Any, new: Any) -> None:
        """Compares two plain values."""
        self.comparisons += 1
        if old != new:
            self.report(f"{where}: {what} is {old} in LightZero's caches and {new} in kvjax's")

    def check_tensors(self, where: str, old: Any, new: Any) -> None:
        """Compares keys or values [.., tokens, D]."""
        self.comparisons += 1
        if old.shape != new.shape:
            self.report(f"{where}: shape {tuple(old.shape)} against {tuple(new.shape)}")
        elif old.numel():
            difference = (old - new).abs()
            largest = float(difference.max())
            if not largest <= _TOLERANCE * max(1.0, float(old.abs().max())):
                token = int(difference.amax(-1).flatten().argmax()) % old.shape[-2]
                self.report(f"{where}: token {token} differs by {largest:.3g}")

    def compare_row(self, where: str, old: Any, batch: Batch, row: int) -> None:
        """Compares one `KeysValues` with one row of an aligned batch."""
        length, size = batch.lengths[row], batch.size
        self.check(where, "size", old.size, length)
        if old.size == length:
            every = slice(None)
            old_at, new_at = (0, every, slice(length)), (row, every, slice(size - length, size))
            self._compare_caches(where, old, batch, old_at, new_at)

    def _compare_caches(self, where: str, old: Any, batch: Batch, old_at: Any, new_at: Any) -> None:
        """Compares what a `KeysValues` and a batch hold at certain places of their tensors."""
        pairs = zip(caches.tensors(old), batch.views, strict=True)
        for index, (theirs, ours) in enumerate(pairs):
            name = f"{where}, layer {index // 2} {('keys', 'values')[index % 2]}"
            self.check_tensors(name, theirs[old_at], ours[new_at])

    def retrieve(
        self, wm: Any, original: Callable[[], Any], batch: Batch, env_ids: Sequence[int]
    ) -> None:
        """Runs LightZero's look-up of parents and compares hits, sizes and caches."""
        wm.keys_values_wm_list, wm.keys_values_wm_size_list = [], []
        queries, hits = wm.total_query_count, wm.hit_count
        self.rows = None
        try:
            original()
        except TypeError:  # 0.2.0 fails on a miss
            self.check("look-up", "a miss", True, batch.hits < len(batch.lengths))
            wm.total_query_count, wm.hit_count = queries + len(batch.lengths), hits + batch.hits
            return
        self.rows = list(wm.keys_values_wm_list)
        self.check("look-up", "the number of hits", wm.hit_count - hits, batch.hits)
        for row, (env, old) in enumerate(zip(env_ids, self.rows, strict=True)):
            self.compare_row(f"look-up, environment {env} (row {row})", old, batch, row)

    def compare_roots(self, wm: Any, batch: Batch, latent: Any, env_ids: Sequence[int]) -> None:
        """Compares what both find for the last observations."""
        rows = [_find_own(wm, latent[row], env) for row, env in enumerate(env_ids)]
        for row, (env, old) in enumerate(zip(env_ids, rows, strict=True)):
            where = f"root look-up, environment {env} (row {row})"
            self.check(where, "a hit", old is not None, bool(batch.sources[row]))
            if old is not None:
                self.compare_row(where, old, batch, row)
        self.rows = None if any(old is None for old in rows) else rows

    def trim(self, wm: Any, original: Callable[[], Any], batch: Batch) -> None:
        """Runs LightZero's alignment of its own rows and compares the aligned caches."""
        rows, self.rows = self.rows, None
        if rows is None:
            return
        ours, wm.keys_values_wm_list = wm.keys_values_wm_list, rows
        original()
        wm.keys_values_wm_list = ours
        self.check("alignment", "the size", wm.keys_values_wm.size, batch.size)
        at = ..., slice(batch.size), slice(None)
        self._compare_caches("alignment", wm.keys_values_wm, batch, at, at)

    def compare_stored(
        self, wm: Any, stored: Batch, latent: Any, env_ids: Sequence[int], *, is_root: bool
    ) -> None:
        """Compares what both stored for a step's latents."""
        kind = "root" if is_root else "node"
        for row, env in enumerate(env_ids):
            where = f"stored {kind}, environment {env} (row {row})"
            old = _find_own(wm, latent[row], env if is_root else None)
            self.check(where, "its presence", old is not None, stored.sources[row] > layout.MISSED)
            if old is not None and stored.sources[row]:
                self.compare_row(where, old, stored, row)


def _find_own(wm: Any, latent: Any, env_id: int | None) -> Any:
    """LightZero's entry for a latent, among an environment's roots or among the nodes (None)."""
    key = _hash_function(wm)(latent.reshape(-1).cpu().numpy())
    manager = wm.kv_cache_manager.own
    if manager is not None:
        pool = manager.recur_pool if env_id is None else manager.init_pools[env_id]
        return pool.get(key)
    entries, pool = wm.past_kv_cache_recurrent_infer, wm.shared_pool_recur_infer
    if env_id is not None:
        entries = wm.past_kv_cache_init_infer_envs[env_id]
        pool = wm.shared_pool_init_infer[env_id]
    index = entries.get(key)
    return None if index is None else pool[index]


def _hash_function(wm: Any) -> Callable[[Any], Any]:
    for kind in type(wm).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "hash_state", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise ValueError(f"the module of {type(wm).__name__} has no hash_state: no shadow mode")
