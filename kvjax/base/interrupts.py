"""Interrupts (Ctrl-C) that wait while a call holds what nobody else has.

A call that moves a state has taken it from its caller and has not yet given the new one back: an
exception in between would lose it.
"""

import threading

# What the module `signal` wraps: it makes an enumeration's member of each handler, in ten times the
# time.
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]
from typing import Any


class held:  # noqa: N801  (used like a function)
    """Inside a `with held():` block an interrupt waits for the block's end.

    It then goes to the handler that was there before, which by Python's default raises
    `KeyboardInterrupt`. Blocks may be nested: the outermost one's end counts. Only the main thread
    gets interrupts, so elsewhere there is nothing to hold.
    """

    __slots__ = ("_before", "_noted")

    def __enter__(self) -> None:
        self._noted: tuple[Any, ...] | None = None
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = getsignal(SIGINT)
            if callable(self._before):
                signal(SIGINT, self._note)

    def _note(self, *signal_and_frame: Any) -> None:
        self._noted = signal_and_frame

    def __exit__(self, *exception: object) -> None:
        if callable(self._before):
            signal(SIGINT, self._before)
            if self._noted is not None:
                self._before(*self._noted)
