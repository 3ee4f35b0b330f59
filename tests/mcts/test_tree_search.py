"""A search for any cached model: against mctx, against plain Python, and what it refuses."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import FULL, SMALL, in_full, random_params, with_mode
from flax import serialization
from jax import export

from kvjax import (
    Node,
    Root,
    SearchConfig,
    Transition,
    TreeModel,
    init_contexts,
    init_kept,
    prepare,
    search,
    tree_search,
)
from kvjax.mcts import unizero_tree
from kvjax.mcts.tree_search import _tree_search
from kvjax.tools.bench import mctx_windows

ACTIONS, STATES, ROWS = 5, 997, 100
RNG = np.random.default_rng(0)
PLAY = {
    "policy": RNG.normal(size=(STATES, ACTIONS)).astype(np.float32),
    "value": RNG.normal(size=STATES).astype(np.float32),
    "reward": RNG.normal(size=STATES).astype(np.float32),
    "discount": RNG.choice(np.float32([0.9, -1.0, 0.0]), p=[0.5, 0.4, 0.1], size=STATES),
    "legal": (RNG.random((STATES, ACTIONS)) < 0.6) | (np.arange(ACTIONS) == 0),
}
"""A game as tables, so that everybody computes with the same bits."""


def after(state, action):
    return (state * 31 + action * 17 + 5) % STATES


def table_step(play, rng, node, action, *, masked):
    state = after(node.state, action)
    parts = (play[name][state] for name in ("reward", "value", "policy", "discount"))
    return (), state, Transition(*parts, play["legal"][state] if masked else None)


def recurrent_fn(play, rng, action, state, *, masked):
    state = after(state, action)
    policy = play["policy"][state]
    if masked:
        policy = jnp.where(play["legal"][state], policy, jnp.finfo(jnp.float32).min)
    reward, discount, value = (play[name][state] for name in ("reward", "discount", "value"))
    output = mctx.RecurrentFnOutput(
        reward=reward, discount=discount, prior_logits=policy, value=value
    )
    return output, state


TABLES = {
    masked: TreeModel(1, 1, functools.partial(table_step, masked=masked))
    for masked in (False, True)
}
TRANSFORMS = {
    "siblings": mctx.qtransform_by_parent_and_siblings,
    "mix_value": mctx.qtransform_completed_by_mix_value,
}
POLICIES = {"muzero": mctx.muzero_policy, "gumbel": mctx.gumbel_muzero_policy}


@functools.partial(jax.jit, static_argnames=("masked", "by"))
def by_mctx(play, rng, root, legal, *, masked, by):
    """What mctx answers to the same roots."""
    options = {"qtransform": TRANSFORMS[by.q_transform], "max_depth": by.max_depth}
    if by.tree == "muzero":
        options |= {"dirichlet_fraction": by.noise_fraction, "temperature": by.temperature}
    else:
        options |= {"gumbel_scale": float(by.noise_fraction > 0)}
    return POLICIES[by.tree](
        play,
        rng,
        mctx.RootFnOutput(prior_logits=root.policy, value=root.value, embedding=root.state),
        functools.partial(recurrent_fn, masked=masked),
        by.num_simulations,
        invalid_actions=None if legal is None else ~legal,
        **options,
    )


def roots(seed, rows=ROWS):
    state = np.random.default_rng(seed).integers(STATES, size=rows).astype(np.int32)
    return Root((), None, PLAY["policy"][state], PLAY["value"][state], state=state)


@pytest.mark.parametrize("tree", ["muzero", "gumbel"])
@pytest.mark.parametrize(
    ("transform", "legal", "masked", "max_depth", "noise", "temperature"),
    [
        ("mix_value", True, False, 4, 0.25, 0.5),
        *in_full(("siblings", False, False, None, 0.25, 1.0)),
        *in_full(("siblings", True, True, None, 0.0, 0.0)),
    ],
)
def test_the_trees_of_mctx(tree, transform, legal, masked, max_depth, noise, temperature):
    """Three hundred trees of each policy: actions, visits, weights, and who is whose parent."""
    by = SearchConfig(
        num_simulations=40,
        tree=tree,
        q_transform=transform,
        max_depth=max_depth,
        noise_fraction=noise,
        temperature=temperature if tree == "muzero" else 0.0,
    )
    rng, root = jax.random.key(7), roots(max_depth or 0)
    mask = PLAY["legal"][root.state] if legal else None
    given = dataclasses.replace(root, legal=mask)
    out = tree_search(PLAY, rng, given, TABLES[masked], search=by, return_tree=True)
    wanted = by_mctx(PLAY, rng, root, mask, masked=masked, by=by)
    summary = wanted.search_tree.summary()
    np.testing.assert_array_equal(out.visit_counts, summary.visit_counts)
    np.testing.assert_array_equal(out.action, wanted.action)
    np.testing.assert_allclose(out.action_weights, wanted.action_weights, atol=1e-6)
    np.testing.assert_allclose(out.root_value, summary.value, atol=1e-5)
    np.testing.assert_allclose(out.q_values, summary.qvalues, atol=1e-5)
    assert out.finite.all()
    grown, other = out.tree, wanted.search_tree
    np.testing.assert_array_equal(grown.depth.max(axis=1) >= 2, True)
    made = np.asarray(grown.parent) >= 0
    visits = np.where(made, other.node_visits, 0)
    np.testing.assert_array_equal(np.where(made, grown.visits, 0)[:, 1:], visits[:, 1:])
    if max_depth is None:
        np.testing.assert_array_equal(grown.parent, other.parents)
        np.testing.assert_array_equal(grown.action, other.action_from_parent)
        np.testing.assert_array_equal(grown.state, other.embeddings)
        np.testing.assert_array_equal(grown.value, other.raw_values)
        state = np.asarray(grown.state)[:, 1:]
        np.testing.assert_array_equal(grown.reward[:, 1:], PLAY["reward"][state])
        np.testing.assert_array_equal(grown.discount[:, 1:], PLAY["discount"][state])


def chance_step(play, rng, node, action):
    """Decision nodes add no reward; behind each outcome stands a decision again."""
    state = after(node.state, action)
    to_chance = node.depth % 2 == 0
    parts = {name: play[name][state] for name in ("reward", "value", "policy", "discount")}
    reward = jnp.where(to_chance, 0.0, parts["reward"])
    discount = jnp.where(to_chance, 1.0, parts["discount"])
    return (), state, Transition(reward, parts["value"], parts["policy"], discount)


def test_the_trees_of_stochastic_muzero():
    """Chance nodes on every other level, as `mctx.stochastic_muzero_policy` has them."""
    by = SearchConfig(
        num_simulations=40, tree="muzero", noise_fraction=0.25, temperature=1.0, max_depth=7
    )
    rng, root = jax.random.key(3), roots(9)
    mask = PLAY["legal"][root.state]

    def decision_fn(play, rng, action, state):
        state = after(state, action)
        output = mctx.DecisionRecurrentFnOutput(
            chance_logits=play["policy"][state], afterstate_value=play["value"][state]
        )
        return output, state

    def chance_fn(play, rng, outcome, state):
        output, state = recurrent_fn(play, rng, outcome, state, masked=False)
        names = {"action_logits": output.prior_logits, "value": output.value}
        rest = {"reward": output.reward, "discount": output.discount}
        return mctx.ChanceRecurrentFnOutput(**names, **rest), state

    wanted = jax.jit(
        functools.partial(mctx.stochastic_muzero_policy, max_depth=7), static_argnums=(3, 4, 5)
    )(
        PLAY,
        rng,
        mctx.RootFnOutput(prior_logits=root.policy, value=root.value, embedding=root.state),
        decision_fn,
        chance_fn,
        40,
        ~mask,
    )
    model = TreeModel(1, 1, chance_step, chance=True)
    out = tree_search(PLAY, rng, dataclasses.replace(root, legal=mask), model, search=by)
    summary = wanted.search_tree.summary()
    np.testing.assert_array_equal(out.visit_counts, summary.visit_counts)
    np.testing.assert_array_equal(out.action, wanted.action)
    np.testing.assert_allclose(out.action_weights, wanted.action_weights, atol=1e-6)
    np.testing.assert_allclose(out.root_value, summary.value, atol=1e-5)
    assert (out.mean_depth > 2).any()


@pytest.mark.parametrize("tree", ["lightzero", "gumbel"])
def test_outcomes_are_tried_as_often_as_they_are_likely(tree):
    """Two outcomes of 3 to 1 below the one action; the value is their mean, whatever they bring."""

    def step(params, rng, node, action):
        to_chance = node.depth == 0
        policy = jnp.log(jnp.where(to_chance, 1.0, 0.0)[:, None] * jnp.asarray([0.75, 0.25]) + 1e-9)
        legal = jnp.broadcast_to(to_chance[:, None] | (jnp.arange(2) == 0), (1, 2))
        worth = jnp.where(node.depth == 1, jnp.where(action == 0, 0.0, 1.0), 0.0)
        return (
            (),
            None,
            Transition(worth, jnp.zeros(1), policy, jnp.ones(1) * (node.depth < 1), legal),
        )

    only = Root((), np.zeros(1, np.int32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32))
    only = dataclasses.replace(only, legal=np.array([[True, False]]))
    by = SearchConfig(num_simulations=41, tree=tree, discount=1.0)
    model = TreeModel(1, 1, step, chance=True)
    out = tree_search((), jax.random.key(0), only, model, search=by, return_tree=True)
    first = int(np.argmax(np.asarray(out.tree.depth[0]) == 1))
    below = np.asarray(out.tree.visits[0])[np.asarray(out.tree.parent[0]) == first]
    assert sorted(below.tolist()) == [10, 30]
    np.testing.assert_allclose(out.q_values[0, 0], 10 / 41, atol=1e-6)


def test_an_mctx_user_changes_one_function():
    """`RootFnOutput` and `RecurrentFnOutput` are taken as they are."""
    by = SearchConfig(num_simulations=10, tree="gumbel", noise_fraction=0.25)
    root = roots(3, 4)

    def step(play, rng, node, action):
        output, state = recurrent_fn(play, rng, action, node.state, masked=False)
        return (), state, output

    embedding = {"tokens": (), "length": np.zeros(4, int), "state": root.state}
    theirs = mctx.RootFnOutput(prior_logits=root.policy, value=root.value, embedding=embedding)
    out = tree_search(PLAY, jax.random.key(0), theirs, TreeModel(1, 1, step), search=by)
    same = tree_search(PLAY, jax.random.key(0), root, TABLES[False], search=by)
    chex.assert_trees_all_close(out, same, rtol=1e-6)


@pytest.mark.parametrize("tree", ["gumbel", *in_full("muzero")])
def test_own_tokens_search_as_windows_do(tree):
    """UniZero with mctx's policies: its visits with a whole window per node, over an episode."""
    by = SearchConfig(num_simulations=12, tree=tree, noise_fraction=0.25, temperature=0.0)
    by = dataclasses.replace(by, q_transform="siblings" if tree == "muzero" else "mix_value")
    model, rng = prepare(random_params(SMALL), config=SMALL), np.random.default_rng(0)
    contexts, action = init_contexts(SMALL, 3), np.full(3, -1)
    for step in range(8):
        observation = rng.normal(size=(3, 5)).astype(np.float32)
        given = jax.random.key(step), contexts, observation, action
        _, wanted = mctx_windows.search(model, *given, config=SMALL, search=by)
        contexts, out = search(model, *given, config=SMALL, search=by)
        summary = wanted.search_tree.summary()
        np.testing.assert_array_equal(out.visit_counts, summary.visit_counts)
        np.testing.assert_array_equal(out.action, wanted.action)
        np.testing.assert_allclose(out.action_weights, wanted.action_weights, atol=1e-4)
        np.testing.assert_allclose(out.root_value, summary.value, atol=1e-4)
        action = np.array(out.action)


