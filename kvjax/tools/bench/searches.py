"""Searches that benchmarks time: their sizes, and one step of an episode by kvjax or LightZero.

All windows are full from the first timed step.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import meshes
from kvjax.config import BLOCK, SearchConfig, WorldModelConfig
from kvjax.mcts.search import compiled, search
from kvjax.model.contexts import Contexts, init_contexts
from kvjax.model.folding import prepare
from kvjax.model.step import FIRST_STEP
from kvjax.model.world_model import Params
from kvjax.tools.bench import lightzero_020, mctx_windows, rows

OBSERVATION_SIZE = 4
NUM_ACTIONS = 6
_MIN_BLOCKS = 10
_LONGEST_PLAYED = 64  # tokens; to fill longer windows step by step takes minutes
_MIB = 2**20
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one row."""

    embed: int
    envs: int
    context: int = 8  # tokens
    simulations: int = 50
    layers: int = 2
    heads: int = 8
    repeats: int = 15
    dtype: str = "float32"  # of kvjax's matrices
    devices: int = 1  # on which kvjax searches

    SIZES: ClassVar = ("embed", "layers", "context", "envs", "simulations", "dtype", "devices")

    def label(self) -> str:
        """What `--only` is matched against."""
        return ",".join(f"{name}={size}" for name, size in self.sizes().items())

    def sizes(self) -> dict[str, Any]:
        """The sizes that a row names."""
        return {name: getattr(self, name) for name in self.SIZES}

    @property
    def blocks(self) -> int:
        """Steps that fill a window."""
        return self.context // BLOCK

    @property
    def max_blocks(self) -> int:
        """Length of the position table, in blocks."""
        return max(_MIN_BLOCKS, self.blocks)


def choose(cases: Iterable[Case], only: str, *besides: str) -> dict[str, Case]:
    """Cases by label, see `kvjax.tools.bench.rows.choose`."""
    labeled = {case.label(): case for case in cases}
    otherwise = "no benchmark row matches {}; rows are " + "; ".join([*labeled, *besides])
    return rows.choose(labeled, only, otherwise=otherwise, besides=besides)


def lightzero_model(case: Case) -> Any:
    """LightZero 0.2.0's model of a case, with random weights."""
    return lightzero_020.build_model(
        observation_size=OBSERVATION_SIZE,
        num_actions=NUM_ACTIONS,
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        context_length=case.context,
        num_envs=case.envs,
        num_simulations=case.simulations,
        max_blocks=case.max_blocks,
    )


def _observations(case: Case) -> Any:
    """What each environment observes at every step: [envs, 4] float32."""
    shape = (case.envs, OBSERVATION_SIZE)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _full(contexts: Contexts, config: WorldModelConfig) -> Contexts:
    """Windows as full as in play, of tokens that nobody has computed."""
    window, kept = contexts.window, config.window.kept_length
    drawn = np.random.default_rng(0).normal(size=window.kv[0].shape).astype(window.kv.dtype)
    drawn[kept:] = 0
    kv = jnp.broadcast_to(jnp.asarray(drawn), window.kv.shape)
    length = jnp.full_like(window.length, kept)
    full = dataclasses.replace(window, kv=jax.device_put(kv, window.kv.sharding), length=length)
    return Contexts(full, jnp.full_like(contexts.timestep, config.context_length // BLOCK))


class Search:
    """One step of an episode by `kvjax.search` per call of `step`, or by mctx with windows."""

    def __init__(
        self,
        case: Case,
        config: WorldModelConfig,
        params: Params,
        how: SearchConfig | None = None,
        *,
        by_mctx: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        model = prepare(params, config=config, dtype=case.dtype)
        self.prepared = meshes.replicated(model, mesh)
        self.mean_depth = 0.0  # of the last search, mean over rows
        self._by_mctx = by_mctx
        self._config, self._observation = config, _observations(case)
        self.contexts = init_contexts(config, case.envs, mesh=mesh)
        self._action: Any = np.full(case.envs, FIRST_STEP)
        self._search = SearchConfig(num_simulations=1)
        if case.context > _LONGEST_PLAYED:
            self.contexts, self._action = _full(self.contexts, config), np.zeros(case.envs, int)
        else:
            for _ in range(case.blocks):
                self._act(*self._run(search))
        self._search = how or SearchConfig(case.simulations)

    def _run(self, function: Callable[..., T]) -> T:
        arrays = jax.random.key(0), self.contexts, self._observation, self._action
        return function(self.prepared, *arrays, config=self._config, search=self._search)

    def step(self) -> None:
        """Searches and acts."""
        self._act(*self._run(mctx_windows.search if self._by_mctx else search))

    def _act(self, contexts: Contexts, out: Any) -> None:
        self.contexts, self._action = contexts, np.asarray(out.action)
        if not self._by_mctx:
            self.mean_depth = float(np.mean(out.mean_depth))

    def temporary_mib(self) -> float:
        """What the compiled search holds beside its arguments and results."""
        program = mctx_windows.compiled if self._by_mctx else compiled
        memory: Any = self._run(program).memory_analysis()
        return float(memory.temp_size_in_bytes) / _MIB


def lightzero_search(case: Case, model: Any) -> Callable[[], None]:
    """One step of an episode by LightZero 0.2.0 per call."""
    searcher, observation = lightzero_020.Searcher(model), _observations(case)
    action: Any = np.full(case.envs, FIRST_STEP)
    for _ in range(case.blocks):
        action = searcher.push(observation, action).policy_logits.numpy().argmax(axis=1)

    def step() -> None:
        nonlocal action
        action = searcher.step(observation, action)["action"]

    return step
