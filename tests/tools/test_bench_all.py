"""All benchmarks into one file: row by row, once each; tables and plots are what was measured."""

import json

import pytest
from conftest import FULL

from kvjax.tools import cli
from kvjax.tools.bench import everything, render, rows, weights
from kvjax.tools.bench.searches import Case

SEARCH = {"embed": 64, "layers": 2, "context": 8, "envs": 8, "simulations": 50, "devices": 1}
SEARCH |= {"dtype": "float32", "kvjax_ms": 7.25, "mctx_ms": 14.0, "floor_ms": 3.0}
SEARCH |= {"floor_ratio": 2.4, "tree_mib": 1.0, "mctx_tree_mib": 12.0, "muzero_tree_mib": 1.5}
WITH_LIGHTZERO = {"lightzero_ms": 1704.4, "lightzero_ratio": 20.2}
BRIDGE = {"embed": 64, "envs": 8, "cache_ratio": 2.3, "search_ratio": 1.22}
BRIDGE |= {"lightzero_ms": 150.0, "kvjax_ms": 7.5}
OPS = {"op": "slide", "size": "large", "bandwidth_fraction": 0.96}
WEIGHTS = {"agent": "cartpole", "float32_return": 196.2, "bfloat16_return": 196.9}
WEIGHTS |= {"same_action": 0.9985, "same_visits": 0.985, "visits_moved": 0.0006}
ROWS = {
    "search": {"a": SEARCH | WITH_LIGHTZERO, "b": SEARCH | {"dtype": "bfloat16"}},
    "series": {
        "envs=1": SEARCH | {"envs": 1, "kvjax_ms": 3.0},
        "context=64": SEARCH | {"context": 64, "mctx_tree_mib": 90.0},
    },
    "weights": {"cartpole": WEIGHTS},
    "ops": {"slide, large": OPS},
    "bridge": {"c": BRIDGE},
}


@pytest.fixture
def measured(monkeypatch):
    """Parts that tell which rows they measure, one of which may be the last."""
    log, last = [], []

    def part(name):
        def measure(label, progress):
            log.append(f"{name} {label}")
            if label in last:
                raise KeyboardInterrupt
            return ROWS[name][label]

        def run(*, only, progress, rows):
            cases = {label: label for label in ROWS[name]}
            extras = {"growth": lambda: log.append("growth") or [{"ratio": 1.1}]}
            extras = extras if name == "search" else {}
            return everything.rows.measured(cases, measure, progress=progress, rows=rows, **extras)

        return run

    monkeypatch.setattr(everything, "PARTS", {name: part(name) for name in ROWS})
    monkeypatch.setattr(everything.lightzero_020, "available", lambda: True)
    return log, last


EVERY = [
    *("search a", "search b", "growth", "series envs=1", "series context=64"),
    *("weights cartpole", "ops slide, large", "bridge c"),
]


def test_every_row_is_measured_once(measured, tmp_path):
    """Whatever ended the process before."""
    log, last = measured
    last.append("context=64")
    told = []
    with pytest.raises(KeyboardInterrupt):
        everything.run(output=tmp_path)
    last.clear()
    progress = lambda share, text: told.append((share, text))  # noqa: E731
    flat = []
    result = everything.run(output=tmp_path, progress=progress, rows=flat)
    assert log == [*EVERY[:5], *EVERY[4:]]
    assert everything.run(output=tmp_path) == result
    assert len(log) == len(EVERY) + 1
    assert result["parts"]["search"]["rows"] == list(ROWS["search"].values())
    assert result["parts"]["search"]["growth"] == [{"ratio": 1.1}]
    assert {"machine", "versions", "commit", "parts"} == result.keys()
    assert json.loads((tmp_path / "bench.json").read_text())["commit"] == rows.commit()
    assert [row["part"] for row in flat] == [name for name in ROWS for _ in ROWS[name]]
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any(text == "bridge: c: building" for _, text in told)


def test_parts(measured, tmp_path, monkeypatch):
    log, _ = measured
    everything.run(output=tmp_path, only="ops,weights")
    assert log == ["ops slide, large", "weights cartpole"]
    with pytest.raises(ValueError, match="no part matches 'opts'; parts are search, series,"):
        everything.run(output=tmp_path, only="opts")
    monkeypatch.setattr(everything.lightzero_020, "available", lambda: False)
    assert "bridge" not in everything.run(output=tmp_path / "b")["parts"]


