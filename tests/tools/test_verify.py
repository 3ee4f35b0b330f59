"""Recorded answers of LightZero; and that a broken cache is found out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL

from kvjax.lightzero.traces import trace as traces
from kvjax.model import modes, step
from kvjax.ops import window as windows
from kvjax.ops.window import Window
from kvjax.tools.parity import verify

TRACES = (
    "lightzero_main_abs.npz",
    "lightzero_020_abs.npz",
    "lightzero_main_rope.npz",
    "lightzero_main_rebuild.npz",
    "lightzero_main_reset.npz",
)
TOLERANCE = 1e-4


BY_STORE = ("lightzero_020_abs.npz", "lightzero_main_rebuild.npz")


@pytest.mark.parametrize(
    ("name", "route"),
    [
        *((name, "tree") for name in TRACES),
        *((name, "store") for name in (TRACES if FULL else BY_STORE)),
    ],
)
def test_within_tolerance(data, name, route):
    report = verify.verify(data / name, route=route)
    assert report.ok
    assert report.route == route
    assert report.found["length_mismatches"] == 0
    assert set(report.found["max_abs_error"]) == set(verify.OUTPUTS)
    assert all(0 < error < TOLERANCE / 10 for error in report.found["max_abs_error"].values())
    assert (report.found["steps"], report.found["simulations"]) == (8, 80)


@pytest.mark.parametrize("route", ["tree", "store"])
def test_every_answer_is_compared(data, tmp_path, route):
    """One number changed in each kind of answer: each is reported, with its size."""

    def change(arrays):
        names = ("policy_logits", "value_logits", "k2", "v1")
        for size, name in enumerate((*names, *verify.OUTPUTS[4:]), start=1):
            arrays[f"step6/{name}"].reshape(-1)[-1] += 10.0 * size
        arrays["step7/length"][1] += 1

    report = verify.verify(rewritten(data / TRACES[0], tmp_path / "t.npz", change), route=route)
    assert not report.ok
    assert report.found["length_mismatches"] == 1
    for size, name in enumerate(verify.OUTPUTS, start=1):
        assert abs(report.found["max_abs_error"][name] - 10.0 * size) < 1e-3


def test_a_wrong_length_alone_fails(data, tmp_path):
    def change(arrays):
        arrays["step7/length"][1] += 1

    report = verify.verify(rewritten(data / TRACES[0], tmp_path / "t.npz", change))
    assert max(report.found["max_abs_error"].values()) < TOLERANCE
    assert report.found["length_mismatches"] == 1
    assert not report.ok


def break_correction(monkeypatch):
    exact = modes.slide_correction
    monkeypatch.setattr(
        modes, "slide_correction", lambda model, config: 0.9 * exact(model, config=config)
    )


def break_mask(monkeypatch):
    monkeypatch.setattr(
        windows, "valid_mask", lambda w: jnp.arange(w.kv.shape[0]) < jnp.maximum(w.length, 3)
    )


def break_slide_length(monkeypatch):
    exact = windows.slide

    def slide(window, correction, block):
        slid = exact(window, correction)
        return Window(slid.kv, slid.length - (window.length >= 7))

    monkeypatch.setattr(windows, "slide", slide)


def break_slide_threshold(monkeypatch):
    exact = windows.slide
    monkeypatch.setattr(
        windows,
        "slide",
        lambda window, correction, block: jax.tree.map(
            lambda new, old: jnp.where(window.length > 7, new, old),
            exact(window, correction),
            window,
        ),
    )


def break_slide_by_one_token(monkeypatch):
    exact = windows.slide

    def slide(window, correction, block):
        return exact(Window(jnp.roll(window.kv, 1, axis=0), window.length), correction)

    monkeypatch.setattr(windows, "slide", slide)


def break_restart(monkeypatch):
    monkeypatch.setattr(step, "FIRST_STEP", -7)


@pytest.mark.parametrize(
    "damage",
    [
        break_correction,
        break_mask,
        break_slide_length,
        break_slide_threshold,
        break_slide_by_one_token,
        break_restart,
    ],
)
def test_a_broken_cache_fails(data, monkeypatch, damage):
    damage(monkeypatch)
    report = verify.verify(data / TRACES[0])
    assert not report.ok
    worst = max(report.found["max_abs_error"].values())
    assert worst > 10 * TOLERANCE or report.found["length_mismatches"] > 0


def test_release_020_needs_its_padding_read(data, monkeypatch):
    exact = traces.read
    monkeypatch.setattr(
        traces, "read", lambda path: traces.dataclasses.replace(exact(path), pads_are_read=False)
    )
    report = verify.verify(data / TRACES[1])
    assert not report.ok
    assert report.found["max_abs_error"]["sim_value_logits"] > 1e-3


def test_nan_is_a_failure(data, monkeypatch):
    exact = modes.slide_correction
    monkeypatch.setattr(
        modes,
        "slide_correction",
        lambda model, config: jnp.nan * exact(model, config=config),
    )
    report = verify.verify(data / TRACES[0])
    assert not report.ok
    assert report.as_json()["max_abs_error"]["k"] is None
    json.dumps(report.as_json(), allow_nan=False)


def rewritten(source, path, change):
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays)
    np.savez(path, **arrays)
    return path


def set_config(arrays, **changes):
    config = {**json.loads(str(arrays["config"])), **changes}
    arrays["config"] = np.array(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("config"), "holds no config: it is no trace"),
        (lambda a: a.update(config=np.array("{")), "config is no JSON"),
        (lambda a: a.update(config=np.array("[]")), "config must be a JSON object"),
        (lambda a: a.update(config=np.array("{}")), "config lacks ctx, envs, heads"),
        (lambda a: set_config(a, ctx=7), "context_length must be even"),
        (lambda a: set_config(a, ctx=2), "context_length must be at least 4"),
        (lambda a: set_config(a, heads=5), "num_heads must divide embed_dim 64, got 5"),
        (lambda a: set_config(a, envs=4), r"step0/timestep has shape \(3,\), expected \(4,\)"),
        (lambda a: set_config(a, steps=9), "step8/timestep is missing"),
        (lambda a: set_config(a, rebuild=True, reset=True), "rebuild and reset exclude each"),
        (lambda a: set_config(a, rope=True), '"rope_lightzero" excludes learned positions'),
        (
            lambda a: set_config(a, rope=True, rope_positions="mine"),
            "rope_positions must be lightzero or consistent, got mine",
        ),
        (lambda a: a.pop("step3/sim_action"), "step3/sim_action is missing"),
        (lambda a: a.pop("weights/pos_emb.weight"), "missing tensor pos_emb.weight"),
        (
            lambda a: a["weights/pos_emb.weight"].__setitem__((0, 0), np.nan),
            "pos_emb.weight holds 1 values that are NaN",
        ),
        (
            lambda a: [a.pop(k) for k in list(a) if k.startswith("weights/")],
            "holds no weights",
        ),
    ],
)
def test_bad_traces(data, tmp_path, change, message):
    path = rewritten(data / TRACES[1], tmp_path / "trace.npz", change)
    with pytest.raises(ValueError, match=message):
        verify.verify(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cartpole_lightzero_0.2.0.pth.tar", "holds no config: it is no trace"),
    ],
)
def test_unsupported_traces_are_refused_by_name(data, name, message):
    with pytest.raises(ValueError, match=message):
        verify.verify(data / name)


def test_missing_and_truncated_traces(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such trace"):
        verify.verify(tmp_path / "absent.npz")
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes((data / TRACES[0]).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="not a readable .npz trace"):
        verify.verify(truncated)
    array = tmp_path / "array.npz"
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="not a readable .npz trace"):
        verify.verify(array)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_bad_tolerance(data, tolerance):
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        verify.verify(data / TRACES[0], tolerance=tolerance)
