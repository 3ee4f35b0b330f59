"""Files that appear whole or not at all."""

import contextlib
import glob
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of a file that is being written; it lies beside the one that it becomes."""

_unfinished: set[Path] = set()
_log = logging.getLogger(__name__)


def require_writable(path: str | Path) -> None:
    """Tries whether a file can be written, before long work whose result it shall hold.

    The log names unfinished files beside it, here and in `replacing`.

    Raises:
      OSError: the folder is missing or cannot be written to, or the path is no file's.
    """
    _, partial = _names(path)
    with _told(path):
        partial.touch(exist_ok=False)
        partial.unlink()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the path's place when the block ends, with the umask's mode.

    An exception leaves what was there before, and nothing else. A process that is killed outright
    leaves `NAME.xxxxxxxx.partial` beside it.

    Raises:
      OSError: the file cannot be written; says the path and why.
    """
    target, partial = _names(path)
    with _told(path):
        try:
            _unfinished.add(partial)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
            _unfinished.discard(partial)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Puts the name of a file before what a `ValueError` in the block says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def discard_unfinished() -> None:
    """Removes what is being written: for a process that ends without unwinding."""
    for partial in tuple(_unfinished):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _names(path: str | Path) -> tuple[Path, Path]:
    """The file that a path means, behind links, and a name beside it that nobody has."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no such folder {target.parent}")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no file"
        raise FileExistsError(f"cannot write {path}: it is {kind}")
    for other in target.parent.glob(f"{glob.escape(target.name)}.*{PARTIAL}"):
        _log.warning("%s was never finished: its writer was killed, or is at work", other)
    return target, target.with_name(f"{target.name}.{secrets.token_hex(4)}{PARTIAL}")


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Says which file could not be written: a full disk's error names none."""
    try:
        yield
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}"
        raise OSError(*((error.errno, text) if error.errno else (text,))) from error
