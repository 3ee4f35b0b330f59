"""What a command prints: results on standard output, progress and warnings on standard error."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class _Output(Console):
    """A console that leaves it to `kvjax.tools.cli.main` what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        """Raises what rich would end the process for, with exit code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on a line."""
    print(json.dumps(content, allow_nan=False))


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """A name and a text in each row."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _Output().print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each field that a row has, lists left out.

    A screen that is too narrow for it gets a line for each field, in as many tables as it takes.
    """
    fields = {name: value for row in reversed(rows) for name, value in row.items()}
    names = [name for name in {**rows[0], **fields} if not isinstance(fields[name], list)]
    cells = [[_shown(row.get(name, "")) for name in names] for row in rows]
    screen = _Output()
    endless = screen.options.update_width(10_000)

    def fits(table: Table) -> bool:
        return screen.measure(table, options=endless).maximum <= screen.width

    def turned(count: int) -> list[Table]:
        parts = (cells[start : start + count] for start in range(0, len(cells), count))
        return [_table(title, list(zip(names, *part, strict=True))) for part in parts]

    whole = [_table(title, [names, *cells])]
    tables = whole, *(turned(count) for count in range(len(cells), 1, -1))
    for table in next((each for each in tables if all(map(fits, each))), turned(1)):
        screen.print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(title: str, lines: Sequence[Sequence[str]]) -> Table:
    table = Table(*lines[0], title=title, title_justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    return table


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error, which is gone where an error's line takes its place."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_Output(stderr=True)) as bar:
        try:
            yield bar
        except BaseException:
            bar.live.transient = True
            bar.console.quiet = not bar.console.is_interactive
            raise


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """What kvjax warns of goes to standard error, whatever handlers the root logger has."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("kvjax: %(message)s"))
    logger = logging.getLogger("kvjax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
