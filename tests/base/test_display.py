"""States draw themselves: the very text, and what the HTML is made of."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

import kvjax
from kvjax import store as stores
from kvjax.base.display_tree import tree_svg
from kvjax.mcts.output import SearchOutput
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.store import pool as pools
from kvjax.tools.parity import reference_tree as trees


def window(text):
    """[1 2 . .] -> a window of tokens filled with 1, 2."""
    values = [0 if c == "." else int(c) for c in text.strip("[]").split()]
    kv = jnp.asarray(values, jnp.float32)[:, None, None, None, None] * jnp.ones((1, 1, 2, 1, 1))
    return Window(kv, jnp.int32(sum(v > 0 for v in values)))


def rows_of(text):
    return [line.strip() for line in text.splitlines() if line.strip().startswith("[")]


def kinds(html):
    return re.findall(r'class="(\w+)"', html)


def labels(html):
    return [x.replace("&nbsp;", "") for x in re.findall(r">([^<>]*)</span>", html)]


def test_a_window():
    drawn = window("[1 2 . .]")
    expected = "Window: 2 of 4 slots, 1 layers, 1 heads of 1, float32\n  [1 2 . .]"
    assert repr(drawn) == str(drawn) == expected
    page = drawn._repr_html_()
    assert kinds(page) == ["token", "token", "free", "free"]
    assert labels(page) == ["1", "2", "", ""]


def test_what_a_slide_keeps_moves_and_is_corrected():
    before = window("[1 2 3 4 5 6 7 .]")
    slid = windows.slide(before, 0.5 * jnp.ones((5, 1, 2, 1, 1)))
    assert rows_of(repr(before)) == ["[1 2 3 4 5 6 7 .]"]
    assert rows_of(repr(slid)) == ["[3.5 4.5 5.5 6.5 7.5 . . .]"]
    assert kinds(slid._repr_html_()) == ["token"] * 5 + ["free"] * 3


def test_trim_and_pad_draws_the_docstring():
    rows = [window("[1 . . .]"), window("[2 3 . .]"), window("[4 5 6 .]")]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    aligned = windows.trim_and_pad(batch)
    assert rows_of(repr(aligned)) == ["[. . 1 .]", "[. 2 3 .]", "[4 5 6 .]"]
    assert kinds(aligned._repr_html_())[:4] == ["pad", "pad", "token", "free"]
    assert rows_of(repr(windows.undo_trim_and_pad(aligned))) == rows_of(repr(batch))


def test_large_batches_and_long_windows_are_cut():
    wide = Window(jnp.zeros((11, 40, 1, 2, 1, 1)), jnp.full(11, 40))
    drawn = rows_of(repr(wide))
    assert len(drawn) == 8
    assert drawn[0].split()[-1] == "...]"
    assert repr(wide).endswith("... and 3 more rows")


@pytest.mark.parametrize("draw", [repr, lambda state: state._repr_html_()])
def test_without_numbers_shapes_are_said(draw):
    state = windows.init(SMALL.window)
    text = "Window(kv=float32[8,2,2,2,8], length=int32[], raw=None)"
    assert text in draw(jax.eval_shape(lambda: state))
    seen = []
    jax.jit(lambda w: seen.append(draw(w)) or w)(state)
    jax.vmap(lambda w: seen.append(draw(w)) or w)(jax.tree.map(lambda x: x[None], state))
    assert len(seen) == 2
    assert all(text in one for one in seen)
    assert "Window(kv=None, length=None, raw=None)" in draw(Window(None, None))
    axes = dataclasses.replace(state, kv=0, length=None)
    assert draw(axes)


def test_leading_axes_of_a_scan_are_not_drawn():
    state = windows.init(SMALL.window)
    stacked = jax.tree.map(lambda x: jnp.zeros((3, 2, *x.shape), x.dtype), state)
    assert repr(stacked) == "Window(kv=float32[3,2,8,2,2,2,8], length=int32[3,2], raw=None)"


def test_a_state_that_was_moved_says_so():
    state = window("[1 2 . .]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the backend could use the donation
        jax.jit(lambda w: jax.tree.map(lambda x: x + 1, w), donate_argnums=0)(state)
    assert repr(state) == "Window(kv=moved away, length=moved away, raw=None)"


add = jax.jit(pools.add)


def key(number):
    return jnp.zeros((1, 7), jnp.uint32).at[0, 0].set(number)


def filled(eviction="fifo", numbers=(1, 2, 3, 4), slots=3, **options):
    pool = pools.init(
        {"x": jnp.zeros(1)}, num_slots=slots, key_lanes=7, eviction=eviction, **options
    )
    for number in numbers:
        priorities = jnp.float32([-number]) if eviction == "priority" else None
        pool, *_ = add(
            pool, key(number), jnp.zeros(1, int), {"x": jnp.ones((1, 1))}, priorities=priorities
        )
    return pool


def test_a_pool_shows_the_order_in_which_it_would_evict():
    assert repr(filled(numbers=())) == "Pool: 0 of 3 slots used, fifo\n  [. . .]"
    assert repr(filled()) == "Pool: 3 of 3 slots used, fifo\n  [3 1 2]"
    assert rows_of(repr(filled("fifo", (1, 2, 3, 1)))) == ["[1 2 3]"]
    assert rows_of(repr(filled("lru", (1, 2, 3, 1)))) == ["[3 1 2]"]
    assert rows_of(repr(filled("priority", (1, 2, 3)))) == ["[3 2 1]"]
    page = filled("lru", (1, 2))._repr_html_()
    assert kinds(page) == ["token", "token", "empty"]
    assert labels(page) == ["1", "2", ""]
    assert [float(x) for x in re.findall(r"rgba\(59,125,216,([\d.]+)", page)] == [0.43, 0.32]


def test_ages_survive_a_wrapped_clock():
    pool = filled(numbers=())
    old = dataclasses.replace(pool, segments=pool.segments.at[0, pools.CLOCK].set(2**32 - 2))
    for number in (1, 2, 3):
        old, *_ = add(old, key(number), jnp.zeros(1, int), {"x": jnp.ones((1, 1))})
    assert rows_of(repr(old)) == ["[1 2 3]"]


def test_a_cleared_segment_is_empty():
    pool = filled(num_segments=2)
    assert repr(pool) == "Pool: 3 of 6 slots used, fifo, 2 segments\n  [3 1 2]\n  [. . .]"
    assert rows_of(repr(pools.clear(pool, 0))) == ["[. . .]", "[. . .]"]


def test_a_store():
    store = stores.init_store(SMALL, 2, 3, root_slots=2)
    keys = stores.latent_keys(store, jnp.ones((2, 16)), jnp.arange(2))
    held = jax.vmap(lambda _: windows.init(SMALL.window))(jnp.arange(2))
    store, _ = jax.jit(stores.add_roots)(store, keys, jnp.arange(2), held)
    assert repr(stores.new_epoch(store)).startswith("Store: epoch 1, 0 look-ups, 0 misses\n")
    assert repr(store) == "\n".join(
        [
            "Store: epoch 0, 0 look-ups, 0 misses",
            "roots: 2 of 4 slots used, fifo, 2 segments",
            "  [1 .]",
            "  [1 .]",
            "nodes: 0 of 6 slots used, fifo",
            "  [. . . . . .]",
        ]
    )
    assert kinds(store._repr_html_()) == ["token", "empty"] * 2 + ["empty"] * 6
    shapes = repr(jax.eval_shape(lambda: store))
    assert shapes.startswith("Store(roots=Pool(records=uint32[5,")


def test_a_search_output():
    out = SearchOutput(
        action=np.array([1]),
        visit_counts=np.array([[5, 20]]),
        root_value=np.array([2.5]),
        q_values=np.array([[1.0, 2.0]]),
        prior=np.array([[0.25, 0.75]]),
        network_value=np.array([3.0]),
        mean_depth=np.array([4.0]),
        finite=np.array([True]),
        action_weights=np.array([[0.2, 0.8]]),
    )
    assert repr(out) == "\n".join(
        [
            "SearchOutput: 1 rows, 2 actions",
            "  row 0: action 1, value 2.5 (network 3), mean depth 4",
            "    action  visits  bar           q       prior",
            "    0       5       ###           1       0.250",
            "    1       20      ############  2       0.750",
        ]
    )
    page = out._repr_html_()
    assert "<td>20</td>" in page
    assert re.findall(r"background:(#\w+);height:.8em;width:([\d.]+)em", page) == [
        ("#3b7dd8", "2.50"),
        ("#d9822b", "10.00"),
    ]


def searched(simulations=6):
    config = kvjax.SearchConfig(num_simulations=simulations)
    tree = trees.init(np.zeros(2, np.float32), np.ones(2, bool), config)
    for _ in range(simulations):
        _, action = trees.select(tree)
        trees.expand(tree, float(action), 0.0, np.zeros(2, np.float32))
    return tree


def test_a_tree_draws_every_node_its_visits_and_the_most_visited_path():
    tree = searched()
    assert repr(tree) == "Tree: 7 nodes, visits of the root's actions 1, 5"
    drawn = tree._repr_html_()
    circles = re.findall(r'fill="(#\w+)"><title>node (\d+): (\d+) visits', drawn)
    assert [int(node) for _, node, _ in circles] == list(range(7))
    assert [int(count) for *_, count in circles] == tree.visits.tolist()
    assert drawn.count("<line") == 6
    path, node = {0}, 0
    while (tree.children[node] >= 0).any():
        node = max(tree.children[node][tree.children[node] >= 0], key=lambda c: tree.visits[c])
        path.add(int(node))
    assert {int(node) for colour, node, _ in circles if colour == "#d9822b"} == path
    assert len(path) > 2


def test_no_two_nodes_of_a_tree_touch():
    drawn = searched(20)._repr_html_()
    at = [tuple(map(float, x)) for x in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    nearest = min(np.hypot(a[0] - b[0], a[1] - b[1]) for a in at for b in at if a is not b)
    assert len(at) == 21
    assert nearest > 33


def test_large_trees_show_their_most_visited_nodes():
    tree = searched(20)
    drawn = tree_svg(tree.children, tree.visits, tree.value_sum, max_nodes=5)
    counts = sorted(int(x) for x in re.findall(r": (\d+) visits", drawn))
    assert counts == sorted(tree.visits)[-5:]
