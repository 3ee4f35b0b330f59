"""Values of configuration fields: what numpy made becomes Python's, and numbers must be numbers."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

_LARGEST, _SMALLEST = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
"""Of float32, in which everything is computed; smaller ones are taken for 0."""

_LAST_INTEGER = 2**63 - 1


def make_plain(owner: Any) -> None:
    """Numpy's numbers and texts in the fields of a frozen owner become Python's.

    Raises:
      ValueError: an integer is larger than 64 bits hold.
    """
    for field in dataclasses.fields(owner):
        value = _plain(getattr(owner, field.name))
        if field.type in (int, int | None) and is_integer(value) and value > _LAST_INTEGER:
            raise ValueError(f"{field.name} must be at most {_LAST_INTEGER}, got {value}")
        object.__setattr__(owner, field.name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds as a finite one; a truth value is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST <= value <= _LARGEST


def require_numbers(owner: Any, *names: str) -> None:
    """Raises `ValueError` unless each named field is a finite number."""
    for name in names:
        value = getattr(owner, name)
        if not is_number(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def require_above_zero(owner: Any, *names: str) -> None:
    """Raises `ValueError` unless each named field is a finite number above 0, in float32 too."""
    require_numbers(owner, *names)
    for name in names:
        value = getattr(owner, name)
        if value < _SMALLEST:
            raise ValueError(f"{name} must be above 0, got {value!r}")


def is_integer(value: Any) -> bool:
    """Whether a value is one of Python's integers; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


MAX_LISTED = 5
"""Names that a message lists at most."""


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_type(name: str, value: Any, kind: type, maker: str) -> None:
    """Raises `TypeError` unless the value is of a kind, with a word on where to find one."""
    if isinstance(value, kind):
        return
    inside = [i for i, x in enumerate(value) if isinstance(x, kind)] if type(value) is tuple else []
    if isinstance(getattr(value, name, None), kind):
        hint = f"pass its .{name}"
    else:
        hint = f"pass its item {inside[0]}" if inside else f"{maker} makes one"
    raise TypeError(f"{name} must be of type {kind.__name__}, got {describe(value)}: {hint}")


def require_hashable(name: str, value: Any) -> None:
    """Raises `TypeError` unless a value has a hash, by which what was compiled for it is found."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name} must be hashable, got an object of type {type(value).__name__}"
        ) from None


def describe(value: Any) -> str:
    """A value's type, and a plain value itself."""
    name = type(value).__name__
    return f"{name} {value!r}" if isinstance(value, int | float | str) else name


def require_count(name: str, value: Any) -> int:
    """The value as an `int`; raises `ValueError` unless it is a positive integer, numpy's too."""
    count: int = _plain(value)
    is_count = is_integer(count) and count >= 1
    require(is_count, f"{name} must be a positive integer, got {value!r}")
    return count


def require_positive(owner: Any, *names: str) -> None:
    """Raises `ValueError` unless each named field is a positive integer."""
    for name in names:
        require_count(name, getattr(owner, name))


def require_shape(name: str, array: Any, shape: tuple[int | str, ...]) -> None:
    """Raises `ValueError` unless an array has that shape, in which letters stand for any size."""
    came = np.shape(array)
    fits = len(came) == len(shape) and all(
        wanted == size or isinstance(wanted, str) for wanted, size in zip(shape, came, strict=True)
    )
    require(fits, f"{name} must have shape [{', '.join(map(str, shape))}], got {list(came)}")


def require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError` unless the value is one of the allowed ones."""
    is_allowed = isinstance(value, str) and value in allowed
    require(is_allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def listed(names: Iterable[str]) -> str:
    """Names in order, for a message: the first few, and how many more there are."""
    names = sorted(names)
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