@pytest.mark.parametrize(
    "mode", ["learned", *in_full("rope_lightzero", "rope_consistent", "reset")]
)
def test_windows_read_in_place(mode, monkeypatch):
    """The same search as with copied windows: short, full and slid ones, with what was kept."""
    config, by = with_mode(SMALL, mode), SearchConfig(40, tree="muzero", kept_nodes=20)
    params, rng = random_params(config), np.random.default_rng(1)
    contexts, action, depths = init_contexts(config, 2), np.full(2, -1), []
    kept = init_kept(config, 2, by)
    plan = jax.jit(functools.partial(search, config=config, search=by))
    first = params, jax.random.key(0), contexts, np.ones((2, 5), np.float32), action
    with monkeypatch.context() as patch:
        patch.setattr(unizero_tree, "_LONG", 0)
        unizero_tree.tree_model.cache_clear()
        kept_in_place = init_kept(config, 2, by)
        plan_in_place = plan.lower(*first, kept=kept_in_place).compile()
    unizero_tree.tree_model.cache_clear()
    assert kept_in_place.tokens.tables[0].shape[0] < kept.tokens.tables[0].shape[0]
    for step in range(6):
        observation = rng.normal(size=(2, 5)).astype(np.float32)
        given = params, jax.random.key(step), contexts, observation, action
        _, in_place = plan_in_place(*given, kept=kept_in_place)
        contexts, out = plan(*given, kept=kept)
        kept, kept_in_place = out.kept, in_place.kept
        found, wanted = (dataclasses.replace(x, kept=None) for x in (in_place, out))
        chex.assert_trees_all_close(found, wanted, atol=2e-4)
        np.testing.assert_array_equal(in_place.visit_counts, out.visit_counts)
        action = np.array([1, -1]) if step == 2 else np.asarray(out.action)
        depths.append(float(out.mean_depth.max()))
    assert max(depths) > 3


