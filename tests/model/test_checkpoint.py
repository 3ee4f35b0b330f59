"""kvjax's own files: round trip, what is shipped, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import SMALL, random_params

from kvjax.base import tensor_files
from kvjax.config import EnvironmentConfig
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    environment = EnvironmentConfig("CartPole-v1", (1.0, 0.0, 2.5, 0.0))
    agent = Checkpoint(SMALL, random_params(SMALL), environment)
    checkpoint.save(path, agent)
    return path, agent


def test_round_trip(saved):
    path, agent = saved
    loaded = checkpoint.load(path)
    assert loaded.config == agent.config
    assert loaded.environment == agent.environment
    jax.tree.map(np.testing.assert_array_equal, loaded.params, agent.params)


def test_shipped_agents(data):
    pytest.importorskip("torch")
    from kvjax import lightzero

    for name, scale in (("cartpole", (1, 1, 1, 1)), ("cartpole_masked", (1, 0, 10, 0))):
        agent = checkpoint.load(checkpoint.shipped()[name])
        assert agent.environment is not None
        assert agent.environment.env_id == "CartPole-v0"
        assert (agent.environment.observation_scale or (1, 1, 1, 1)) == scale
        source = data / f"{name}_lightzero_0.2.0.pth.tar"
        config, params = lightzero.load(source, num_heads=2, context_length=8)
        assert agent.config == config
        jax.tree.map(np.testing.assert_array_equal, agent.params, params)


def edit(path, change, digest=False):
    """Changes a file; without its digest it is one of an earlier kvjax."""
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not digest:
        described = json.loads(metadata["kvjax"])
        del described["digest"], described["notes"]
        metadata["kvjax"] = json.dumps(described)
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def described(metadata, **changes):
    """Changes fields of the stored configuration."""
    content = json.loads(metadata["kvjax"])
    content["config"] |= changes
    metadata["kvjax"] = json.dumps(content)


def environment(metadata, value):
    metadata["kvjax"] = json.dumps(json.loads(metadata["kvjax"]) | {"environment": value})


BIAS = "params/value_head/output/bias"
SIZES = ("embed_dim", "num_layers", "num_actions", "observation_size", "max_tokens", "image_blocks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(BIAS), f"missing or unknown tensors: {BIAS}"),
        (lambda t, m: t.update(extra=np.zeros(2)), "missing or unknown tensors: extra"),
        (lambda t, m: t.update({BIAS: np.zeros(3, "f")}), r"has shape \(3,\), expected \(7,\)"),
        (lambda t, m: t[BIAS].__setitem__(0, np.inf), f"{BIAS} holds 1 values that are NaN or"),
        (lambda t, m: m.clear(), "holds no kvjax configuration"),
        (lambda t, m: m.update(kvjax="{"), "holds a configuration that kvjax cannot read"),
        (lambda t, m: m.update(kvjax='{"config": {}}'), "configuration that kvjax cannot read"),
        (lambda t, m: described(m, num_heads=3), "num_heads must divide embed_dim 16, got 3"),
        (lambda t, m: m.update(kvjax="[" * 100_000), "configuration that kvjax cannot read"),
        (lambda t, m: m.update(kvjax="[]"), "configuration that kvjax cannot read"),
        (lambda t, m: m.update(kvjax='{"config": []}'), "configuration that kvjax cannot read"),
        (lambda t, m: m.update(kvjax='{"egal": 1}'), "configuration that kvjax cannot read"),
        (lambda t, m: environment(m, "x"), "configuration that kvjax cannot read"),
        (
            lambda t, m: environment(m, {"env_id": 3}),
            "env_id must name a Gymnasium environment, got 3",
        ),
        (lambda t, m: described(m, support=["a", "b"]), "kvjax cannot read"),
        (lambda t, m: described(m, support=[-3.0, 3.0]), "kvjax cannot read"),
        (lambda t, m: described(m, embed_dim="16"), "kvjax cannot read: embed_dim must be"),
        (lambda t, m: described(m, rope_theta="a", window_mode="rope_lightzero"), "cannot read"),
        *((lambda t, m, n=n: described(m, **{n: 2**40}), f"says {n} {2**40}, its") for n in SIZES),
        (lambda t, m: described(m, support=[0, 2**40]), "says support_size"),
        *(
            (lambda t, m, k=k: t.update({BIAS: np.ones(7, k)}), f"{BIAS} holds {name}, expected")
            for k, name in (("i4", "I32"), ("?", "BOOL"), ("u1", "U8"), ("c8", "C64"))
        ),
    ],
)
def test_bad_files(saved, change, message):
    path, _ = saved
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def tell_another_head(metadata):
    metadata["kvjax"] = metadata["kvjax"].replace('"num_heads": 2', '"num_heads": 4')


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t[BIAS].__setitem__(0, 0.125),
        lambda t, m: t.update({BIAS: t[BIAS].astype(np.float64)}),
        lambda t, m: t.update({BIAS: t["params/reward_head/output/bias"]}),
        lambda t, m: tell_another_head(m),
        lambda t, m: environment(m, None),
    ],
)
def test_content_that_is_not_what_the_digest_says(saved, change):
    """Each of these is a good checkpoint, though another one."""
    path, _ = saved
    edit(path, change)
    checkpoint.load(path)
    checkpoint.save(*saved)
    edit(path, change, digest=True)
    with pytest.raises(ValueError, match="is damaged: its digest is another"):
        checkpoint.load(path)


def test_the_digest_tells_all_of_a_tensor_and_the_description():
    """Bytes of which one may be the other: another name, kind, shape, value, or configuration."""
    tensors = {"a": np.ones((2, 3), "f2"), "b": np.zeros(2, "f4")}
    others = [
        ({}, {"c": tensors["a"], "b": tensors["b"]}),
        ({}, {"a": tensors["b"], "b": tensors["a"]}),
        ({}, tensors | {"a": tensors["a"].view(jax.numpy.bfloat16)}),
        ({}, tensors | {"a": tensors["a"].reshape(3, 2)}),
        ({}, tensors | {"b": np.array([0.0, -0.0], "f4")}),
        ({"config": 1}, tensors),
        ({}, tensors),
    ]
    assert len({tensor_files.digest_of(*other) for other in others}) == len(others)
    assert tensor_files.digest_of({}, dict(reversed(tensors.items()))) == tensor_files.digest_of(
        {}, tensors
    )


def test_files_without_a_digest_are_read_with_a_warning(saved, caplog):
    path, agent = saved
    checkpoint.load(path)
    for shipped in checkpoint.shipped().values():
        checkpoint.load(shipped)
    assert not caplog.text
    edit(path, lambda t, m: None)
    loaded = checkpoint.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, agent.params)
    assert "carries no digest of its weights" in caplog.text


def test_the_same_agent_makes_the_same_file(saved, tmp_path):
    path, _ = saved
    checkpoint.save(tmp_path / "again.safetensors", checkpoint.load(path))
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_floats_of_any_width_are_weights(saved, kind):
    path, agent = saved
    params = jax.tree.map(lambda x: np.asarray(x).astype(kind), agent.params)
    checkpoint.save(path, dataclasses.replace(agent, params=params))
    loaded = checkpoint.load(path).params
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype("f4")), loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_windows_that_outgrow_their_table_are_told(saved, caplog):
    path, agent = saved
    config = dataclasses.replace(SMALL, context_length=14)
    checkpoint.save(path, dataclasses.replace(agent, config=config))
    assert checkpoint.load(path).config == config
    assert "up to 13 tokens continue a table of 12 positions" in caplog.text


def test_an_environment_that_imports_a_module_must_be_said(saved):
    path, agent = saved
    other = dataclasses.replace(agent.environment, env_id="somebody:CartPole-v1")
    checkpoint.save(path, dataclasses.replace(agent, environment=other))
    with pytest.raises(ValueError, match="'somebody:CartPole-v1', for which Gymnasium imports"):
        checkpoint.load(path)
    assert checkpoint.load(path, env="somebody:CartPole-v1").environment == other
    assert checkpoint.load(path, env="CartPole-v1").environment == EnvironmentConfig("CartPole-v1")


def test_what_cannot_be_written(saved, tmp_path):
    path, agent = saved
    before = path.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (("absent/a", "no such folder"), ("folder", "it is a folder")):
        with pytest.raises(OSError, match=f"cannot write .*{name}.safetensors: {message}"):
            checkpoint.save(tmp_path / f"{name}.safetensors", agent)
    broken = dataclasses.replace(agent, params={"params": {"a": np.array("text")}})
    with pytest.raises(Exception, match="dtype"):
        checkpoint.save(path, broken)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "folder.safetensors"}


def test_missing_truncated_and_misnamed_files(saved, tmp_path):
    path, agent = saved
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"must end in .safetensors, got .*model.bin"):
        checkpoint.save(tmp_path / "model.bin", agent)


def test_environment_configuration():
    with pytest.raises(ValueError, match="env_id must name a Gymnasium environment"):
        EnvironmentConfig("")
    with pytest.raises(ValueError, match="observation_scale must be numbers"):
        EnvironmentConfig("CartPole-v1", ("a",))
    assert hash(dataclasses.replace(EnvironmentConfig("CartPole-v1")))
