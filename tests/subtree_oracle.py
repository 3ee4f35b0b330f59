"""Searches that keep the subtree of the action that was taken, in plain Python, one row.

A node is an object and so is a token: a window is a list of tokens, oldest first, and tokens know
nothing of positions. The rules of a search are written out once more, on objects.
"""

import dataclasses

import flax_model
import jax
import jax.numpy as jnp
import numpy as np

from kvjax.ops import support
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.tools.parity import reference_tree

F = np.float32
ZERO = F(0)
encode = jax.jit(flax_model.encode, static_argnames="config")
root_step = jax.jit(flax_model.root_step, static_argnames="config")
recurrent_step = jax.jit(flax_model.recurrent_step, static_argnames="config")
rebuild = jax.jit(flax_model.rebuild, static_argnames="config")
to_scalar = jax.jit(support.to_scalar, static_argnums=1)


@dataclasses.dataclass(eq=False)
class Token:
    bare: np.ndarray  # [L, 2, H, D] without what its slot adds
    raw: np.ndarray | None


@dataclasses.dataclass(eq=False)
class Node:
    prior: np.ndarray  # [A]
    tokens: list | None  # None: forgotten, only its edge's statistics are left
    born: int = 0
    reward: np.float32 = ZERO
    visits: int = 0
    value_sum: np.float32 = ZERO
    children: dict = dataclasses.field(default_factory=dict)

    def q(self, discount):
        return F(self.reward + F(discount) * (self.value_sum / F(self.visits)))

    def below(self):
        """All nodes below this one that still have tokens."""
        for child in self.children.values():
            if child.tokens is not None:
                yield child
                yield from child.below()


class Searcher:
    """One environment: `act` pushes a step and searches from it."""

    def __init__(self, params, config, search):
        self.params, self.config, self.search = params, config, search
        shape = (config.context_length, *config.window.token_shape)
        self.added = np.zeros(shape, F)
        if not config.is_rotary:
            self.added = np.asarray(flax_model.projected_positions(params, config=config))
        self.window, self.root, self.timestep = windows.init(config.window), None, -1
        self.born = 0

    def act(self, observation, last_action, legal):
        """Visits [A], Q values [A] and the value of the root."""
        latent = encode(self.params, observation, config=self.config)
        self.timestep = 0 if last_action == -1 else self.timestep + 1
        self.window, policy, _ = root_step(
            self.params,
            self.window,
            jnp.int32(last_action),
            latent,
            jnp.int32(self.timestep),
            config=self.config,
        )
        prior = np.zeros(len(legal), F)
        prior[legal] = reference_tree.softmax(np.asarray(policy)[legal])
        self.legal = legal
        child = self.root.children.get(last_action) if self.root and last_action >= 0 else None
        if child is None or child.tokens is None:
            self.low, self.high = F(1e6), F(-1e6)
            self.root = Node(prior, self._tokens_of(self.window), visits=1)
        else:
            self._promote(child, prior)
        for _ in range(self.search.num_simulations):
            self._simulate()
        visits, q = np.zeros(len(legal), int), np.zeros(len(legal), F)
        for action, node in self.root.children.items():
            visits[action], q[action] = node.visits, node.q(self.search.discount)
        return visits, q, F(self.root.value_sum / F(self.root.visits))

    def _promote(self, child, prior):
        """The child becomes the root; nodes beyond the capacity are forgotten, newest first."""
        for action in [a for a in child.children if not self.legal[a]]:
            lost = child.children.pop(action)
            child.visits -= lost.visits
            child.value_sum -= F(lost.visits) * lost.q(self.search.discount)
        tokens = self._tokens_of(self.window)
        real = dict(zip(map(id, child.tokens), tokens, strict=True))
        for rank, node in enumerate(sorted(child.below(), key=lambda node: node.born)):
            if rank < self.search.kept_nodes:
                node.tokens = [real.get(id(token), token) for token in node.tokens]
            else:
                node.tokens, node.children = None, {}
        child.tokens, child.prior, self.root = tokens, prior, child

    def _simulate(self):
        node, path, parent_q, depth = self.root, [self.root], F(0), 0
        while True:
            parent_q, action = self._best(node, parent_q)
            child, depth = node.children.get(action), depth + 1
            if child is None or child.tokens is None or depth == self.search.max_depth:
                break
            node = child
            path.append(node)
        reward, value, prior, tokens = self._imagine(node, action, depth)
        self.born += 1
        if child is None:
            child = node.children[action] = Node(prior, None)
        if child.tokens is None:
            child.prior, child.tokens, child.born, child.reward = prior, tokens, self.born, reward
        gain = value
        for visited in (child, *reversed(path)):
            visited.visits += 1
            visited.value_sum += gain
            received = F(0) if visited is self.root else visited.reward
            q = F(received + F(self.search.discount) * (visited.value_sum / F(visited.visits)))
            self.low, self.high = min(self.low, q), max(self.high, q)
            gain = received + F(self.search.discount) * gain

    def _best(self, node, parent_q):
        """The node's mean Q and the action with the largest score, the first on ties."""
        num_actions, is_root = len(node.prior), node is self.root
        q, visits, total_q = np.zeros(num_actions, F), np.zeros(num_actions, F), F(0)
        for action in sorted(node.children):
            child = node.children[action]
            q[action], visits[action] = child.q(self.search.discount), child.visits
            total_q += q[action]
        count = F(len(node.children))
        mean = total_q / count if is_root and count else (parent_q + total_q) / (count + F(1))
        x = np.where(visits > 0, q, mean)
        spread = F(self.high - self.low)
        if spread > 0:
            x = (x - self.low) / max(spread, F(0.01))
        base, total = F(self.search.pb_c_base), visits.sum(dtype=F)
        weight = np.log((total + base + F(1)) / base) + F(self.search.pb_c_init)
        score = weight * (np.sqrt(total) / (visits + F(1))) * node.prior + np.clip(x, F(0), F(1))
        if is_root:
            score = np.where(self.legal, score, -np.inf)
        return mean, int(np.argmax(score))

    def _imagine(self, node, action, depth):
        window, out = recurrent_step(
            self.params,
            self._window_of(node.tokens),
            jnp.int32(action),
            jnp.int32(depth),
            jnp.int32(self.timestep),
            config=self.config,
        )
        own = self._tokens_of(window)[-2:]
        tokens = [*node.tokens, *own][-int(window.length) :]
        if len(own) == 1:
            tokens = own
        scalars = (F(to_scalar(x, self.config.support)) for x in (out.reward, out.value))
        return *scalars, reference_tree.softmax(np.asarray(out.policy)), tokens

    def _tokens_of(self, window):
        kv = np.asarray(window.kv)
        raw = [None] * len(kv) if window.raw is None else np.asarray(window.raw)
        slots = range(int(window.length))
        return [Token(kv[slot] - self.added[slot], raw[slot]) for slot in slots]

    def _window_of(self, tokens):
        kv, raw = np.zeros_like(self.added), None
        for slot, token in enumerate(tokens):
            kv[slot] = token.bare + self.added[slot]
        if self.window.raw is not None:
            raw = np.zeros(self.window.raw.shape, F)
            raw[: len(tokens)] = [token.raw for token in tokens]
        window = Window(jnp.asarray(kv), jnp.int32(len(tokens)), raw)
        return window if raw is None else rebuild(self.params, window, config=self.config)
