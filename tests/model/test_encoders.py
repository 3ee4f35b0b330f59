"""Image encoders: parity with LightZero's own modules, and what loading says of their variants."""

import dataclasses
import functools

import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import one_row
import pytest

from kvjax import lightzero
from kvjax.config import WorldModelConfig
from kvjax.lightzero.checkpoint.reading import read
from kvjax.model import checkpoint, step
from kvjax.model.checkpoint import Checkpoint
from kvjax.ops import window as windows
from kvjax.tools import cli
from kvjax.tools.bench import lightzero_020

torch = pytest.importorskip("torch")
pytest.importorskip("lzero")

OPTIONS = {"num_heads": 2, "context_length": 8}
SHAPES = [(3, 64, 64), (3, 96, 96), (4, 84, 84)]
ENCODER = "representation_network."
MODEL = {"num_actions": 3, "embed_dim": 32, "num_layers": 1, "num_heads": 2, "context_length": 8}


def images(shape, rows=3, seed=1):
    return np.random.default_rng(seed).random((rows, *shape), np.float32)


def with_statistics(model, shape):
    """Running statistics of their own in every BatchNorm, and latents that no softmax saturates."""
    encoder, random = model.representation_network.train(), torch.Generator().manual_seed(5)
    observed = torch.from_numpy(images(shape, rows=8, seed=7))
    spread = []
    with torch.no_grad():
        for _ in range(2):
            encoder(observed)
        for name, value in encoder.named_buffers():
            if name.endswith("running_mean"):
                value.add_(torch.randn(value.shape, generator=random), alpha=0.1)
        hook = encoder.last_linear.register_forward_hook(lambda *args: spread.append(args[2].std()))
        encoder.eval()(observed)
        hook.remove()
        encoder.last_linear.weight.div_(spread[0] / 3)
    return model.eval()


def build(shape):
    sizes = {"num_envs": 3, "num_simulations": 2, "support": 5, "seed": 3}
    return with_statistics(
        lightzero_020.build_model(observation_size=shape, **MODEL, **sizes), shape
    )


@pytest.fixture(scope="module")
def models():
    return {shape: build(shape) for shape in SHAPES}


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, observation):
    return jax.vmap(lambda x: flax_model.encode(params, x, config=config))(observation)


@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_those_of_lightzero(models, shape):
    model, observation = models[shape], images(shape)
    with torch.no_grad():
        expected = model.representation_network(torch.from_numpy(observation)).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the images make a difference
    config, params = lightzero.load(model)
    assert config.image_shape == shape
    assert config.observation_shape == shape
    np.testing.assert_allclose(encode(config, params, observation), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_state_dict_loads_and_answers_the_first_step(models, shape):
    model, observation = models[shape], images(shape)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    imported = read({"model": state}, **OPTIONS)
    config, params = imported.config, imported.params
    assert config == lightzero.load(model)[0]
    assert "_orig_mod.tokenizer.encoder.last_linear.weight" in imported.ignored
    observed = torch.from_numpy(observation)
    with torch.no_grad():
        out = model.initial_inference(observed, [-1] * 3, observed, np.zeros(3, np.int64))
    latent = encode(config, params, observation)
    np.testing.assert_allclose(latent, out.latent_state.numpy()[:, 0], atol=1e-5)
    window = windows.init(config.window)
    for row in range(3):
        _, policy, value = one_row.root_step(
            params,
            window,
            jnp.int32(step.FIRST_STEP),
            latent[row],
            jnp.int32(0),
            config=config,
        )
        np.testing.assert_allclose(policy, out.policy_logits.numpy()[row], atol=1e-4)
        np.testing.assert_allclose(value, out.value.numpy()[row], atol=1e-4)


class MainEncoder(torch.nn.Module):
    """Main's encoder as a state dict shows it: 0.2.0's with another norm behind it."""

    def __init__(self, encoder, option):
        super().__init__()
        self.downsample_net, self.resblocks = encoder.downsample_net, encoder.resblocks
        self.last_linear, self.option = encoder.last_linear, option
        if option == "LayerNorm":
            self.final_norm = torch.nn.LayerNorm(encoder.embedding_dim, eps=1e-5)
            torch.nn.init.normal_(self.final_norm.weight)
            torch.nn.init.normal_(self.final_norm.bias)

    def forward(self, x):
        x = self.downsample_net(x)
        for block in self.resblocks:
            x = block(x)
        return self.final_norm(self.last_linear(x.flatten(1)))


def without_encoder(model):
    kept = model.state_dict().items()
    return {k: v for k, v in kept if not k.startswith(ENCODER) and "tokenizer" not in k}


def test_an_encoder_that_ends_in_layernorm(models):
    shape = SHAPES[0]
    model = MainEncoder(models[shape].representation_network, "LayerNorm").eval()
    state = {ENCODER + name: tensor for name, tensor in model.state_dict().items()}
    config, params = lightzero.load(without_encoder(models[shape]) | state, **OPTIONS)
    assert config.encoder_norm == "layernorm"
    observation = images(shape)
    with torch.no_grad():
        expected = model(torch.from_numpy(observation)).numpy()
    np.testing.assert_allclose(encode(config, params, observation), expected, atol=1e-4)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("channels", [16])
def test_other_sizes_of_the_network(models, blocks, channels):
    network = lightzero_020._load("lzero.model.common").RepresentationNetworkUniZero
    shape = SHAPES[1]
    encoder = network(shape, blocks, channels, embedding_dim=MODEL["embed_dim"]).eval()
    encoder.last_linear = torch.nn.Linear(channels * 36, MODEL["embed_dim"], bias=False)
    state = {ENCODER + name: tensor for name, tensor in encoder.state_dict().items()}
    config, params = lightzero.load(without_encoder(models[shape]) | state, **OPTIONS)
    assert (config.image_channels, config.image_blocks) == (channels, blocks)
    observation = images(shape)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(observation)).numpy()
    np.testing.assert_allclose(encode(config, params, observation), expected, atol=1e-5)


