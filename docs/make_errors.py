"""Writes docs/errors.md: what a user is told, taken from the tests that try bad input.

    python docs/make_errors.py

It runs every test that expects an error and records the error that came.
"""

import ast
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# What bad input is told

Every row is an error that a test provokes; `python docs/make_errors.py` writes this page from them.
Errors of the command line look the same and come with exit code 2. Nothing here is repaired or
ignored silently; what can only be known while a compiled program runs (an identifier on the device
that is out of range, a full window, a model that answers NaN) comes back as a mask: `valid`, `hit`,
`finite`, `is_full`.

| error | message | test |
|---|---|---|
"""
MAX_MESSAGE = 240

Row = tuple[str, str, str]
"""Error type, message, test."""


class Recorder:
    """A pytest plugin that notes what `pytest.raises` caught, and what the command line printed."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.rows: set[Row] = set()

    def note(self, kind: str, message: str) -> None:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
        self.rows.add((kind, tidy(message), self.function(test)))

    def function(self, test: str) -> str:
        """A test's id without its parameters, which unittest's classes write as a number."""
        name = test.partition("[")[0]
        return name if name in self.wanted else name.rstrip("0123456789")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.function(item.nodeid) in self.wanted]

    def pytest_configure(self) -> None:
        original, recorder = pytest.raises, self

        class Raises:
            def __init__(self, *args: Any, **options: Any) -> None:
                self._inner = original(*args, **options)

            def __enter__(self) -> Any:
                return self._inner.__enter__()

            def __exit__(self, kind: Any, value: Any, trace: Any) -> Any:
                caught = self._inner.__exit__(kind, value, trace)
                if caught and issubclass(kind, Exception):  # neither exits nor interrupts
                    recorder.note(kind.__name__, str(value))
                return caught

        pytest.raises = Raises  # type: ignore[misc, assignment]


def tidy(message: str) -> str:
    """One line that fits into a table and names no folder of this machine."""
    message = message.replace(f"{ROOT}/", "")
    message = re.sub(r"\S*" + re.escape(tempfile.gettempdir()) + r"/\S*/", "", message)
    message = " ".join(message.split()).replace("|", "\\|").replace("<", "&lt;")
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."


def tests_with_errors(path: Path) -> list[str]:
    """Node ids of a file's tests that use `pytest.raises`."""
    ids = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}::{node.name}")
            elif isinstance(node, ast.FunctionDef) and "pytest.raises" in ast.unparse(node):
                ids.append(f"{prefix}::{node.name}")

    visit(ast.parse(path.read_text()).body, f"tests/{path.name}")
    return [name for name in ids if name.rpartition("::")[2].startswith("test")]


def collect(paths: list[Path]) -> list[Row]:
    """Runs those tests and returns what they recorded, sorted by test and message."""
    ids = [name for path in paths for name in tests_with_errors(path)]
    files = sorted({name.partition("::")[0] for name in ids})
    recorder = Recorder(set(ids))
    status = pytest.main(
        [*files, "-q", "-p", "no:cacheprovider", "--numprocesses=0"], plugins=[recorder]
    )
    if status:
        raise SystemExit(int(status))
    return sorted(recorder.rows, key=lambda row: (row[2], row[1]))


def lines(rows: list[Row]) -> list[str]:
    """Rows of the page's table."""
    return [f"| {kind} | {message} | `{test}` |" for kind, message, test in rows]


if __name__ == "__main__":
    os.chdir(ROOT)
    if sys.argv[1:]:  # some files, to standard output
        print("\n".join(lines(collect([ROOT / name for name in sys.argv[1:]]))))
    else:
        table = lines(collect(sorted((ROOT / "tests").glob("test_*.py"))))
        PAGE.write_text(HEAD + "\n".join(table) + "\n")
