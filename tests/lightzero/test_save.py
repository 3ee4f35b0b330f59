"""Writing LightZero's checkpoints: its own classes load them strictly, and nothing is lost."""

import dataclasses
import json
import os
import stat
import sys
import types

import jax
import numpy as np
import pytest
import torch_models
from conftest import random_params

from kvjax import checkpoint, lightzero
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint import unread, writing
from kvjax.tools import cli
from kvjax.tools.bench import lightzero_020

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

SMALL = WorldModelConfig(
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_actions=3,
    context_length=8,
    max_tokens=20,
    observation_size=4,
)
MODEL = "lzero.model.unizero_model"
IMAGES = {"observation_size": None, "image_shape": (3, 64, 64)}
SAMPLED = {"num_sampled_actions": 2}
CASES = {
    "vectors": {},
    "rotary": {"max_tokens": None, "window_mode": "rope_lightzero"},
    "images": IMAGES,
    "images of 96": IMAGES | {"image_shape": (4, 96, 96), "image_blocks": 2},
    "LayerNorm": IMAGES | {"encoder_hidden_norm": "layernorm"},
    "MemoryEnv": IMAGES | {"image_shape": (3, 5, 5), "image_encoder": "memory"},
    "drawn": SAMPLED,
    "drawn, LayerNorm": SAMPLED | {"encoder_hidden_norm": "layernorm"},
    "drawn of images": SAMPLED | IMAGES,
    "drawn of MemoryEnv": SAMPLED
    | {"observation_size": None, "image_shape": (3, 5, 5), "image_encoder": "memory"},
    "conditioned": SAMPLED | {"sigma_type": "conditioned"},
    "fixed": SAMPLED | {"sigma_type": "fixed", "fixed_sigma_value": 0.3, "bound_type": "tanh"},
    "independent": SAMPLED | {"sigma_type": "independent"},
    "happo": SAMPLED | {"sigma_type": "happo", "bound_type": "tanh"},
}


def made(settings, monkeypatch):
    """LightZero's own model by what `save` says of it."""
    easydict = lightzero_020._load("easydict").EasyDict
    config = easydict(lightzero_020._CONFIG | settings["world_model_cfg"], device="cpu")
    config.env_num, config.num_simulations = 4, 6
    name = "SampledUniZeroModel" if "num_of_sampled_actions" in config else "UniZeroModel"
    package = "lzero.model.sampled_unizero_model" if "Sampled" in name else MODEL
    given = {k: v for k, v in settings.items() if k not in ("world_model_cfg", "support_scale")}
    module = lightzero_020._load(package)
    import_the_metric(monkeypatch)
    if config.obs_type == "image_memory" and package == MODEL:
        tell_parameters_of_no_metric(module, monkeypatch)
    with lightzero_020._quiet():
        return getattr(module, name)(world_model_cfg=config, **given)


def import_the_metric(monkeypatch):
    """Which asks for packages that it does not need here."""
    with monkeypatch.context() as patch:
        for name in ("torchvision", "tqdm"):
            stub = types.SimpleNamespace(models=None, tqdm=None)
            patch.setitem(sys.modules, name, stub)
        lightzero_020._load("lzero.model.unizero_world_models.lpips")


def tell_parameters_of_no_metric(module, monkeypatch):
    """0.2.0 counts those of a metric that its model of MemoryEnv does not have, and fails."""

    def without_metric(*args, tokenizer=module.Tokenizer, **options):
        made = tokenizer(*args, **options)
        made.lpips = torch.nn.Module()
        return made

    monkeypatch.setattr(module, "Tokenizer", without_metric)


def unsaid(config):
    """Options of `load` for what a file does not tell."""
    names = ["num_heads", "context_length", "window_mode", "num_sampled_actions", "image_shape"]
    names += ["sigma_type", "fixed_sigma_value", "bound_type"] if config.is_continuous else []
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def assert_same(ones, others):
    jax.tree.map(np.testing.assert_array_equal, ones, others)


