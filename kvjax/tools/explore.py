"""One search out of an episode, as a page that is stepped through in a browser."""

import contextlib
import dataclasses
import functools
from collections import deque
from pathlib import Path
from typing import Any

from kvjax.base.values import require
from kvjax.config import SearchConfig, WindowMode
from kvjax.mcts.output import SearchOutput
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.play import Status, play
from kvjax.tools.routes import tree

TOKENS = "action", "latent"
"""What a step of UniZero adds."""

NOTES: dict[WindowMode, str] = {
    "learned": "Positions are learned: what stays is corrected for its new slots.",
    "rope_lightzero": "Positions are rotary, of the episode: what stays is as it was.",
    "rope_consistent": "Positions are rotary, of the episode: what stays is as it was.",
    "rebuild": "Keys and values of what stays are computed again from raw tokens.",
    "reset": "A full window keeps the newest latent alone.",
}
"""What a full window does with its tokens."""


@dataclasses.dataclass(frozen=True)
class Explored:
    """Which search was written."""

    output: str
    step: int
    action: int
    simulations: int
    root_value: float


class _EnoughError(Exception):
    """The step has been searched."""


def explore(
    agent: Checkpoint, path: str | Path, *, step: int, search: SearchConfig, seed: int = 0
) -> Explored:
    """Plays one episode up to a step and writes that step's search; its last if it ends before.

    Args:
      agent: a model whose checkpoint names its environment.
      path: of the page.
      step: of the episode, from 0.
      search: how to search.
      seed: the episode is reset with it.

    Raises:
      ValueError: a step below 0, a model whose nodes draw their actions, or what
        `kvjax.tools.play.play` refuses.
      OSError: the page cannot be written.
    """
    require(step >= 0, f"step must be at least 0, got {step}")
    drawn = agent.config.num_sampled_actions
    require(drawn is None, f"the page shows trees of all actions, this model draws {drawn} of them")
    outputs: deque[SearchOutput] = deque(maxlen=1)
    last = -1

    def count(status: Status) -> None:
        nonlocal last
        last = status.steps - 1
        if last == step:
            raise _EnoughError

    options: dict[str, Any] = {"search_config": search, "seed": seed, "progress": count}
    route = functools.partial(tree, look=outputs.append)
    with contextlib.suppress(_EnoughError):
        play(agent, episodes=1, route=route, **options)
    (out,) = outputs
    env_id = "an episode" if agent.environment is None else agent.environment.env_id
    out.to_html(
        path,
        tokens=TOKENS,
        title=f"{env_id}, step {last}, simulation by simulation",
        note=NOTES[agent.config.window_mode],
    )
    action, value = int(out.action[0]), float(out.root_value[0])
    return Explored(str(path), last, action, search.num_simulations, value)
