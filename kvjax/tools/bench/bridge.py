"""`kvjax bench bridge`: LightZero's own cache management against `kvjax.lightzero.attach`.

Two copies of one model of release 0.2.0, one of them attached, search in turn with LightZero's own
C++ tree. Needs LightZero.
"""

import copy
import time
from typing import Any

import numpy as np

from kvjax import lightzero
from kvjax.tools.bench import lightzero_020, timing
from kvjax.tools.bench.rows import Progress, Row, measured
from kvjax.tools.bench.searches import Case, Search, choose, lightzero_model, lightzero_search

CASES = (
    Case(embed=64, envs=8, repeats=15),
    Case(embed=64, envs=32, repeats=9),
    Case(embed=64, envs=64, repeats=7),
    Case(embed=768, envs=8, repeats=5),
    Case(embed=768, envs=32, repeats=5),
    Case(embed=768, envs=64, repeats=3),
)


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    rows: list[Row] | None = None,
) -> dict[str, Any]:
    """Measures every case whose label contains all comma-separated parts of `only`.

    Rows are added to `rows` as they are measured.

    Returns:
      The fields of `--json`: machine, versions and one row per case.

    Raises:
      ValueError: LightZero is not installed, or no case fits `only`.
    """
    if not lightzero_020.available():
        raise ValueError("this benchmark needs LightZero 0.2.0 and torch: make test installs them")
    return measured(choose(CASES, only), _row, progress=progress, rows=rows)


def _row(case: Case, progress: Progress) -> Row:
    original = lightzero_model(case)
    attached = copy.deepcopy(original)
    lightzero.attach(attached.world_model)
    models = {"lightzero": original, "attach": attached}
    recorders = {name: _Recorder(model.world_model) for name, model in models.items()}
    candidates = {name: lightzero_search(case, model) for name, model in models.items()}
    candidates["kvjax"] = Search(case, *lightzero.load(original)).step
    medians = timing.medians_in_turn(candidates, repeats=case.repeats, progress=progress)
    cache = {name: recorder.median_ms(case) for name, recorder in recorders.items()}
    return {
        "embed": case.embed,
        "envs": case.envs,
        "cache_ratio": cache["lightzero"] / cache["attach"],
        "search_ratio": medians["lightzero"] / medians["attach"],
        "lightzero_cache_ms": cache["lightzero"],
        "attach_cache_ms": cache["attach"],
        **{f"{name}_ms": taken for name, taken in medians.items()},
    }


class _Recorder:
    """Times what a world model spends on its caches in every simulation."""

    def __init__(self, wm: Any) -> None:
        self._seconds: list[float] = []
        self._wrap(wm, "retrieve_or_generate_kvcache", begins=True)
        self._wrap(wm, "trim_and_pad_kv_cache")
        self._wrap(wm, "update_cache_context")

    def _wrap(self, wm: Any, name: str, *, begins: bool = False) -> None:
        method = getattr(wm, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            seconds = time.perf_counter() - started
            if begins:
                self._seconds.append(seconds)
            elif not kwargs.get("is_init_infer"):
                self._seconds[-1] += seconds
            return result

        setattr(wm, name, timed)

    def median_ms(self, case: Case) -> float:
        """Median milliseconds of a simulation, warm-up searches left out."""
        measured = self._seconds[-case.repeats * case.simulations :]
        return 1e3 * float(np.median(measured))
