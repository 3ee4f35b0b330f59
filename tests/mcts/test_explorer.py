"""The page that a search is stepped through on: its numbers are the search's, step by step."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_params

import kvjax
from kvjax.mcts import explorer

BLOCK, SIZE, ROWS, ACTIONS = 2, 5, 3, 3
PARAMS = random_params(SMALL)


def step(params, rng, node, action):
    """Numbers that follow from the path alone; some edges end the episode or turn the sign."""
    name = (7 * node.state + 3 * action + 1) % 101
    part = jnp.sin(1.0 * name)
    policy = jnp.stack([jnp.sin(1.0 * name * (a + 1)) for a in range(ACTIONS)], axis=1)
    discount = jnp.where(name % 5 == 0, 0.0, jnp.where(name % 3 == 0, -1.0, 0.9))
    value = jnp.where(discount == 0, jnp.nan, part**3)  # what lies behind an end reaches nobody
    answer = kvjax.Transition(part, value, policy, discount)
    return jnp.stack([name, -name]), name, answer


MODEL = kvjax.TreeModel(BLOCK, SIZE, step)
NAMES = np.arange(ROWS, dtype=np.int32) + 1
ROOT = kvjax.Root(
    np.tile(np.arange(SIZE, dtype=np.int32), (ROWS, 1)),
    np.array([1, 3, 5], np.int32),
    np.tile(np.array([[0.1, 0.2, 0.0]], np.float32), (ROWS, 1)),
    np.full(ROWS, 0.3, np.float32),
    state=NAMES,
)


def searched(simulations, tree="lightzero", **options):
    more = {name: options.pop(name) for name in ("kept", "last_action") if name in options}
    search = kvjax.SearchConfig(num_simulations=simulations, tree=tree, **options)
    return kvjax.tree_search(
        {}, jax.random.key(0), ROOT, MODEL, search=search, return_tree=True, **more
    )


def facts(out, row=0, tokens=None):
    return explorer.facts(out, row=row, tokens=tokens, title="", note="")


def after(told, steps):
    """Visits and Q by node after so many steps."""
    taken = [told["start"], *told["steps"][:steps]]
    return {node: (visits, q) for step in taken for node, visits, q in step or []}


def assert_same(found, wanted):
    assert {node: visits for node, (visits, _) in found.items()} == {n: v for n, v, _ in wanted}
    q = {n: q for n, _, q in wanted}
    assert all(abs(found[n][1] - q[n]) < 2e-3 * max(1, abs(q[n])) for n in q)


@pytest.mark.parametrize("tree", ["lightzero", "muzero"])
def test_a_step_stands_where_a_shorter_search_ends(tree):
    whole, short = searched(50, tree), searched(11, tree)
    assert np.asarray(whole.tree.discount == 0)[:, 1:].any()
    for row in range(ROWS):
        told, ended = facts(whole, row), facts(short, row)
        assert_same(after(told, 11), ended["end"])
        assert_same(after(told, 50), told["end"])
        assert told["start"] == []
        assert [step[-1][0] for step in told["steps"]] == list(range(1, 51))
        assert told["visits"] == np.asarray(whole.visit_counts)[row].tolist()
        q = [told["nodes"][0]["Q"][a] for a in range(ACTIONS)]
        np.testing.assert_allclose(q, whole.q_values[row], rtol=1e-3)


def test_nodes_and_their_windows():
    out = searched(50)
    tree = jax.tree.map(np.asarray, out.tree)
    assert tree.depth.max() > 3
    for row in range(ROWS):
        for node, told in enumerate(facts(out, row)["nodes"]):
            slots = [first + i for first, count in told["w"] for i in range(count)]
            assert slots == tree.slots[row, node, : tree.length[row, node]].tolist()
            owned = [1 + (slot - SIZE) // BLOCK for slot in slots if slot >= SIZE]
            values = tree.tokens[row, node, : tree.length[row, node]]
            signs = [(-1) ** ((slot - SIZE) % BLOCK) for slot in slots if slot >= SIZE]
            states = [tree.state[row, n] * sign for n, sign in zip(owned, signs, strict=True)]
            assert states == values[len(slots) - len(owned) :].tolist()
            if node:
                assert (told["p"], told["a"]) == (tree.parent[row, node], tree.action[row, node])
                assert told["r"] == pytest.approx(tree.reward[row, node], rel=1e-3)
                value = np.nan if told["v"] is None else told["v"]
                np.testing.assert_allclose(value, tree.value[row, node], rtol=1e-3)
            np.testing.assert_allclose(told["P"], tree.prior[row, node], rtol=1e-3)


def test_kept_nodes_stand_at_the_start():
    first = searched(12, kept_nodes=8)
    out = searched(12, kept_nodes=8, kept=first.kept, last_action=first.action)
    goes_on = 0
    for row in range(ROWS):
        told = facts(out, row)
        assert_same(after(told, 12), told["end"])
        assert len(told["steps"]) == 12
        kept = [n["s"] for n in told["nodes"][1:] if n].count(-1)
        assert kept == len(told["start"])
        goes_on += kept > 0
        before, child = facts(first, row), None
        for node in before["end"]:
            step = before["nodes"][node[0]]
            child = node[0] if (step["p"], step["a"]) == (0, int(first.action[row])) else child
        below = [child]
        for node, _, _ in before["end"]:
            below += [node] if before["nodes"][node]["p"] in below else []
        ends = [node[1:] for node in before["end"] if node[0] in below[1:]]
        if kept:
            assert [visits for _, visits, _ in told["start"]] == [v for v, _ in ends[:8]]
            q = [q for _, _, q in told["start"]]
            np.testing.assert_allclose(q, [q for _, q in ends[:8]], rtol=5e-3, atol=1e-3)
    assert goes_on


def test_a_simulation_that_ends_at_the_limit_of_depth_made_no_node():
    told = facts(searched(8, max_depth=1))
    none = [step is None for step in told["steps"]]
    assert none == [node is None for node in told["nodes"][1:]]
    assert none.count(False) <= ACTIONS
    assert sum(visits for _, visits, _ in told["end"]) == 8


KEEPING = kvjax.SearchConfig(num_simulations=6, kept_nodes=4)
SEEN = np.random.default_rng(0).normal(size=(2, 2, 5)).astype(np.float32)


@functools.cache
def of_unizero(return_tree):
    """The first step of an episode."""
    return then(kvjax.init_contexts(SMALL, 2), None, 0, np.full(2, -1), return_tree)


def then(contexts, kept, at, last_action, return_tree):
    how = {"config": SMALL, "search": KEEPING, "kept": kept, "return_tree": return_tree}
    return kvjax.search(PARAMS, jax.random.key(0), contexts, SEEN[at], last_action, **how)


def test_unizero_hands_out_its_tree_and_answers_the_same():
    (_, out), (_, plain) = of_unizero(True), of_unizero(False)
    assert plain.tree is None
    for field in dataclasses.fields(plain):
        if field.name not in ("tree", "kept"):
            mine, other = (getattr(x, field.name) for x in (out, plain))
            np.testing.assert_array_equal(mine, other, field.name)
    told = facts(out, 1, ("action", "latent"))
    assert (told["block"], told["size"]) == (2, SMALL.window.kept_length)
    assert_same(after(told, 6), told["end"])
    assert told["nodes"][0]["v"] == pytest.approx(float(out.network_value[1]), rel=1e-3)


def test_values_of_nodes_that_were_kept_without_a_tree_are_unknown():
    """And whichever way trees were kept, the next search may ask for its tree or not."""
    (contexts, told), (_, plain) = of_unizero(True), of_unizero(False)
    last, unknown = plain.action, []
    for kept in (plain.kept, told.kept):
        _, out = then(contexts, kept, 1, last, True)
        nodes = [node for node in facts(out)["nodes"][1:] if node]
        assert len({node["s"] < 0 for node in nodes}) == 2
        assert all(node["v"] is not None for node in nodes if node["s"] >= 0)
        unknown.append({node["v"] is None for node in nodes if node["s"] < 0})
    assert unknown == [{True}, {False}]
    shapes = jax.eval_shape(lambda: then(contexts, told.kept, 1, last, False)[1].kept)
    assert shapes.tree.edges.shape == plain.kept.tree.edges.shape


def test_the_page_is_one_small_file(tmp_path):
    path, title = tmp_path / "tree.html", "a </script><b> & more"
    text = searched(50).to_html(path, row=1, tokens=("this", "that"), title=title, note="so")
    assert path.read_text() == text
    assert len(text.encode()) < 60_000
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", text)
    assert text.count("</script>") == 2
    told = json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', text)[1])
    assert (told["title"], told["note"], told["names"]) == (title, "so", ["this", "that"])
    ids = set(re.findall(r' id="(\w+)"', text))
    assert set(re.findall(r'\$\("(\w+)"\)', text)) <= ids


def test_refusals():
    out = searched(50)
    for options, text in (
        ({"row": ROWS}, "row must be an integer in 0 .. 2, got 3"),
        ({"row": 0.5}, "row must be"),
        ({"tokens": ["one"]}, "names of the 2 tokens"),
    ):
        with pytest.raises(ValueError, match=text):
            out.to_html(**options)
    with pytest.raises(ValueError, match="return_tree=True"):
        dataclasses.replace(out, tree=None).to_html()
    with pytest.raises(ValueError, match=r"must be \[B, N\]"):
        jax.tree.map(lambda x: x[None], out).to_html()
