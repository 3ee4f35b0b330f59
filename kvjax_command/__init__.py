"""The `kvjax` command's first lines. They stand outside the package, whose import takes seconds.

Ctrl-C ends the process at once, in one line, without unwinding: an exception that is raised inside
jax is lost in its callbacks or brings XLA's threads down with a signal 11 (plain jax does both).
Files appear whole or not at all, so that nothing is left half done.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

_INTERRUPTED = 130
_FAILED = 2
_MOST_SECONDS = 2.0  # for last words

_last_words: list[Callable[[], None]] = []


def main() -> int:
    """Runs the command line; returns the exit code."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _failed("standard output is closed")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _watch_interrupts()
    try:
        from kvjax.tools import cli
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _failed(str(error))
    _last_words.append(cli.leave)
    try:
        code = cli.main()
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else _FAILED
    if code := _flushed(code):
        sys.stderr.flush()
        os._exit(code)  # what failed may be in no state to be taken down in order
    return code


def _flushed(code: int) -> int:
    """The exit code once standard output has taken everything; Python's own end would not say."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return code or _failed(f"standard output: {error.strerror}")
    return code


def _failed(why: str) -> int:
    print(f"kvjax: {' '.join(why.split())}", file=sys.stderr)
    return _FAILED


def _watch_interrupts() -> None:
    """Has a thread wait for SIGINT: the main one may compile for minutes without looking."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as in the background of a script
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def _wait(reader: int) -> None:
    while os.read(reader, 1)[0] != signal.SIGINT:
        pass
    in_time = threading.Timer(_MOST_SECONDS, os._exit, (_INTERRUPTED,))
    in_time.daemon = True
    in_time.start()
    command = [word for word in sys.argv[1:2] if not word.startswith("-")]
    try:
        for speak in _last_words:
            speak()
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
        os.write(2, f"{cursor}{' '.join(['kvjax', *command])}: interrupted\n".encode())
    finally:
        os._exit(_INTERRUPTED)
