"""Interrupts wait for the end of what must not be interrupted."""

import signal
import threading

import pytest

from kvjax.base import interrupts


def test_an_interrupt_waits_for_the_end_of_the_outermost_block():
    def interrupted():
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")

    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt):  # from now on they come at once
        signal.raise_signal(signal.SIGINT)


def test_the_handler_that_was_there_is_the_one_that_is_told():
    told = []
    before = signal.signal(signal.SIGINT, lambda *_: told.append("told"))
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            assert not told
        assert told == ["told"]
        signal.raise_signal(signal.SIGINT)
        assert told == ["told"] * 2
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_holds_nothing_and_fails_at_nothing():
    def run():
        with interrupts.held():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers = [signal.getsignal(signal.SIGINT)]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers[1] is handlers[0]
