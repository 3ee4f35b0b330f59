"""`kvjax bench search`: one whole search, beside LightZero 0.2.0's where it is installed.

Both search the same kind of model with random weights, step after step of an episode, so that
windows are as full as in play.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax import lightzero, world_model
from kvjax.bench import lightzero_020, timing
from kvjax.config import SearchConfig, Tree, WorldModelConfig
from kvjax.contexts import init_contexts
from kvjax.search import prepare, search
from kvjax.step import FIRST_STEP

Progress = Callable[[float, str], None]

_OBSERVATION_SIZE = 4
_NUM_ACTIONS = 6
_MAX_BLOCKS = 10
_TREES: dict[str, Tree] = {"kvjax": "lightzero", "mctx": "muzero"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one row of the benchmark."""

    embed: int
    layers: int
    heads: int
    context: int  # tokens
    envs: int
    simulations: int
    repeats: int = 15

    def label(self) -> str:
        """What `--only` is matched against."""
        names = ("embed", "layers", "context", "envs", "simulations")
        return ",".join(f"{name}={getattr(self, name)}" for name in names)


CASES = (
    Case(embed=64, layers=2, heads=8, context=8, envs=8, simulations=50),
    Case(embed=64, layers=2, heads=8, context=8, envs=64, simulations=50, repeats=7),
    Case(embed=768, layers=2, heads=8, context=8, envs=8, simulations=50, repeats=5),
)


def run(*, only: str = "", progress: Progress = lambda fraction, text: None) -> dict[str, Any]:
    """Measures every case whose label contains all comma-separated parts of `only`.

    Returns:
      The fields of `--json`: machine, versions and one row per case.

    Raises:
      ValueError: no case fits `only`.
    """
    parts = [part for part in only.split(",") if part]
    cases = [case for case in CASES if all(p in case.label().split(",") for p in parts)]
    if not cases:
        labels = "; ".join(case.label() for case in CASES)
        raise ValueError(f"no benchmark row matches {only!r}; rows are {labels}")
    rows = []
    for index, case in enumerate(cases):
        progress(index / len(cases), case.label())
        rows.append(_row(case))
    progress(1.0, "done")
    return {"machine": timing.machine(), "versions": timing.versions(), "rows": rows}


def _row(case: Case) -> dict[str, Any]:
    model = _lightzero_model(case) if lightzero_020.available() else None
    candidates = {name: _kvjax_search(case, model, tree) for name, tree in _TREES.items()}
    if model is not None:
        candidates["lightzero"] = _lightzero_search(case, model)
    medians = timing.medians_in_turn(candidates, repeats=case.repeats)
    row = {
        "embed": case.embed,
        "layers": case.layers,
        "context": case.context,
        "envs": case.envs,
        "simulations": case.simulations,
        "kvjax_ms": medians["kvjax"],
        "mctx_ms": medians["mctx"],
    }
    if model is not None:
        row["lightzero_ms"] = medians["lightzero"]
        row["lightzero_ratio"] = medians["lightzero"] / medians["kvjax"]
    return row


def _lightzero_model(case: Case) -> Any:
    return lightzero_020.build_model(
        observation_size=_OBSERVATION_SIZE,
        num_actions=_NUM_ACTIONS,
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        context_length=case.context,
        num_envs=case.envs,
        num_simulations=case.simulations,
        max_blocks=_MAX_BLOCKS,
    )


def _kvjax_search(case: Case, model: Any | None, tree: Tree) -> Callable[[], None]:
    """One search per call, with LightZero's weights if it is there."""
    if model is not None:
        config, params = lightzero.load(model)
    else:
        config = WorldModelConfig(
            embed_dim=case.embed,
            num_layers=case.layers,
            num_heads=case.heads,
            num_actions=_NUM_ACTIONS,
            context_length=case.context,
            max_tokens=2 * _MAX_BLOCKS,
            observation_size=_OBSERVATION_SIZE,
        )
        params = world_model.init_params(jax.random.key(0), config)
    search_config = SearchConfig(num_simulations=case.simulations, tree=tree)
    observation, prepared = _observations(case), prepare(params, config=config)
    contexts = init_contexts(config, case.envs)
    action: Any = np.full(case.envs, FIRST_STEP)

    def step() -> None:
        nonlocal contexts, action
        contexts, out = search(
            prepared,
            jax.random.key(0),
            contexts,
            observation,
            action,
            config=config,
            search=search_config,
        )
        action = np.asarray(out.action)

    return step


def _lightzero_search(case: Case, model: Any) -> Callable[[], None]:
    searcher = lightzero_020.Searcher(model)
    observation = _observations(case)
    action: Any = np.full(case.envs, FIRST_STEP)

    def step() -> None:
        nonlocal action
        action = searcher.step(observation, action)["action"]

    return step


def _observations(case: Case) -> Any:
    shape = (case.envs, _OBSERVATION_SIZE)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
