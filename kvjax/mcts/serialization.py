"""What `flax.serialization` does with kvjax's states, so that they go into a Flax checkpoint."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from kvjax.base.values import require
from kvjax.mcts.subtree import Kept
from kvjax.mcts.tokens import Tokens
from kvjax.mcts.tree import Tree
from kvjax.model.contexts import Contexts
from kvjax.ops.window import Window
from kvjax.store import Store
from kvjax.store.pool import Pool

STATES = (Window, Contexts, Pool, Store, Tree, Tokens, Kept)
_STATIC = (str, bool, int)


def register() -> None:
    """Makes the types known to Flax; more than once does no harm."""
    for kind in STATES:
        serialization.register_serialization_state(  # type: ignore[no-untyped-call]
            kind, _to_state, _from_state, override=True
        )


def _to_state(owner: Any) -> dict[str, Any]:
    fields = {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner)}
    return {name: serialization.to_state_dict(value) for name, value in fields.items()}


def _from_state(owner: Any, state: dict[str, Any]) -> Any:
    """The state in place of the owner's arrays, which say what shapes and dtypes it must have.

    Raises:
      ValueError: it has others, or is of another kind.
    """
    kind = type(owner).__name__
    names = [field.name for field in dataclasses.fields(owner)]
    require(
        isinstance(state, dict) and sorted(state) == sorted(names),
        f"a {kind} has {', '.join(names)}, got {', '.join(map(str, state))}",
    )
    return dataclasses.replace(
        owner,
        **{name: restored(f"{kind}.{name}", getattr(owner, name), state[name]) for name in names},
    )


def restored(name: str, value: Any, state: Any) -> Any:
    """A state of Flax's in place of a value, which says what it must be like.

    Raises:
      ValueError: it is another one; says which part, called `name`.
    """
    if value is None or isinstance(value, _STATIC):
        same = type(value) is type(state) and value == state
        require(same, f"{name} must be {value!r}, got {_described(state)}")
        return value
    if isinstance(value, dict | list | tuple):
        return _restored_parts(name, value, state)
    if not isinstance(value, jax.Array | np.ndarray):
        return serialization.from_state_dict(value, state, name)
    expected = f"{value.dtype}{list(value.shape)}"
    require(expected == _described(state), f"{name} must be {expected}, got {_described(state)}")
    return jnp.asarray(state)


def _restored_parts(name: str, value: Any, state: Any) -> Any:
    keys = value if isinstance(value, dict) else getattr(value, "_fields", range(len(value)))
    names = [str(key) for key in keys]
    require(
        isinstance(state, dict) and sorted(state) == sorted(names),
        f"{name} must have {', '.join(names) or 'no parts'}, got {_described(state)}",
    )
    values = value.values() if isinstance(value, dict) else value
    parts = [
        restored(f"{name}[{key}]", part, state[key])
        for key, part in zip(names, values, strict=True)
    ]
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _described(state: Any) -> str:
    if isinstance(state, dict):
        return f"what has {', '.join(map(str, state)) or 'no parts'}"
    is_array = hasattr(state, "dtype") and hasattr(state, "shape")
    return f"{state.dtype}{list(state.shape)}" if is_array else repr(state)
