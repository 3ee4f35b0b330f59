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
    """A column for each field that a row has; lists are left out."""
    fields = {name: value for row in reversed(rows) for name, value in row.items()}
    columns = [name for name in {**rows[0], **fields} if not isinstance(fields[name], list)]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        shown = (row.get(name, "") for name in columns)
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown))
    _Output().print(table)


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
