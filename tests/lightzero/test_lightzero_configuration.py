"""Where a LightZero checkpoint's configuration is from, and what contradicts its tensors."""

import logging
import os
import shutil
import types

import numpy as np
import pytest

from kvjax import lightzero
from kvjax.lightzero.checkpoint import described
from kvjax.lightzero.checkpoint.reading import read
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.agent import find_agent

torch = pytest.importorskip("torch")

MASKED = "cartpole_masked_lightzero_0.2.0.pth.tar"
ROPE = "cartpole_masked_rope_lightzero_main.pth.tar"
OPTIONS = {"num_heads": 2, "context_length": 8}
WORLD_MODEL = {
    "tokens_per_block": 2,
    "max_tokens": 20,
    "context_length": 8,
    "device": "cpu",
    "action_space_size": 2,
    "group_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 64,
    "rotary_emb": False,
    "rope_theta": 10000,
}


def total_config(model=None, **world_model):
    """What DI-engine writes of a run: a dictionary's picture, infinity made readable."""
    cfg = {name: said for name, said in (WORLD_MODEL | world_model).items() if said is not ...}
    model = {"observation_shape": 4, "world_model_cfg": cfg} | (model or {})
    text = str({"env": {"stop_value": "INF"}, "policy": {"model": model}, "exp_name": "run"})
    return "exp_config = " + text.replace("'INF'", 'float("inf")')


def formatted_total_config(**world_model):
    """Its twin, in calls of `dict`; infinity in it is a name."""
    return (
        "from easydict import EasyDict\n\nmain_config = dict(\n    exp_name='run',\n    env=dict(\n"
        "        stop_value=inf,\n    ),\n    policy=dict(\n        model=dict(\n"
        f"            world_model_cfg={WORLD_MODEL | world_model},\n        ),\n"
        "        cuda=True,\n    ),\n)\nmain_config = EasyDict(main_config)\n"
    )


@pytest.fixture
def run(data, tmp_path):
    """A run's folder as LightZero leaves it: a checkpoint one folder below."""
    (tmp_path / "ckpt").mkdir()
    shutil.copy(data / MASKED, tmp_path / "ckpt" / "ckpt_best.pth.tar")
    return tmp_path


def load(run, **options):
    return read(run / "ckpt" / "ckpt_best.pth.tar", **options)


@pytest.mark.parametrize("folder", [".", "ckpt"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("total_config.py", total_config()),
        ("formatted_total_config.py", formatted_total_config()),
        ("total_config.py", f"import os\nos.abort()\n{total_config()}\n1 / 0"),
    ],
)
def test_heads_and_context_are_read_beside_the_file_and_nothing_is_executed(
    run, folder, name, text
):
    path = run / folder / name
    path.write_text(text)
    found = load(run)
    assert (found.config.num_heads, found.config.context_length) == (2, 8)
    assert found.origins["num_heads"] == found.origins["context_length"] == f"from {path}"
    assert found.origins["embed_dim"] == f"from {path}"
    assert found.origins["num_layers"] != "as you said"
    assert found.origins["dtype"] == "by default"


def test_what_is_said_wins_and_is_told(run, caplog):
    (run / "total_config.py").write_text(total_config(num_heads=4))
    found = load(run, num_heads=8)
    assert (found.config.num_heads, found.config.context_length) == (8, 8)
    assert found.origins["num_heads"] == "as you said"
    assert f"num_heads=8 as you said, though {run}/total_config.py says 4" in caplog.text


