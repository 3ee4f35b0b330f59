"""Every kind of encoder that LightZero has: parity with torch, and what its tensors tell."""

import copy
import dataclasses
import functools
import os
import types

import flax_model
import jax
import numpy as np
import pytest
from conftest import DATA
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from kvjax import lightzero
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint.reading import read
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.checks import validate_model
from kvjax.tools import cli

torch = pytest.importorskip("torch")
pytest.importorskip("lzero")
import torch_encoders  # noqa: E402

EXAMPLES = 25 if os.environ.get("KVJAX_FULL") else 1
FILES = {
    "0.2.0": "cartpole_masked_lightzero_0.2.0.pth.tar",
    "main": "cartpole_masked_rope_lightzero_main.pth.tar",
}
OPTIONS = {"num_heads": 2, "context_length": 8}
ENCODER = "representation_network."
ATOL, SEEN = 1e-5, 0.01


@functools.cache
def bare(layout):
    """A whole model's tensors but for its encoder."""
    state = torch.load(DATA / FILES[layout], map_location="cpu", weights_only=True)["model"]
    state = {
        name.removeprefix("_orig_mod.").removeprefix("world_model."): state[name] for name in state
    }
    return {k: v for k, v in state.items() if not k.startswith((ENCODER, "tokenizer."))}


def with_encoder(module, layout="0.2.0"):
    return bare(layout) | {ENCODER + name: x for name, x in module.state_dict().items()}


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, observation):
    return jax.vmap(lambda x: flax_model.encode(params, x, config=config))(observation)


def difference(module, shape):
    """How far latents of two observations are apart: a comparison of equal ones says nothing."""
    with torch.no_grad():
        first, second = module(torch_encoders.observations(shape, 2)).numpy()
    return np.abs(first - second).max()


def rounding(module, shape):
    """How far torch's own float32 is from its float64: what a badly conditioned network costs."""
    if hasattr(module, "cnn"):  # MemoryEnv's casts to float32 itself
        return 0.0
    observed = torch_encoders.observations(shape, 2)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(observed.double())
        return (module(observed) - exact).abs().max().item()


def check(module, shape, config, params, atol=ATOL):
    """Compares latents of an encoder with torch's."""
    assert config.observation_shape == shape
    assert difference(module, shape) > SEEN
    observed = torch_encoders.observations(shape, 2)
    with torch.no_grad():
        expected = module(observed).numpy()
    np.testing.assert_allclose(encode(config, params, observed.numpy()), expected, atol=atol)


KINDS = {
    "layernorm": lambda: torch_encoders.resnet(64, channels=4),
    "layernorm 84": lambda: torch_encoders.resnet(84, channels=4),
    "layernorm 96": lambda: torch_encoders.resnet(96, channels=4, final="layernorm"),
    "memory": lambda: torch_encoders.memory(channels=16),
    "vit": lambda: torch_encoders.vit(side=24),
    "vector": lambda: torch_encoders.vector("LN"),
}
TOLD = {
    "layernorm": ("resnet", "layernorm"),
    "memory": ("memory", "batchnorm"),
    "vit": ("vit", "batchnorm"),
    "vector": ("resnet", "layernorm"),
}


@functools.cache
def loaded(kind):
    """The torch module, the tensors of a model with it, and what is loaded of them."""
    module, shape = KINDS[kind]()
    state = with_encoder(module, "main" if kind == "vit" else "0.2.0")
    return module, shape, state, *lightzero.load(state, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_torch(kind, caplog):
    module, shape, _, config, params = loaded(kind)
    check(module, shape, config, params)
    assert (config.image_encoder, config.encoder_hidden_norm) == TOLD[kind.split()[0]]
    assert "make equal tensors" not in caplog.text  # LayerNorm of the stem tells the side


def test_another_side_than_layernorm_tells_is_refused():
    _, _, state, *_ = loaded("layernorm 84")
    with pytest.raises(ValueError, match=r"\(3, 96, 96\), but the tensors say \(3, 84, 84\)"):
        lightzero.load(state, **OPTIONS, image_shape=(3, 96, 96))


def test_main_names_a_layer_of_memorys_encoder_otherwise():
    module, shape, *_, params = loaded("memory")
    state = with_encoder(module, "main")
    state = {name.replace("linear.0.", "linear."): tensor for name, tensor in state.items()}
    config, found = lightzero.load(state, **OPTIONS)
    assert config.observation_shape == shape
    names = "params", "encoder", "output", "kernel"
    kernels = (functools.reduce(dict.__getitem__, names, x) for x in (found, params))
    np.testing.assert_array_equal(*kernels)


def test_vision_transformers_have_their_own_simnorm_groups():
    module, shape = torch_encoders.vit(final="simnorm")
    state = with_encoder(module, "main")
    check(module, shape, *lightzero.load(state, **OPTIONS, simnorm_group=16))


def test_what_a_vision_transformers_tensors_tell():
    *_, config, _ = loaded("vit")
    sizes = config.image_channels, config.image_blocks, config.image_heads, config.image_hidden
    assert (config.image_shape, *sizes) == ((3, 24, 24), 24, 2, 2, 40)


finals = st.sampled_from(["simnorm", "layernorm"])
planes = st.integers(1, 5)
RESNETS = st.builds(
    torch_encoders.resnet,
    side=st.sampled_from([64, 84, 96]),
    norm=st.sampled_from(["LN", "BN"]),
    blocks=st.integers(0, 2),
    channels=st.integers(1, 9).map(lambda half: 2 * half),
    planes=planes,
    final=finals,
)
VITS = st.builds(
    torch_encoders.vit,
    side=st.integers(1, 4).map(lambda patches: 8 * patches),
    width=st.integers(8, 40),
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    hidden=st.integers(1, 50),
    planes=planes,
    final=finals,
)
MEMORIES = st.builds(
    torch_encoders.memory, channels=st.integers(1, 20).map(lambda x: 4 * x), planes=planes
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],
)
@given(drawn=st.one_of(RESNETS, VITS, MEMORIES))
def test_encoders_of_drawn_sizes(drawn):
    module, shape = drawn
    assume(difference(module, shape) > SEEN)  # few channels of random weights may be blind
    layout = "main" if isinstance(module, torch_encoders.Vit) else "0.2.0"
    config, params = lightzero.load(with_encoder(module, layout), **OPTIONS)
    if config.image_shape != shape:  # BatchNorm's tensors are equal for 84 and 96
        assert config.encoder_hidden_norm == "batchnorm"
        assert (shape[1], config.image_shape[1]) == (84, 96)
        config = dataclasses.replace(config, image_shape=shape)
    validate_model(params, config)
    check(module, shape, config, params, ATOL + 4 * rounding(module, shape))


