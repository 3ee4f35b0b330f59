"""`kvjax bench bridge`: its JSON, not its numbers."""

import json

import pytest

from kvjax.tools import cli
from kvjax.tools.bench import bridge, lightzero_020


@pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows(monkeypatch, capsys):
    case = bridge.Case(embed=32, envs=2, repeats=1, heads=2, simulations=4)
    monkeypatch.setattr(bridge, "CASES", (case, bridge.Case(embed=64, envs=2, repeats=1)))
    assert cli.main(["bench", "bridge", "--json", "--only", "embed=32,envs=2"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["embed"], row["envs"]) == (32, 2)
    assert row["cache_ratio"] == pytest.approx(row["lightzero_cache_ms"] / row["attach_cache_ms"])
    assert row["search_ratio"] == pytest.approx(row["lightzero_ms"] / row["attach_ms"])
    assert 0 < 4 * row["attach_cache_ms"] < row["attach_ms"]
    assert 0 < 4 * row["lightzero_cache_ms"] < row["lightzero_ms"]
    assert row["kvjax_ms"] > 0


def test_an_unknown_row(capsys):
    assert cli.main(["bench", "bridge", "--only", "embed=1"]) == 2
    assert (
        "rows are embed=64,layers=2,context=8,envs=8" in capsys.readouterr().err
        or not lightzero_020.available()
    )
