"""An attached model's counters in the logs of LightZero's own collector and evaluator."""

import functools
from collections.abc import Callable
from typing import Any

from kvjax.base.values import require
from kvjax.store.statistics import Statistics

Stats = Callable[[], Statistics | None]


def log_with(worker: Any, stats: Stats) -> None:
    """Adds counters to what a worker reports, whenever it reports.

    Args:
      worker: LightZero's `MuZeroCollector` or `MuZeroEvaluator`.
      stats: brings the counters; None once there are none any more.

    Raises:
      ValueError: the worker is neither.
    """
    name = next((name for name in _REPORTS if hasattr(worker, name)), None)
    expected = "a collector or an evaluator of LightZero"
    require(
        name is not None and hasattr(worker, "_logger"),
        f"worker must be {expected}, got a {type(worker).__name__}",
    )
    setattr(worker, str(name), _REPORTS[str(name)](worker, getattr(worker, str(name)), stats))


def _collecting(worker: Any, output_log: Callable[[int], None], stats: Stats) -> Any:
    """A collector's `_output_log`, which says something every now and then."""

    @functools.wraps(output_log)
    def told(train_iter: int) -> None:
        before = worker._last_train_iter
        output_log(train_iter)
        if worker._last_train_iter != before:
            _tell(worker, stats(), train_iter, worker._total_envstep_count)

    return told


def _evaluating(worker: Any, evaluate: Callable[..., Any], stats: Stats) -> Any:
    @functools.wraps(evaluate)
    def told(
        save_ckpt_fn: Any = None, train_iter: int = -1, envstep: int = -1, *args: Any, **named: Any
    ) -> Any:
        answer = evaluate(save_ckpt_fn, train_iter, envstep, *args, **named)
        _tell(worker, stats(), train_iter, envstep)
        return answer

    return told


_REPORTS: dict[str, Any] = {"_output_log": _collecting, "eval": _evaluating}
"""What reports: a collector's method, and an evaluator's."""


def _tell(worker: Any, stats: Statistics | None, train_iter: int, envstep: int) -> None:
    """Text, and a curve for each number over LightZero's two axes; other ranks have no logger."""
    if stats is None or worker._logger is None:
        return
    worker._logger.info(f"kvjax:\n{stats}")
    if worker._tb_logger is None:
        return
    for axis, at in (("iter", train_iter), ("step", envstep)):
        for name, value in stats.as_dict(f"{worker._instance_name}_{axis}/kvjax_").items():
            worker._tb_logger.add_scalar(name, value, at)
