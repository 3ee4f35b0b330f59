"""kvjax's own files: round trip, what is shipped, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import SMALL, random_params

from kvjax import checkpoint
from kvjax.checkpoint import Checkpoint
from kvjax.config import EnvironmentConfig


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


def edit(path, change):
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


BIAS = "params/value_head/output/bias"


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
        (
            lambda t, m: m.update(kvjax=m["kvjax"].replace('"num_heads": 2', '"num_heads": 3')),
            "num_heads must divide embed_dim 16, got 3",
        ),
    ],
)
def test_bad_files(saved, change, message):
    path, _ = saved
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


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
