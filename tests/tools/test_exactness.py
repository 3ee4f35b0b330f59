"""`kvjax bench exactness`: the modes that are exact are, and a wrong one shows."""

import pytest

from kvjax.model import step
from kvjax.ops import window as windows
from kvjax.tools.bench import exactness

STEPS = 12


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(exactness, "STEPS", STEPS)
    monkeypatch.setattr(exactness.make_case, "__defaults__", (STEPS,))


def errors(mode, weights="random"):
    """A row's errors by reference."""
    rows = exactness.run(only=f"mode={mode},weights={weights}")["rows"]
    assert [(row["weights"], row["mode"]) for row in rows] == [(weights, mode)] * 2
    assert all(len(row["series"]) == STEPS for row in rows)
    return {
        row["reference"]: {name: x for name, x in row.items() if name.endswith("_error")}
        for row in rows
    }


@pytest.mark.parametrize(
    ("mode", "exact"),
    [("rope_lightzero", "history"), ("rebuild", "window"), ("reset", "window")],
)
def test_each_mode_equals_its_reference_and_not_the_other(mode, exact):
    found = errors(mode)
    other = "window" if exact == "history" else "history"
    assert set(found[exact]) == {"policy_error", "value_error"} | {
        f"{side}{layer}_error" for side in "kv" for layer in range(2)
    }
    assert max(found[exact].values()) < 1e-4
    assert found[other]["k1_error"] > 0.01
    assert found[other]["policy_error"] > 0.01


def test_the_correction_equals_neither():
    found = errors("learned", "trained")
    assert found["history"]["k1_error"] > 0.01
    assert found["window"]["k1_error"] > 0.1


def test_a_broken_slide_shows(monkeypatch):
    def slide_by_one(window, correction=None, block=2):
        moved = exact(window, correction)
        return moved.__class__(moved.kv.at[0].set(window.kv[1]), moved.length)

    exact = windows.slide
    monkeypatch.setattr(step.windows, "slide", slide_by_one)
    assert errors("rope_consistent")["history"]["k0_error"] > 0.1


def test_a_plot_is_drawn(tmp_path):
    exactness.run(only="mode=reset", plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_such_row():
    with pytest.raises(ValueError, match="no row matches 'mode=rope'; say mode=, one of learned"):
        exactness.run(only="mode=rope")
