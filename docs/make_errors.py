"""Writes docs/errors.md: what a user is told, taken from the tests that try bad input.

    python docs/make_errors.py

It runs every test that expects an error and records the error that came, and which function of
kvjax was called.
"""

import ast
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import kvjax

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# What bad input is told

By what was called, the names of `kvjax` itself first. Every row is an error that a test provokes;
`python docs/make_errors.py` writes this page from them.
Errors of the command line look the same and come with exit code 2. Nothing here is repaired or
ignored silently; what can only be known while a compiled program runs (an identifier on the device
that is out of range, a full window, a model that answers NaN) comes back as a mask: `valid`, `hit`,
`finite`, `is_full`.
"""
TABLE = """
## {function}

| error | message | test |
|---|---|---|
"""
MAX_MESSAGE = 240

Row = tuple[str, str, str, str]
"""What was called, error type, message, test."""


class Recorder:
    """A pytest plugin that notes what `pytest.raises` caught, and what the command line printed."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.rows: set[Row] = set()

    def note(self, error: BaseException) -> None:
        called = entrance(error.__traceback__)
        if called is not None:  # else it is somebody else's error
            test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
            row = type(error).__name__, tidy(str(error)), self.function(test)
            self.rows.add((called, *row))

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
                    recorder.note(value)
                return caught

        pytest.raises = Raises  # type: ignore[misc, assignment]


def entrance(trace: TracebackType | None) -> str | None:
    """The function or class of kvjax through which a test came to an error; None if through none.

    What `kvjax` itself has is called by that name.
    """
    package = ROOT / "kvjax"
    while trace is not None:
        code, path = trace.tb_frame.f_code, Path(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
        if path.is_relative_to(package):
            name = re.sub(r"\.(__\w+__|<.*)", "", code.co_qualname)
            if name in kvjax.__all__:
                return f"kvjax.{name}"
            module = path.relative_to(ROOT).with_suffix("").parts
            return ".".join((*(part for part in module if part != "__init__"), name))
    return None


def tidy(message: str) -> str:
    """One line that fits into a table and names no folder of this machine, and no commit."""
    message = message.replace(f"{ROOT}/", "")
    message = re.sub(r"\S*" + re.escape(tempfile.gettempdir()) + r"/\S*/", "", message)
    message = re.sub(r"commit [0-9a-f]{40}(-dirty)?", "commit 1f4eb03", message)
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

    visit(ast.parse(path.read_text()).body, str(path.relative_to(ROOT)))
    return [name for name in ids if name.rpartition("::")[2].startswith("test")]


def collect(paths: list[Path]) -> list[Row]:
    """Runs those tests and returns what they recorded, sorted by function, test and message."""
    ids = [name for path in paths for name in tests_with_errors(path)]
    files = sorted({name.partition("::")[0] for name in ids})
    recorder = Recorder(set(ids))
    status = pytest.main(
        [*files, "-q", "-p", "no:cacheprovider", "--numprocesses=0"], plugins=[recorder]
    )
    if status:
        raise SystemExit(int(status))
    rows = sorted(recorder.rows, key=lambda row: (row[0].count("."), row[0], row[3], row[2]))
    first: dict[Row, Row] = {}
    for row in rows:
        first.setdefault(told(row), row)
    return list(first.values())


def told(row: Row) -> Row:
    """A row without what came: of those that differ in nothing else the first is enough."""
    function, kind, message, test = row
    return function, kind, message.partition(", got ")[0], test


def line(row: Row) -> str:
    """A row of the page's tables."""
    _, kind, message, test = row
    return f"| {kind} | {message} | `{test}` |"


def page(rows: list[Row]) -> str:
    """The whole page: a table for each function."""
    text = HEAD
    for function, group in itertools.groupby(rows, key=lambda row: row[0]):
        text += TABLE.format(function=function) + "\n".join(map(line, group)) + "\n"
    return text


if __name__ == "__main__":
    os.chdir(ROOT)
    if sys.argv[1:]:  # some files, to standard output
        print("\n".join(map(line, collect([ROOT / name for name in sys.argv[1:]]))))
    else:
        PAGE.write_text(page(collect(sorted((ROOT / "tests").rglob("test_*.py")))))