def test_another_machine_or_commit_is_refused(measured, tmp_path, monkeypatch):
    everything.run(output=tmp_path, only="ops")
    monkeypatch.setattr(everything.rows, "commit", lambda: "other")
    with pytest.raises(
        ValueError, match=r"was measured with commit .*, here it is other: say anot"
    ):
        everything.run(output=tmp_path)
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no measurements"):
        everything.run(output=tmp_path)


def test_tables_and_plots(measured, tmp_path):
    page = tmp_path / "page.md"
    marked = "<!-- kvjax bench: {} -->\n{}<!-- end -->\n"
    page.write_text(f"# A\n{marked.format('search', 'old')}B\n{marked.format('none', 'kept')}")
    everything.run(output=tmp_path, into=[page])
    text = page.read_text()
    lines = text.splitlines()
    assert lines[4] == (
        "| 64, 8, 8, 50 | float32 | 7.2 ms | 14.0 ms | 3.0 ms | 2.4 | 1,704 ms | 20.2 | 1 and 12 |"
    )
    assert lines[5] == (
        "| 64, 8, 8, 50 | bfloat16 | 7.2 ms | 14.0 ms | 3.0 ms | 2.4 |  |  | 1 and 12 |"
    )
    assert lines[6:8] == ["<!-- end -->", "B"]
    assert "old" not in text
    assert marked.format("none", "kept") in text
    tables = (tmp_path / "tables.md").read_text()
    assert "| 64, 8 | 2.3 | 1.22 | 20.0 |" in tables
    assert "| slide | large | 0.96 |" in tables
    assert "| cartpole | 196.2 | 196.9 | 99.9% | 98.5% | 0.1% |" in tables
    assert tables.splitlines()[0].endswith(f"commit {rows.commit()}")
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for a table"):
        everything.run(output=tmp_path, into=[page])


def test_curves(measured, tmp_path):
    """Each over one size, of float32 rows that are as usual else."""
    panels = render.curves(everything.run(output=tmp_path))
    assert panels[0]["kvjax"] == [(1, 3.0), (8, 7.25)]
    assert panels[0]["LightZero 0.2.0"] == [(8, 1704.4)]
    assert panels[1]["floor"] == [(8, 3.0), (64, 3.0)]
    assert panels[2]["kvjax"] == [(50, 7.25)]
    assert panels[3]["mctx, a window per node"] == [(8, 12.0), (64, 90.0)]
    assert render.curves({"parts": {}}) == []


def test_the_command(measured, tmp_path, capsys):
    command = ["bench", "all", "--output", str(tmp_path)]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"].keys() == ROWS.keys()
    assert cli.main(command) == 0
    assert "kvjax bench weights" in capsys.readouterr().out
    assert cli.main(["bench", "ops", "--output", str(tmp_path)]) == 2
    assert "--output belongs to bench all, not to bench ops" in capsys.readouterr().err


def test_cases_of_the_series_are_no_rows_of_the_search():
    labels = [case.label() for case in (*everything.SERIES, *everything.search.CASES)]
    assert len(set(labels)) == len(labels)
    assert all(isinstance(case, Case) for case in everything.SERIES)


@pytest.mark.skipif(not FULL, reason="plays an agent four times")
def test_weights(monkeypatch):
    """The same agent twice: how alike it plays, and what a difference is."""
    monkeypatch.setattr(weights, "EPISODES", 3)
    monkeypatch.setattr(weights, "SIMULATIONS", 3)
    (row,) = weights.run(only="cartpole_masked")["rows"]
    assert row["searches"] >= 3 * max(row["float32_return"] // 3, 1)
    assert 0.9 < row["same_visits"] <= row["same_action"] <= 1
    assert 0 < row["value_difference"] < 1
    assert abs(row["float32_return"] - row["bfloat16_return"]) < 40
    with pytest.raises(ValueError, match="no row matches 'x'; rows are cartpole, cartpole_masked"):
        weights.run(only="x")
