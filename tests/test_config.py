"""Configuration: every field refuses what it cannot be, and takes numpy's numbers for Python's."""

import dataclasses

import numpy as np
import pytest
from conftest import SMALL, with_mode

from kvjax.config import (
    EnvironmentConfig,
    FramesConfig,
    SearchConfig,
    WindowConfig,
    WorldModelConfig,
)

IMAGES = dataclasses.replace(SMALL, observation_size=None, image_shape=(3, 64, 64))
CONFIGURATIONS = (
    WindowConfig(8, 2, 4, 16, raw_size=64),
    SMALL,
    with_mode(SMALL, "rope_consistent"),
    IMAGES,
    SearchConfig(max_depth=5, kept_nodes=3, temperature=0.5, noise_fraction=0.25),
    EnvironmentConfig("CartPole-v0", (1.0, 0.0, 10.0, 0.0)),
    FramesConfig(gray_scale=True, frame_stack=4, repeat_action_probability=0.25),
)
FIELDS = [
    pytest.param(config, field.name, id=f"{type(config).__name__}-{index}-{field.name}")
    for index, config in enumerate(CONFIGURATIONS)
    for field in dataclasses.fields(config)
]
ROTTEN = (
    float("nan"),
    float("inf"),
    float("-inf"),
    np.float32("nan"),
    np.float64("inf"),
    -1,
    -1.5,
    2.5,
    1e39,
    10**400,
    True,
    np.bool_(True),
    1 + 2j,
    None,
    "",
    "25",
    "CartPole",
    b"25",
    (),
    (1,),
    (3, -3),
    ("a", "b"),
    (-3.0, 3.0),
    (1, 2, 3),
    (3, "a", "a"),
    (float("nan"), 1.0),
    [1, [2]],
    {},
    object(),
    np.array(3),
    np.array([1.0, float("nan")]),
    int,
)


OPTIONAL = (
    "raw_size",
    "max_depth",
    "observation_scale",
    "observation_size",
    "image_shape",
    "q_transform",
    "frames",
    "sigma_type",
    "bound_type",
    "num_sampled_actions",
)
ABOVE_ZERO = ("temperature", "dirichlet_alpha", "pb_c_base", "rope_theta", "fixed_sigma_value")
SCALES = [(1,), (3, -3), (-3.0, 3.0), (1, 2, 3)]


def is_allowed(config, name, value):
    """What may stand there all the same."""
    if value is None:
        return name in OPTIONAL or (name == "max_tokens" and config.max_tokens is None)
    if isinstance(value, bool | np.bool_):
        is_rotary = name == "task_in_positions" and config.is_rotary
        return type(getattr(config, name)) is bool and not (value and is_rotary)
    if type(value) in (int, float):
        return value == 2.5 if name in ABOVE_ZERO else name == "pb_c_init" and abs(value) <= 2.5
    if isinstance(value, str):
        return name == "env_id" and value != ""
    return name == "observation_scale" and isinstance(value, tuple) and value in SCALES


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_every_field_refuses_by_its_name(config, name):
    refused = 0
    for value in ROTTEN:
        if is_allowed(config, name, value):
            assert hash(dataclasses.replace(config, **{name: value}))
            continue
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})
        refused += 1
    assert refused > len(ROTTEN) * 0.75


def numpy_value(value):
    if isinstance(value, tuple):
        return tuple(numpy_value(x) for x in value)
    kinds = {int: np.int32, float: np.float64, str: np.str_, bool: np.bool_}
    return kinds[type(value)](value) if type(value) in kinds else value


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: type(config).__name__)
def test_numpys_numbers_are_pythons(config):
    """One key of a compilation, one text: as if the plain ones had been said."""
    fields = {f.name: numpy_value(getattr(config, f.name)) for f in dataclasses.fields(config)}
    other = type(config)(**fields)
    assert other == config
    assert hash(other) == hash(config)
    assert repr(other) == repr(config)


def test_small_numpy_integers_do_not_overflow():
    assert WindowConfig(np.int8(100), np.int8(100), 4, 16).token_shape == (100, 2, 4, 16)
    assert SearchConfig(np.int8(127), kept_nodes=np.int8(100)).num_nodes == 228
    model = WorldModelConfig(
        **(dataclasses.asdict(SMALL) | {"support": (np.int8(-100), np.int8(100))})
    )
    assert model.support_size == 201


@pytest.mark.parametrize("name", ["dirichlet_alpha", "pb_c_base"])
def test_what_float32_takes_for_zero_is_not_above_zero(name):
    for value in (0.0, 1e-60, 1e-40, -1.0):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got {value}"):
            SearchConfig(**{name: value})
    assert SearchConfig(**{name: 1e-37})