def plain_lightzero(state, policy, legal, by):
    """LightZero's rules in plain Python, with discounts of edges, masks and ends: root's visits."""
    one, f = np.float32(1), np.float32

    def softmax(logits, allowed):
        exponents = np.where(allowed, np.exp(logits - logits[allowed].max()), f(0)).astype(f)
        total = f(0)
        for x in exponents:
            total += x
        return np.where(allowed, exponents / total, f(-1))

    def new(state, prior):
        return {"state": state, "prior": prior, "edges": {}, "visits": 0, "sum": f(0)}

    def q(edge):
        child = edge["child"]
        mean = edge["discount"] * (child["sum"] / f(child["visits"]))
        return edge["reward"] if edge["discount"] == 0 else f(edge["reward"] + mean)

    root, low, high = new(state, softmax(policy, legal)), f(1e6), f(-1e6)
    root["visits"] = 1
    for _ in range(by.num_simulations):
        node, above, path = root, f(0), []
        while True:
            tried = sorted(node["edges"])
            total = f(0)
            for a in tried:
                total += q(node["edges"][a])
            at_root = node is root and tried
            mean = total / f(len(tried)) if at_root else (above + total) / f(len(tried) + 1)
            count = f(sum(e["child"]["visits"] for e in node["edges"].values()))
            weight = np.log((count + f(by.pb_c_base) + one) / f(by.pb_c_base)) + f(by.pb_c_init)
            scores = []
            for a in range(ACTIONS):
                edge = node["edges"].get(a)
                value = mean if edge is None else q(edge)
                if high > low:
                    value = (value - low) / max(high - low, f(0.01))
                visits = f(0 if edge is None else edge["child"]["visits"])
                bonus = weight * (np.sqrt(count) / (visits + one)) * node["prior"][a]
                scores.append(
                    -np.inf if node["prior"][a] < 0 else bonus + np.clip(value, f(0), one)
                )
            action = int(np.argmax(scores))
            if action not in node["edges"]:
                break
            edge = node["edges"][action]
            path.append(edge)
            node, above = edge["child"], mean * np.sign(edge["discount"])
        state = after(node["state"], action)
        child = new(state, softmax(PLAY["policy"][state], PLAY["legal"][state]))
        edge = {
            "child": child,
            "reward": PLAY["reward"][state],
            "discount": PLAY["discount"][state],
        }
        node["edges"][action] = edge
        path.append(edge)
        gain = PLAY["value"][state]
        for level in reversed(range(len(path))):
            edge = path[level]
            edge["child"]["sum"] += gain
            edge["child"]["visits"] += 1
            if not any(e["discount"] == 0 for e in path[:level]):
                low, high = min(low, q(edge)), max(high, q(edge))
            kept = edge["discount"] * gain
            gain = edge["reward"] if edge["discount"] == 0 else f(edge["reward"] + kept)
        root["sum"] += gain
        root["visits"] += 1
        of_root = f(by.discount) * (root["sum"] / f(root["visits"]))
        low, high = min(low, of_root), max(high, of_root)
    visits = [
        root["edges"][a]["child"]["visits"] if a in root["edges"] else 0 for a in range(ACTIONS)
    ]
    return visits, root["sum"] / f(root["visits"])