ODD = {
    "empty": "",
    "no python": "exp_config = {",
    "nothing known": "x = 3",
    "another algorithm's": "exp_config = {'policy': {'model': {'num_layers': 3}}}",
    "a list": "exp_config = [1, 2]",
    "policy is a number": "exp_config = {'policy': 3}",
    "null bytes": "exp_config = {}\0",
    "unary nesting": "exp_config = " + "-" * 200_000 + "1",
    "brackets": "exp_config = " + "[" * 200_000,
    "attributes": "exp_config = x" + ".x" * 200_000,
    "too large": total_config() + "#" * described.MAX_BYTES,
    "odd escapes": f"x = '\\d'\n{total_config(num_heads=..., context_length=...)}",
    "numbers of no use": total_config(num_heads=True, context_length="8"),
    "a call": total_config().replace("'num_heads': 2", "'num_heads': int('2')"),
    "huge": total_config(num_heads=..., rope_theta=10**400),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_as_if_they_were_not_there(run, kind):
    (run / "total_config.py").write_text(ODD[kind])
    with pytest.raises(ValueError, match=r"is not stored in a LightZero checkpoint: pass \w+="):
        load(run)
    assert load(run, **OPTIONS).config.num_heads == 2


def test_files_that_are_no_text_or_no_files(run):
    path = run / "total_config.py"
    for make in (path.mkdir, lambda: path.write_bytes(b"\xff\xfe\x00"), lambda: os.mkfifo(path)):
        make()
        assert load(run, **OPTIONS).origins["num_heads"] == "as you said"
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (total_config(embed_dim=128), "embed_dim=128, the tensors 64"),
        (total_config(num_layers=4), "num_layers=4, the tensors 2"),
        (total_config(action_space_size=6), "num_actions=6, the tensors 2"),
        (total_config(rotary_emb=True), "window_mode='rope_lightzero', the tensors 'table'"),
        (total_config({"support_scale": 300}), "support=.*-300, 300.*, the tensors .*-50, 50"),
    ],
)
def test_another_models_configuration_is_refused_or_left_unread(run, caplog, text, problem):
    (run / "total_config.py").write_text(text)
    with pytest.raises(ValueError, match=f"total_config.py says {problem}.*another model"):
        load(run, num_heads=2)
    found = load(run, **OPTIONS)
    assert found.origins["embed_dim"] == "from the tensors"
    assert "left unread" in caplog.text


@pytest.mark.parametrize(
    ("model", "world_model", "field", "expected"),
    [
        ({}, {"group_size": 16}, "simnorm_group", 16),
        ({}, {"rebuild_kv_window_from_tokens": True}, "window_mode", "rebuild"),
        ({}, {"exact_kv_window_reset": True}, "window_mode", "reset"),
        (
            {"reward_support_range": (0.0, 101.0, 1.0), "support_scale": 300},
            {},
            "support",
            (0, 100),
        ),
        ({"reward_support_range": "odd", "value_support_range": "odd"}, {}, "support", (-50, 50)),
        ({"observation_shape": (3, 64, 64)}, {}, "image_shape", None),
    ],
)
def test_what_else_a_configuration_tells(run, model, world_model, field, expected):
    (run / "total_config.py").write_text(total_config(model, **world_model))
    assert getattr(load(run).config, field) == expected


def test_rotary_configurations(run, data):
    shutil.copy(data / ROPE, run / "ckpt" / "ckpt_best.pth.tar")
    (run / "total_config.py").write_text(total_config(rotary_emb=True, rope_theta=500))
    config = load(run).config
    assert (config.window_mode, config.rope_theta) == ("rope_lightzero", 500.0)
    (run / "total_config.py").write_text(total_config())
    with pytest.raises(ValueError, match="says window_mode='learned', the tensors 'rope'"):
        load(run)


def test_supports_that_differ_are_refused_by_name(run):
    ranges = {"reward_support_range": (-50, 51, 1), "value_support_range": (0, 101, 1)}
    (run / "total_config.py").write_text(total_config(ranges))
    with pytest.raises(ValueError, match=r"total_config.py: unsupported variant: reward_support"):
        load(run)


CLIPPED = "unsupported variant: use_policy_logits_clip"


def state_of(path):
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def clipping_sources(run, data):
    """A file, a live model and a state dict that tell of clipped logits."""
    (run / "total_config.py").write_text(total_config(use_policy_logits_clip=True))
    yield run / "ckpt" / "ckpt_best.pth.tar"
    state = state_of(data / MASKED)
    config = types.SimpleNamespace(**WORLD_MODEL, use_policy_logits_clip=True)
    yield types.SimpleNamespace(config=config, state_dict=lambda: state)
    yield state | {"world_model.policy_logits_running_max": torch.tensor(10.0)}


