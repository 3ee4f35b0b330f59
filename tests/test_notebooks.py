"""Notebooks run as they are, without a warning, and were committed with their outputs."""

import itertools
from pathlib import Path

import pytest
from conftest import in_full

from kvjax.tools.bench import lightzero_020

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
GUARD = 'import warnings; warnings.simplefilter("default")'
LIGHTZERO = "03_lightzero.ipynb"  # runs the real one
VARIES = "varies"  # a tag of cells whose output depends on the machine
EXACT = "01_windows.ipynb"  # outputs are the same on every machine
LONG = {"04_exactness.ipynb", "05_from_mctx.ipynb", "06_learning.ipynb"}


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def joined(outputs):
    """What a cell gave: a kernel may hand one stream over in several pieces."""
    parts = [(out.get("name"), out.get("text") or out["data"]["text/plain"]) for out in outputs]
    grouped = itertools.groupby(parts, key=lambda part: part[0])
    streams = [(name, [text for _, text in group]) for name, group in grouped]
    return [
        text for name, texts in streams for text in (texts if name is None else ["".join(texts)])
    ]


def assert_clean(notebook):
    for cell in code_cells(notebook):
        for out in cell.outputs:
            assert out.output_type != "error", out
            assert out.get("name") != "stderr", out["text"]
            assert "warning" not in str(out).lower(), out


def test_there_are_notebooks():
    assert {"01_windows.ipynb", "02_search.ipynb", "04_exactness.ipynb"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_cells_are_short(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert_clean(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        last = cell.source.splitlines()[-1]
        speaks = last.startswith(("print", "display")) or last.isidentifier()
        assert cell.outputs or not speaks, f"no output kept: {cell.source}"
        assert len(cell.source.splitlines()) <= 6, cell.source
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert 2 * len(prose) >= len(cells)
    assert sum(bool(cell.outputs) for cell in cells) >= 5


@pytest.mark.parametrize("name", [x for x in NAMES if x not in LONG] + [*in_full(*sorted(LONG))])
@pytest.mark.filterwarnings("default")  # those of the notebook's client; the kernel's are checked
def test_runs(name, monkeypatch):
    if name == LIGHTZERO and not lightzero_020.available():
        pytest.skip("LightZero 0.2.0 is not installed")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook, kept = read(name), code_cells(read(name))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(GUARD))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": FOLDER}}
    ).execute()
    assert_clean(notebook)
    fresh = code_cells(notebook)[1:]
    for old, new in zip(kept, fresh, strict=True):
        before, now = joined(old.outputs), joined(new.outputs)
        assert len(before) == len(now), old.source
        if name == EXACT and VARIES not in old.metadata.get("tags", []):
            assert before == now, old.source


def test_a_stream_in_pieces_is_one_output():
    """Kernels flush when they like: `print` once came as its text and its newline."""
    pieces = [nbformat.v4.new_output("stream", text=text) for text in ("a", "\n")]
    picture = nbformat.v4.new_output("display_data", {"text/plain": "p"})
    assert joined([*pieces, picture, picture, *pieces]) == ["a\n", "p", "p", "a\n"]
