"""Replays episodes that an agent played with LightZero, step by step.

Recorded observations and actions go in; visits, actions and root values are compared.

Shapes: A actions, E embedding size.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.config import SearchConfig
from kvjax.lightzero.traces import npz
from kvjax.lightzero.traces.search_trace import Episode, EpisodeTrace, read_episodes
from kvjax.model import checkpoint, step
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.agent import read_agent
from kvjax.tools.parity import reference_tree
from kvjax.tools.parity.host_search import encode
from kvjax.tools.parity.nodes import Carried, network
from kvjax.tools.parity.report import Compared, Report, compare, differences
from kvjax.tools.routes import ROUTES, Answer

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-4
"""Largest relative error of a root value; models on two platforms do not agree to the last bit."""

_LEAST_IDENTICAL = 0.995
"""Share of the steps whose visits must be identical."""


def verify_episodes(
    path: str | Path,
    *,
    route: str = "tree",
    agent: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> Report:
    """Replays an episode trace: recorded observations and actions go in, visits are compared.

    Args:
      path: see `kvjax.lightzero.traces.search_trace`.
      route: "tree" is `kvjax.search`, "store" is `kvjax.tools.parity.host_search`.
      agent: the agent that played, see `read_agent`; by default the shipped one of that
        environment.
      tolerance: largest relative error of a root value.

    Returns:
      Finds the `checkpoint`; the number of `steps`; the shares of `identical_visits` and
      `identical_actions`; the number of `near_ties` that explain a difference;
      `max_root_value_error`, relative; and the `differences`. All is well if, near ties aside, all
      actions and 99.5 % of the visits are identical.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no episode trace, is incomplete, or the agent is another one.
    """
    trace = read_episodes(path)
    name = str(agent) if agent is not None else _shipped_agent(path, trace)
    player = _read_player(path, trace, name)
    searches = list(_replay(player, trace, route))
    found: dict[str, Any] = {
        "checkpoint": name,
        "steps": len(searches),
        "identical_visits": _share(one.same_visits for one in searches),
        "identical_actions": _share(one.same_action for one in searches),
    }
    found |= differences(searches)
    explained = _share(one.same_visits or one.tie is not None for one in searches)
    actions = all(one.same_action or one.tie is not None for one in searches)
    close = found["max_root_value_error"] <= tolerance
    return Report(str(path), route, found, explained >= _LEAST_IDENTICAL and actions and close)


def _share(are: Iterable[bool]) -> float:
    return float(np.mean(list(are)))


def _shipped_agent(path: str | Path, trace: EpisodeTrace) -> str:
    """The shipped agent that plays the trace's environment with its window mode."""
    for name, file in checkpoint.shipped().items():
        agent = checkpoint.load(file)
        if (agent.environment, agent.config.window_mode) == (trace.environment, trace.window_mode):
            return name
    raise ValueError(
        f"{path}: no agent that is shipped plays {trace.environment}, pass --checkpoint"
    )


def _read_player(path: str | Path, trace: EpisodeTrace, name: str) -> Checkpoint:
    """The agent, which must be of the trace's sizes."""
    sizes = {"num_heads": trace.num_heads, "context_length": trace.context_length}
    player, _ = read_agent(name, **sizes, window_mode=trace.window_mode)
    config, episode = player.config, trace.episodes[0]
    expected = {
        "support": (trace.support, config.support),
        "num_actions": (episode.visits.shape[1], config.num_actions),
        "observation_shape": (episode.observations.shape[1:], config.observation_shape),
    }
    for what, (recorded, ours) in expected.items():
        if recorded != ours:
            raise ValueError(f"{path} was recorded with {what} {recorded}, {name} has {ours}")
    nodes, window = trace.search.num_nodes, config.window
    what = f"{path}: {nodes:,} nodes with {window.context_length:,} tokens are too large"
    npz.check_bytes(what, 4 * nodes * window.context_length * math.prod(window.token_shape))
    return player


def _replay(player: Checkpoint, trace: EpisodeTrace, route: str) -> Iterator[Compared]:
    search_step = ROUTES[route](player.params, player.config, trace.search, 1)
    nodes, rng = Carried(player.params, player.config, 1), jax.random.key(0)
    for episode in trace.episodes:
        recorded = zip(episode.visits, episode.root_values, episode.actions, strict=True)
        for t, answer in enumerate(recorded):
            ours = search_step(rng, episode.observations[t, None], _last_action(episode, t))
            begin = functools.partial(_begin, player, nodes, trace.search, episode, t)
            where = f"seed {episode.seed}, step {t}"
            yield compare(where, Answer(*(x[0] for x in ours)), Answer(*answer), begin)


def _last_action(episode: Episode, t: int) -> Array:
    return np.array([episode.actions[t - 1] if t else step.FIRST_STEP])


def _begin(
    player: Checkpoint, nodes: Carried, search_config: SearchConfig, episode: Episode, t: int
) -> tuple[reference_tree.Tree, reference_tree.Network]:
    """The host's tree of one step, and the network behind whole windows: slow, and for one step."""
    for s, observation in enumerate(episode.observations[: t + 1]):
        latent = encode(player.params, observation[None], config=player.config)
        policy, _ = nodes.observe(latent, _last_action(episode, s), latent, np.array([s]))
    legal = np.ones(player.config.num_actions, bool)
    tree = reference_tree.init(np.asarray(policy[0]), legal, search_config)
    return tree, network(nodes, player.config)
