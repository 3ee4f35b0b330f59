"""`kvjax bench search`: one whole search, beside three others of the same model.

They are mctx with a window per node ("muzero" is the search with the same policy and own tokens),
the floor (`floor.py`) and LightZero 0.2.0 where it is installed. All search the same random
weights, step after step of an episode, so that windows are as full as in play.

`growth` is about this search alone: what a simulation costs in a small and in a large tree.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import lightzero
from kvjax.config import BLOCK, SearchConfig, WorldModelConfig
from kvjax.model import world_model
from kvjax.model.world_model import Params
from kvjax.tools.bench import floor, lightzero_020, timing
from kvjax.tools.bench.rows import Progress, Row, measured
from kvjax.tools.bench.searches import (
    NUM_ACTIONS,
    OBSERVATION_SIZE,
    Case,
    Search,
    choose,
    lightzero_model,
    lightzero_search,
)
from kvjax.tools.machine import mesh_of

_WARMUP = 2  # rounds that compile
_GROWTH = "growth"
_LONGEST_OF_LIGHTZERO = 64  # tokens; it fills longer contexts for minutes

CASES = (
    Case(embed=64, context=8, envs=8, simulations=50, repeats=15),
    Case(embed=768, context=8, envs=8, simulations=50, repeats=7),
    Case(embed=64, context=8, envs=64, simulations=50, repeats=7),
    Case(embed=64, context=8, envs=256, simulations=50, repeats=5),
    Case(embed=64, context=64, envs=8, simulations=200, repeats=5),
    Case(embed=768, context=64, envs=8, simulations=200, repeats=1),
    Case(embed=256, context=64, envs=8, simulations=200, repeats=3),
    Case(embed=64, context=512, envs=8, simulations=50, repeats=5),
    Case(embed=256, context=512, envs=8, simulations=50, repeats=3),
    Case(embed=64, context=4096, envs=8, simulations=50, repeats=3),
    Case(embed=64, context=8, envs=8, simulations=50, repeats=15, dtype="bfloat16"),
    Case(embed=64, context=8, envs=256, simulations=50, repeats=5, dtype="bfloat16"),
    Case(embed=768, context=8, envs=8, simulations=50, repeats=7, dtype="bfloat16"),
    Case(embed=768, context=64, envs=8, simulations=200, repeats=1, dtype="bfloat16"),
)

GROWTH = (
    (Case(embed=64, context=8, envs=8, simulations=50, repeats=15), 0.1),
    (Case(embed=64, context=8, envs=8, simulations=800, repeats=15), 4.0),
)
"""A small and a large tree, and how eager each is to explore: so that both are equally deep."""


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    rows: list[Row] | None = None,
    devices: int = 1,
    cases: Sequence[Case] | None = None,
) -> dict[str, Any]:
    """Measures every case whose label contains all comma-separated parts of `only`.

    Rows are added to `rows` as they are measured. A row of bfloat16 matrices has kvjax's time with
    float32 ones, measured in turn with it, as `float32_ms`; its floor multiplies bfloat16 too. On
    several devices kvjax alone searches on them.

    Args:
      cases: `CASES` by default.

    Returns:
      The fields of `--json`: machine, versions, one row per case, and `growth` where `only` is
      empty or "growth".

    Raises:
      ValueError: no case fits `only`.
    """
    mesh_of(devices)  # before anything is computed
    every = (dataclasses.replace(case, devices=devices) for case in cases or CASES)
    chosen = choose(every, only, _GROWTH)
    extras = {_GROWTH: growth} if cases is None and only in ("", _GROWTH) else {}
    return measured(chosen, _row, progress=progress, rows=rows, **extras)


def growth() -> list[Row]:
    """Time of one simulation by the size of its tree, at equal mean depth, in turn.

    Deep paths cost more than shallow ones, whatever the tree; hence the equal depth, which the rows
    report. `ratio` is over the first row's time.
    """
    config, params = _model(GROWTH[0][0], None)
    depths: list[list[float]] = [[] for _ in GROWTH]

    def search_of(index: int) -> Callable[[], None]:
        case, exploration = GROWTH[index]
        one = Search(case, config, params, SearchConfig(case.simulations, pb_c_init=exploration))

        def step() -> None:
            one.step()
            depths[index].append(one.mean_depth)

        return step

    candidates = {str(index): search_of(index) for index in range(len(GROWTH))}
    medians = timing.medians_in_turn(candidates, repeats=GROWTH[0][0].repeats, warmup=_WARMUP)
    rows: list[Row] = []
    for (case, exploration), taken, depth in zip(GROWTH, medians.values(), depths, strict=True):
        row = case.sizes() | {"pb_c_init": exploration}
        row["us_per_simulation"] = 1e3 * taken / case.simulations
        row["mean_depth"] = float(np.mean(depth[_WARMUP:]))
        rows.append(row)
        row["ratio"] = row["us_per_simulation"] / rows[0]["us_per_simulation"]
    return rows


def _row(case: Case, progress: Progress) -> Row:
    usual = case.context <= _LONGEST_OF_LIGHTZERO and lightzero_020.available()
    model = lightzero_model(case) if usual else None
    config, params = _model(case, model)
    same_policy = SearchConfig(case.simulations, "muzero", q_transform="siblings")
    searches = {
        "kvjax": Search(case, config, params, mesh=mesh_of(case.devices)),
        "muzero": Search(case, config, params, same_policy),
        "mctx": Search(case, config, params, same_policy, by_mctx=True),
    }
    kvjax, muzero, mctx = searches.values()
    if case.dtype != "float32":
        searches["float32"] = Search(dataclasses.replace(case, dtype="float32"), config, params)
    candidates: dict[str, Callable[[], Any]] = {k: one.step for k, one in searches.items()}
    products = floor.make(muzero.prepared, rows=case.envs, simulations=case.simulations)
    candidates["floor"] = products
    if model is not None:
        candidates["lightzero"] = lightzero_search(case, model)
    medians = timing.medians_in_turn(
        candidates, repeats=case.repeats, warmup=_WARMUP, progress=progress
    )
    ours = medians["kvjax"]
    row = case.sizes() | {f"{name}_ms": medians[name] for name in candidates}
    row.setdefault("float32_ms", ours)
    row["floor_ratio"] = ours / medians["floor"]
    row["mctx_ratio"] = medians["mctx"] / medians["muzero"]
    if model is not None:
        row["lightzero_ratio"] = medians["lightzero"] / ours
    row["mean_depth"] = kvjax.mean_depth
    row["tree_mib"] = kvjax.temporary_mib()
    row["muzero_tree_mib"] = muzero.temporary_mib()
    row["mctx_tree_mib"] = mctx.temporary_mib()
    return row


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
