"""The ways in which LightZero's policies forget: they reach into the world model's attributes.

While a model is attached these attributes are stand-ins. They hold LightZero's own entries as
before, and clearing them also clears kvjax's.
"""

from typing import Any, Protocol


class _Missing:
    """An attribute that was not there; a class, so that copies of a module know it too."""


class Forgets(Protocol):
    """Who is told."""

    def forget_roots(self, env_id: int) -> None:
        """One environment's root windows go."""

    def forget_nodes(self) -> None:
        """All searched windows go."""


class ClearingDict(dict[Any, Any]):
    """A cache dictionary whose `clear` reaches further."""

    bridge: Forgets
    env_id: int | None  # None: the searched nodes
    companion: Any  # LightZero's own pool of the same entries, or None

    def clear(self) -> None:
        """Forgets LightZero's entries and kvjax's."""
        super().clear()
        if self.companion is not None:
            self.companion.clear()
        _forget(self.bridge, self.env_id)


class ClearingPool:
    """One pool of a cache manager; everything but `clear` is the pool's that it stands for."""

    def __init__(self, bridge: Forgets, env_id: int | None, pool: Any) -> None:
        self._bridge, self._env_id, self._pool = bridge, env_id, pool

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_pool":  # not there yet while it is being copied
            raise AttributeError(name)
        return getattr(self._pool, name)

    def __len__(self) -> int:
        return len(self._pool)

    def clear(self) -> None:
        """Forgets LightZero's entries and kvjax's."""
        self._pool.clear()
        _forget(self._bridge, self._env_id)


class ClearingManager:
    """A `kv_cache_manager`, also for models that were built without one."""

    def __init__(self, bridge: Forgets, roots: list[Any], nodes: Any, own: Any) -> None:
        self.own = own  # LightZero's, None if there is none
        self.init_pools = [ClearingPool(bridge, env, pool) for env, pool in enumerate(roots)]
        self.recur_pool = ClearingPool(bridge, None, nodes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    def clear_init_caches(self) -> None:
        """Forgets all roots."""
        for pool in self.init_pools:
            pool.clear()

    def clear_recur_cache(self) -> None:
        """Forgets all searched nodes."""
        self.recur_pool.clear()

    def clear_all(self) -> None:
        """Forgets everything."""
        if self.own is not None:
            self.own.clear_all()
        self.clear_init_caches()
        self.clear_recur_cache()


def _forget(bridge: Forgets, env_id: int | None) -> None:
    if env_id is None:
        bridge.forget_nodes()
    else:
        bridge.forget_roots(env_id)


def install(wm: Any, bridge: Forgets, num_envs: int) -> dict[str, Any]:
    """Puts the stand-ins in place; returns what was there, for `uninstall`."""
    own = wm.__dict__.get("kv_cache_manager")
    pools = list(own.init_pools) if own is not None else [None] * num_envs
    nodes = own.recur_pool if own is not None else None

    def stand_in(original: Any, env_id: int | None, companion: Any = None) -> ClearingDict:
        made = ClearingDict(original or {})
        made.bridge, made.env_id, made.companion = bridge, env_id, companion
        return made

    def per_env(name: str, companions: list[Any]) -> list[ClearingDict]:
        originals = wm.__dict__.get(name, [None] * num_envs)
        return [stand_in(originals[i], i, companions[i]) for i in range(num_envs)]

    roots = per_env("past_kv_cache_init_infer_envs", pools)
    searched = stand_in(wm.__dict__.get("past_kv_cache_recurrent_infer"), None, nodes)
    made: dict[str, Any] = {
        "past_kv_cache_init_infer_envs": roots,
        "past_kv_cache_recurrent_infer": searched,
        "kv_cache_manager": ClearingManager(
            bridge,
            roots if own is None else pools,
            searched if own is None else nodes,
            own,
        ),
    }
    if "past_token_context_init_infer_envs" in wm.__dict__:
        made["past_token_context_init_infer_envs"] = per_env(
            "past_token_context_init_infer_envs", [None] * num_envs
        )
        made["past_token_context_recurrent_infer"] = stand_in(
            wm.past_token_context_recurrent_infer, None
        )
    saved = {name: wm.__dict__.get(name, _Missing) for name in made}
    wm.__dict__.update(made)
    return saved


def uninstall(wm: Any, saved: dict[str, Any]) -> None:
    """Puts back what was there, with the entries that the stand-ins hold now."""
    for name, original in saved.items():
        stand_in = wm.__dict__.pop(name)
        if original is _Missing:
            continue
        if isinstance(original, list):
            for one, other in zip(original, stand_in, strict=True):
                _refill(one, other)
        elif isinstance(original, dict):
            _refill(original, stand_in)
        wm.__dict__[name] = original


def _refill(original: Any, stand_in: Any) -> None:
    original.clear()
    original.update(stand_in)