@pytest.mark.parametrize("kind", ["layernorm", "memory", "vit"])
def test_checkpoints_keep_them(kind, tmp_path):
    *_, config, params = loaded(kind)
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, Checkpoint(config, params))
    restored = checkpoint.load(path)
    assert restored.config == config
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)


@pytest.mark.parametrize("kind", ["layernorm", "memory", "vit", "vector"])
def test_every_tensor_of_an_encoder_is_read_and_no_other(kind):
    _, _, state, *_ = loaded(kind)
    names = [k for k in state if k.startswith(ENCODER) and not k.endswith("num_batches_tracked")]
    for name in names:
        with pytest.raises(ValueError, match="missing tensor|does not know|dimensions"):
            lightzero.load({k: v for k, v in state.items() if k != name}, **OPTIONS)
    with pytest.raises(ValueError, match="does not know: representation_network.surprise"):
        lightzero.load(state | {f"{ENCODER}surprise": torch.zeros(2)}, **OPTIONS)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("layernorm", {"encoder_hidden_norm": "batchnorm"}, r"stem_norm/bias must have shape \(2,"),
        ("memory", {"image_channels": 8}, r"convs_0/kernel must have shape \(3, 3, 3, 2\)"),
        ("vit", {"image_shape": (3, 32, 32)}, r"positions must have shape \(1, 17, 24\)"),
        ("vit", {"image_heads": 1}, r"qkv/kernel must have shape \(24, 192\)"),
        ("vit", {"image_blocks": 1}, "blocks_1/expand/bias must be absent"),
    ],
)
def test_params_of_another_encoder_are_refused(kind, change, message):
    *_, config, params = loaded(kind)
    with pytest.raises(ValueError, match=message):
        validate_model(params, dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_encoder": "cnn"}, "image_encoder must be one of resnet, memory, vit, got 'cnn'"),
        ({"encoder_hidden_norm": "simnorm"}, "encoder_hidden_norm must be one of batchnorm"),
        ({"image_encoder": "memory"}, "image_shape must be .*, side 5, got"),
        ({"image_encoder": "vit", "image_shape": (3, 20, 20)}, "side 8, 16 .. 256, got"),
        (
            {"image_encoder": "memory", "image_shape": (3, 5, 5), "image_channels": 6},
            "image_channels must be a multiple of 4: 6",
        ),
        (
            {"image_encoder": "vit", "encoder_hidden_norm": "layernorm"},
            'encoder_hidden_norm must be batchnorm with image_encoder "vit"',
        ),
        (
            {"image_encoder": "vit", "embed_dim": 36, "simnorm_group": 4},
            "embed_dim must be a multiple of 8, got 36",
        ),
        ({"image_heads": 0}, "image_heads must be a positive integer, got 0"),
    ],
)
def test_configurations(fields, message):
    sizes = {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "num_actions": 3}
    sizes |= {"context_length": 8, "max_tokens": 20, "image_shape": (3, 64, 64)}
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**(sizes | fields))


def jericho():
    """Tensors of a text encoder, which are not all floats, and the tokenizer's copy of them."""
    parts = {
        "model.embeddings.position_ids": torch.arange(512)[None],
        "model.encoder.layer.0.attention.self.query.weight": torch.ones(2, 2),
        "embed_proj_head.weight": torch.ones(64, 2),
    }
    copies = {f"tokenizer.encoder.{name}": tensor for name, tensor in parts.items()}
    return bare("0.2.0") | copies | {ENCODER + name: tensor for name, tensor in parts.items()}


