"""`kvjax bench exactness`: how far each window mode is from a full forward pass, layer by layer.

One episode is run by the cache. At each step the outputs and the stored window are compared with
two references, which no mode equals both of once a window has overflowed:

* "history": one full pass over the tokens of the whole episode, each at the position where it was
  pushed, attending to what was in its window then. What left the window goes on acting through the
  tokens that saw it.
* "window": the window's own raw tokens alone, at the positions that the mode gives them. What left
  the window is forgotten.

Shapes: T steps, N = 2 T - 1 tokens, E embedding size, L layers, C context_length in tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import files
from kvjax.config import WINDOW_MODES, WindowMode, WorldModelConfig
from kvjax.model import checkpoint, folding, step, unizero, world_model
from kvjax.model.contexts import init_contexts
from kvjax.model.world_model import Params, WorldModel
from kvjax.ops.window import Window
from kvjax.tools.bench.rows import Progress, Row, choose, measured

Array = np.ndarray[Any, Any]

STEPS = 100
WEIGHTS = ("trained", "random")
REFERENCES = ("history", "window")
_OTHERWISE = (
    f"no row matches {{}}; say mode=, one of {', '.join(WINDOW_MODES)}, or weights=, one of"
    f" {', '.join(WEIGHTS)}, or reference=, one of {', '.join(REFERENCES)}"
)
_TRAINED = {True: "cartpole_masked_rope", False: "cartpole_masked"}  # by rotary positions


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in one window mode, and the episode that it is run on."""

    config: WorldModelConfig
    params: Params
    actions: Array  # [T - 1] int32
    latents: Array  # [T, E] float32


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a pass says at each step."""

    policy: Array  # [T, A] logits
    value: Array  # [T, S] logits
    kept: tuple[Array, ...]  # per step [n, L, 2, H, D]: what stays in the window after the step


def run(
    *,
    only: str = "",
    progress: Progress = lambda share, text: None,
    plot: str | Path | None = None,
    rows: list[Row] | None = None,
) -> dict[str, Any]:
    """Compares every mode with both references, with trained and with random weights.

    Args:
      only: comma-separated parts of a row's label, e.g. "mode=rebuild,weights=trained".
      plot: writes a picture of the errors along the episode, as matplotlib understands the name.
      rows: where rows are added as they are measured.

    Returns:
      The fields of `--json`: machine, versions, and one row per weights, mode and reference. A row
      has the largest absolute errors of the policy and value logits; the mean relative error
      (Frobenius) of each layer's keys and values over the steps whose window has overflowed; and
      `series`, the larger relative error of the last layer's keys and values at each step.

    Raises:
      ValueError: no row fits `only`, or matplotlib writes no plot of that name.
      ImportError: a plot without matplotlib.
      OSError: the plot cannot be written; said before anything is measured.
    """
    cases = {
        f"weights={weights},mode={mode},reference={reference}": (weights, mode, reference)
        for weights in WEIGHTS
        for mode in WINDOW_MODES
        for reference in REFERENCES
    }
    chosen = choose(cases, only, otherwise=_OTHERWISE)
    if plot is not None:
        _plot_format(plot)
        files.require_writable(plot)
    passes = functools.lru_cache(maxsize=1)(_passes)
    result = measured(chosen, functools.partial(_row, passes), progress=progress, rows=rows)
    if plot is not None:
        draw(result["rows"], plot)
    return result


def _passes(weights: str, mode: WindowMode) -> tuple[Case, Outputs, "History"]:
    case = make_case(weights, mode)
    return case, by_cache(case), History(case.config, STEPS)


def _row(passes: Any, labels: tuple[str, WindowMode, str], progress: Progress) -> Row:
    weights, mode, reference = labels
    case, ours, history = passes(weights, mode)
    answers = {"history": by_history, "window": by_window}[reference](case, history)
    named = {"weights": weights, "mode": mode, "reference": reference}
    return named | compare(ours, answers, history.overflowed)


def make_case(weights: str, mode: WindowMode, steps: int = STEPS) -> Case:
    """The shipped agents or random weights of their shapes; random actions and observations."""
    agent = checkpoint.load(checkpoint.shipped()[_TRAINED[mode.startswith("rope")]])
    config, rng = dataclasses.replace(agent.config, window_mode=mode), np.random.default_rng(0)
    params = agent.params
    if weights == "random":
        params = world_model.init_params(jax.random.key(0), config)
    # A pole that drifts: positions and angles in the range that the agents saw.
    drift = np.cumsum(rng.normal(size=(steps, 4)), axis=0) / np.sqrt(steps)
    observations = jnp.asarray(drift * [1.0, 0.0, 1.0, 0.0], jnp.float32)
    latents = _encode(params, observations, config=config)
    actions = rng.integers(config.num_actions, size=steps - 1).astype(np.int32)
    return Case(config, params, actions, np.asarray(latents))


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: Params, observations: jax.Array, *, config: WorldModelConfig) -> jax.Array:
    return unizero.encode(folding.fold(params, config=config), observations, config=config)


class History:
    """Which tokens each step pushes, sees and keeps, as plain lists of token numbers."""

    def __init__(self, config: WorldModelConfig, steps: int) -> None:
        self.config = config
        self.positions: list[int] = []  # [N], where each token was pushed
        self.earlier = np.zeros((2 * steps - 1, 2 * steps - 1), bool)  # [N, N] seen besides itself
        self.held: list[list[int]] = []  # per step: the window with the step's observation
        self.kept: list[list[int]] = []  # per step: after making room
        window: list[int] = []
        for token in range(2 * steps - 1):
            self.earlier[token, window] = True
            self.positions.append(token if config.is_rotary else len(window))
            window = [*window, token]
            if token % 2 == 0:
                self.held.append(window)
                window = self._make_room(window)
                self.kept.append(window)

    def _make_room(self, window: list[int]) -> list[int]:
        if len(window) < self.config.window.full_length:
            return window
        carry = self.config.mode.carry
        return window[-(self.config.window.kept_length if carry is None else carry) :]

    @property
    def overflowed(self) -> Array:
        """Whether anything has left the window after each step: [T] bool."""
        return np.array([0 not in window for window in self.kept])


def by_cache(case: Case) -> Outputs:
    """The episode step by step, as a search's root windows are made."""
    config, params = case.config, case.params
    acted = np.concatenate([[step.FIRST_STEP], case.actions]).astype(np.int32)

    @jax.jit
    def episode() -> Any:
        model = folding.fold(params, config=config)

        def one_step(window: Window, x: Any) -> Any:
            window, policy, value = step.root_step(model, window, *x, config=config)
            return window, (window, policy, value)

        timesteps = jnp.arange(len(acted), dtype=jnp.int32)
        start = init_contexts(config, 1).window
        history = jax.tree.map(lambda x: x[:, None], (acted, case.latents, timesteps))
        return jax.lax.scan(one_step, start, history)[1]

    window, policy, value = jax.tree.map(lambda x: np.asarray(x)[:, 0], episode())
    kept = tuple(kv[:length] for kv, length in zip(window.kv, window.length, strict=True))
    return Outputs(policy, value, kept)