@pytest.mark.parametrize("name", CASES)
def test_its_own_model_loads_it_strictly_and_it_comes_back_bit_for_bit(name, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, **CASES[name])
    params, path = random_params(config), tmp_path / "x.pth.tar"
    settings = lightzero.save(params, config, path)
    written = torch.load(path, weights_only=True)
    model = made(settings, monkeypatch)
    own = model.state_dict()
    assert written["model"].keys() == own.keys() == written["target_model"].keys()
    model.load_state_dict(written["model"], strict=True)
    for key, value in written["model"].items():
        assert value.dtype == own[key].dtype, key
    again, back = lightzero.load(path, **unsaid(config))
    assert again == config
    assert_same(back, params)
    assert_same(lightzero.load(model.state_dict(), **unsaid(config))[1], params)
    utils = lightzero_020._load("lzero.policy.utils")
    with lightzero_020._quiet():
        optimiser = utils.configure_optimizers_nanogpt(
            model.world_model, 1e-4, 3e-3, (0.9, 0.95), "cpu"
        )
    optimiser.load_state_dict(written["optimizer_world_model"])
    assert {group["lr"] for group in optimiser.param_groups} == {1e-4}


def test_another_model_that_loads_it_answers_as_before(tmp_path):
    """All outputs of root steps and of simulations, over slides."""
    model, other = torch_models.make(), torch_models.make(seed=1)
    config, params = lightzero.load(model)
    path = tmp_path / "x.pth.tar"
    lightzero.save(params, config, path)
    lightzero_020.load_checkpoint(other, path)
    ours, theirs = (torch_models.Driver(each, 3) for each in (model, other))
    for _ in range(6):
        assert torch_models.difference(ours.step(), theirs.step()) <= 1e-5


@pytest.mark.parametrize("name", ["0.2.0", "main"])
def test_names_and_shapes_of_a_run_of_lightzero(data, tmp_path, name):
    """The policy of 0.2.0 compiled its model."""
    files = {
        "0.2.0": "cartpole_masked_lightzero_0.2.0.pth.tar",
        "main": "cartpole_masked_rope_lightzero_main.pth.tar",
    }
    source, path = data / files[name], tmp_path / "x.pth.tar"
    said = {"num_heads": 2, "context_length": 8}
    config, params = lightzero.load(source, **said)
    lightzero.save(params, config, path, compiled=name == "0.2.0")
    theirs, ours = (torch.load(p, weights_only=True)["model"] for p in (source, path))
    kinds = [{k: (v.shape, v.dtype) for k, v in state.items()} for state in (theirs, ours)]
    assert kinds[0] == kinds[1]
    read = [k for k in theirs if not k.endswith("tracked") and unread.DECODER not in k]
    for key in read:
        assert torch.equal(theirs[key], ours[key]), key
    again, back = lightzero.load(path, **said)
    assert again == config
    assert_same(back, params)


def test_rotations_are_those_of_lightzero(monkeypatch):
    config = dataclasses.replace(SMALL, **CASES["rotary"])
    model = made(writing.settings(config), monkeypatch)
    ours = writing.state_dict(random_params(config), config)["world_model.transformer.freqs_cis"]
    np.testing.assert_allclose(ours, model.world_model.transformer.freqs_cis, atol=1e-6)


MAIN = {"layout": "main", "encoder_norm": "layernorm", "latent_norm": "layernorm"}
VIT = IMAGES | {"image_shape": (3, 16, 16), "image_encoder": "vit"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation_size": None}, "models without an encoder"),
        ({"task_size": 8}, "one task of a multi-task model"),
        ({"encoder_norm": "layernorm"}, "0.2.0's encoders that end in LayerNorm"),
        ({"latent_norm": "layernorm"}, "0.2.0's latent heads that end in LayerNorm"),
        (VIT, "vision transformers of 0.2.0"),
        (MAIN | VIT | SAMPLED, "vision transformers of Sampled UniZero"),
        (MAIN | IMAGES | SAMPLED, "main's Sampled UniZero of images"),
        (MAIN | {"head_expansion": 1}, "main's heads of head_expansion 1, expected 4"),
        ({"encoder_hidden_norm": "layernorm"}, "encoders of vectors with LayerNorm between"),
        (CASES["MemoryEnv"] | {"image_shape": (4, 5, 5)}, r"pictures \(4, 5, 5\), expected \(3,"),
        (IMAGES | {"image_channels": 32}, "encoders of images with 32 channels, expected 64"),
        ({"support": (0, 10)}, r"support \(0, 10\), expected one around 0"),
        ({"max_tokens": 21}, "max_tokens must be a multiple of 2, at least 7, got 21"),
        ({"max_tokens": 6}, "max_tokens must be a multiple of 2, at least 7, got 6"),
    ],
)
def test_what_lightzero_has_not_is_refused_by_name(tmp_path, changes, message):
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        lightzero.save({}, config, tmp_path / "x.pth.tar")
    assert not list(tmp_path.iterdir())