def test_the_rules_of_lightzero_with_discounts_masks_and_ends():
    """Against plain Python: two players, ends of episodes, illegal actions inside."""
    by, root = SearchConfig(num_simulations=40, discount=0.9), roots(4, 30)
    mask = PLAY["legal"][root.state]
    given = dataclasses.replace(root, legal=mask)
    out = tree_search(PLAY, jax.random.key(0), given, TABLES[True], search=by)
    for b in range(30):
        visits, value = plain_lightzero(root.state[b], root.policy[b], mask[b], by)
        assert out.visit_counts[b].tolist() == visits
        np.testing.assert_allclose(out.root_value[b], value, atol=1e-5)
    assert out.finite.all()


@pytest.mark.parametrize("tree", ["lightzero", "muzero", "gumbel"])
@pytest.mark.parametrize("junk", [np.nan, *in_full(9.0, np.inf)])
def test_nothing_behind_an_end_is_heard_of(tree, junk):
    """Values, rewards and missing actions there change no visit of the roots."""

    def step(play, rng, node, action):
        state, over = after(node.state["at"], action), node.state["over"]
        reward, value, policy, discount = (
            play[name][state] for name in ("reward", "value", "policy", "discount")
        )
        legal = play["legal"][state] & ~(over & (node.root != 0))[:, None]
        nonsense = jnp.where(over & (node.root != 0), junk, 0.0)
        now = {"at": state, "over": over | (discount == 0)}
        return (), now, Transition(reward + nonsense, value + nonsense, policy, discount, legal)

    root, transform = roots(2, 50), None if tree == "lightzero" else "tree"
    state = {"at": root.state, "over": np.zeros(50, bool)}
    by = SearchConfig(num_simulations=40, tree=tree, q_transform=transform)
    model = TreeModel(1, 1, step)
    clean, dirty = (
        tree_search(
            PLAY,
            jax.random.key(0),
            dataclasses.replace(root, state=state, data=np.full(50, data, np.int32)),
            model,
            search=by,
            return_tree=True,
        )
        for data in (0, 1)
    )
    assert dirty.finite.all()
    np.testing.assert_array_equal(dirty.visit_counts, clean.visit_counts)
    np.testing.assert_array_equal(dirty.root_value, clean.root_value)
    over = np.asarray(clean.tree.state["over"])[:, 1:]
    parents = np.take_along_axis(over, np.maximum(np.asarray(clean.tree.parent)[:, 1:] - 1, 0), 1)
    assert (over & parents).sum() > 50  # nodes behind ends


def numbered_step(params, rng, node, action, *, block):
    """Tokens that say who made them: node's own number (a draw of the key), and their place."""
    name = jax.random.randint(rng, node.length.shape, 0, 2**30)
    tokens = jnp.stack([name + place for place in range(block)])
    flat = jnp.tanh(name % 7 - 3.0)
    policy = jnp.stack([jnp.sin(name % (5 + a)) for a in range(3)], axis=1)
    state = {"name": name, "length": node.length, "at_root": node.at_root, "depth": node.depth}
    return tokens, state, Transition(flat, flat, policy)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("seed", [0, *in_full(1, 2, 3, 4)])
def test_every_window_is_its_parents_and_its_own_tokens(seed, in_place):
    """Sizes drawn; roots of all lengths, full windows that lose a block or keep `carry` tokens."""
    seen, draw = [], np.random.default_rng(seed)
    block = int(draw.integers(1, 6))
    size = block + int(draw.integers(8))
    carry = [None, 0, block // 2, block][seed % 4]

    def step(params, rng, node, action):
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.asarray, x)), node, action)
        return numbered_step(params, rng, node, action, block=block)

    rows = size + 1
    length = np.arange(rows, dtype=np.int32)
    tokens = -np.arange(1, rows * size + 1, dtype=np.int32).reshape(rows, size)
    nothing = np.zeros(rows, np.int32)
    state = dict.fromkeys(("name", "length", "at_root", "depth"), nothing)
    policy, value = np.zeros((rows, 3), np.float32), np.zeros(rows, np.float32)
    model = TreeModel(block, size, step, carry, in_place)
    by = SearchConfig(num_simulations=30, discount=0.9)
    root = Root(tokens, length, policy, value, state=state)
    out = tree_search({}, jax.random.key(1), root, model, search=by, return_tree=True)
    jax.effects_barrier()
    tree = jax.tree.map(np.asarray, out.tree)
    assert tree.depth.max() >= 4
    for b in range(rows):
        windows = {0: [int(x) for x in tokens[b, : length[b]]]}
        for n in range(1, 31):
            above = windows[int(tree.parent[b, n])]
            own = [int(tree.state["name"][b, n]) + place for place in range(block)]
            fits = len(above) + block <= size
            if fits:
                windows[n] = above + own
            elif carry is None:
                windows[n] = above[block:] + own
            else:
                windows[n] = own[block - carry :]
            assert tree.length[b, n] == len(windows[n])
            assert tree.tokens[b, n, : len(windows[n])].tolist() == windows[n]
            assert tree.state["length"][b, n] == len(above)
            assert tree.state["at_root"][b, n] == sum(x < 0 for x in above)
            assert tree.state["depth"][b, n] == tree.depth[b, n] - 1
    assert len(seen) == 30
    for (node, _), n in zip(seen, range(1, 31), strict=True):  # what the model was shown
        for b in range(rows):
            shown = node.tokens[b][node.valid[b]].tolist()
            above = tree.tokens[b, tree.parent[b, n], : node.length[b]].tolist()
            assert shown == (above[node.at_root[b] :] if in_place else above)


