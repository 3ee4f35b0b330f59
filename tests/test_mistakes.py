"""Plausible mistakes are told before anything is compiled: what was expected and what came."""

import dataclasses
import functools
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, with_mode

import kvjax
from kvjax.model import world_model
from kvjax.model.checkpoint import Checkpoint
from kvjax.ops import attention, hashing, position, support
from kvjax.ops import window as windows
from kvjax.store import pool


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def made(function, *arguments):
    return jax.eval_shape(lambda *arrays: function(*arrays), *arguments)


def batch_of(state):
    return jax.tree.map(lambda x: shaped(2, *x.shape, dtype=x.dtype), state)


TOKEN_SHAPE, EMBED_DIM = SMALL.window.token_shape, SMALL.embed_dim
WINDOW = made(lambda: windows.init(SMALL.window))
POOL = made(lambda: pool.init(WINDOW, num_slots=4))
KEY = shaped(hashing.KEY_LANES, dtype=jnp.uint32)
LATENT = shaped(EMBED_DIM)
ZERO, TRUE = shaped(dtype=jnp.int32), shaped(dtype=bool)


def scalars(logits):
    return support.to_scalar(logits, (-3, 3), axis=0)


OPS = {
    windows.is_full: [WINDOW],
    windows.overflows: [WINDOW],
    windows.valid_mask: [WINDOW],
    windows.append: [WINDOW, shaped(*TOKEN_SHAPE)],
    windows.where: [TRUE, WINDOW, WINDOW],
    windows.right_align: [WINDOW],
    windows.left_align: [made(windows.right_align, WINDOW)],
    windows.trim_and_pad: [batch_of(WINDOW)],
    windows.undo_trim_and_pad: [made(windows.trim_and_pad, batch_of(WINDOW))],
    windows.slide: [WINDOW, shaped(SMALL.window.kept_length, *TOKEN_SHAPE)],
    attention.attend: [shaped(2, 8), shaped(2, 2, 8), shaped(8, 2, 2, 8), shaped(8, dtype=bool)],
    hashing.digest: [KEY],
    hashing.latent_key: [LATENT, ZERO, ZERO],
    hashing.path_key: [KEY, ZERO],
    hashing.key: [shaped(hashing.DIGEST_LANES, dtype=jnp.uint32), ZERO, ZERO],
    hashing.bucket: [KEY],
    position.continue_table: [shaped(3, 4), 5],
    position.project: [shaped(8, 4), shaped(2, 2, 4, 6), 2],
    position.slide_correction: [shaped(8, 2, 2, 2, 3)],
    position.rotation: [ZERO, 8, 1e4],
    position.rotate: [shaped(2, 8), shaped(2, 4)],
    scalars: [shaped(7)],
    pool.find: [POOL, KEY, ZERO],
    pool.add: [POOL, batch_of(KEY), batch_of(ZERO), batch_of(WINDOW)],
}
ELEMENTWISE = {  # any shape, or none
    windows.init, hashing.canonical_bits, hashing.integer_digests, support.inverse_value_transform,
    support.to_scalar, position.observation_position,
}  # fmt: skip


def run(op, arguments):
    fixed = {i: x for i, x in enumerate(arguments) if isinstance(x, int | float)}  # static
    arrays = {i: x for i, x in enumerate(arguments) if i not in fixed}

    def call(arrays):
        return op(*(x for _, x in sorted((arrays | fixed).items())))

    return jax.eval_shape(call, arrays)


def places():
    for op, arguments in OPS.items():
        for place, value in enumerate(arguments):
            if not isinstance(value, int | float | kvjax.Pool):
                yield pytest.param(op, place, id=f"{op.__qualname__}-{place}")


@pytest.mark.parametrize(("op", "place"), list(places()))
def test_ops_take_one_item_and_refuse_a_batch_where_it_would_be_misread(op, place):
    arguments = OPS[op]
    run(op, arguments)
    batched = batch_of(arguments[place])
    with pytest.raises(ValueError, match=r"must have shape \[|bins, got"):
        run(op, [*arguments[:place], batched, *arguments[place + 1 :]])


