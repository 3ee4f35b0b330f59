"""Random walks along which a model is asked: latents, actions, trees.

Shapes: B environments, E embedding size, N simulations; an action is [], or [A] numbers.
"""

import math
from typing import Any

import numpy as np

from kvjax.config import WorldModelConfig
from kvjax.model.step import FIRST_STEP, first_actions

Array = np.ndarray[Any, Any]

_GO_DEEPER = 0.6  # share of simulations that expand the newest node
_STEP = 0.5  # of a walk, in standard deviations of a latent's logits


class Walks:
    """What the B environments do."""

    def __init__(self, rng: np.random.Generator, config: WorldModelConfig, rows: int) -> None:
        self._rng, self._config, self._rows = rng, config, rows
        self._logits = rng.standard_normal((rows, config.embed_dim - config.task_size))

    def latents(self) -> Array:
        """The next latents of all rows, as the model's own norm would shape them: [B, E]."""
        shape = self._logits.shape
        self._logits = self._logits + _STEP * self._rng.standard_normal(shape)
        if self._config.latent_norm == "layernorm":
            centred = self._logits - self._logits.mean(axis=1, keepdims=True)
            return np.asarray(centred / centred.std(axis=1, keepdims=True), np.float32)
        weights = np.exp(self._logits).reshape(shape[0], -1, self._config.simnorm_group)
        shares = weights / weights.sum(axis=2, keepdims=True)
        return np.asarray(shares.reshape(shape), np.float32)

    def actions(self, begins: Array) -> Array:
        """The last actions [B, ...] of all rows, some of which begin [B]."""
        actions = self._random_actions(self._rows)
        actions[begins] = first_actions(int(begins.sum()), self._config)
        return actions

    def _random_actions(self, count: int) -> Array:
        if self._config.is_continuous:
            shape = count, self._config.num_actions
            return self._rng.uniform(-1.0, 1.0, shape).astype(np.float32)
        return self._rng.integers(self._config.num_actions, size=count)

    def trees(self, sims: int) -> tuple[Array, Array]:
        """Parents [N, B] and actions [N, B, ...]; no row expands an edge twice."""
        shape, config = (sims, self._rows), self._config
        edges = config.num_edges if config.is_continuous else config.num_actions
        parents, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row in range(shape[1]):
            free = [(0, edge) for edge in range(edges)]
            for index in range(shape[0]):
                newest = [edge for edge in free if edge[0] == index]
                chosen = newest if self._rng.random() < _GO_DEEPER else free
                edge = chosen[self._rng.integers(len(chosen))]
                free.remove(edge)
                parents[index, row], actions[index, row] = edge
                free += [(index + 1, edge) for edge in range(edges)]
        if config.is_continuous:  # an edge is an action that was drawn
            drawn = self._random_actions(math.prod(shape))
            return parents, drawn.reshape(*shape, *config.action_shape)
        return parents, actions


def as_lightzero_says(actions: Array) -> list[Any]:
    """Last actions: numbers, or vectors and -1 in rows that begin."""
    if actions.ndim == 1:
        return list(actions.tolist())
    return [FIRST_STEP if np.isnan(action).all() else action for action in actions]