def test_what_was_kept_has_its_states():
    """A state is its parent's and its action's, in kept nodes too; the root's is the new one."""
    by = SearchConfig(num_simulations=15, kept_nodes=10, tree="muzero", discount=0.9)
    root, kept, action, goes_on = roots(5, 6), None, None, np.zeros(6, bool)
    for step in range(5):
        out = tree_search(
            PLAY,
            jax.random.key(step),
            root,
            TABLES[True],
            search=by,
            kept=kept,
            last_action=action,
            return_tree=True,
        )
        tree = jax.tree.map(np.asarray, out.tree)
        rows, nodes = np.nonzero(tree.parent >= 0)
        parent, moved = tree.parent[rows, nodes], tree.action[rows, nodes]
        np.testing.assert_array_equal(
            tree.state[rows, nodes], after(tree.state[rows, parent], moved)
        )
        assert out.finite.all()
        carried = np.sum(tree.parent[:, : by.kept_nodes + 1] >= 0, axis=1)
        np.testing.assert_array_equal(carried > 0, goes_on)
        kept, action = out.kept, np.array(out.action)
        state = after(np.asarray(root.state), action)
        goes_on = PLAY["discount"][state] != 0  # nothing is kept from behind an end
        if step == 2:
            action[4], goes_on[4] = -1, False
        root = dataclasses.replace(
            root, policy=PLAY["policy"][state], value=PLAY["value"][state], state=state
        )


def test_one_program_over_an_episode():
    by = SearchConfig(num_simulations=10, tree="muzero")
    before = _tree_search._cache_size()
    for seed in range(3):
        tree_search(PLAY, jax.random.key(seed), roots(seed, 5), TABLES[False], search=by)
    warmer = dataclasses.replace(by, temperature=1.0, discount=0.5)
    tree_search(PLAY, jax.random.key(0), roots(0, 5), TABLES[False], search=warmer)
    assert _tree_search._cache_size() == before + 1


def test_a_row_with_nan_or_without_a_legal_action_leaves_the_others_alone():
    by = SearchConfig(num_simulations=10, tree="muzero")

    def step(play, rng, node, action):
        state = after(node.state, action)
        reward = jnp.where(node.root == 1, jnp.nan, play["reward"][state])
        legal = play["legal"][state] & (node.root != 2)[:, None]
        going = Transition(reward, play["value"][state], play["policy"][state], None, legal)
        return (), state, going

    for tree in ("lightzero", "muzero", "gumbel"):
        by = SearchConfig(num_simulations=10, tree=tree)
        root, model = roots(0, 4), TreeModel(1, 1, step)
        clean, dirty = (
            tree_search(
                PLAY, jax.random.key(0), dataclasses.replace(root, data=data), model, search=by
            )
            for data in (np.zeros(4, np.int32), np.array([0, 1, 2, 0], np.int32))
        )
        assert clean.finite.all()
        assert dirty.finite.tolist() == [True, False, False, True]
        for row in (0, 3):
            np.testing.assert_array_equal(dirty.visit_counts[row], clean.visit_counts[row])
    ended = TreeModel(1, 1, lambda *x: _without_discount(step(*x)))
    data = np.array([0, 0, 2, 0], np.int32)
    over = tree_search(
        PLAY, jax.random.key(0), dataclasses.replace(root, data=data), ended, search=by
    )
    assert over.finite.all()  # the episode is over: nobody needs an action


def _without_discount(answer):
    tokens, state, came = answer
    return tokens, state, dataclasses.replace(came, discount=jnp.zeros_like(came.reward))


def plain_step(params, rng, node, action):
    rows = action.shape[0]
    zeros = jnp.zeros(rows)
    return jnp.zeros((2, rows, 4)), node.state, Transition(zeros, zeros, jnp.zeros((rows, 3)))


def plain_root(rows=2, **changes):
    zeros = np.zeros(rows, np.float32)
    root = Root(
        np.zeros((rows, 6, 4), np.float32),
        np.zeros(rows, np.int32),
        np.zeros((rows, 3), np.float32),
        zeros,
        state=zeros,
    )
    return dataclasses.replace(root, **changes)


