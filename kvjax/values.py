"""Values of configuration fields: what numpy made becomes Python's, and numbers must be numbers."""

import dataclasses
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
