"""Reading LightZero's weights: what is inferred, what must be said, what is refused."""

import dataclasses
import functools
import types

import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import one_row
import pytest

from kvjax import lightzero
from kvjax.lightzero.checkpoint.reading import read
from kvjax.model import step, world_model
from kvjax.ops import window as windows

torch = pytest.importorskip("torch")

MASKED = "cartpole_masked_lightzero_0.2.0.pth.tar"
ROPE = "cartpole_masked_rope_lightzero_main.pth.tar"
OPTIONS = {"num_heads": 2, "context_length": 8}


@pytest.fixture
def state(data):
    """A fresh copy of a real checkpoint's tensors, as the file names them."""
    return torch.load(data / MASKED, map_location="cpu", weights_only=True)["model"]


def replayed_logits(config, params, observed, actions):
    push = functools.partial(one_row.root_step, params, config=config)
    encode = functools.partial(flax_model.encode, params, config=config)
    window, logits = windows.init(config.window), []
    for t, observation in enumerate(observed):
        action = jnp.int32(actions[t - 1] if t else step.FIRST_STEP)
        window, policy, _ = push(window, action, encode(jnp.asarray(observation)), t)
        logits.append(policy)
    return np.stack(logits)


@pytest.mark.parametrize("seed", [1000, 1001])
def test_two_hundred_recorded_steps_of_the_trained_agent(data, seed):
    """The root's policy logits along whole episodes, each with about 195 slides."""
    config, params = lightzero.load(data / MASKED, **OPTIONS)
    with np.load(data / "cartpole_masked_episodes.npz") as episodes:
        recorded = {
            name: episodes[f"seed{seed}/{name}"] for name in ("obs", "action", "policy_logits")
        }
    assert len(recorded["obs"]) == 200
    logits = replayed_logits(config, params, recorded["obs"], recorded["action"])
    np.testing.assert_allclose(logits, recorded["policy_logits"], atol=5e-5)


def test_what_shapes_tell(data):
    config, params = lightzero.load(data / MASKED, **OPTIONS)
    assert (config.embed_dim, config.num_layers, config.num_actions) == (64, 2, 2)
    assert (config.max_tokens, config.observation_size, config.support) == (20, 4, (-50, 50))
    assert (config.layout, config.encoder_norm, config.latent_norm) == ("0.2.0", *["simnorm"] * 2)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), world_model.params_shapes(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == expected


def test_path_dictionary_state_dict_and_prefixes_agree(data, state):
    from_path = lightzero.load(data / MASKED, **OPTIONS)[1]
    for source in (
        {"model": state, "last_iter": 3},
        state,
        {f"module.{k}": v for k, v in state.items()},
    ):
        loaded = lightzero.load(source, **OPTIONS)[1]
        jax.tree.map(np.testing.assert_array_equal, loaded, from_path)


def test_ignored_tensors_are_named(data, state):
    ignored = read(data / MASKED, **OPTIONS).ignored
    assert set(ignored) < set(state)
    assert "_orig_mod.world_model.transformer.blocks.0.attn.mask" in ignored
    assert "_orig_mod.decoder_network.fc_representation.0.weight" in ignored
    assert "_orig_mod.tokenizer.encoder.fc_representation.0.weight" in ignored
    read_tensors = set(state) - set(ignored)
    assert len(read_tensors) == len(jax.tree.leaves(lightzero.load(state, **OPTIONS)[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"context_length": 8},
            "num_heads is not stored in a LightZero checkpoint: pass num_heads",
        ),
        ({"num_heads": 2}, "context_length is not stored"),
        ({**OPTIONS, "num_heads": 3}, "num_heads must divide embed_dim 64, got 3"),
        ({**OPTIONS, "context_length": 7}, "context_length must be even"),
        ({**OPTIONS, "context_length": 2}, "context_length must be at least 4"),
        ({**OPTIONS, "embed_dim": 32}, "embed_dim=32, but the tensors say 64"),
        ({**OPTIONS, "layout": "main"}, "layout='main', but the tensors say '0.2.0'"),
        ({**OPTIONS, "support": (0, 10)}, r"support \(0, 10\) has 11 bins, not 101"),
        ({**OPTIONS, "heads": 2}, "unknown options heads; known are"),
    ],
)
def test_options(data, options, message):
    with pytest.raises(ValueError, match=message):
        lightzero.load(data / MASKED, **options)


def test_another_support_of_as_many_bins_may_be_said(data):
    config, _ = lightzero.load(data / MASKED, **OPTIONS, support=(0, 100))
    assert config.support == (0, 100)


W = "_orig_mod.world_model."