def test_clipped_logits_are_refused_unless_they_are_to_be_ignored(run, data, tmp_path, caplog):
    for source in clipping_sources(run, data):
        caplog.clear()
        with pytest.raises(ValueError, match=CLIPPED):
            lightzero.load(source, **OPTIONS)
        with pytest.raises(ValueError, match='can only be "ignore", got True'):
            lightzero.load(source, **OPTIONS, use_policy_logits_clip=True)
        assert "not clipped" not in caplog.text
        found = read(source, **OPTIONS, use_policy_logits_clip="ignore")
        assert "not clipped" in caplog.text
    caplog.clear()
    checkpoint.save(
        tmp_path / "a.safetensors", Checkpoint(found.config, found.params, None, found.notes)
    )
    assert checkpoint.load(tmp_path / "a.safetensors").notes == found.notes
    assert "not clipped" in caplog.text


@pytest.mark.parametrize("context", [22, 24, 64])
def test_windows_beyond_the_table_are_refused(data, context):
    """A window of C tokens is full with C - 1; the table has 20 rows."""
    message = f"context_length {context}.* needs {context - 1} rows of pos_emb.weight, which has 20"
    with pytest.raises(ValueError, match=message):
        lightzero.load(data / MASKED, num_heads=2, context_length=context)


@pytest.mark.parametrize("rows", [18, 19])
def test_a_table_may_just_reach(data, rows):
    state = state_of(data / MASKED)
    for name in [name for name in state if name.endswith(("pos_emb.weight", "attn.mask"))]:
        state[name] = state[name][:rows, :rows] if name.endswith("mask") else state[name][:rows]
    if rows == 19:
        assert read(state, num_heads=2, context_length=20).config.max_tokens == 19
        return
    with pytest.raises(ValueError, match="needs 19 rows of pos_emb.weight, which has 18"):
        read(state, num_heads=2, context_length=20)


def test_rotary_windows_beyond_the_mask(data, caplog):
    """Main extends its mask; release 0.2.0 cannot."""
    read(data / ROPE, num_heads=2, context_length=20)
    assert "longer than" not in caplog.text
    read(data / ROPE, num_heads=2, context_length=64)
    assert "longer than the 20 tokens that transformer.blocks.0.attn.mask is for" in caplog.text


def test_a_mask_that_contradicts_the_table(data):
    state = state_of(data / MASKED)
    name = "_orig_mod.world_model.transformer.blocks.1.attn.mask"
    state[name] = torch.ones(16, 16)
    with pytest.raises(ValueError, match="attn.mask is for 16 tokens, pos_emb.weight has 20 rows"):
        lightzero.load(state, **OPTIONS)


@pytest.fixture
def rotating(data):
    """Tensors as release 0.2.0 saves them of a rotary model: with its rotations."""
    state = state_of(data / MASKED)
    del state["_orig_mod.world_model.pos_emb.weight"]
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    angles = torch.outer(torch.arange(40.0), frequencies)
    state["world_model.transformer.freqs_cis"] = torch.polar(torch.ones_like(angles), angles)
    return state


def test_stored_rotations_tell_the_heads_and_contradict(rotating):
    found = read(rotating, context_length=8)
    assert (found.config.num_heads, found.origins["num_heads"]) == (2, "from the tensors")
    with pytest.raises(ValueError, match="num_heads=4, but the tensors say 2"):
        read(rotating, num_heads=4, context_length=8)
    with pytest.raises(ValueError, match="rope_theta is 5000, but .*freqs_cis turns by 0.5623"):
        read(rotating, context_length=8, rope_theta=5000.0)
    with pytest.raises(ValueError, match="longer than the 20 tokens that .*attn.mask is for"):
        read(rotating, context_length=24)
    rotating["world_model.transformer.freqs_cis"] = torch.ones(40, 5, dtype=torch.complex64)
    with pytest.raises(ValueError, match="rotates heads of 10, embed_dim is 64"):
        read(rotating, context_length=8)


