"""Replays episodes that an agent played with LightZero, step by step.

Recorded observations and actions go in; visits, actions and root values are compared.

Shapes: A actions, E embedding size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax import store as stores
from kvjax.config import SearchConfig
from kvjax.lightzero.traces import npz
from kvjax.lightzero.traces.search_trace import Episode, EpisodeTrace, read_episodes
from kvjax.mcts.search import search
from kvjax.model import checkpoint, step
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.contexts import init_contexts
from kvjax.model.unizero import prepare
from kvjax.ops import support
from kvjax.tools.agent import read_agent
from kvjax.tools.parity import near_ties, reference_tree
from kvjax.tools.parity.host_search import encode, host_search, most_visited
from kvjax.tools.parity.verify_trees import Difference, as_json, difference, relative_error

Array = np.ndarray[Any, Any]
Answer = tuple[Array, float, int]
"""Visits [A], root value and action of one search."""

TOLERANCE = 1e-4
"""Largest relative error of a root value; models on two platforms do not agree to the last bit."""

_root_step = jax.jit(step.root_step, static_argnames="config")
_recurrent_step = jax.jit(step.recurrent_step, static_argnames="config")

_LEAST_IDENTICAL = 0.995
"""Share of the steps whose visits must be identical."""


@dataclasses.dataclass(frozen=True)
class EpisodeReport:
    """What the replay of an episode trace found."""

    trace: str
    route: str
    checkpoint: str
    steps: int
    identical_visits: float  # share of the steps
    identical_actions: float
    near_ties: int  # differences that a near tie explains
    max_root_value_error: float  # relative
    differences: tuple[Difference, ...]
    ok: bool  # near ties aside, all actions and 99.5 % of the visits are identical

    def as_json(self) -> dict[str, Any]:
        """Fields for `--json`; an infinite error is null."""
        return as_json(self)


def verify_episodes(
    path: str | Path,
    *,
    route: str = "tree",
    agent: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> EpisodeReport:
    """Replays an episode trace: recorded observations and actions go in, visits are compared.

    Args:
      path: see `kvjax.lightzero.traces.search_trace`.
      route: "tree" is `kvjax.search`, "store" is `kvjax.tools.parity.host_search`.
      agent: the agent that played, see `read_agent`; by default the shipped one of that
        environment.
      tolerance: largest relative error of a root value.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no episode trace, is incomplete, or the agent is another one.
    """
    trace = read_episodes(path)
    name = str(agent) if agent is not None else _shipped_agent(path, trace)
    player = _read_player(path, trace, name)
    replay = {"tree": _replay_tree, "store": _replay_store}[route]
    tally = _Tally()
    for episode in trace.episodes:
        for t, answer in enumerate(replay(player, trace.search, episode)):
            tally = _compare(tally, player, trace.search, episode, t, answer)
    explained = sum(d.margin is not None for d in tally.differences)
    unexplained = len(tally.differences) - explained
    few = unexplained <= (1.0 - _LEAST_IDENTICAL) * tally.steps
    return EpisodeReport(
        trace=str(path),
        route=route,
        checkpoint=name,
        steps=tally.steps,
        identical_visits=1.0 - len(tally.differences) / tally.steps,
        identical_actions=1.0 - tally.other_actions / tally.steps,
        near_ties=explained,
        max_root_value_error=tally.worst,
        differences=tally.differences,
        ok=few and tally.wrong_actions == 0 and tally.worst <= tolerance,
    )


@dataclasses.dataclass(frozen=True)
class _Tally:
    steps: int = 0
    other_actions: int = 0
    wrong_actions: int = 0  # other actions that no near tie explains
    worst: float = 0.0  # relative error of a root value
    differences: tuple[Difference, ...] = ()


def _compare(
    tally: _Tally,
    player: Checkpoint,
    config: SearchConfig,
    episode: Episode,
    t: int,
    answer: Answer,
) -> _Tally:
    """Adds step `t` of an episode."""
    visits, root_value, action = answer
    recorded, tie = episode.visits[t], None
    other_action, found = action != episode.actions[t], tally.differences
    if not np.array_equal(visits, recorded):
        if math.isfinite(root_value):
            start = functools.partial(_begin, player, config, episode, t)
            tie = near_ties.find(start, visits, recorded)
        where = f"seed {episode.seed}, step {t}"
        found = (*found, difference(where, visits, recorded, tie))
    value = tie.root_value if tie else root_value
    return _Tally(
        steps=tally.steps + 1,
        other_actions=tally.other_actions + other_action,
        wrong_actions=tally.wrong_actions + (other_action and tie is None),
        worst=max(tally.worst, relative_error(value, float(episode.root_values[t]))),
        differences=found,
    )


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


def _last_action(episode: Episode, t: int) -> Array:
    return np.array([episode.actions[t - 1] if t else step.FIRST_STEP])


def _replay_tree(player: Checkpoint, config: SearchConfig, episode: Episode) -> Iterator[Answer]:
    contexts = init_contexts(player.config, 1)
    prepared, rng = prepare(player.params, config=player.config), jax.random.key(0)
    for t, observation in enumerate(episode.observations):
        contexts, out = search(
            prepared,
            rng,
            contexts,
            observation[None],
            _last_action(episode, t),
            config=player.config,
            search=config,
        )
        yield np.asarray(out.visit_counts[0]), float(out.root_value[0]), int(out.action[0])


def _replay_store(player: Checkpoint, config: SearchConfig, episode: Episode) -> Iterator[Answer]:
    store = stores.init_store(player.config, 1, config.num_simulations)
    latent = np.zeros((1, player.config.embed_dim), np.float32)
    for t, observation in enumerate(episode.observations):
        store, latent, forest = host_search(
            player.params,
            store,
            latent,
            observation[None],
            _last_action(episode, t),
            np.array([t]),
            config=player.config,
            search=config,
        )
        tree = forest[0]
        action = int(most_visited(forest)[0])
        yield reference_tree.visit_counts(tree), reference_tree.root_value(tree), action


def _begin(
    player: Checkpoint, search_config: SearchConfig, episode: Episode, t: int
) -> tuple[reference_tree.Tree, near_ties.Network]:
    """The host's tree of one step, and the network behind whole windows: slow, and for one step."""
    config, params = player.config, player.params
    model = prepare(params, config=config)
    push = functools.partial(_root_step, model, config=config)
    imagine = functools.partial(_recurrent_step, model, config=config)
    window = init_contexts(config, 1).window
    latents = encode(params, episode.observations[: t + 1], config=config)
    for s, latent in enumerate(latents):
        window, policy, _ = push(window, _last_action(episode, s), latent[None], np.array([s]))
    nodes, depths = [window], [0]

    def network(node: int, action: int) -> tuple[float, float, Array]:
        depths.append(depths[node] + 1)
        row = (np.array([x], np.int32) for x in (action, depths[-1], t))
        child, answer = imagine(nodes[node], *row)
        nodes.append(child)
        reward, value = (
            support.to_scalar(x[0], config.support) for x in (answer.reward, answer.value)
        )
        return float(reward), float(value), np.asarray(answer.policy[0])

    legal = np.ones(config.num_actions, bool)
    return reference_tree.init(np.asarray(policy[0]), legal, search_config), network