def _tokens(case: Case) -> Array:
    """Raw tokens [N, E]: o0 a0 o1 a1 .."""
    actions = jax.jit(jax.vmap(_published(case, "embed_action")))(case.actions)
    pairs = np.stack([case.latents[:-1], np.asarray(actions)], axis=1)
    return np.concatenate([pairs.reshape(-1, case.config.embed_dim), case.latents[-1:]])


def _published(case: Case, method: str) -> Callable[..., Any]:
    """The model's formulas as they were published: the Flax module's, not folded, no cache."""
    return functools.partial(WorldModel(case.config).apply, case.params, method=method)


def _heads(case: Case, hidden: Array) -> tuple[Array, Array]:
    policy, value = jax.jit(jax.vmap(_published(case, "at_observation")))(hidden)
    return np.asarray(policy), np.asarray(value)


def by_history(case: Case, history: History) -> Outputs:
    """One full pass over all tokens of the episode."""
    positions = jnp.asarray(history.positions, jnp.int32)
    whole = jax.jit(_published(case, "sequence"))
    hidden, kv = whole(_tokens(case), positions, jnp.asarray(history.earlier))
    return Outputs(
        *_heads(case, np.asarray(hidden)[::2]), tuple(np.asarray(kv)[w] for w in history.kept)
    )


