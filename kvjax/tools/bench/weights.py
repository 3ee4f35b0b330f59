"""`kvjax bench weights`: what is left of an agent whose matrices are bfloat16.

Each shipped agent plays the same episodes with float32 matrices and with bfloat16 ones. Along the
float32 episodes both search every step, each with a context of its own, which tells how alike their
answers are.

Shapes: B environments, A actions.
"""

import functools
from typing import Any

import jax
import numpy as np

from kvjax.config import SearchConfig, WorldModelConfig
from kvjax.model import checkpoint
from kvjax.model.folding import UniZero, prepare
from kvjax.tools.bench.rows import Progress, Row, choose, measured
from kvjax.tools.play import Status, play
from kvjax.tools.routes import Answer, Step, tree

Array = np.ndarray[Any, Any]

EPISODES = 24
"""As many in each row of a batch, so that none has to wait for the others."""

SIMULATIONS = 25
_SHARES = 2  # of a row's time: both agents play


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    rows: list[Row] | None = None,
) -> dict[str, Any]:
    """Plays every shipped agent, or that of one name.

    Returns:
      The fields of `--json`: machine, versions and a row per agent: both mean returns; of all
      searches along the float32 episodes the shares whose action and whose visits are the same, the
      mean share of a search's visits that went elsewhere, and the mean difference of root values.

    Raises:
      ValueError: no agent is called `only`.
    """
    agents = checkpoint.shipped()
    cases = {name: name for name in agents}
    otherwise = f"no row matches {{}}; rows are {', '.join(agents)}"
    chosen = choose(cases, only, otherwise=otherwise)
    return measured(chosen, _row, progress=progress, rows=rows)


def _row(name: str, progress: Progress) -> Row:
    agent = checkpoint.load(checkpoint.shipped()[name])
    search, pairs = SearchConfig(SIMULATIONS), Pairs()

    def tell(part: int, dtype: str, status: Status) -> None:
        progress((part + status.fraction) / _SHARES, dtype)

    how: Any = {"episodes": EPISODES, "search_config": search}
    first, second = (functools.partial(tell, *x) for x in enumerate(("float32", "bfloat16")))
    plain = play(agent, route=pairs.route, progress=first, **how)
    rounded = play(agent, dtype="bfloat16", progress=second, **how)
    return {
        "agent": name,
        "episodes": EPISODES,
        "simulations": SIMULATIONS,
        "float32_return": plain.mean_return,
        "bfloat16_return": rounded.mean_return,
        **pairs.agreement(),
    }


class Pairs:
    """Both models' answers to the same observations."""

    def __init__(self) -> None:
        self._begun: list[list[tuple[Answer, Answer]]] = []

    def route(
        self,
        params: Any,
        config: WorldModelConfig,
        search_config: SearchConfig,
        num_envs: int,
        mesh: Any = None,
    ) -> Step:
        """A route that answers as float32 does, see `kvjax.tools.routes`."""
        pairs: list[tuple[Answer, Answer]] = []
        self._begun.append(pairs)
        models: tuple[UniZero, ...] = params, prepare(params, config=config, dtype="bfloat16")
        steps = [tree(model, config, search_config, num_envs, mesh) for model in models]

        def step(rng: jax.Array, observation: Array, last_action: Array) -> Answer:
            ours, theirs = (one(rng, observation, last_action) for one in steps)
            pairs.append((ours, theirs))
            return ours

        return step

    def agreement(self) -> Row:
        """How alike the answers were in what was begun first: what comes then only compiles."""
        sides = zip(*self._begun[0], strict=True)
        ours, theirs = (Answer(*map(np.concatenate, zip(*x, strict=True))) for x in sides)
        moved = np.abs(ours.visits - theirs.visits).sum(axis=1) / 2
        return {
            "searches": len(moved),
            "same_action": float(np.mean(ours.action == theirs.action)),
            "same_visits": float(np.mean(moved == 0)),
            "visits_moved": float(np.mean(moved / ours.visits.sum(axis=1))),
            "value_difference": float(np.mean(np.abs(ours.root_value - theirs.root_value))),
        }
