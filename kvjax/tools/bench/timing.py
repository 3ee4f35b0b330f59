"""Timing in turn."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from kvjax.tools.bench.rows import Progress

T = TypeVar("T")


def medians_in_turn(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 2,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, float]:
    """Median milliseconds of each candidate, run one after the other, round by round.

    A drift of the machine's speed then meets all of them alike, and so does what one leaves behind
    for the next, as every round has another order. Candidates must block until their work is done.
    `progress` is told the share of the rounds that are done and the name of who runs next.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = warmup + repeats
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(candidates), len(candidates)):
            progress(turn / rounds, name)
            started = time.perf_counter()
            candidates[name]()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: 1e3 * float(np.median(taken)) for name, taken in times.items()}


def finished(tree: T) -> T:
    """The same arrays, once they are computed."""
    ready: T = jax.block_until_ready(tree)  # type: ignore[no-untyped-call]
    return ready
