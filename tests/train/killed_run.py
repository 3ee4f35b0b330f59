"""Runs `kvjax train`, kills it at random moments and resumes it, until it was killed often enough.

    python killed_run.py COUNT SEED OUTPUT [OPTIONS OF kvjax train]

Each run is a process of its own, forked before jax has begun anything; a quarter of them are killed
while they begin, the others soon after they have written their state. Prints the kills: after how
many seconds, and how many steps the run had then written.
"""

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import kvjax.train  # noqa: F401  (once, and not in each process)
from kvjax.tools import cli
from kvjax.train.run import CURVE, STATE

LONGEST = 300.0
"""Seconds that a process may take to write something."""


def main():
    count, seed, output, *options = sys.argv[1:]
    chance, folder, kills = random.Random(int(seed)), Path(output), []
    while len(kills) < int(count):
        child, begun = run(folder, options), time.perf_counter()
        wait(folder, chance)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"it ended by itself ({status}) after {len(kills)} kills of {count}")
        kills.append((round(time.perf_counter() - begun, 2), steps(folder)))
    _, status = os.waitpid(run(folder, options), 0)
    print(json.dumps(kills))
    sys.exit(os.waitstatus_to_exitcode(status))


def run(folder, options):
    """Starts or resumes the run; the process's number."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            os._exit(cli.main(["train", f"--output={folder}", "--resume", *options]))
    return child


def wait(folder, chance):
    """Until a random moment."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0.0, 2.0))
        return
    before, deadline = written(folder), time.perf_counter() + LONGEST
    while written(folder) == before and time.perf_counter() < deadline:
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.2))


def written(folder):
    """When the state was written, None before."""
    path = folder / STATE
    return path.stat().st_mtime_ns if path.exists() else None


def steps(folder):
    """Steps that the run's curve has."""
    path = folder / CURVE
    if not path.exists():
        return 0
    with path.open() as file:
        return int(list(csv.DictReader(file))[-1]["env_steps"])


if __name__ == "__main__":
    main()
