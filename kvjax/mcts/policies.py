"""The three policies, from roots to an answer: noise, rules, and an action from what was found.

Shapes: B rows, A actions.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import loops
from kvjax.base.meshes import ALL, Share
from kvjax.config import SearchConfig
from kvjax.mcts import mctx_rules, puct
from kvjax.mcts import tree as trees
from kvjax.mcts.output import Dials, SearchOutput
from kvjax.mcts.tokens import Tokens
from kvjax.mcts.tree import DISCOUNT, RAW, Q, Rules, Tree

Grown = tuple[Tree, Tokens]

Grow = Callable[[Rules, Tree, jax.Array], Grown]
"""All simulations of a search: with the rules, from trees that hold their roots, with a key."""

_LOWEST_SCORE = -1e9
"""Of an action that is considered: one that is alone is chosen whatever its logit."""

_TINY = float(np.finfo(np.float32).tiny)
"""The smallest number that every processor knows; a temperature below is 0."""


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a plan begins with.

    Attributes:
      policy: [B, A] logits of the roots.
      value: [B], the network's of the roots.
      legal: [B, A] bool; None: all actions.
      fields: F of an edge.
      masked: whether nodes below the roots have illegal actions.
      chance: whether nodes at odd levels are chance nodes.
      share: which rows of a batch these are.
    """

    policy: jax.Array
    value: jax.Array
    legal: jax.Array | None
    fields: int
    masked: bool = False
    chance: bool = False
    share: Share = ALL

    @property
    def all_legal(self) -> jax.Array:
        """[B, A] bool."""
        return jnp.ones(self.policy.shape, bool) if self.legal is None else self.legal


def num_fields(search: SearchConfig, *, discounted: bool, raw: bool) -> int:
    """F of an edge.

    Args:
      discounted: whether edges have their own discounts.
      raw: whether trees keep what the network said of each node, even if no rule reads it.
    """
    last = DISCOUNT if discounted else RAW if raw or search.tree != "lightzero" else Q
    return last + 1


def plan(
    rng: jax.Array, beginning: Beginning, grow: Grow, dials: Dials, search: SearchConfig
) -> tuple[SearchOutput, Grown]:
    """Searches all rows; the actions, visits and targets of the policy that the search names."""
    run = {"lightzero": _lightzero, "muzero": _muzero, "gumbel": _gumbel}[search.tree]
    return run(rng, beginning, grow, dials, search)


def _lightzero(
    rng: jax.Array, root: Beginning, grow: Grow, dials: Dials, search: SearchConfig
) -> tuple[SearchOutput, Grown]:
    noise_rng, action_rng, model_rng = jax.random.split(rng, 3)
    legal, prior = root.all_legal, puct.softmax(root.policy, root.all_legal)
    noisy = with_noise(noise_rng, prior, legal, search, root.share)
    rules = puct.Rules(search, root.fields, root.chance)
    grown = grow(rules, trees.init(noisy, search, root.fields), model_rng)
    tree = grown[0]
    visit_counts = trees.visit_counts(tree)
    value = trees.root_value(tree)
    output = SearchOutput(
        action=choose(action_rng, visit_counts, legal, dials.temperature, root.share),
        visit_counts=visit_counts,
        root_value=value,
        q_values=trees.q_values(tree),
        prior=jnp.maximum(prior, 0.0),
        network_value=root.value,
        mean_depth=tree.total_depth / search.num_simulations,
        finite=all_finite(
            below_infinity(root.policy), prior, root.value, value, tree.low, tree.high
        )
        & jnp.any(legal, axis=1),
        action_weights=visit_shares(jnp.where(legal, visit_counts, 0)),
    )
    return output, grown


def _muzero(
    rng: jax.Array, root: Beginning, grow: Grow, dials: Dials, search: SearchConfig
) -> tuple[SearchOutput, Grown]:
    """As `mctx.muzero_policy`."""
    rng, noise_rng, search_rng = jax.random.split(rng, 3)
    noisy = jax.nn.softmax(root.policy)
    if search.noise_fraction > 0.0:
        alpha = jnp.full(noisy.shape[1:], search.dirichlet_alpha, noisy.dtype)
        draw = functools.partial(jax.random.dirichlet, noise_rng, alpha, dtype=noisy.dtype)
        noise = root.share.drawn(lambda rows: draw(shape=(rows,)), noisy.shape[0])
        noisy = (1 - search.noise_fraction) * noisy + search.noise_fraction * noise
    logits = _masked(logs(noisy), root.legal)
    grown, _ = _grown(logits, None, search_rng, root, grow, search)
    visit_counts = trees.visit_counts(grown[0])
    weights = visit_shares(visit_counts)
    logits = heated(logs(weights), dials.temperature)
    action = categorical(rng, logits, root.share)
    return _answer(action, weights, grown[0], root, search), grown


def _gumbel(
    rng: jax.Array, root: Beginning, grow: Grow, dials: Dials, search: SearchConfig
) -> tuple[SearchOutput, Grown]:
    """As `mctx.gumbel_muzero_policy`."""
    del dials
    logits = _masked(root.policy, root.legal)
    rng, gumbel_rng = jax.random.split(rng)
    gumbel = jnp.zeros_like(logits)
    if search.noise_fraction > 0.0:
        gumbel = _gumbel_noise(gumbel_rng, logits, root.share)
    grown, rules = _grown(logits, gumbel, rng, root, grow, search)
    visits, completed = trees.visit_counts(grown[0]), rules.transformed(grown[0])
    below_best = logits - jnp.max(logits, axis=1, keepdims=True)
    score = jnp.maximum(gumbel + below_best + completed, _LOWEST_SCORE)
    considered = root.all_legal & (visits == jnp.max(visits, axis=1, keepdims=True))
    action = jnp.argmax(jnp.where(considered, score, -jnp.inf), axis=1).astype(jnp.int32)
    weights = jax.nn.softmax(_masked(logits + completed, root.legal))
    return _answer(action, weights, grown[0], root, search), grown


