"""`kvjax bench search`: one whole search, beside three others of the same model.

They are mctx with a window per node, the floor (`floor.py`) and LightZero 0.2.0 where it is
 installed. All search the same random weights, step after step of an episode, so that windows are
as full as in play.

`growth` is about this search alone: what a simulation costs in a small and in a large tree.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from kvjax import lightzero
from kvjax.config import BLOCK, SearchConfig, Tree, WorldModelConfig
from kvjax.mcts.search import compiled, search
from kvjax.model import world_model
from kvjax.model.contexts import init_contexts
from kvjax.model.step import FIRST_STEP
from kvjax.model.unizero import prepare
from kvjax.model.world_model import Params
from kvjax.tools.bench import floor, lightzero_020, timing
from kvjax.tools.bench.case import (
    NUM_ACTIONS,
    OBSERVATION_SIZE,
    Case,
    choose,
    lightzero_model,
    observations,
)

Progress = Callable[[float, str], None]

_WARMUP = 2  # rounds that compile
_MIB = 2**20
_GROWTH = "growth"
T = TypeVar("T")
_TREES: dict[str, Tree] = {"kvjax": "lightzero", "mctx": "muzero"}

CASES = (
    Case(embed=64, context=8, envs=8, simulations=50, repeats=15),
    Case(embed=768, context=8, envs=8, simulations=50, repeats=7),
    Case(embed=64, context=8, envs=64, simulations=50, repeats=7),
    Case(embed=64, context=8, envs=256, simulations=50, repeats=5),
    Case(embed=64, context=64, envs=8, simulations=200, repeats=5),
    Case(embed=768, context=64, envs=8, simulations=200, repeats=1),
)

GROWTH = (
    (Case(embed=64, context=8, envs=8, simulations=50, repeats=15), 0.1),
    (Case(embed=64, context=8, envs=8, simulations=800, repeats=15), 4.0),
)
"""A small and a large tree, and how eager each is to explore: so that both are equally deep."""


def run(
    *,
    only: str = "",
    progress: Progress = lambda fraction, text: None,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measures every case whose label contains all comma-separated parts of `only`.

    Rows are added to `rows` as they are measured.

    Returns:
      The fields of `--json`: machine, versions, one row per case, and `growth` where `only` is
      empty or "growth".

    Raises:
      ValueError: no case fits `only`.
    """
    cases, grows = choose(CASES, only, besides=(_GROWTH,)), only in ("", _GROWTH)
    total, rows = sum(_rounds(case) for case in cases), [] if rows is None else rows
    for index, case in enumerate(cases):
        before, label = sum(_rounds(case) for case in cases[:index]), case.label()
        progress(before / total, f"{label}: building")
        rows.append(
            _row(case, lambda text, turn: progress((before + turn) / total, f"{label}: {text}"))  # noqa: B023
        )
    result = {"machine": timing.machine(), "versions": timing.versions(), "rows": rows}
    if grows:
        progress(float(bool(cases)), "a simulation in small and large trees")
        result[_GROWTH] = growth()
    progress(1.0, "done")
    return result


def growth() -> list[dict[str, Any]]:
    """Time of one simulation by the size of its tree, at equal mean depth, in turn.

    Deep paths cost more than shallow ones, whatever the tree; hence the equal depth, which the rows
    report. `ratio` is over the first row's time.
    """
    config, params = _model(GROWTH[0][0], None)
    depths: list[list[float]] = [[] for _ in GROWTH]

    def search_of(index: int) -> Callable[[], None]:
        case, exploration = GROWTH[index]
        one = _Search(case, config, params, "lightzero", pb_c_init=exploration)

        def step() -> None:
            one.step()
            depths[index].append(one.mean_depth)

        return step

    candidates = {str(index): search_of(index) for index in range(len(GROWTH))}
    medians = timing.medians_in_turn(candidates, repeats=GROWTH[0][0].repeats, warmup=_WARMUP)
    rows: list[dict[str, Any]] = []
    for (case, exploration), taken, depth in zip(GROWTH, medians.values(), depths, strict=True):
        row = {name: getattr(case, name) for name in Case.SIZES} | {"pb_c_init": exploration}
        row["us_per_simulation"] = 1e3 * taken / case.simulations
        row["mean_depth"] = float(np.mean(depth[_WARMUP:]))
        rows.append(row)
    return [
        row | {"ratio": row["us_per_simulation"] / rows[0]["us_per_simulation"]} for row in rows
    ]


