"""Timing in turn, and what was timed on."""

import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

_PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "mctx", "numpy", "torch", "LightZero")


def medians_in_turn(
    candidates: Mapping[str, Callable[[], None]],
    *,
    repeats: int,
    warmup: int = 2,
    progress: Callable[[str, int], None] = lambda name, turn: None,
) -> dict[str, float]:
    """Median milliseconds of each candidate, run one after the other, round by round.

    A drift of the machine's speed then meets all of them alike, and so does what one leaves behind
    for the next, as every round has another order. Candidates must block until their work is done.
    `progress` is told the name of each and the round before it runs.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name in random.Random(turn).sample(list(candidates), len(candidates)):
            progress(name, turn)
            started = time.perf_counter()
            candidates[name]()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: 1e3 * float(np.median(taken)) for name, taken in times.items()}


def finished(tree: T) -> T:
    """The same arrays, once they are computed."""
    ready: T = jax.block_until_ready(tree)  # type: ignore[no-untyped-call]
    return ready


def machine() -> dict[str, Any]:
    """The hardware as far as it matters to a ratio."""
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "arch": platform.machine()}


def versions() -> dict[str, str]:
    """Versions of what was measured; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