def _grown(
    logits: jax.Array,
    gumbel: jax.Array | None,
    rng: jax.Array,
    root: Beginning,
    grow: Grow,
    search: SearchConfig,
) -> tuple[Grown, mctx_rules.Rules]:
    """Trees that begin with the network's value as a visit."""
    rules = mctx_rules.Rules(
        search, root.value, root.legal, gumbel, root.fields, root.masked, root.chance, root.share
    )
    begun = trees.init(rules.prior(logits, None), search, root.fields, root.value)
    return grow(rules, begun, rng), rules


def _masked(logits: jax.Array, legal: jax.Array | None) -> jax.Array:
    """Logits [B, A] below 0, illegal ones as low as can be; as they are if all are legal."""
    if legal is None:
        return logits
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    return jnp.where(legal, below, mctx_rules.NEVER)


def _answer(
    action: jax.Array, weights: jax.Array, tree: Tree, root: Beginning, search: SearchConfig
) -> SearchOutput:
    legal, value = root.all_legal, trees.root_value(tree, running_mean=True)
    q_values = trees.q_values(tree)
    policy, some = below_infinity(root.policy), jnp.any(root.policy > -jnp.inf, axis=1)
    return SearchOutput(
        action=action,
        visit_counts=trees.visit_counts(tree),
        root_value=value,
        q_values=q_values,
        prior=jax.nn.softmax(jnp.where(legal, policy, mctx_rules.NEVER)),
        network_value=root.value,
        mean_depth=tree.total_depth / search.num_simulations,
        finite=all_finite(policy, root.value, value, q_values) & some & jnp.any(legal, axis=1),
        action_weights=weights,
    )


def with_noise(
    rng: jax.Array,
    prior: jax.Array,
    legal: jax.Array,
    search: SearchConfig,
    share: Share = ALL,
) -> jax.Array:
    """Mixes Dirichlet noise over the legal actions into priors [B, A]."""
    if search.noise_fraction == 0.0:
        return prior
    alpha, (count, num_actions) = search.dirichlet_alpha, prior.shape
    gamma = share.drawn(
        lambda rows: jax.random.gamma(rng, alpha, (rows, num_actions), prior.dtype), count
    )
    gamma = jnp.where(legal, jnp.maximum(gamma, _TINY), 0.0)
    noise = gamma / jnp.sum(gamma, axis=1, keepdims=True)
    fraction = search.noise_fraction
    return jnp.where(legal, prior * (1 - fraction) + fraction * noise, prior)


def choose(
    rng: jax.Array,
    visit_counts: jax.Array,
    legal: jax.Array,
    temperature: jax.Array | float,
    share: Share = ALL,
) -> jax.Array:
    """The most visited legal action, the first on ties; or a sample of the visits: [B] int32.

    At a temperature above 0 an action is drawn in proportion to `visits ** (1 / temperature)`, and
    only one that is legal and was visited; where none was, all legal ones are alike.

    Args:
      rng: a JAX PRNG key, for the sample.
      visit_counts: [B, A] int32.
      legal: [B, A] bool.
      temperature: [], at least 0. Below float32's smallest normal number it counts as 0.
      share: which rows of a batch these are.
    """
    counts = jnp.where(legal, visit_counts, -1)
    temperature = jnp.asarray(temperature, jnp.float32)

    def most_visited() -> jax.Array:
        return jnp.argmax(counts, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        visited = counts > 0
        chosen = jnp.where(jnp.any(visited, axis=-1, keepdims=True), visited, legal)
        logs = jnp.log(jnp.maximum(counts, 1).astype(jnp.float32))
        below = logs - jnp.max(logs, axis=-1, keepdims=True)  # 0 at the top, however divided
        logits = jnp.where(chosen, below / temperature, -jnp.inf)
        return categorical(rng, logits, share)

    action: jax.Array = loops.cond(temperature < _TINY, most_visited, sample)
    return action


def categorical(rng: jax.Array, logits: jax.Array, share: Share = ALL) -> jax.Array:
    """As `jax.random.categorical`, for a share of a batch: [B] int32 of logits [B, A]."""
    noise = _gumbel_noise(rng, logits, share)
    return jnp.argmax(noise + logits, axis=-1).astype(jnp.int32)


def _gumbel_noise(rng: jax.Array, logits: jax.Array, share: Share) -> jax.Array:
    """For logits [..., B, A]; their rows' own."""
    rows, num_actions = logits.shape
    noise: jax.Array = share.drawn(
        lambda count: jax.random.gumbel(rng, (count, num_actions), logits.dtype), rows
    )
    return noise


def below_infinity(policy: jax.Array) -> jax.Array:
    """Logits [B, A] of which those of -inf, which say that an action never is, are finite."""
    return jnp.maximum(policy, mctx_rules.NEVER)


def logs(probabilities: jax.Array) -> jax.Array:
    """Logits of probabilities [B, A]; finite ones."""
    return jnp.log(jnp.maximum(probabilities, _TINY))


def heated(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits [B, A] over a temperature [], which may be 0."""
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    return below / jnp.maximum(temperature, _TINY)


def visit_shares(visit_counts: jax.Array) -> jax.Array:
    """Each action's share of its row's visits: [B, A]; zeros where there are none."""
    counts = visit_counts.astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)


def all_finite(*arrays: jax.Array) -> jax.Array:
    """Rows [B] in which all arrays [B] or [B, A] are finite."""
    rows = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in arrays]
    return functools.reduce(jnp.logical_and, rows)