def _row(case: Case, progress: Callable[[str, int], None]) -> dict[str, Any]:
    model = lightzero_model(case) if lightzero_020.available() else None
    config, params = _model(case, model)
    searches = {name: _Search(case, config, params, tree) for name, tree in _TREES.items()}
    candidates: dict[str, Callable[[], None]] = {k: one.step for k, one in searches.items()}
    folded = searches["kvjax"].prepared
    candidates["floor"] = floor.make(folded, rows=case.envs, simulations=case.simulations)
    if model is not None:
        candidates["lightzero"] = _lightzero_search(case, model)
    medians = timing.medians_in_turn(
        candidates, repeats=case.repeats, warmup=_WARMUP, progress=progress
    )
    ours = medians["kvjax"]
    row = {name: getattr(case, name) for name in Case.SIZES}
    row |= {f"{name}_ms": medians[name] for name in candidates}
    row["floor_ratio"] = ours / medians["floor"]
    row["mctx_ratio"] = medians["mctx"] / ours
    if model is not None:
        row["lightzero_ratio"] = medians["lightzero"] / ours
    row["mean_depth"] = searches["kvjax"].mean_depth
    row["tree_mib"] = searches["kvjax"].temporary_mib()
    row["mctx_tree_mib"] = searches["mctx"].temporary_mib()
    return row


def _rounds(case: Case) -> int:
    return _WARMUP + case.repeats


def _model(case: Case, model: Any | None) -> tuple[WorldModelConfig, Params]:
    """LightZero's weights if it is there."""
    if model is not None:
        loaded: tuple[WorldModelConfig, Params] = lightzero.load(model)
        return loaded
    config = WorldModelConfig(
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        num_actions=NUM_ACTIONS,
        context_length=case.context,
        max_tokens=BLOCK * case.max_blocks,
        observation_size=OBSERVATION_SIZE,
    )
    return config, world_model.init_params(jax.random.key(0), config)


class _Search:
    """One step of an episode per call of `step`; windows are full from the first."""

    def __init__(
        self,
        case: Case,
        config: WorldModelConfig,
        params: Params,
        tree: Tree,
        pb_c_init: float = SearchConfig.pb_c_init,
    ) -> None:
        self.prepared = prepare(params, config=config)
        self.mean_depth = 0.0  # of the last search, mean over rows
        short = SearchConfig(num_simulations=1)
        self._config, self._observation = config, observations(case)
        self._contexts = init_contexts(config, case.envs)
        self._action: Any = np.full(case.envs, FIRST_STEP)
        for _ in range(case.blocks):
            self._contexts, out = self._run(search, short)
            self._action = np.asarray(out.action)
        self._search = SearchConfig(case.simulations, tree, pb_c_init=pb_c_init)

    def _run(self, function: Callable[..., T], search_config: SearchConfig) -> T:
        arrays = self._contexts, self._observation, self._action
        key = jax.random.key(0)
        return function(self.prepared, key, *arrays, config=self._config, search=search_config)

    def step(self) -> None:
        self._contexts, out = self._run(search, self._search)
        self._action = np.asarray(out.action)
        self.mean_depth = float(np.mean(out.mean_depth))

    def temporary_mib(self) -> float:
        """What the compiled search holds beside its arguments and results."""
        memory: Any = self._run(compiled, self._search).memory_analysis()
        return float(memory.temp_size_in_bytes) / _MIB


def _lightzero_search(case: Case, model: Any) -> Callable[[], None]:
    searcher = lightzero_020.Searcher(model)
    observation = observations(case)
    action: Any = np.full(case.envs, FIRST_STEP)
    for _ in range(case.blocks):
        action = searcher.push(observation, action).policy_logits.numpy().argmax(axis=1)

    def step() -> None:
        nonlocal action
        action = searcher.step(observation, action)["action"]

    return step