def test_every_op_was_tried():
    modules = (windows, attention, hashing, position, support)
    public = {
        value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert public == (OPS.keys() & public) | ELEMENTWISE


def zeros(function, *arguments):
    """What a function would make, as numpy's zeros, so that nothing is compiled."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made(function, *arguments))


def donated(state, field):
    array = jnp.asarray(getattr(state, field))
    array.delete()
    return dataclasses.replace(state, **{field: array})


@functools.cache
def good():
    """Arguments by name that fit, for two environments."""
    contexts = zeros(lambda: kvjax.init_contexts(SMALL, 2))
    action, latent = np.zeros(2, np.int32), np.zeros((2, EMBED_DIM), np.float32)
    return {
        "params": jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), world_model.params_shapes(SMALL)
        ),
        "config": SMALL,
        "search": kvjax.SearchConfig(4),
        "rng": np.zeros(2, np.uint32),
        "contexts": contexts,
        "state": contexts,
        "window": zeros(lambda: windows.init(SMALL.window)),
        "store": zeros(lambda: kvjax.init_store(SMALL, 2, 4)),
        "observation": np.zeros((2, SMALL.observation_size), np.float32),
        "last_action": action,
        "latent": latent,
        "last_latent": latent,
        "num_envs": 2,
        "num_simulations": 4,
    } | dict.fromkeys(("action", "env_id", "timestep", "depth", "length"), action)


def agent(_):
    return Checkpoint(SMALL, good()["params"])


def other(**change):
    return dataclasses.replace(SMALL, **change)


SEARCH, INFERENCE = (kvjax.search,), (kvjax.initial_inference, kvjax.recurrent_inference)
ON_UPDATE, ROLLOUT = (kvjax.on_params_update,), (kvjax.rollout,)
CONTEXTS = (kvjax.search, kvjax.replay)
MODEL = (*CONTEXTS, *ROLLOUT, *ON_UPDATE, *INFERENCE, kvjax.prepare)
EMPTY = (kvjax.init_contexts, kvjax.init_store, kvjax.init_kept)
WRONG_TYPES = [  # functions, the argument, what is passed instead of it, the error
    (MODEL, "params", agent, "variables, {...}, got Checkpoint: pass its .params"),
    (MODEL, "params", lambda _: None, "a dictionary of variables, {...}, got NoneType"),
    (MODEL, "params", lambda good: good["rng"], "got ndarray"),
    (MODEL, "config", agent, "type WorldModelConfig, got Checkpoint: pass its .config"),
    (MODEL + EMPTY, "config", lambda _: 2, "WorldModelConfig, got int 2: kvjax.WorldModelConfig"),
    (SEARCH, "search", lambda _: 25, "type SearchConfig, got int 25: kvjax.SearchConfig makes"),
    (SEARCH, "search", lambda _: SMALL, "type SearchConfig, got WorldModelConfig"),
    ((kvjax.init_kept,), "search", lambda _: 25, "type SearchConfig, got int 25"),
    (SEARCH, "rng", lambda _: 0, "rng must be a PRNG key, got int 0: jax.random.key makes one"),
    (SEARCH, "rng", lambda _: np.zeros((3, 2), np.uint32), "one PRNG key, got uint32 of shape (3"),
    (SEARCH, "rng", lambda _: np.zeros(2, np.int32), "one PRNG key, got int32 of shape (2,)"),
    (SEARCH, "rng", lambda good: good["contexts"], "rng must be a PRNG key, got Contexts"),
    (SEARCH, "kept", lambda good: good["contexts"], "type Kept, got Contexts"),
    (SEARCH, "contexts", lambda _: None, "got NoneType: kvjax.init_contexts makes one"),
    (CONTEXTS, "contexts", lambda good: good["window"], "type Contexts, got Window"),
    (CONTEXTS, "contexts", lambda good: (good["contexts"], 1), "got tuple: pass its item 0"),
    (ON_UPDATE, "state", lambda good: (good["contexts"], 1), "Contexts or a Store, got tuple"),
    (ON_UPDATE, "state", lambda good: good["params"], "Contexts or a Store, got dict"),
    (ROLLOUT, "window", lambda good: good["contexts"], "got Contexts: pass its .window"),
    (INFERENCE, "store", lambda _: None, "Store, got NoneType: kvjax.init_store makes one"),
    (INFERENCE, "store", lambda good: (1, good["store"]), "got tuple: pass its item 1"),
    ((kvjax.stats,), "store", lambda good: (good["store"], 1), "got tuple: pass its item 0"),
]
OTHER_MODELS = [  # configurations of other models, and what tells them from that of the variables
    (other(num_actions=4), "action_embedding/embedding must have shape (4, 16), got (3, 16)"),
    (other(num_layers=1), "blocks_1/key/bias must be absent, got (16,)"),
    (other(num_layers=3), "blocks_2/key/bias must have shape (16,), got none"),
    (other(embed_dim=32), "embedding must have shape (3, 32), got (3, 16)"),
    (other(support=(-9, 9)), "value_head/output/bias must have shape (19,), got (7,)"),
    (other(layout="main"), "value_head/hidden/bias must have shape (64,), got (16,)"),
    (other(latent_norm="layernorm"), "latent_final/norm/bias must have shape (16,), got none"),
    (other(encoder_norm="layernorm"), "encoder/final/norm/bias must have shape (16,), got none"),
    (other(observation_size=6), "encoder/input/kernel must have shape (6, 16), got (5, 16)"),
    (other(observation_size=None, image_shape=(3, 64, 64)), "encoder/stem/kernel must...got none"),
    (other(max_tokens=9), "position_embedding/embedding must have shape (9, 16), got (12, 16)"),
    (with_mode(SMALL, "rope_consistent"), "position_embedding/embedding must be absent"),
]
WRONG_VALUES = [
    *((MODEL, "config", lambda _, config=config: config, told) for config, told in OTHER_MODELS),
    (MODEL, "params", lambda good: good["params"]["params"], "all variables, {...}, got a dict"),
    (MODEL, "params", lambda _: {"params": agent(_)}, "embedding must have...got none"),
    (CONTEXTS, "contexts", lambda good: donated(good["contexts"], "timestep"), "were donated to"),
    ((*INFERENCE, kvjax.stats), "store", lambda good: donated(good["store"], "counters"),
     "the store was moved by an earlier call: use the one that came back from it"),
    (ON_UPDATE, "state", lambda good: donated(good["store"], "counters"), "the store was moved"),
    (ROLLOUT, "window", lambda good: good["contexts"].window, "shape [8, 2...], got [2, 8, 2"),
    (ROLLOUT, "action", lambda _: np.zeros((2, 3), np.int32), "shape [K], got [2, 3]"),
    (INFERENCE, "latent", lambda _: [[0.0] * EMBED_DIM] * 2, "latent must be float32...got list"),
    (INFERENCE, "action", lambda _: [0, 0], "action must be integers of shape...got list"),
    *((functions, name, lambda _, size=size: size, f"{name} must be a positive integer, got {size}")
      for functions, name in [(EMPTY, "num_envs"), ((kvjax.init_store,), "num_simulations")]
      for size in (2.0, 0, True, None)),
]  # fmt: skip
MISTAKES = [
    pytest.param(function, name, wrong, error, told, id=f"{function.__name__}-{name}-{told}")
    for error, rows in ((TypeError, WRONG_TYPES), (ValueError, WRONG_VALUES))
    for functions, name, wrong, told in rows
    for function in functions
]


@pytest.mark.parametrize(("function", "name", "wrong", "error", "told"), MISTAKES)
def test_arguments(function, name, wrong, error, told):
    taken = inspect.signature(function).parameters
    arguments = {key: value for key, value in good().items() if key in taken}
    if function is kvjax.rollout:
        arguments["timestep"] = 0
    if function is kvjax.replay:  # a history of one step
        arguments |= {key: arguments[key][:, None] for key in ("observation", "action")}
    with pytest.raises(error, match=".*".join(map(re.escape, told.split("...")))):
        function(**(arguments | {name: wrong(good())}))


def test_numpy_counts_are_counts_and_nothing_else_changes():
    search = kvjax.SearchConfig(np.int64(25))
    assert (search, hash(search)) == (kvjax.SearchConfig(25), hash(kvjax.SearchConfig(25)))
    assert type(search.num_simulations) is int
    config = other(num_heads=np.int32(2))
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(SMALL))
    small, plain = np.uint8(3), 3
    made_small, made_plain = (
        made(lambda n=n: (kvjax.init_contexts(SMALL, n), kvjax.init_store(SMALL, n, n)))
        for n in (small, plain)
    )
    assert made_small == made_plain


@pytest.mark.parametrize("function", [kvjax.to_torch, kvjax.to_jax])
def test_nothing_is_no_array(function):
    with pytest.raises(ValueError, match="got None"):
        function(None)