def answers(**changes):
    """A step whose answer differs from a good one."""

    def step(params, rng, node, action):
        tokens, state, came = plain_step(params, rng, node, action)
        came = dataclasses.replace(came, **{k: v for k, v in changes.items() if hasattr(came, k)})
        return changes.get("tokens", tokens), changes.get("state", state), came

    return step


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (
            answers(tokens=jnp.zeros((3, 2, 4))),
            ValueError,
            r"must return tokens as float32 \(2, 2, 4\), like root.tokens, got float32 \(3, 2, 4\)",
        ),
        (
            answers(tokens=jnp.zeros((2, 2, 4), jnp.bfloat16)),
            ValueError,
            r"must return tokens as float32 \(2, 2, 4\), like root.tokens, got bfloat16",
        ),
        (answers(tokens=()), ValueError, "must return tokens of the same structure as root.tokens"),
        (
            answers(state=jnp.zeros((2, 1))),
            ValueError,
            r"must return state as float32 \(2,\), like root.state, got float32 \(2, 1\)",
        ),
        (answers(state=None), ValueError, "must return state of the same structure as root.state"),
        (
            answers(policy=jnp.zeros((2, 4))),
            ValueError,
            r"Transition.policy must have shape \(2, 3\), got \(2, 4\)",
        ),
        (answers(value=jnp.zeros(3)), ValueError, r"Transition.value must have shape \(2,\)"),
        (answers(reward=0.0), ValueError, "Transition.reward must be an array of numbers, got"),
        (answers(discount=jnp.zeros(())), ValueError, "Transition.discount must have shape"),
        (answers(legal=jnp.ones((2, 3))), ValueError, "Transition.legal must be bool, got float32"),
        (answers(legal=[True] * 3), ValueError, "Transition.legal must be an array, got list"),
        (
            answers(policy=jnp.ones((2, 3), bool)),
            ValueError,
            r"Transition.policy must be an array of numbers, got bool \(2, 3\)",
        ),
        (
            answers(state={"name": "x"}),
            TypeError,
            r"must return arrays in state\['name'\], got str 'x'",
        ),
        (
            lambda *x: (*plain_step(*x)[:2], type("Odd", (), {"policy": jnp.zeros((2, 3))})()),
            TypeError,
            "a kvjax.Transition or a mctx.RecurrentFnOutput, got Odd",
        ),
        (
            lambda *x: plain_step(*x)[1:],
            TypeError,
            r"\(tokens, state, Transition\), got tuple of 2",
        ),
        (
            lambda *x: (*plain_step(*x)[:2], 0.0),
            TypeError,
            "a kvjax.Transition or a mctx.RecurrentFnOutput, got float",
        ),
    ],
)
def test_what_a_step_may_not_return(step, kind, message):
    with pytest.raises(kind, match=message):
        tree_search(
            {}, jax.random.key(0), plain_root(), TreeModel(2, 6, step), search=SearchConfig(3)
        )


@pytest.mark.parametrize(
    ("root", "kind", "message"),
    [
        (
            plain_root(length=np.zeros(3, np.int32)),
            ValueError,
            r"root.length must have shape \(2,\)",
        ),
        (plain_root(length=None), ValueError, r"root.length must have shape \(2,\), got \(\)"),
        (plain_root(length=np.array([0, 7])), ValueError, r"root.length must be in 0 .. 6"),
        (
            plain_root(length=np.zeros(2)),
            ValueError,
            "root.length must be integer numbers, got float",
        ),
        (plain_root(value=np.zeros((2, 1))), ValueError, r"root.value must have shape \(2,\), got"),
        (plain_root(policy=np.zeros(2)), ValueError, r"root.policy must have shape \[B, A\]"),
        (
            plain_root(tokens={"k": np.zeros((2, 5, 4))}),
            ValueError,
            r"root.tokens\['k'\] must have shape \[2, 6, ...\], got \(2, 5, 4\)",
        ),
        (plain_root(state=np.zeros(3)), ValueError, r"root.state must have shape \[2, ...\]"),
        (plain_root(data=np.zeros(())), ValueError, r"root.data must have shape \[2, ...\], got"),
        (plain_root(legal=np.ones((2, 3))), ValueError, "root.legal must be bool, got float"),
        (plain_root(legal=np.eye(2, 3) > 1), ValueError, r"root.legal needs .* rows \[0, 1\] have"),
        ({"policy": 0}, TypeError, "root must be a kvjax.Root, or a mctx.RootFnOutput whose"),
        (
            mctx.RootFnOutput(prior_logits=0, value=0, embedding=np.zeros(2)),
            TypeError,
            "got RootFnOutput with embedding ndarray",
        ),
    ],
)
def test_what_a_root_may_not_be(root, kind, message):
    model = TreeModel(2, 6, plain_step)
    with pytest.raises(kind, match=message):
        tree_search({}, jax.random.key(0), root, model, search=SearchConfig(3))


