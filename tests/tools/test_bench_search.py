"""The benchmark of whole searches: its rows, and that its floor leaves nothing out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_params

from kvjax.config import SearchConfig
from kvjax.model import folding
from kvjax.tools.bench import floor, search, timing

TINY = search.Case(embed=16, layers=2, heads=2, context=8, envs=2, simulations=3, repeats=1)


@pytest.fixture
def no_lightzero(monkeypatch):
    monkeypatch.setattr(search.lightzero_020, "available", lambda: False)


@pytest.mark.optimised
@pytest.mark.parametrize("layers", [1, 2])
def test_every_product_of_a_simulation_is_in_the_floor(layers):
    config = dataclasses.replace(SMALL, num_layers=layers)
    folded = folding.fold(random_params(config), config=config)
    text = floor.compiled(folded, jnp.ones((16, 4)), simulations=5).as_text()
    products = re.findall(r"f32\[(\d+),4\]\S* dot\(", text)
    assert floor.num_products(layers) == len(products) == 8 * layers + 6
    per_layer = ["48", "16", "64", "16"] * 2 * layers
    hidden_and_outputs = ["32", "7", "16", "32", "3", "7"]
    assert sorted(products) == sorted(per_layer + hidden_and_outputs)


def test_the_floor_is_a_chain():
    """Every weight matters to the result, and it stays finite."""
    folded = folding.fold(random_params(SMALL), config=SMALL)
    start = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    run = floor.compiled(folded, start, simulations=1)
    plain = run(folded, start)
    assert np.isfinite(plain).all()
    pairs = (folded.at_action, folded.at_observation)
    layers = [layer for b in folded.blocks for layer in (b.qkv, b.projection, b.expand, b.contract)]
    layers += [layer for pair in pairs for layer in (pair.hidden, *pair.outputs)]
    changed = {id(layer.weight) for layer in layers}
    assert len(changed) == floor.num_products(2) // 2 + 3
    for weight in changed:
        other = jax.tree.map(lambda x, w=weight: jnp.roll(x, 1, 1) if id(x) == w else x, folded)
        assert np.abs(run(other, start) - plain).max() > 1e-6


def test_a_row(monkeypatch, no_lightzero):
    monkeypatch.setattr(search, "CASES", (TINY,))
    monkeypatch.setattr(search, "growth", list)
    told = []
    result = search.run(progress=lambda fraction, text: told.append((fraction, text)))
    (row,) = result["rows"]
    sizes = {"embed": 16, "layers": 2, "context": 8, "envs": 2, "simulations": 3}
    sizes |= {"dtype": "float32", "devices": 1}
    assert sizes.items() <= row.items()
    times = ("kvjax_ms", "muzero_ms", "mctx_ms", "floor_ms", "tree_mib", "mctx_tree_mib")
    assert all(row[name] > 0 for name in times)
    assert row["floor_ratio"] == row["kvjax_ms"] / row["floor_ms"]
    assert row["float32_ms"] == row["kvjax_ms"]
    assert row["mctx_ratio"] == row["mctx_ms"] / row["muzero_ms"]
    assert 1 <= row["mean_depth"] <= 3
    assert "lightzero_ms" not in row
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert any("floor" in text for _, text in told)


def test_growth(monkeypatch):
    """A simulation's time and the depth of two trees; the second is over the first."""
    large = dataclasses.replace(TINY, simulations=9)
    monkeypatch.setattr(search, "GROWTH", ((TINY, 0.1), (large, 4.0)))
    monkeypatch.setattr(search.timing, "medians_in_turn", medians := MedianOfOne())
    result = search.run(only="growth")
    assert result["rows"] == []
    small, big = result["growth"]
    sizes = {"embed": 16, "layers": 2, "context": 8, "envs": 2}
    assert (sizes | {"simulations": 3, "pb_c_init": 0.1}).items() <= small.items()
    assert (sizes | {"simulations": 9, "pb_c_init": 4.0}).items() <= big.items()
    assert (small["us_per_simulation"], big["us_per_simulation"]) == (1000.0, 2000.0)
    assert (small["ratio"], big["ratio"]) == (1.0, 2.0)
    assert 1 <= small["mean_depth"] <= 2 < medians.rounds
    assert 1 < big["mean_depth"] <= 5