def test_checkpoints_keep_image_models(models, tmp_path):
    config, params = lightzero.load(models[SHAPES[1]])
    checkpoint.save(tmp_path / "a.safetensors", Checkpoint(config, params))
    restored = checkpoint.load(tmp_path / "a.safetensors")
    assert restored.config == config
    assert hash(restored.config) == hash(config)
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)


def test_convert_takes_image_models(models, tmp_path, capsys):
    source, target = tmp_path / "ckpt.pth.tar", tmp_path / "out.safetensors"
    torch.save({"model": models[SHAPES[0]].state_dict()}, source)
    options = ["--num-heads", "2", "--context-length", "8", "--json"]
    assert cli.main(["convert", str(source), str(target), *options]) == 0
    assert '"image_shape": [3, 64, 64]' in capsys.readouterr().out
    assert checkpoint.load(target).config == lightzero.load(models[SHAPES[0]])[0]


def test_a_side_of_84_must_be_said_where_only_tensors_are_given(models):
    state = models[SHAPES[2]].state_dict()
    assert lightzero.load(state, **OPTIONS)[0].image_shape == (4, 96, 96)
    config, _ = lightzero.load(state, **OPTIONS, image_shape=(4, 84, 84))
    assert config.image_shape == (4, 84, 84)
    with pytest.raises(ValueError, match=r"image_shape=\(4, 64, 64\), but the tensors say"):
        lightzero.load(state, **OPTIONS, image_shape=(4, 64, 64))


def test_another_observation_is_refused(models):
    config, params = lightzero.load(models[SHAPES[0]])
    with pytest.raises(ValueError, match="observation must have shape"):
        one_row.encode(params, jnp.zeros(SHAPES[1]), config=config)


def renamed(state, old, new):
    return {k.replace(old, new): v for k, v in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "norm1.running" not in k},
            "missing tensor .*downsample_net.norm1.running_mean",
        ),
        (
            lambda s: renamed(s, "downsample_net.conv1", "conv"),
            "image encoders without downsampling",
        ),
        (lambda s: {k.replace(ENCODER, f"{ENCODER}0."): s[k] for k in s}, "a list of encoders"),
        (lambda s: renamed(s, "last_linear", "other"), "missing tensor .*last_linear.weight"),
        (
            lambda s: s | {f"{ENCODER}last_linear.weight": torch.zeros(32, 100)},
            r"last_linear.weight has shape \(32, 100\): no image side of \(64, 84, 96\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "resblocks2.0.conv2.1.running_var" not in k},
            "missing tensor .*resblocks2.0.conv2.1.running_var",
        ),
        (
            lambda s: s | {f"{ENCODER}downsample_net.resblocks1.1.conv1.0.weight": torch.zeros(2)},
            "does not know: .*resblocks1.1.conv1",
        ),
    ],
)
def test_variants_are_refused_by_name(models, change, message):
    state = models[SHAPES[0]].state_dict()
    encoder = {k: v for k, v in state.items() if k.startswith(ENCODER)}
    with pytest.raises(ValueError, match=message):
        lightzero.load(without_encoder(models[SHAPES[0]]) | change(encoder), **OPTIONS)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"final_norm_option_in_encoder": "L2Norm"}, "encoders that end in L2Norm: encoder=None"),
        ({"activation": torch.nn.ReLU()}, r"image encoders with activation ReLU\(\)"),
    ],
)
def test_what_a_module_tells_beside_its_tensors(models, monkeypatch, attributes, message):
    model = models[SHAPES[0]]
    for name, value in attributes.items():
        monkeypatch.setattr(model.representation_network, name, value, raising=False)
    with pytest.raises(ValueError, match=message):
        lightzero.load(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_shape": (3, 64, 96)}, "image_shape must be .*got \\(3, 64, 96\\)"),
        ({"image_shape": (3, 128, 128)}, "side one of 64, 84, 96"),
        ({"image_shape": [3, 64, 64]}, "image_shape must be"),
        ({"image_shape": (3, 64, 64), "observation_size": 4}, "exclude each other"),
        ({"image_shape": (3, 64, 64), "image_channels": 7}, "image_channels must be even"),
        ({"image_shape": (3, 64, 64), "image_blocks": -1}, "image_blocks must be >= 0, got -1"),
    ],
)
def test_configurations(fields, message):
    sizes = dict(MODEL, max_tokens=20)
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**sizes, **fields)
    good = WorldModelConfig(**sizes, image_shape=(3, 64, 64))
    assert dataclasses.replace(good, image_shape=None).observation_shape == (32,)
