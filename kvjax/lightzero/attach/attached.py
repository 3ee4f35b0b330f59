"""The methods of an attached world model: LightZero's signatures, kvjax's caches.

Shapes: B rows, E embedding size.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from kvjax.lightzero.attach import caches, root_step
from kvjax.lightzero.attach.bridge import Bridge
from kvjax.lightzero.attach.shadow import Shadow

STATE = "_kvjax"
"""Where an attached module keeps its `Attachment`."""

_WorldModel: Any = object


@dataclasses.dataclass
class Attachment:
    """What an attached module carries in its `__dict__`."""

    bridge: Bridge
    shadow: Shadow
    original: type
    own_flag: bool | None  # the model's own `use_new_cache_manager`
    saved: dict[str, Any]  # the attributes that routes stand for
    enabled: bool = True
    in_original: int = 0

    @property
    def serves(self) -> bool:
        """Whether kvjax is switched on."""
        return self.enabled and not self.in_original

    @contextlib.contextmanager
    def original_code(self) -> Iterator[None]:
        """Lets LightZero's methods run as if nothing was attached."""
        self.in_original += 1
        try:
            yield
        finally:
            self.in_original -= 1


def state_of(wm: Any) -> Attachment:
    """What an attached module carries."""
    state: Attachment = vars(wm)[STATE]
    return state