def without(tree, *path):
    name, *rest = path
    if not rest:
        return {k: v for k, v in tree.items() if k != name}
    return tree | {name: without(tree[name], *rest)}


def test_variables_that_are_not_the_configuration_s(tmp_path):
    params, path = random_params(SMALL), tmp_path / "x.pth.tar"
    with pytest.raises(ValueError, match="missing variable params/final_norm/scale"):
        lightzero.save(without(params, "params", "final_norm", "scale"), SMALL, path)
    with pytest.raises(ValueError, match="does not have: other"):
        lightzero.save(params | {"other": np.zeros(2)}, SMALL, path)
    wide = dataclasses.replace(SMALL, observation_size=5)
    with pytest.raises(ValueError, match=r"encoder/input/kernel has shape \(4, 32\), expected \(5"):
        lightzero.save(params, wide, path)
    rotary = dataclasses.replace(SMALL, **CASES["rotary"])
    with pytest.raises(ValueError, match="max_tokens must be a multiple of 2, at least 7, got 4"):
        lightzero.save(random_params(rotary), rotary, path, max_tokens=4)
    with pytest.raises(ValueError, match="max_tokens must be the 20 rows of the table"):
        lightzero.save(params, SMALL, path, max_tokens=22)
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        lightzero.save(params, SMALL, tmp_path / "x.safetensors")


def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    params, path = random_params(SMALL), tmp_path / "x.pth.tar"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda content, file: file.write(b"half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lightzero.save(params, SMALL, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    before = os.umask(0o027)
    try:
        lightzero.save(params, SMALL, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_mode_that_lightzero_has_not_is_told(tmp_path, caplog):
    rotary = dataclasses.replace(SMALL, max_tokens=None, window_mode="rope_consistent")
    lightzero.save(random_params(rotary), rotary, tmp_path / "x.pth.tar")
    assert 'no window_mode "rope_consistent": it plays' in caplog.text
    assert 'as "rope_lightzero"' in caplog.text


def test_without_torch_the_error_says_what_to_do(tmp_path, monkeypatch):
    agent = checkpoint.load(checkpoint.shipped()["cartpole_masked"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch \(pip install torch\)"):
        lightzero.save(agent.params, agent.config, tmp_path / "x.pth.tar")


def test_the_command_writes_either_kind_of_file(capsys, tmp_path):
    agent = checkpoint.load(checkpoint.shipped()["cartpole_masked"])
    ours, theirs, back = (
        str(tmp_path / name) for name in ("a.pth.tar", "b.pth.tar", "a.safetensors")
    )
    assert cli.main(["convert", "cartpole_masked", ours, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["policy.model"]
    assert (told["observation_shape"], told["world_model_cfg"]["max_blocks"]) == (4, 10)
    assert (
        cli.main(["convert", ours, theirs, "--num-heads=2", "--context-length=8", "--compiled"])
        == 0
    )
    assert "LightZero's policy.model: {'observation_shape': 4" in capsys.readouterr().out
    assert all(name.startswith("_orig_mod.") for name in torch.load(theirs)["model"])
    assert cli.main(["convert", theirs, back, "--num-heads=2", "--context-length=8"]) == 0
    assert_same(checkpoint.load(back).params, agent.params)
    assert cli.main(["convert", "cartpole_masked", back, "--compiled"]) == 2
    assert "--compiled is for *.pth.tar, got" in capsys.readouterr().err