@pytest.mark.parametrize("name", ["model.embeddings.position_ids", "embed_proj_head.weight"])
def test_a_text_encoder_is_refused_in_words_that_tell_what_to_do(name):
    state = jericho()
    state = {k: x for k, x in state.items() if not k.startswith(ENCODER) or k.endswith(name)}
    with pytest.raises(ValueError, match=r"unsupported variant: text encoders \(.*encoder=None"):
        lightzero.load({k: x for k, x in state.items() if "tokenizer" not in k}, **OPTIONS)


def test_a_model_without_its_encoder():
    imported = read(jericho(), **OPTIONS, encoder=None)
    config, expected = imported.config, lightzero.load(bare("0.2.0"), **OPTIONS)
    assert not config.has_encoder
    assert config.observation_shape == (64,)
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, imported.params, expected[1])
    assert sum("position_ids" in name for name in imported.ignored) == 2
    with pytest.raises(ValueError, match='encoder can only be "own" or None, got False'):
        lightzero.load(jericho(), **OPTIONS, encoder=False)


def test_an_encoder_that_kvjax_has_may_be_left_out_too():
    _, _, state, *_ = loaded("memory")
    expected = lightzero.load(bare("0.2.0"), **OPTIONS)
    found = lightzero.load(state, **OPTIONS, encoder=None)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_convert_leaves_an_encoder_out(tmp_path, capsys):
    torch.save({"model": jericho()}, tmp_path / "a.pth.tar")
    paths = [str(tmp_path / name) for name in ("a.pth.tar", "a.safetensors")]
    options = ["--num-heads", "2", "--context-length", "8"]
    assert cli.main(["convert", *paths, *options]) == 2
    assert "text encoders" in capsys.readouterr().err
    assert cli.main(["convert", *paths, *options, "--no-encoder"]) == 0
    assert not checkpoint.load(paths[1]).config.has_encoder
    assert cli.main(["convert", paths[1], str(tmp_path / "b.safetensors"), "--no-encoder"]) == 2
    assert "is kvjax's: its encoder is read with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [
                "representation_network.0.to_patch_embedding.1.weight",
                "transformer.blocks.0.experts.0",
            ],
            "mixture of experts",
        ),
        (["representation_network.0.last_linear.weight"], "a list of encoders"),
        (
            ["representation_network.transformer.layers.0.0.to_qkv.lora_A.0"],
            "LoRA adapters",
        ),
    ],
)
def test_variants_are_refused_in_the_right_words(names, message):
    with pytest.raises(ValueError, match=f"unsupported variant: {message}"):
        lightzero.load({name: torch.ones(2) for name in names}, **OPTIONS)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("'L2Norm'", "encoders that end in L2Norm"),
        ("'LayerNorm_Tanh'", "encoders that end in LayerNorm_Tanh"),
        ("'LayerNormNoAffine'", "encoders that end in LayerNormNoAffine"),
        ("None", "encoders that end in None"),
    ],
)
def test_norms_that_leave_no_trace_in_the_tensors(said, message, tmp_path):
    """But in the run's configuration."""
    torch.save({"model": loaded("layernorm 96")[2]}, tmp_path / "a.pth.tar")
    world_model = f"dict(num_heads=2, context_length=8, final_norm_option_in_encoder={said})"
    text = f"exp_config = dict(policy=dict(model=dict(world_model_cfg={world_model})))"
    (tmp_path / "total_config.py").write_text(text)
    with pytest.raises(ValueError, match=f"total_config.py: unsupported variant: {message}"):
        lightzero.load(tmp_path / "a.pth.tar")
    assert not lightzero.load(tmp_path / "a.pth.tar", encoder=None)[0].has_encoder
    (tmp_path / "total_config.py").write_text(text.replace(said, "'LayerNorm'"))
    assert lightzero.load(tmp_path / "a.pth.tar")[0].encoder_norm == "layernorm"


@pytest.mark.parametrize("owner", ["encoder", "config"])
@pytest.mark.parametrize(
    ("attribute", "value"), [("normalize_pixel", True), ("pool", "mean"), ("dim_head", 32)]
)
def test_ways_that_leave_no_trace_in_the_tensors(attribute, value, owner):
    """But in a live encoder, or in its configuration."""
    own = types.SimpleNamespace(**{attribute: value})
    encoder = own if owner == "encoder" else types.SimpleNamespace(config=own)
    tokenizer = types.SimpleNamespace(encoder=encoder)
    config = types.SimpleNamespace(num_heads=2, context_length=8)
    model = types.SimpleNamespace(config=config, tokenizer=tokenizer, state_dict=dict)
    with pytest.raises(ValueError, match=f"unsupported variant: encoders with {attribute} {value}"):
        lightzero.load(model)