class AttachedMethods(_WorldModel):  # type: ignore[misc]
    """What an attached world model does itself; `super()` is LightZero's code."""

    @property
    def use_new_cache_manager(self) -> bool:
        """Whether kvjax keeps the caches; may be set at run time."""
        state = state_of(self)
        return bool(state.own_flag) if state.in_original else state.enabled

    @use_new_cache_manager.setter
    def use_new_cache_manager(self, value: bool) -> None:
        state = state_of(self)
        if state.enabled != bool(value):
            state.enabled = bool(value)
            for entries in (
                *self.past_kv_cache_init_infer_envs,
                self.past_kv_cache_recurrent_infer,
            ):
                entries.clear()

    def _kvjax_serves(self) -> bool:
        return state_of(self).serves and not self.reanalyze_phase

    def forward(self, tokens: Any, past_keys_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """LightZero's forward pass; with `padding="masked"` no pad is read."""
        bridge = state_of(self).bridge
        bridge.settle()  # the model may write to the memory that waits to be filed
        original = super().forward
        if not bridge.mask_padding or past_keys_values is not self.keys_values_wm:
            return original(tokens, past_keys_values, *args, **kwargs)
        batch, pads = bridge.batch, list[int]()
        if batch is not None and caches.holds(past_keys_values, batch):
            pads = batch.pads
        with caches.masked(self, pads):
            return original(tokens, past_keys_values, *args, **kwargs)

    def wm_forward_for_initial_infererence(
        self,
        last_obs_embeddings: Any,
        batch_action: Any = None,
        current_obs_embeddings: Any = None,
        start_pos: Any = 0,
        *ids: Any,
        **named_ids: Any,
    ) -> Any:
        """A root step; targets of training are left to LightZero."""
        state, original = state_of(self), super().wm_forward_for_initial_infererence
        arguments = last_obs_embeddings, batch_action, current_obs_embeddings, start_pos
        if current_obs_embeddings is None or not self._kvjax_serves():
            with state.original_code():
                return original(*arguments, *ids, **named_ids)
        import torch

        env_ids = ids[0] if ids else named_ids.get("ready_env_id")
        batch = root_step.make_root_batch(*arguments, env_ids)
        with torch.no_grad():
            state.bridge.follow_weights(self, thorough=True)
            return root_step.run(self, state.bridge, state.shadow, batch)

    def retrieve_or_generate_kvcache(
        self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
    ) -> Any:
        """Finds the parents' windows, aligned; the sizes of the rows."""
        state = state_of(self)
        arguments = latent_state, ready_env_num, simulation_index, start_pos
        if not self._kvjax_serves():
            with state.original_code():
                return super().retrieve_or_generate_kvcache(*arguments)
        bridge, env_ids = state.bridge, _env_ids(self, ready_env_num)
        if not simulation_index:  # no update interrupts a search
            bridge.follow_weights(self, thorough=False)
        bridge.capacity(ready_env_num)  # too many rows are told so before anything is let go
        bridge.batch = None
        caches.let_go(self)
        batch = bridge.look_up(latent_state[:ready_env_num], env_ids, roots_only=False)
        caches.fill_missed(self, batch, latent_state, start_pos)
        if state.shadow.mode:
            original = functools.partial(super().retrieve_or_generate_kvcache, *arguments)
            with state.original_code():
                state.shadow.retrieve(self, original, batch, env_ids)
        else:
            counts = self.__dict__  # past the module's own setter, as no parameter is set
            counts["total_query_count"] = self.total_query_count + ready_env_num
            counts["hit_count"] = self.hit_count + batch.hits
        caches.hold(self, batch)
        return self.keys_values_wm_size_list

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> Any:
        """Makes the rows that were found the batch that the model reads."""
        state, rows = state_of(self), self.keys_values_wm_list
        batch = rows.untouched if isinstance(rows, caches.Rows) else None
        if batch is None or not self._kvjax_serves():
            with state.original_code():
                return super().trim_and_pad_kv_cache(is_init_infer)
        shadowed = bool(state.shadow.mode) and state.shadow.rows is not None
        if shadowed:
            original = functools.partial(super().trim_and_pad_kv_cache, is_init_infer)
            with state.original_code():
                state.shadow.trim(self, original, batch)
        caches.install(self.keys_values_wm, batch, batch.size)
        if not shadowed and "kv_padding_total_batches" in vars(self):
            _count_padding(self, batch.pads)
        return self.keys_values_wm_size_list

    def update_cache_context(
        self,
        latent_state: Any,
        is_init_infer: bool = True,
        simulation_index: int = 0,
        search_depth: Any = None,
        valid_context_lengths: Any = None,
        env_ids: Any = None,
    ) -> None:
        """Takes the batch back, slides what is full and stores it under the latents."""
        state = state_of(self)
        arguments = latent_state, is_init_infer, simulation_index, search_depth
        context = valid_context_lengths, env_ids
        if not self._kvjax_serves():
            self._kvjax_original_update(*arguments, *context)
            return
        bridge, count, keys_values = state.bridge, len(latent_state), self.keys_values_wm
        if not is_init_infer:
            ids, lengths = _env_ids(self, count), self.keys_values_wm_size_list_current
        else:
            ids = list(range(count)) if env_ids is None else [int(env) for env in env_ids]
            lengths = valid_context_lengths
            if lengths is None or not bridge.reads_no_pads:
                lengths = [keys_values.size] * count
        written, tokens = bridge.written(keys_values, count), None
        if bridge.description.exact:
            root_step.renew_full_rows(self, written, latent_state, lengths)
        if bridge.description.keeps_tokens:
            tokens = self.keys_values_wm_token_context_list
        bridge.file(written, lengths, latent_state, ids, tokens, is_root=is_init_infer)
        if state.shadow.mode:
            bridge.settle()  # LightZero's code writes to the memory
            state.shadow.remark = bridge.outgrown
            self._kvjax_original_update(*arguments, *context)
            stored = bridge.peek(latent_state, ids, roots_only=is_init_infer)
            state.shadow.compare_stored(self, stored, latent_state, ids, is_root=is_init_infer)

    def _kvjax_original_update(self, *arguments: Any) -> None:
        """LightZero's `update_cache_context`; release 0.2.0 knows no environment ids."""
        state, (*rest, lengths, env_ids) = state_of(self), arguments
        named = {"env_ids": env_ids} if state.bridge.description.takes_env_ids else {}
        with state.original_code():
            super().update_cache_context(*rest, valid_context_lengths=lengths, **named)


def _env_ids(wm: Any, count: int) -> list[int]:
    """The environments of a search's rows: main says which, 0.2.0 numbers them."""
    named = vars(wm).get("current_infer_env_ids") or ()
    return [int(env) for env in named[:count]] + list(range(len(named), count))


def _count_padding(wm: Any, pads: list[int]) -> None:
    """Main's own statistics of padding."""
    wm.kv_padding_total_batches += 1
    wm.kv_padding_total_samples += len(pads)
    wm.kv_padding_unequal_batches += any(pads)
    wm.kv_padding_padded_samples += sum(pad > 0 for pad in pads)
    wm.kv_padding_token_count += sum(pads)
    wm.kv_padding_max_tokens = max(wm.kv_padding_max_tokens, *pads)


@functools.cache
def attached_class(original: type) -> type:
    """A subclass of a world model's class that leaves its caches to kvjax."""
    members = {"__doc__": original.__doc__, "__module__": original.__module__}
    return type(original.__name__, (AttachedMethods, original), members)
