"""What users call: every name and parameter of the release before is still there, and the same."""

import inspect
import json

import pytest
from conftest import DATA

import kvjax

RECORDED = json.loads((DATA / "api.json").read_text())
"""Names to parameters: [name, kind, default] each, or null for what is no function or class."""


def found(name):
    value = kvjax
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def parameters(value):
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in signature.parameters.values()
        if p.name != "self"
    ]


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_called_as_before(name):
    """What came since has a default, or is a field of what kvjax makes."""
    now, before = parameters(found(name)), RECORDED[name]
    if before is None:
        return
    assert [parameter for parameter in now if parameter in before] == before
    added = [parameter for parameter in now if parameter not in before]
    is_made_here = name in ("kvjax.Inference", "kvjax.SearchOutput", "kvjax.Store")
    assert is_made_here or all(default is not None for _, _, default in added)


def test_every_public_name_is_recorded_or_new():
    assert {name.split(".")[1] for name in RECORDED} - set(kvjax.__all__) == set()