def test_other_bad_input():
    good = {}, jax.random.key(0), plain_root()
    by = SearchConfig(3)
    with pytest.raises(ValueError, match="block must be at most its size 6, got 7"):
        tree_search(*good, TreeModel(7, 6, plain_step), search=by)
    with pytest.raises(TypeError, match=r"model must be of type TreeModel, got function"):
        tree_search(*good, plain_step, search=by)
    for options, message in (
        ({"block": 0}, "block must be a positive integer, got 0"),
        ({"size": 2.5}, "size must be a positive integer, got 2.5"),
        ({"carry": 3}, r"carry must be None or an integer in 0 .. 2 \(block\), got 3"),
        ({"step": 1}, "step must be a function, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TreeModel(**{"block": 2, "size": 6, "step": plain_step} | options)
    keeps, model = SearchConfig(3, kept_nodes=2), TreeModel(2, 6, plain_step)
    kept = tree_search(*good, model, search=keeps).kept
    for given, options, message in (
        (kept, {"search": by}, "kept needs a search with kept_nodes above 0"),
        (kept, {"search": keeps}, "kept needs last_action, which led to the roots"),
        (kept, {"search": keeps, "last_action": [0, 3]}, r"last_action must be in -1 .. 2"),
        (kept, {"search": SearchConfig(4, kept_nodes=2), "last_action": [0, 0]}, "kept.tree.edges"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_search(*good, model, kept=given, **options)
    chance = TreeModel(2, 6, plain_step, chance=True)
    with pytest.raises(ValueError, match="kept_nodes must be 0 for a model with chance nodes"):
        tree_search(*good, chance, search=keeps)
    with pytest.raises(ValueError, match="q_transform must be"):
        SearchConfig(tree="gumbel", q_transform="mixed")
    with pytest.raises(ValueError, match='q_transform must be None with tree "lightzero"'):
        SearchConfig(q_transform="tree")
    assert isinstance(Node, type)


@pytest.mark.skipif(not FULL, reason="four devices are tried in test_composition.py")
def test_roots_on_a_mesh_with_explicit_axes():
    """The model's step is asked as on any other: its own gathers need not say how they lie."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    by_row = jax.sharding.PartitionSpec("d")
    by, root = SearchConfig(10, tree="muzero", kept_nodes=4), plain_root(4, state=roots(0, 4).state)
    placed = jax.device_put(root, jax.sharding.NamedSharding(mesh, by_row))

    def step(play, rng, node, action):
        tokens = jnp.broadcast_to(node.state.astype(jnp.float32)[None, :, None], (2, 4, 4))
        read = jnp.sum(jnp.where(node.valid[..., None], node.tokens, 0), (1, 2))
        _, state, came = table_step(play, rng, node, action, masked=False)
        policy = came.policy[:, :3] + read[:, None] / 1000
        return tokens, state, dataclasses.replace(came, policy=policy)

    outs = []
    for given in root, placed:
        kept = action = None
        for _ in range(2):
            out = tree_search(
                PLAY,
                jax.random.key(0),
                given,
                TreeModel(2, 6, step),
                search=by,
                kept=kept,
                last_action=action,
                return_tree=True,
            )
            kept, action = out.kept, out.action
        outs.append(out)
    assert outs[1].tree.tables.sharding.spec == jax.sharding.PartitionSpec(None, "d", None)
    assert outs[1].tree.tokens.sharding.spec[0] == outs[1].action.sharding.spec[0] == "d"
    chex.assert_trees_all_close(*(jax.device_get(out) for out in outs), atol=1e-6)
    np.testing.assert_array_equal(*(out.tree.tokens for out in outs))


@pytest.mark.parametrize("tree", ["muzero", "gumbel"])
def test_a_model_that_draws_at_the_depth_limit(tree):
    """There mctx asks the model again and keeps its last reward and value."""

    def drawn(rng, state):
        return jax.random.normal(rng, state.shape)

    def recurrent(play, rng, action, state):
        state = after(state, action)
        both = {"reward": drawn(rng, state), "value": -drawn(rng, state)}
        rest = {"discount": play["discount"][state], "prior_logits": play["policy"][state]}
        return mctx.RecurrentFnOutput(**both, **rest), state

    def step(play, rng, node, action):
        output, state = recurrent(play, rng, action, node.state)
        return (), state, output

    by = SearchConfig(40, tree=tree, max_depth=2, q_transform="siblings")
    rng, root = jax.random.key(5), roots(1, 30)
    out = tree_search(PLAY, rng, root, TreeModel(1, 1, step), search=by)
    options = {"dirichlet_fraction": 0.0, "temperature": 0.0}
    wanted = jax.jit(
        functools.partial(
            POLICIES[tree],
            recurrent_fn=recurrent,
            num_simulations=40,
            max_depth=2,
            qtransform=mctx.qtransform_by_parent_and_siblings,
            **(options if tree == "muzero" else {"gumbel_scale": 0.0}),
        )
    )(
        PLAY,
        rng,
        mctx.RootFnOutput(prior_logits=root.policy, value=root.value, embedding=root.state),
    )
    summary = wanted.search_tree.summary()
    np.testing.assert_array_equal(out.visit_counts, summary.visit_counts)
    np.testing.assert_allclose(out.q_values, summary.qvalues, atol=1e-5)
    np.testing.assert_allclose(out.root_value, summary.value, atol=1e-5)


@pytest.mark.parametrize("tree", ["lightzero", "muzero"])
def test_an_edge_whose_node_was_forgotten_goes_on_from_its_mean(tree):
    """A chain of states 0, 1, .. that are worth their numbers; one node is kept."""

    def step(params, rng, node, action):
        state = node.state + 1.0
        return (), state, Transition(0 * state, state, jnp.zeros((1, 1)))

    def chain(state):
        return Root((), np.zeros(1, int), np.zeros((1, 1), np.float32), state, state=state)

    model, by = TreeModel(1, 1, step), SearchConfig(4, tree=tree, kept_nodes=1, discount=1.0)
    first = tree_search((), jax.random.key(0), chain(np.zeros(1, np.float32)), model, search=by)
    again = tree_search(
        (),
        jax.random.key(0),
        chain(np.ones(1, np.float32)),
        model,
        search=by,
        kept=first.kept,
        last_action=first.action,
        return_tree=True,
    )
    # Of state 3 two visits were kept, worth 3 and 4; it is imagined anew, then 4, 5 and 6 below it.
    np.testing.assert_allclose(again.tree.q_values[0, 1, 0], (3 + 4 + 3 + 4 + 5 + 6) / 6)
    np.testing.assert_allclose(again.q_values[0, 0], (2 + 3 + 4 + 3 + 4 + 5 + 6) / 7)


@pytest.mark.parametrize("tree", ["lightzero", "muzero", "gumbel"])
def test_logits_of_minus_infinity_are_no_fault_of_a_row(tree):
    """Masks as many of mctx's users write them; but some action must be possible."""
    root = roots(0, 3)
    policy = np.array(root.policy)
    policy[1, 2:], policy[2] = -np.inf, -np.inf
    given = dataclasses.replace(root, policy=policy)
    by = SearchConfig(20, tree=tree)
    out = tree_search(PLAY, jax.random.key(0), given, TABLES[False], search=by)
    assert out.finite.tolist() == [True, True, False]
    assert np.isfinite(out.action_weights[:2]).all()


@pytest.mark.parametrize("tree", ["lightzero", "muzero"])
def test_nothing_is_kept_from_behind_an_end(tree):
    """The model took the step for the last one; the episode goes on all the same."""

    def step(params, rng, node, action):
        over = node.state
        nothing = jnp.zeros(1) + jnp.where(over, jnp.nan, 0.0)
        going = Transition(nothing, nothing, jnp.zeros((1, 2)), jnp.zeros(1))
        return (), over | True, going

    root = Root((), np.zeros(1, int), np.zeros((1, 2), np.float32), np.zeros(1, np.float32))
    root = dataclasses.replace(root, state=np.zeros(1, bool))
    by, kept, action = SearchConfig(20, tree=tree, kept_nodes=5), None, None
    for _ in range(2):
        out = tree_search(
            (),
            jax.random.key(0),
            root,
            TreeModel(1, 1, step),
            search=by,
            kept=kept,
            last_action=action,
        )
        assert out.finite.all()
        assert out.visit_counts.sum() == 20
        kept, action = out.kept, out.action


class Latent(NamedTuple):
    """A state of two parts."""

    state: Any
    steps: Any


def test_states_of_any_structure_go_into_flax_checkpoints():
    def step(play, rng, node, action):
        latent, (again,) = node.state["latent"], node.state["again"]
        _, state, came = table_step(
            play, rng, dataclasses.replace(node, state=latent.state), action, masked=False
        )
        return (), {"latent": Latent(state, latent.steps + 1), "again": (again,)}, came

    root, by = roots(0, 3), SearchConfig(5, tree="muzero", kept_nodes=2)
    state = {"latent": Latent(root.state, root.state * 0), "again": (root.state,)}
    for begun, of_state in ((state, step), (state["latent"], _of_latent)):
        given, model = dataclasses.replace(root, state=begun), TreeModel(1, 1, of_state)
        kept = tree_search(PLAY, jax.random.key(0), given, model, search=by).kept
        empty = jax.tree.map(jnp.zeros_like, kept)
        restored = serialization.from_bytes(empty, serialization.to_bytes(kept))
        chex.assert_trees_all_equal(restored, kept)
        assert type(restored.tokens.state) is type(begun)


def _of_latent(play, rng, node, action):
    node, latent = dataclasses.replace(node, state=node.state.state), node.state
    _, state, came = table_step(play, rng, node, action, masked=False)
    return (), Latent(state, latent.steps + 1), came


def test_a_step_that_has_no_hash_is_refused():
    class Unhashable:
        __hash__ = None

        def __call__(self, *args):
            return plain_step(*args)

    with pytest.raises(TypeError, match="step must be hashable, got an object of type Unhashable"):
        TreeModel(2, 6, Unhashable())
    with pytest.raises(TypeError, match="q_transform must be hashable, got an object of type"):
        SearchConfig(tree="gumbel", q_transform=Unhashable())


def test_lists_for_arrays_and_other_names_in_an_embedding():
    by, root, model = SearchConfig(3), plain_root(), TreeModel(2, 6, plain_step)
    lists = dataclasses.replace(
        root, length=[0, 0], value=[0.0, 0.0], policy=[[0.0] * 3] * 2, legal=[[True] * 3] * 2
    )
    found, wanted = (tree_search({}, jax.random.key(0), x, model, search=by) for x in (lists, root))
    chex.assert_trees_all_equal(found, wanted)
    embedding = {"tokens": root.tokens, "length": root.length, "latent": root.state}
    theirs = mctx.RootFnOutput(prior_logits=root.policy, value=root.value, embedding=embedding)
    with pytest.raises(TypeError, match=r"embedding dict of tokens, length, latent"):
        tree_search({}, jax.random.key(0), theirs, model, search=by)


def test_export_with_a_symbolic_number_of_rows():
    root, by = roots(0, 3), SearchConfig(5, tree="muzero")
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), root)

    def visits(play, rng, root):
        return tree_search(play, rng, root, TABLES[False], search=by).visit_counts

    play, rng = jax.tree.map(jnp.asarray, PLAY), jax.random.PRNGKey(0)
    exported = export.export(jax.jit(visits))(play, rng, shapes)
    np.testing.assert_array_equal(exported.call(play, rng, root), visits(play, rng, root))


def test_a_call_that_leaves_arguments_out_moves_nothing():
    by = SearchConfig(5, tree="muzero", kept_nodes=2)
    given = jax.device_put((PLAY, jax.random.key(0), roots(0, 3)))
    tree_search(*given, TABLES[False], search=by)
    with jax.transfer_guard("disallow"):
        tree_search(*given, TABLES[False], search=by)