def by_window(case: Case, history: History) -> Outputs:
    """A full pass over each step's window."""
    tokens = jnp.asarray(_tokens(case))

    @jax.jit
    @jax.vmap
    def passes(members: jax.Array) -> Any:
        slots = jnp.arange(members.shape[0])
        positions = members if case.config.is_rotary else slots
        return _published(case, "sequence")(tokens[members], positions)

    def padded(window: list[int]) -> list[int]:
        """Behind its last token, where the tokens before it do not see it."""
        return window + window[-1:] * (case.config.window.full_length - len(window))

    hidden, _ = passes(np.array([padded(window) for window in history.held], np.int32))
    _, kv = passes(np.array([padded(window) for window in history.kept], np.int32))
    last = np.array([len(window) - 1 for window in history.held])
    kept = tuple(rows[: len(w)] for rows, w in zip(np.asarray(kv), history.kept, strict=True))
    return Outputs(*_heads(case, np.asarray(hidden)[np.arange(len(last)), last]), kept)


def compare(ours: Outputs, theirs: Outputs, overflowed: Array) -> Row:
    """A row's errors."""
    pairs = list(zip(ours.kept, theirs.kept, strict=True))
    by_step = np.array([_relative(mine, other) for mine, other in pairs])  # [T, L, 2]
    row: Row = {
        "policy_error": float(np.max(np.abs(ours.policy - theirs.policy))),
        "value_error": float(np.max(np.abs(ours.value - theirs.value))),
    }
    for layer, error in enumerate(np.mean(by_step[overflowed], axis=0)):
        row |= {f"k{layer}_error": float(error[0]), f"v{layer}_error": float(error[1])}
    return row | {"series": np.max(by_step[:, -1], axis=1).tolist()}


def _relative(ours: Array, theirs: Array) -> Array:
    """Relative error of keys and values of each layer: [n, L, 2, H, D] to [L, 2]."""
    size = np.sqrt(np.sum(np.square(theirs), axis=(0, 3, 4)))
    error: Array = np.sqrt(np.sum(np.square(ours - theirs), axis=(0, 3, 4))) / size
    return error


def _plot_format(path: str | Path) -> str:
    """What matplotlib calls the file's format."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("drawing a plot needs matplotlib (pip install matplotlib)") from error
    suffix, known = Path(path).suffix.lower().removeprefix("."), FigureCanvasBase.filetypes
    if suffix not in known:
        raise ValueError(f"a plot's name must end in one of .{', .'.join(sorted(known))}: {path}")
    return suffix


def draw(rows: list[Row], path: str | Path) -> None:
    """Draws each row's `series`, one panel for each weights and reference."""
    picture = _plot_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(len(WEIGHTS), len(REFERENCES), sharex=True, sharey=True)
    for line, weights in zip(panels, WEIGHTS, strict=True):
        for axes, reference in zip(line, REFERENCES, strict=True):
            axes.set(title=f"{weights} weights, against the {reference}", yscale="log")
            axes.set(ylim=(1e-8, 2.0), xlabel="step", ylabel="relative error, last layer")
            for row in rows:
                if (row["weights"], row["reference"]) == (weights, reference):
                    axes.plot(np.maximum(row["series"], 1e-8), label=row["mode"], linewidth=1.2)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    with files.replacing(path) as file:
        figure.savefig(file, format=picture, dpi=120)