def poison(state, name):
    state[name] = state[name].clone()
    state[name].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: poison(s, f"{W}transformer.ln_f.weight"),
            "ln_f.weight holds 1 values that are NaN",
        ),
        (
            lambda s: s.pop(f"{W}head_value.head_module.2.bias"),
            "missing tensor head_value.head_module.2.bias",
        ),
        (lambda s: s.update({f"{W}surprise": torch.zeros(2)}), "does not know: surprise"),
        (
            lambda s: s.update({f"{W}head_value.head_module.2.bias": torch.zeros(7)}),
            r"\(7,\), expected \(101,\)",
        ),
        (
            lambda s: poison(s, f"{W}tokenizer.encoder.fc_representation.0.bias"),
            "differs from the first copy",
        ),
        (lambda s: s.pop(f"{W}pos_emb.weight"), "missing tensor pos_emb.weight"),
        (
            lambda s: s.update({f"{W}transformer.blocks.0.gate1.w_r.weight": torch.zeros(2)}),
            "GRU gating",
        ),
        (
            lambda s: s.update({f"{W}transformer.blocks.0.experts.0.0.weight": torch.zeros(2)}),
            "mixture of experts",
        ),
        (
            lambda s: s.update({f"{W}act_embedding_table.0.weight": torch.zeros(2)}),
            r"act_embedding_table.0.weight has shape \(2,\), expected 2 dimensions",
        ),
        (lambda s: s.update({f"{W}task_emb.weight": torch.zeros(2)}), "multi-task models"),
        (
            lambda s: s.update({f"{W}transformer.register_tokens": torch.zeros(2)}),
            "register tokens",
        ),
        (
            lambda s: s.update({"representation_network.pretrained_model.weight": torch.zeros(2)}),
            "text encoders",
        ),
        (lambda s: s.update({f"{W}transformer.blocks.0.attn.key.lora_A": torch.zeros(2)}), "LoRA"),
        (lambda s: s.update({"epoch": 3}), "epoch is a int, expected a tensor"),
    ],
)
def test_bad_tensors(state, change, message):
    change(state)
    with pytest.raises(ValueError, match=message):
        lightzero.load(state, **OPTIONS)


class StandIn:
    """A torch module as far as loading looks at it."""

    def __init__(self, state, **config):
        self.config = types.SimpleNamespace(num_heads=2, context_length=8, **config)
        self._state = state

    def state_dict(self):
        return self._state


def test_a_module_of_an_unsupported_variant(state):
    with pytest.raises(ValueError, match="unsupported variant: use_policy_logits_clip"):
        lightzero.load(StandIn(state, use_policy_logits_clip=True))


def test_modes_that_exclude_each_other_are_refused_by_name(state, data):
    both = {"rotary_emb": True, "rebuild_kv_window_from_tokens": True}
    with pytest.raises(
        ValueError, match="rotary_emb and rebuild_kv_window_from_tokens exclude each other"
    ):
        lightzero.load(StandIn(state, **both))
    with pytest.raises(ValueError, match='"rebuild" needs a table of learned positions'):
        lightzero.load(data / ROPE, **OPTIONS, window_mode="rebuild")
    with pytest.raises(ValueError, match='"rope_consistent" excludes learned positions'):
        lightzero.load(data / MASKED, **OPTIONS, window_mode="rope_consistent")
    with pytest.raises(ValueError, match="window_mode must be one of learned, rope_lightzero"):
        lightzero.load(data / MASKED, **OPTIONS, window_mode="rope")


def test_a_module_tells_its_own_configuration(state):
    config, _ = lightzero.load(StandIn(state, rotary_emb=False, group_size=16))
    assert (config.num_heads, config.context_length, config.simnorm_group) == (2, 8, 16)


def test_a_module_without_configuration():
    with pytest.raises(ValueError, match="has no config: expected a LightZero WorldModel"):
        lightzero.load(torch.nn.Linear(2, 2))


def test_bad_files(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*absent"):
        lightzero.load(tmp_path / "absent.pth.tar", **OPTIONS)
    truncated = tmp_path / "truncated.pth.tar"
    truncated.write_bytes((data / MASKED).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="truncated.pth.tar is not a readable torch checkpoint"):
        lightzero.load(truncated, **OPTIONS)
    text = tmp_path / "text.pth.tar"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is not a readable torch checkpoint"):
        lightzero.load(text, **OPTIONS)
    torch.save([1, 2], tmp_path / "list.pth.tar")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        lightzero.load(tmp_path / "list.pth.tar", **OPTIONS)
    with pytest.raises(ValueError, match="expected a path, a state dict or a torch module, got"):
        lightzero.load(3, **OPTIONS)
    with pytest.raises(ValueError, match="missing tensor transformer.ln_f.weight"):
        lightzero.load({}, **OPTIONS)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_torch_files_are_read_weights_only(tmp_path, capsys):
    torch.save({"model": {}, "payload": Payload()}, tmp_path / "evil.pth.tar")
    with pytest.raises(ValueError, match="more than weights"):
        lightzero.load(tmp_path / "evil.pth.tar", **OPTIONS)
    assert "executed" not in capsys.readouterr().out


def test_half_precision_weights_become_float32(state):
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    _, params = lightzero.load(halved, **OPTIONS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_loaded_parameters_do_not_alias_torch(state):
    _, params = lightzero.load(state, **OPTIONS)
    before = jax.tree.map(np.array, params)
    for tensor in state.values():
        tensor.zero_()
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_without_torch_the_error_says_what_to_do(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="needs torch .*kvjax convert"):
        lightzero.load(data / MASKED, **OPTIONS)


def test_config_survives_as_a_dataclass(data):
    config, _ = lightzero.load(data / MASKED, **OPTIONS)
    assert dataclasses.replace(config) == config
