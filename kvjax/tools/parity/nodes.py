"""Nodes of searches that the host leads: what was observed makes a root, what is imagined a child.

`Carried` and `Stored` take the same steps; one finds a parent's window by the parent's index, the
other by its latent. A row of a batch is an environment, and node i is the i-th that was made.

Shapes: B environments, E embedding size, A actions, S support bins.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import store as stores
from kvjax.config import WorldModelConfig
from kvjax.mcts.inference import Inference, initial_inference, recurrent_inference
from kvjax.model import step
from kvjax.model.contexts import init_contexts
from kvjax.model.folding import UniZero, prepare
from kvjax.model.step import Prediction
from kvjax.model.world_model import Params
from kvjax.ops import support
from kvjax.ops.window import Window
from kvjax.store import Store
from kvjax.tools.parity.reference_tree import Network

Array = np.ndarray[Any, Any]
Root = tuple[jax.Array, jax.Array]
"""Policy logits [B, A], or of Gaussians [B, 2A], and value logits [B, S]."""


class Carried:
    """Windows by index; those of the roots are carried from step to step."""

    def __init__(
        self,
        params: Params,
        config: WorldModelConfig,
        num_envs: int,
        *,
        pads_are_read: bool = False,
    ) -> None:
        self._model = prepare(params, config=config)
        self._push = jax.jit(functools.partial(step.root_step, config=config))
        self._imagine = jax.jit(
            functools.partial(_recurrent_step, config=config, pads_are_read=pads_are_read)
        )
        self._nodes = [init_contexts(config, num_envs).window]

    @property
    def roots(self) -> Window:
        """The roots' windows [B, ...]."""
        return self._nodes[0]

    def observe(self, last_latent: Any, action: Array, latent: Any, timestep: Array) -> Root:
        """Makes roots of what the environments did; see `kvjax.initial_inference`."""
        del last_latent  # the windows are at hand
        self._timestep = timestep.astype(np.int32)
        asked = step.as_taken(action), latent, self._timestep
        window, policy, value = self._push(self._model, self.roots, *asked)
        self._nodes = [window]
        return policy, value

    def imagine(self, parent: Array, action: Array, depth: Array) -> Prediction:
        """Makes a child of node `parent[b]` in each row b, at a depth of 1 or more."""
        parents = [self._nodes[i] for i in parent]
        asked = step.as_taken(action), depth.astype(np.int32), self._timestep
        prediction: Prediction
        child, prediction = self._imagine(self._model, parents, *asked)
        self._nodes.append(child)
        return prediction


def _recurrent_step(
    model: UniZero,
    parents: list[Window],
    *rows: jax.Array,
    config: WorldModelConfig,
    pads_are_read: bool,
) -> tuple[Window, Prediction]:
    """The batched step from row b of window b; in 0.2.0 each row reads the padding of its batch."""
    windows = [jax.tree.map(lambda x, b=b: x[b], parent) for b, parent in enumerate(parents)]
    window = jax.tree.map(lambda *leaves: jnp.stack(leaves), *windows)
    pads = jnp.max(window.length) - window.length if pads_are_read else None
    return step.recurrent_step(model, window, *rows, config=config, zero_keys=pads)


class Stored:
    """Windows in a store, looked up by latents. Options are those of `recurrent_inference`."""

    def __init__(
        self, params: Params | UniZero, config: WorldModelConfig, store: Store, **options: Any
    ) -> None:
        self.store = store
        self._config, self._options = config, options
        self._model = params if isinstance(params, UniZero) else prepare(params, config=config)

    @property
    def roots(self) -> Window:
        """The roots' windows [B, ...]."""
        window: Window = _named(self.store, self._handle, self._rows)
        return window

    def observe(self, last_latent: Any, action: Array, latent: Any, timestep: Array) -> Root:
        """Makes roots of what the environments did; see `kvjax.initial_inference`."""
        self._rows, self._timestep, self._latents = np.arange(len(action)), timestep, [latent]
        asked = last_latent, action, latent, self._rows, timestep
        self.store, out = initial_inference(self._model, self.store, *asked, config=self._config)
        self._handle = out.slot
        return out.policy, out.value

    def imagine(self, parent: Array, action: Array, depth: Array) -> Inference:
        """Makes a child of node `parent[b]` in each row b, at a depth of 1 or more."""
        latent = np.stack([self._latents[i][b] for b, i in enumerate(parent)])
        asked = latent, action, self._rows, depth, self._timestep
        options = {"config": self._config, **self._options}
        self.store, out = recurrent_inference(self._model, self.store, *asked, **options)
        self._latents.append(np.asarray(out.latent))
        return out


@jax.jit
def _named(store: Store, handle: jax.Array, env_id: jax.Array) -> Window:
    """Windows of handles [B] in environments [B]."""
    return stores.take(store, stores.resolve(store, handle, env_id))


def network(nodes: Carried | Stored, config: WorldModelConfig) -> Network:
    """What a host's trees ask: makes children and answers with scalars."""

    def answer(parent: Array, action: Array, depth: Array) -> list[Array]:
        out = nodes.imagine(parent, action, depth)
        scalars = _scalars(out.reward, out.value, config=config)
        return [np.asarray(x) for x in (*scalars, out.policy)]

    return answer


@functools.partial(jax.jit, static_argnames=("config",))
def _scalars(
    reward: jax.Array, value: jax.Array, *, config: WorldModelConfig
) -> tuple[jax.Array, jax.Array]:
    return support.to_scalar(reward, config.support), support.to_scalar(value, config.support)
