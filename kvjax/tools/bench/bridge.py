"""`kvjax bench bridge`: LightZero's own cache management against `kvjax.lightzero.attach`.

Two copies of one model of release 0.2.0, one of them attached, search in turn with LightZero's own
C++ tree. Needs LightZero.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax import lightzero
from kvjax.config import SearchConfig
from kvjax.mcts.search import search
from kvjax.model.contexts import init_contexts
from kvjax.model.step import FIRST_STEP
from kvjax.model.unizero import prepare
from kvjax.tools.bench import lightzero_020, timing
from kvjax.tools.bench.case import Case, choose, lightzero_model, observations

Progress = Callable[[float, str], None]

_WARMUP = 5  # root windows are full after C / 2 steps

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
    progress: Progress = lambda fraction, text: None,
    rows: list[dict[str, Any]] | None = None,
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
    cases = choose(CASES, only)
    rows = [] if rows is None else rows
    for index, case in enumerate(cases):
        progress(index / len(cases), case.label())
        rows.append(_row(case))
    progress(1.0, "done")
    return {"machine": timing.machine(), "versions": timing.versions(), "rows": rows}


def _row(case: Case) -> dict[str, Any]:
    original = lightzero_model(case)
    attached = copy.deepcopy(original)
    lightzero.attach(attached.world_model)
    models = {"lightzero": original, "attach": attached}
    recorders = {name: _Recorder(model.world_model) for name, model in models.items()}
    candidates = {name: _lightzero_search(case, model) for name, model in models.items()}
    candidates["kvjax"] = _kvjax_search(case, original)
    medians = timing.medians_in_turn(candidates, repeats=case.repeats, warmup=_WARMUP)
    cache = {name: recorder.median_ms(case) for name, recorder in recorders.items()}
    return {
        "embed": case.embed,
        "envs": case.envs,
        "cache_ratio": cache["lightzero"] / cache["attach"],
        "search_ratio": medians["lightzero"] / medians["attach"],
        "lightzero_cache_ms": cache["lightzero"],
        "attach_cache_ms": cache["attach"],
        "lightzero_ms": medians["lightzero"],
        "attach_ms": medians["attach"],
        "kvjax_ms": medians["kvjax"],
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


def _lightzero_search(case: Case, model: Any) -> Callable[[], None]:
    searcher, observation = lightzero_020.Searcher(model), observations(case)
    action: Any = np.full(case.envs, FIRST_STEP)

    def step() -> None:
        nonlocal action
        action = searcher.step(observation, action)["action"]

    return step


def _kvjax_search(case: Case, model: Any) -> Callable[[], None]:
    """The whole search in one jit, model included, for comparison."""
    config, params = lightzero.load(model)
    prepared, observation = prepare(params, config=config), observations(case)
    search_config = SearchConfig(num_simulations=case.simulations)
    contexts = init_contexts(config, case.envs)
    action: Any = np.full(case.envs, FIRST_STEP)

    def step() -> None:
        nonlocal contexts, action
        rng = jax.random.key(0)
        contexts, out = search(
            prepared, rng, contexts, observation, action, config=config, search=search_config
        )
        action = np.asarray(out.action)

    return step
