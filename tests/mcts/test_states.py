"""States in files: the same bits, on whatever devices; other states are refused in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

import kvjax
from kvjax.base import tensor_files

ROWS = 2
KEEPS = kvjax.SearchConfig(num_simulations=3, kept_nodes=2)
BFLOAT = dataclasses.replace(SMALL, dtype="bfloat16", window_mode="rebuild")


def drawn(state, seed=0):
    """Any bits at all, those of NaN and of -0 among them."""
    draw = np.random.default_rng(seed)

    def bits(x):
        if x.dtype == bool:
            return jnp.asarray(draw.random(x.shape) < 0.5)
        return jnp.asarray(np.frombuffer(draw.bytes(x.nbytes), x.dtype).reshape(x.shape))

    return jax.tree.map(bits, state)


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def contexts(config=SMALL, rows=ROWS):
    return kvjax.init_contexts(config, rows)


def store(config=SMALL, **options):
    return kvjax.init_store(config, ROWS, 1, root_slots=2, **options)


EMPTY = [
    pytest.param(contexts(), SMALL, id="contexts"),
    pytest.param(contexts(BFLOAT), BFLOAT, id="bfloat16 windows and raw tokens"),
    pytest.param(store(BFLOAT, eviction="lru", verify_keys=True), BFLOAT, id="store"),
    pytest.param((contexts(), kvjax.init_kept(SMALL, ROWS, KEEPS)), SMALL, id="kept"),
    pytest.param({"a": (), "b": [jnp.zeros(()), None], "c": contexts()}, None, id="of one's own"),
]


@pytest.mark.parametrize(("empty", "config"), EMPTY)
def test_the_same_bits_come_back(tmp_path, empty, config):
    state = drawn(empty)
    kvjax.save_state(tmp_path / "a", state, config=config)
    same_bits(kvjax.load_state(tmp_path / "a", empty, config=config), state)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_random_keys(tmp_path):
    keys = jax.random.split(jax.random.key(3), 2), jax.random.key(4, impl="rbg")
    like = jax.random.split(jax.random.key(0), 2), jax.random.key(0, impl="rbg")
    kvjax.save_state(tmp_path / "a", keys, config=None)
    loaded = kvjax.load_state(tmp_path / "a", like, config=None)
    assert [key.dtype for key in loaded] == [key.dtype for key in keys]
    same_bits(*(jax.tree.map(jax.random.key_data, one) for one in (loaded, keys)))


def test_what_the_host_holds_stays_there(tmp_path):
    kvjax.save_state(tmp_path / "a", {"x": np.arange(3)}, config=None)
    (loaded,) = kvjax.load_state(tmp_path / "a", {"x": np.zeros(3, int)}, config=None).values()
    assert type(loaded) is np.ndarray
    chex.assert_trees_all_equal(loaded, np.arange(3))


@pytest.mark.parametrize(
    ("like", "config", "message"),
    [
        (contexts(rows=3), SMALL, r"Window.kv must be float32\[3, .*, got float32\[2, "),
        (store(), SMALL, "another state: a Store has roots, .* got timestep, window"),
        ((contexts(),), SMALL, "state must have 0, got what has timestep, window"),
        (None, SMALL, "state must be None, got what has timestep, window"),
        (contexts(), dataclasses.replace(SMALL, window_mode="reset"), "window_mode 'learned', exp"),
        (contexts(), dataclasses.replace(SMALL, num_actions=4), "num_actions 3, expected 4"),
        (contexts(), None, "holds a state of WorldModelConfig, expected one of None"),
        (contexts(), SMALL.window, "a state of WorldModelConfig, expected one of WindowConfig"),
    ],
)
def test_another_state_is_refused(tmp_path, like, config, message):
    kvjax.save_state(tmp_path / "a", contexts(), config=SMALL)
    with pytest.raises(ValueError, match=message) as told:
        kvjax.load_state(tmp_path / "a", like, config=config)
    assert str(told.value).startswith(str(tmp_path / "a"))


def test_another_store_is_refused(tmp_path):
    kvjax.save_state(tmp_path / "a", store(eviction="lru"), config=SMALL)
    with pytest.raises(ValueError, match="Pool.eviction must be 'fifo', got 'lru'"):
        kvjax.load_state(tmp_path / "a", store(), config=SMALL)
    with pytest.raises(ValueError, match="Pool.records must be uint32"):
        kvjax.load_state(tmp_path / "a", store(eviction="lru", verify_keys=True), config=SMALL)


def test_what_is_no_state(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(TypeError, match="a state is made of arrays, got float at x/0"):
        kvjax.save_state(path, {"x": (0.5,)}, config=None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        kvjax.load_state(path, contexts(), config=SMALL)
    for content, message in (
        (b"none", "is not a readable safetensors file"),
        (kvjax.checkpoint.shipped()["cartpole"].read_bytes(), "holds no state"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            kvjax.load_state(path, contexts(), config=SMALL)


def test_a_damaged_file_is_refused(tmp_path):
    """Whatever bit is turned over."""
    path, state = tmp_path / "a", contexts()
    kvjax.save_state(path, state, config=SMALL)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(len(whole), size=60):
        bit = bytes([whole[at] ^ 1])
        path.write_bytes(whole[:at] + bit + whole[at + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            kvjax.load_state(path, state, config=SMALL)


def test_a_field_that_came_later(tmp_path):
    """A file from before a configuration had it is one of its default."""
    path, state = tmp_path / "a", contexts()
    kvjax.save_state(path, state, config=SMALL)
    metadata, tensors = tensor_files.read(path, tensor_files.ALL_KINDS)
    told = json.loads(metadata["kvjax"])
    del told["config"]["rope_theta"], told["digest"]
    tensor_files.write(path, tensors, told)
    same_bits(kvjax.load_state(path, state, config=SMALL), state)
    other = dataclasses.replace(SMALL, rope_theta=5.0)
    with pytest.raises(ValueError, match=r"rope_theta 10000.0, expected 5.0"):
        kvjax.load_state(path, state, config=other)
