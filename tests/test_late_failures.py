"""What fails late: what was measured is printed, what was there before is left."""

import json
import os
import stat
import unittest.mock

import numpy as np
import pytest

from kvjax.tools import cli, gif, play
from kvjax.tools.bench import bridge, exactness, ops, search
from kvjax.tools.bench.searches import Case


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def disk_full(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_returns_are_printed_though_the_animation_fails(capsys, monkeypatch, tmp_path, flags):
    summary = play.Summary((7.0, 9.0), 8.0, 16, 100.0, 1.0, 2.0)
    monkeypatch.setattr(gif.Frames, "write", disk_full)

    def played(agent, *, gif_path, **options):
        play._animate(gif.Frames(gif_path), 30, summary)

    monkeypatch.setattr(play, "play", played)
    code, out, err = run(capsys, "play", "--gif", tmp_path / "a.gif", *flags)
    assert code == 2
    assert err == "kvjax play: [Errno 28] No space left on device\n"
    if flags:
        assert json.loads(out)["returns"] == [7.0, 9.0]
    else:
        assert "7 9" in out
        assert "animation" not in out


def test_play_hands_the_summary_on(masked_agent, monkeypatch, tmp_path):
    monkeypatch.setattr(gif.Frames, "write", disk_full)
    short = play.SearchConfig(num_simulations=3)
    with pytest.raises(play.AnimationError, match="No space left") as failed:
        play.play(masked_agent, episodes=2, search_config=short, gif_path=tmp_path / "a.gif")
    assert len(failed.value.summary.returns) == 2
    assert failed.value.summary.steps == sum(failed.value.summary.returns) > 0


def once(result):
    """A function that answers once; then the disk is full."""
    answers = iter([result])
    return lambda *args, **options: next(answers, None) or disk_full()


@pytest.mark.parametrize("module", [search, ops, bridge, exactness])
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_rows_are_printed_though_a_later_one_fails(capsys, monkeypatch, module, flags):
    row = {"case": "first", "ratio": 1.5}
    name = module.__name__.split(".")[-1]
    if module is exactness:
        for step in ("make_case", "by_cache", "by_history", "by_window", "History"):
            monkeypatch.setattr(exactness, step, unittest.mock.Mock())
        monkeypatch.setattr(exactness, "compare", once(row))
    else:
        monkeypatch.setattr(module, "_row", once(row))
        monkeypatch.setattr(bridge.lightzero_020, "available", lambda: True)
    code, out, err = run(capsys, "bench", name, *flags)
    assert (code, err) == (2, "kvjax bench: [Errno 28] No space left on device\n")
    if flags:
        found = json.loads(out)
        assert found["complete"] is False
        assert [shown["ratio"] for shown in found["rows"]] == [1.5]
    else:
        assert "first" in out


def test_nothing_is_printed_where_nothing_was_measured(capsys, monkeypatch):
    monkeypatch.setattr(search, "_row", disk_full)
    assert run(capsys, "bench", "search", "--json")[:2] == (2, "")
    assert run(capsys, "bench", "search")[:2] == (2, "")


def write_animation(path):
    frames = gif.Frames(path)
    for seed in range(3):
        frames.append(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8))
    frames.write(30)


def write_plot(path):
    row = {"weights": "trained", "mode": "reset", "reference": "history", "series": [1e-3, 0.1]}
    exactness.draw([row], path)


def failing(monkeypatch):
    """Whatever writes a picture fails half way."""
    from matplotlib.figure import Figure
    from PIL import Image

    def half(self, file, *args, **options):
        file.write(b"half")
        disk_full()

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(Figure, "savefig", half)


@pytest.mark.parametrize(
    ("write", "name"), [(write_animation, "a.gif"), (write_plot, "a.png"), (write_plot, "a.svg")]
)
def test_pictures_are_whole_or_not_there(monkeypatch, tmp_path, write, name):
    path = tmp_path / name
    mask = os.umask(0o027)
    try:
        write(path)
    finally:
        os.umask(mask)
    whole = path.read_bytes()
    assert len(whole) > 100
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    failing(monkeypatch)
    with pytest.raises(OSError, match=f"cannot write .*{name}: No space left on device"):
        write(path)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == [name]


def test_cases_of_a_benchmark_go_where_they_are_asked_to(monkeypatch):
    rows = []
    monkeypatch.setattr(search, "_row", lambda case, told: {"case": case.label()})
    case = Case(embed=8, context=4, envs=1, simulations=1, repeats=1)
    monkeypatch.setattr(search, "CASES", (case,))
    assert search.run(only="embed=8", rows=rows)["rows"] is rows
    assert rows == [{"case": case.label()}]
