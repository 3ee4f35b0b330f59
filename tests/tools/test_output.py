"""Tables that a command prints can be read on any screen."""

import re

import pytest

from kvjax.tools.output import print_rows

FIELDS, ROWS = [f"a_field_{i}" for i in range(20)], 13


@pytest.mark.parametrize("width", [30, 80, 120, 400])
def test_every_field_of_every_row_is_told_in_full(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [{name: 1000 * row + i for i, name in enumerate(FIELDS)} for row in range(ROWS)]
    rows[0]["only_here"] = 0.123456
    print_rows("numbers", [row | {"many": [1, 2]} for row in rows])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    told = re.findall(r"[\w.]+", out)
    assert {*FIELDS, "only_here", "0.123"} <= set(told)
    assert "many" not in told
    for row in rows:
        assert {str(row[name]) for name in FIELDS} <= set(told)
    assert (out.count("numbers") == 1) == (width > 100)