W = "_orig_mod.world_model."
LN_F = f"{W}transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(64, dtype=torch.complex64), "ln_f.weight holds complex64, expected"),
        (torch.ones(64, dtype=torch.int32), "ln_f.weight holds int32, expected"),
        (torch.ones(64, dtype=torch.bool), "ln_f.weight holds bool, expected"),
        (torch.ones(64).to(torch.float8_e4m3fn), "ln_f.weight holds float8_e4m3fn, expected"),
        (np.ones(64, np.int64), "ln_f.weight holds int64, expected floating-point numbers"),
        (torch.ones(64).to_sparse(), "ln_f.weight is stored as sparse_coo, expected a dense"),
        (torch.ones(64, device="meta"), r"ln_f.weight has a shape and no values"),
        (torch.ones(1).expand(2**40), "ln_f.weight claims 4398046511104 bytes, 4 are stored"),
        (torch.tensor(1.0), r"ln_f.weight has shape \(\), expected 1 dimensions"),
        (torch.ones(8, 8), r"ln_f.weight has shape \(8, 8\), expected 1 dimensions"),
        (torch.ones(0), "embed_dim must be a positive integer, got 0"),
        ([1.0, 2.0], "ln_f.weight is a list, expected a tensor"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(data, tensor, message):
    with pytest.raises(ValueError, match=message):
        lightzero.load(state_of(data / MASKED) | {LN_F: tensor}, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_any_width_are_weights(data, dtype):
    state = state_of(data / MASKED)
    params = lightzero.load(state | {LN_F: state[LN_F].to(dtype)}, **OPTIONS)[1]
    expected = state[LN_F].to(dtype).float().numpy()
    np.testing.assert_array_equal(params["params"]["final_norm"]["scale"], expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model": [1]}, '"model" is a list, expected a state dict'),
        ({1: torch.zeros(2)}, "a tensor is named 1, expected text"),
        ({"state": {}, "param_groups": [{"lr": 1e-4}]}, "an optimiser's state, expected a model's"),
        (
            {f"representation_network.model.{i}.weight": torch.ones(2) for i in range(90)},
            "unsupported variant: text encoders",
        ),
        ({"representation_network.embed_proj_head.bias": torch.ones(2)}, "text encoders"),
        (
            {f"head_policy_multi_task.{i}.head_module.0.weight": torch.ones(2) for i in range(90)},
            "the model has 90 tasks: pass task_id=, 0 .. 89$",
        ),
        ({"head_value.head_module.1.experts.0.weight": torch.ones(2)}, "mixture of experts"),
        ({f"surprise{i}": torch.ones(2) for i in range(90)}, "missing tensor transformer.ln_f"),
    ],
)
def test_refusals_name_the_variant_in_few_words(source, message):
    with pytest.raises(ValueError, match=message) as refusal:
        lightzero.load(source, **OPTIONS)
    assert len(str(refusal.value)) < 300


def test_many_unknown_tensors_are_counted(data):
    state = state_of(data / MASKED) | {f"surprise{i}": torch.ones(2) for i in range(90)}
    with pytest.raises(ValueError, match="does not know: surprise0, .* and 85 more$"):
        lightzero.load(state, **OPTIONS)


def test_numbers_of_numpy_beside_the_weights(data, tmp_path):
    path = tmp_path / "a.pth.tar"
    torch.save({"model": state_of(data / MASKED), "last_iter": np.float64(3)}, path)
    with pytest.raises(
        ValueError, match=r'load\(torch.load\(path, weights_only=False\)\["model"\]'
    ):
        lightzero.load(path, **OPTIONS)


def test_wrapped_modules(data):
    """As `DistributedDataParallel` and `torch.compile` wrap them, in either order."""
    state = state_of(data / MASKED)

    class Module:
        config = types.SimpleNamespace(**WORLD_MODEL)

        def state_dict(self):
            return state

    def wrapped(inner, name):
        outer = types.SimpleNamespace(state_dict=lambda: {f"{name}.x": torch.ones(2)})
        setattr(outer, name, inner)
        return outer

    expected = lightzero.load(state, **OPTIONS)[0]
    for names in (("module",), ("_orig_mod",), ("module", "_orig_mod"), ("_orig_mod", "module")):
        module = Module()
        for name in names:
            module = wrapped(module, name)
        assert lightzero.load(module)[0] == expected


def test_files_without_checksums_are_read(data, tmp_path):
    """Torch writes none on request, and had none in its format of before 1.6."""
    state = {"model": state_of(data / MASKED)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth.tar")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(state, tmp_path / "b.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("a.pth.tar", "b.pth.tar"):
        assert lightzero.load(tmp_path / name, **OPTIONS)[0].embed_dim == 64


def test_an_agents_origins(data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = find_agent("cartpole_masked", num_heads=2)
    assert not caplog.text
    assert found.origins["num_heads"] == "as you said"
    assert found.origins["context_length"] == "from the shipped cartpole_masked"