class MedianOfOne:
    """Three simulations take 3 ms, nine take 18 ms."""

    def __call__(self, candidates, *, repeats, warmup):
        self.rounds = repeats + warmup
        for _ in range(self.rounds):
            for run in candidates.values():
                run()
        return dict(zip(candidates, (3.0, 18.0), strict=True))


def test_cases():
    sizes = [(c.embed, c.context, c.envs, c.simulations) for c in search.CASES]
    assert set(sizes) == {
        (64, 8, 8, 50),
        (768, 8, 8, 50),
        (64, 8, 64, 50),
        (64, 8, 256, 50),
        (64, 64, 8, 200),
        (768, 64, 8, 200),
        (256, 64, 8, 200),
        (64, 512, 8, 50),
        (256, 512, 8, 50),
        (64, 4096, 8, 50),
    }
    assert {(c.layers, c.heads) for c in search.CASES} == {(2, 8)}
    assert [case.simulations for case, _ in search.GROWTH] == [50, 800]


@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("", 14),
        ("dtype=float32", 10),
        ("dtype=float32,embed=64", 6),
        ("dtype=float32,embed=64,envs=8", 4),
        ("dtype=float32,embed=64,envs=8,context=8", 1),
        ("embed=768,dtype=bfloat16", 2),
        ("embed=64,envs=8,context=8", 2),
    ],
)
def test_only_picks_rows_by_whole_parts(monkeypatch, only, count):
    """`envs=8` is not a part of `envs=80`, and every part must fit."""
    monkeypatch.setattr(search, "_row", lambda case, progress: {"case": case})
    monkeypatch.setattr(search, "growth", list)
    cases = [row["case"] for row in search.run(only=only)["rows"]]
    assert len(cases) == count
    assert all(
        part in case.label().split(",") for case in cases for part in only.split(",") if part
    )
    assert not any(case.envs != 8 for case in cases if "envs=8" in only)


def test_no_such_row():
    with pytest.raises(ValueError, match="no benchmark row matches 'embed=6'"):
        search.run(only="embed=6")


def test_a_row_of_bfloat16(monkeypatch, no_lightzero):
    """Kvjax, mctx and the floor multiply bfloat16; beside them kvjax with float32."""
    monkeypatch.setattr(search, "CASES", (dataclasses.replace(TINY, dtype="bfloat16"),))
    seen = {}

    def medians(candidates, **_):
        for name, run in candidates.items():
            weights = getattr(getattr(run, "__self__", None), "prepared", None)
            seen[name] = None if weights is None else str(weights.blocks[0].qkv.weight.dtype)
        return dict(zip(candidates, range(1, 9), strict=False))

    made = []
    monkeypatch.setattr(search.floor, "make", lambda model, **_: made.append(model) or len)
    monkeypatch.setattr(search.timing, "medians_in_turn", medians)
    monkeypatch.setattr(search.Search, "temporary_mib", lambda _: 1.0)
    (row,) = search.run(only="dtype=bfloat16")["rows"]
    names = dict.fromkeys(("kvjax", "muzero", "mctx"), "bfloat16")
    assert seen == names | {"float32": "float32", "floor": None}
    assert made[0].blocks[0].qkv.weight.dtype == jnp.bfloat16
    assert (row["dtype"], row["kvjax_ms"], row["float32_ms"]) == ("bfloat16", 1, 4)


def test_windows_are_full_and_memory_is_small(no_lightzero):
    """A long context: whole windows per node take many times what own tokens take."""
    case = dataclasses.replace(TINY, embed=64, heads=8, context=64, envs=8, simulations=200)
    config, params = search._model(case, None)
    by = SearchConfig(case.simulations, "muzero", q_transform="siblings")
    ours = search.Search(case, config, params, by)
    theirs = search.Search(case, config, params, by, by_mctx=True)
    assert ours.contexts.window.length.tolist() == [61] * 8
    assert ours.temporary_mib() <= theirs.temporary_mib() / 20


def test_medians_in_turn():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    medians = timing.medians_in_turn(candidates, repeats=7, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 24, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 3  # nobody always follows the same one
    assert list(medians) == list("abc")
