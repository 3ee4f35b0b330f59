"""What an attached world model keeps: its scopes, the batch in hand, and the weights it was of.

Shapes: B rows, B' = B rounded up to a power of two, E embedding size.
"""

import contextlib
import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import store as stores
from kvjax.base import interrupts
from kvjax.base.values import require
from kvjax.lightzero import module
from kvjax.lightzero.attach import caches, layout
from kvjax.lightzero.attach import scope as scopes
from kvjax.lightzero.attach.caches import Batch, Memory
from kvjax.lightzero.attach.scope import Scope
from kvjax.store.statistics import Statistics

Array = np.ndarray[Any, Any]

DEFAULT_SCOPE = "default"

_HALF_BYTES = 2


class Bridge:
    """What one attached module keeps; it holds no reference to the module, so copies are easy."""

    def __init__(self, wm: Any, description: module.Description, *, mask_padding: bool) -> None:
        self.description = description
        self.mask_padding = mask_padding
        self.batch: Batch | None = None
        self._scopes = {DEFAULT_SCOPE: scopes.init(description)}
        self._active: str | None = None
        self._rows: dict[tuple[int, ...], Array] = {}
        self._weights: module.Weights | None = None
        self._warned = False
        self._correction: Any = None
        self.refresh(wm)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bridge":
        # A scope's arrays are moved by whoever files: two owners cannot share them.
        self.settle()
        twin: Bridge = copy.copy(self)
        memo[id(self)] = twin
        twin._scopes = {name: scopes.copied(self._get(name)) for name in self._scopes}
        twin._rows, twin.batch, twin._active = dict(self._rows), None, None
        # The copied module has other parameters of the same values: they are no update.
        twin._weights = None
        return twin

    @property
    def _name(self) -> str:
        return self._active or DEFAULT_SCOPE

    @property
    def scope(self) -> Scope:
        """The scope in use."""
        return self._get(self._name)

    def _get(self, name: str) -> Scope:
        scope = self._scopes[name]
        if scope.is_lost:
            scope = self._scopes[name] = scopes.init(self.description)
        return scope

    def _clean(self, name: str) -> Scope:
        scope = self._get(name)
        return scope if scope.is_clean else self._change(name, scopes.clean)

    def _change(self, name: str, change: Callable[..., Scope], *args: Any, **kw: Any) -> Scope:
        with interrupts.held():
            self._scopes[name] = scope = change(self._get(name), *args, **kw)
        return scope

    @property
    def reads_no_pads(self) -> bool:
        """Whether a row's context is its own tokens, and not the padding of its batch."""
        return self.mask_padding or self.description.masks_padding

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Uses a store of its own, made on first use, for the length of a `with` block."""
        if name not in self._scopes:
            self._scopes[name] = scopes.init(self.description)
        before, self._active = self._active, name
        try:
            yield
        finally:
            self._active = before

    def forget(self, *, roots: Iterable[int] = (), nodes: bool = False) -> None:
        """Roots of environments or all nodes go: of the scope in use, outside of any of all."""
        for name in self._scopes if self._active is None else (self._active,):
            self._change(name, scopes.forget, roots=roots, nodes=nodes)

    def refresh(self, wm: Any) -> None:
        """Takes the weights as they are now: the correction is computed anew."""
        correction = module.slide_correction(wm, self.description)
        self._correction = jax.device_put(correction)
        self._weights = module.look_at_weights(wm, self.description)
        error = module.table_error(wm, correction) if self._weights.watched else 0.0
        if error and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's own table of position corrections is {error:.3g} off: it was computed"
                " from other weights. kvjax uses the weights as they are; for LightZero's own"
                " caches call world_model.precompute_pos_emb_diff_kv()",
                stacklevel=_callers_level(),
            )

    def follow_weights(self, wm: Any, *, thorough: bool) -> None:
        """Drops all entries if the weights changed since they were made.

        Each call looks at the weights that the correction reads. `thorough` looks at all of them,
        and at some of their numbers: once per search, which no update interrupts.
        """
        if self._weights is None:
            self.refresh(wm)
        elif module.have_changed(self._weights, wm, thorough=thorough):
            self.on_params_update(wm)

    def on_params_update(self, wm: Any) -> None:
        """The weights changed: nothing that was stored before can be found again."""
        for name in self._scopes:
            self._change(name, scopes.new_epoch)
        self.refresh(wm)

    def look_up(self, latent: Any, env_ids: Sequence[int], *, roots_only: bool) -> Batch:
        """Finds and aligns the windows of latents [B, 1, E]; torch owns what comes back."""
        asked, name = self._asked(latent, env_ids), self._name
        with interrupts.held():
            scope = scopes.ready(self._get(name), asked[1], roots_only=roots_only)
            self._scopes[name] = scope
            scope, batch = scopes.look_up(scope, *asked, self._correction, roots_only=roots_only)
            self._scopes[name], self.batch = scope, batch
        return batch

    def peek(self, latent: Any, env_ids: Sequence[int], *, roots_only: bool) -> Batch:
        """As `look_up`, counted nowhere."""
        asked, scope = self._asked(latent, env_ids), self._clean(self._name)
        return scopes.peek(scope, *asked, roots_only=roots_only)[1]

    def _asked(self, latent: Any, env_ids: Sequence[int]) -> tuple[Array, Array]:
        """Latents [B, E] and the rows that ask for them."""
        rows, on_host = self._rows_of(env_ids), _on_host(latent)
        size = self.description.config.embed_dim
        if on_host.shape[1] != size:
            raise ValueError(f"expected latents of {size} numbers, got {on_host.shape[1]}")
        return on_host, rows

    def file(
        self,
        windows: Memory,
        lengths: Sequence[int],
        latent: Any,
        env_ids: Sequence[int],
        tokens: Sequence[Any] | None = None,
        *,
        is_root: bool,
    ) -> None:
        """Stores rows under latents [B, 1, E].

        Those of a simulation wait, see `scope.file_later`.

        `tokens` are the raw ones of each row, [length, E] tensors, where they are kept.
        """
        rows, name = self._rows_of(env_ids), self._name
        raw = None if tokens is None else self._raw_tokens(tokens, rows.shape[1])
        scope = self._clean(name)
        if not is_root:
            self._scopes[name] = scope = scopes.make_room(scope, len(env_ids))
            if scopes.can_file_later(scope, windows, rows, lengths):
                scope = scopes.file_later(scope, latent, rows, self._correction, raw)
                self._scopes[name] = scope
                return
        filing = _on_host(latent), rows, lengths, self._correction, raw
        self._change(name, scopes.file, windows, *filing, is_root=is_root)

    def _raw_tokens(self, tokens: Sequence[Any], capacity: int) -> Array:
        """The last raw tokens of each row that a full window keeps, zeros behind: [B', K, E]."""
        kept = self.description.kept
        raw = np.zeros((capacity, kept, tokens[0].shape[-1]), np.float32)
        for row, sequence in zip(raw, tokens, strict=False):
            last = sequence[-kept:].detach().cpu().numpy()
            row[: len(last)] = last
        return raw

    def outdated_tokens(self, env_id: int) -> tuple[Array, int]:
        """Raw tokens [K, E] of a newest root of older weights, and how many: 0 if there is none."""
        store = self._clean(self._name).filed.store
        raw, length = layout.outdated_tokens(store, np.int32(env_id))
        return np.asarray(raw), int(length)

    def count_rebuilt(self) -> None:
        """Counts one window that was computed again after a miss."""
        self._change(self._name, scopes.count_rebuilt)

    def settle(self) -> None:
        """Files what is pending, before somebody writes to its memory."""
        for name, scope in self._scopes.items():
            if scope.pending is not None:
                self._change(name, scopes.settle)

    def written(self, keys_values: Any, rows: int) -> Memory:
        """What a `KeysValues` holds, to be filed.

        Raises:
          ValueError: the caches are not float32, or there are more rows than environments.
        """
        batch = self.batch
        if batch is not None and caches.holds(keys_values, batch):
            return caches.written(keys_values, batch)
        return caches.copied(keys_values, self.capacity(rows), self.description.stored)

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
        rows = self._rows.get(key)
        if rows is None:
            rows = np.zeros((2, self.capacity(len(key))), np.int32)
            most = self.description.num_envs
            require(
                all(0 <= env < most for env in key),
                f"environment ids must be in 0 .. {most - 1}, got {list(key)}",
            )
            rows[layout.ENV, : len(key)] = key
            rows[layout.VALID, : len(key)] = 1
            if len(set(key)) == len(key):
                # Else made anew, these are never the rows that wait: see `Exchange.are_filed`.
                self._rows[key] = rows
        return rows

    def stats(self, scope: str | None = None) -> Statistics:
        """Statistics of one scope's store, by default of the one in use.

        Raises:
          ValueError: there is no such scope.
        """
        name = scope or self._name
        require(name in self._scopes, f"no scope {name!r}, there are {', '.join(self._scopes)}")
        return stores.stats(self._clean(name).filed.store)


def _callers_level() -> int:
    """The `stacklevel` of a warning that shall name the line which called kvjax."""
    frames = itertools.takewhile(_is_ours, inspect.stack(context=0)[1:])
    return 1 + len(list(frames))


def _is_ours(info: inspect.FrameInfo) -> bool:
    name = info.frame.f_globals.get("__name__", "")
    return str(name).startswith("kvjax.")


def _on_host(latent: Any) -> Array:
    """Rows [B, 1, E] of a tensor or an array as [B, E]; the memory may be torch's."""
    if isinstance(latent, np.ndarray):
        array: Array = latent
    else:  # numpy has no bfloat16; all others become float32 where they are written down
        array = (latent if latent.itemsize > _HALF_BYTES else latent.float()).numpy(force=True)
    return array.reshape(len(array), -1)
