"""kvjax inside of what JAX users make of functions; docs/composition.md is the table of it."""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FULL, in_full, random_params
from jax import export

import kvjax
from kvjax import SearchConfig, WorldModelConfig
from kvjax.config import WINDOW_MODES
from kvjax.mcts import puct
from kvjax.mcts.search import _search, compiled

TINY = WorldModelConfig(
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    num_actions=3,
    context_length=4,
    max_tokens=4,
    observation_size=2,
    support=(-2, 2),
)
PARAMS = random_params(TINY)
THREE = SearchConfig(num_simulations=3)
KEEPS = dataclasses.replace(THREE, kept_nodes=2)
ROWS = 4
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""For programs that run once."""


def rows(count=ROWS, config=TINY):
    """Contexts, observations and last actions."""
    observation = np.random.default_rng(0).normal(size=(count, *config.observation_shape))
    start = jnp.full((count,), -1, jnp.int32)
    return kvjax.init_contexts(config, count), jnp.asarray(observation, jnp.float32), start


def search(params, rng, contexts, observation, action, *, config=TINY, search=THREE, **more):
    return kvjax.search(
        params, rng, contexts, observation, action, **more, config=config, search=search
    )


def replay(params, contexts, observation, action, *, config=TINY):
    """Some rows' observations twice, the others' once."""
    history = jnp.stack([observation, observation], 1), jnp.stack([action, action * 0 + 1], 1)
    length = jnp.where(observation[:, 0] > 0, 2, 1)
    return kvjax.replay(params, *history, length, config=config, contexts=contexts)


def rollout(params, contexts, *, config=TINY):
    imagine = functools.partial(kvjax.rollout, params, config=config)
    actions = jnp.ones((contexts.timestep.shape[0], 2), jnp.int32)
    return jax.vmap(imagine)(contexts.window, actions, contexts.timestep)


def infer(params, store, latent, action, *, config=TINY):
    """A root step and an imagined one of every environment."""
    env_id = jnp.arange(latent.shape[0], dtype=jnp.int32)
    none = jnp.zeros_like(env_id)
    ids = action, latent, env_id, none
    store, root = kvjax.initial_inference(params, store, latent, *ids, config=config)
    step = latent, none, env_id, none + 1, none
    store, out = kvjax.recurrent_inference(params, store, *step, config=config)
    return store, root, out


def mixing_step(weights, rng, node, action):
    """One token, of what is read and the action."""
    read = jnp.sum(jnp.where(node.valid[:, :, None], node.tokens, 0.0), axis=1)
    new = jnp.tanh(read @ weights + action.astype(jnp.float32)[:, None])
    return new[None], node.state + 1, kvjax.Transition(new[:, 0], new[:, 1], new)


MIXING = kvjax.TreeModel(block=1, size=3, step=mixing_step)
MIX = SearchConfig(num_simulations=3, tree="muzero", noise_fraction=0.5, kept_nodes=2)


def mix(weights, rng, observation, model=MIXING, *, search=MIX, **more):
    """A search for another model than UniZero, from roots of two tokens."""
    tokens = jnp.stack([observation[:, :1] * weights[:1]] * 3, axis=1)
    count = (0 * observation[:, 0]).astype(jnp.int32)
    root = kvjax.Root(tokens, count + 2, tokens[:, 0], tokens[:, 0, 0], state=count)
    return kvjax.tree_search(weights, rng, root, model, search=search, **more)


WEIGHTS = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)), jnp.float32)


def latents(count=ROWS, config=TINY):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, config.embed_dim)), jnp.float32)


def everything(config=TINY):
    """One call of each function with everything closed over: what they answer."""
    params = PARAMS if config == TINY else shaped_params(config)
    contexts, *seen = rows(config=config)
    contexts, _, _ = replay(params, contexts, *seen, config=config)
    rng, store = jax.random.key(0), kvjax.init_store(config, ROWS, 1, root_slots=2)
    return (
        search(params, rng, contexts, *seen, config=config, search=KEEPS),
        infer(params, store, latents(config=config), seen[1], config=config),
        rollout(params, contexts, config=config),
        mix(WEIGHTS, rng, seen[0], return_tree=True),
    )


def shaped_params(config):
    """Zeros: enough to be traced with."""
    shapes = kvjax.model.world_model.params_shapes(config)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@functools.cache
def expected():
    """What `search` and `replay` answer at the top."""
    planned = search(PARAMS, jax.random.key(0), *rows())
    return planned, replay(PARAMS, *rows())


def close(ours, theirs):
    chex.assert_trees_all_close(ours, theirs, atol=1e-4, rtol=1e-4)


WRAPPERS = {
    "jit": lambda f: jax.jit(f),
    "cond": lambda f: jax.jit(
        lambda: jax.lax.cond(True, f, lambda: jax.tree.map(jnp.zeros_like, f()))
    ),
    "fori_loop": lambda f: lambda: jax.lax.fori_loop(0, 2, lambda _, __: f(), f()),
    "scan": lambda f: lambda: jax.lax.scan(lambda x, _: (x, f()), 0, length=2),
    "checkpoint": lambda f: jax.checkpoint(f),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_closed_over(name):
    """No argument is a tracer."""
    assert jax.jit(WRAPPERS[name](everything)).lower() is not None


def test_closed_over_shapes():
    """By `eval_shape`, which computes nothing."""
    (contexts, planned), *_ = jax.eval_shape(everything)
    wanted, _ = expected()
    chex.assert_trees_all_equal_shapes_and_dtypes(contexts, wanted[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(
        dataclasses.replace(planned, kept=None), wanted[1]
    )


def test_closed_over_answers():
    """A branch in a loop, run."""

    def planned():
        return search(PARAMS, jax.random.key(0), *rows())

    def body(_, state):
        return jax.lax.cond(state[1].finite.any(), planned, lambda: state)

    start = expected()[0]
    close(quick(lambda: jax.lax.fori_loop(0, 2, body, start))(), start)


def one_step(params, rng, before):
    """A search with noise, a replay and a rollout from contexts."""
    _, observation, action = rows()
    noisy, go_on = dataclasses.replace(THREE, noise_fraction=0.9), jnp.zeros_like(action)
    return (
        search(params, rng, before, observation, go_on, search=noisy),
        replay(params, before, observation, go_on),
        rollout(params, before),
        mix(WEIGHTS, rng, observation),
    )


alone_step = quick(one_step)


@pytest.mark.parametrize("over", ["params", *in_full("seeds", "contexts")])
def test_vmap(over):
    """Two at once equal each alone."""
    other = random_params(TINY, seed=1)
    contexts, *seen = rows()
    pairs = {
        "params": (PARAMS, other),
        "seeds": tuple(jax.random.split(jax.random.key(0))),
        "contexts": (contexts, replay(PARAMS, contexts, *seen)[0]),
    }
    given = {"params": PARAMS, "seeds": jax.random.key(1), "contexts": contexts}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs[over])
    together = quick(jax.vmap(lambda x: one_step(*(given | {over: x}).values())))(stacked)
    for index, one in enumerate(pairs[over]):
        alone = alone_step(*(given | {over: one}).values())
        close(jax.tree.map(lambda x, i=index: x[i], together), alone)
    counts = together[0][1].visit_counts
    assert (counts[0] != counts[1]).any()


def test_vmap_of_stores():
    """Two stores at once, and parameters: as each alone."""
    stores = [kvjax.init_store(TINY, ROWS, 1, root_slots=2) for _ in range(2)]
    params = PARAMS, random_params(TINY, seed=1)
    start = jnp.full(ROWS, -1, jnp.int32)
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    together = quick(jax.vmap(infer, (0, 0, None, None)))(
        stack(*params), stack(*stores), latents(), start
    )
    alone = quick(infer)
    for index in range(2):
        one = alone(params[index], stores[index], latents(), start)
        close(jax.tree.map(lambda x, i=index: x[i], together)[1:], one[1:])
        assert one[2].hit.all()


IN_FOUR = """
import os
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
import test_composition
test_composition.over_four_devices()
"""
BY_ROW, WHOLE = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
MOVES = re.compile(r"(?:all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(")
NOISY = dataclasses.replace(KEEPS, noise_fraction=0.5, temperature=1.0)
MIX_NOISY = dataclasses.replace(MIX, temperature=1.0)
GUMBEL = SearchConfig(num_simulations=3, tree="gumbel")


def drawing_step(weights, rng, node, action):
    """One that reads its key."""
    tokens, state, came = mixing_step(weights, rng, node, action)
    return tokens, state, dataclasses.replace(came, value=jax.random.normal(rng, action.shape))


DRAWING = dataclasses.replace(MIXING, step=drawing_step)
DRAWN = dataclasses.replace(TINY, num_sampled_actions=2)
WARM = dataclasses.replace(THREE, temperature=1.0)


def noisy_answers(params, contexts, observation, action, as_searched=lambda x: x):
    key = jax.random.key(3)
    return (
        search(params, key, contexts, *map(as_searched, (observation, action)), search=NOISY),
        replay(params, contexts, observation, action),
        mix(WEIGHTS, key, observation, search=MIX_NOISY, return_tree=True),
        *(more_noisy_answers(params, key, contexts, observation, action) if FULL else ()),
    )


def more_noisy_answers(params, key, contexts, observation, action):
    loud = dataclasses.replace(GUMBEL, noise_fraction=1.0)
    return (
        search(params, key, contexts, observation, action, config=DRAWN, search=WARM),
        mix(0 * WEIGHTS, key, observation, search=MIX_NOISY, return_tree=True),  # ties
        mix(0 * WEIGHTS, key, observation, search=loud),
        mix(WEIGHTS, key, observation, DRAWING, search=dataclasses.replace(THREE, max_depth=2)),
    )


def quiet_answers(params, contexts, observation, action):
    (after, out), replayed = (
        search(params, jax.random.key(0), contexts, observation, action, search=KEEPS),
        replay(params, contexts, observation, action),
    )
    quiet = (GUMBEL, *in_full(SearchConfig(num_simulations=3, tree="muzero")))
    mixed = [mix(WEIGHTS, jax.random.key(0), observation, search=one) for one in quiet]
    return after, dataclasses.replace(out, kept=None), mixed, replayed


def over_four_devices():
    """Rows on each of four devices: the same answers as on one."""
    noisy = noisy_answers(PARAMS, *rows(2 * ROWS))
    explicit, automatic = (
        jax.make_mesh((4,), ("d",), axis_types=(kind,))
        for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto)
    )
    on_a_mesh(explicit, noisy, np.asarray)
    if FULL:
        on_a_mesh(automatic, noisy, lambda x: x)
    in_shard_map(automatic)


def on_a_mesh(mesh, wanted, as_searched):
    """Whole batches: the same numbers are drawn, and nothing moves between devices."""
    contexts = kvjax.init_contexts(TINY, 2 * ROWS, mesh=mesh)
    with pytest.raises(TypeError, match="mesh must be of type Mesh, got tuple"):
        kvjax.init_contexts(TINY, 8, mesh=("d",))
    with pytest.raises(ValueError, match="multiple of the mesh's 4 devices, got 6"):
        kvjax.init_contexts(TINY, 6, mesh=mesh)
    seen = rows(2 * ROWS)[1:]
    placed = contexts, *jax.device_put(seen, jax.sharding.NamedSharding(mesh, BY_ROW))
    params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, WHOLE))
    found = noisy_answers(params, *placed, as_searched)
    close(found, wanted)
    assert contexts.timestep.sharding.spec == BY_ROW
    (after, out), (replayed, *_), mixed, *_ = found
    for window in (
        after.window,
        replayed.window,
        kvjax.on_params_update(after, params, config=TINY).window,
    ):
        assert window.kv.sharding.spec[0] == window.length.sharding.spec[0] == "d"
    assert out.kept.tree.edges.sharding.spec[:2] == (None, "d")
    assert mixed.tree.tables.sharding.spec[:2] == (None, "d")
    seen = map(as_searched, placed[1:])
    program = compiled(params, jax.random.key(3), contexts, *seen, config=TINY, search=NOISY)
    assert "while" in program.as_text()
    assert not MOVES.findall(program.as_text())


def in_shard_map(mesh):
    """A row for each device, by a program of one's own, and a store."""
    given = rows()
    store = kvjax.init_store(TINY, 1, 1, root_slots=2)
    stores = jax.tree.map(lambda x: jnp.stack([x] * ROWS), store)

    def of_a_device(params, stores, *given):
        own = jax.tree.map(lambda x: x[0], stores)
        inferred = infer(params, own, latents(1), given[2])
        return quiet_answers(params, *given), rollout(params, given[0]), inferred[1:]

    spec = WHOLE, BY_ROW, BY_ROW, BY_ROW, BY_ROW
    mapped = jax.shard_map(of_a_device, mesh=mesh, in_specs=spec, out_specs=BY_ROW)
    found, imagined, inferred = quick(mapped)(PARAMS, stores, *given)
    close(found, quick(quiet_answers)(PARAMS, *given))
    close(imagined, rollout(PARAMS, given[0]))
    assert inferred[1].hit.all()


def test_over_devices():
    """`shard_map` with its defaults, automatic and explicit meshes: a process of its own."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, "-c", IN_FOUR], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def strictly():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        *(("float64 windows", mode) for mode in WINDOW_MODES),
        *(("x64", "rebuild"), ("strict", "learned")),
        *in_full(*(("x64", mode) for mode in WINDOW_MODES if mode != "rebuild")),
        *in_full(*(("strict", mode) for mode in WINDOW_MODES[1:])),
    ],
)
def test_settings_of_dtypes(setting, mode):
    """Traced in every window mode; nothing becomes 64 bits wide but such windows."""
    rotary = mode.startswith("rope")
    config = dataclasses.replace(TINY, window_mode=mode, max_tokens=None if rotary else 4)
    if setting == "float64 windows":
        config = dataclasses.replace(config, dtype="float64")
    with strictly() if setting == "strict" else jax.enable_x64(True):
        leaves = jax.tree.leaves(jax.eval_shape(lambda: everything(config)))
    wide = {"float64"} if setting == "float64 windows" else set()
    assert {str(x.dtype) for x in leaves} == {"float32", "int32", "uint32", "bool"} | wide


@pytest.mark.parametrize("setting", ["x64", "strict"])
def test_answers_of_settings(setting):
    with strictly() if setting == "strict" else jax.enable_x64(True):
        close(search(PARAMS, jax.random.key(0), *rows()), expected()[0])


@pytest.mark.parametrize("setting", ["x64", "strict"])
@pytest.mark.parametrize("name", ["muzero", "gumbel"])
def test_settings_of_dtypes_with_the_trees_of_mctx(name, setting):
    mctx = dataclasses.replace(THREE, tree=name, noise_fraction=0.5)
    plan = functools.partial(search, PARAMS, search=mctx)
    usual = jax.eval_shape(plan, jax.random.key(0), *rows())
    with strictly() if setting == "strict" else jax.enable_x64(True):
        wide = jax.eval_shape(plan, jax.random.key(0), *rows())
    assert [x.dtype for x in jax.tree.leaves(wide)] == [x.dtype for x in jax.tree.leaves(usual)]


def test_debug_nans():
    """No output is NaN, with noise, a temperature and illegal actions."""
    two = SearchConfig(num_simulations=2, noise_fraction=0.5, temperature=1.0)
    legal = jnp.asarray([[True, False, True]] * 2)
    with jax.debug_nans(True):
        _, out = search(PARAMS, jax.random.key(0), *rows(2), search=two, legal=legal)
        rollout(PARAMS, rows(2)[0])
    assert out.finite.all()


def test_transfer_guard():
    """With everything on the device nothing moves, whatever is left out."""
    given = PARAMS, jax.random.key(0), *rows()
    store, latent = kvjax.init_store(TINY, ROWS, 1, root_slots=2), latents()
    env_id = jnp.arange(ROWS, dtype=jnp.int32)
    none, start = jnp.zeros_like(env_id), given[-1]
    warm = dataclasses.replace(KEEPS, temperature=0.5)
    with jax.transfer_guard("disallow"):
        search(*given)
        _, out = search(*given, search=KEEPS)
        search(*given, search=warm, kept=out.kept)
        ids = start, latent, env_id, none
        store, _ = kvjax.initial_inference(PARAMS, store, latent, *ids, config=TINY)
        kvjax.recurrent_inference(PARAMS, store, latent, none, env_id, none, none, config=TINY)


def test_export():
    """With a batch size that is not known yet, for every platform."""
    (size,) = export.symbolic_shape("b")

    def plan(params, contexts, observation, action):
        contexts, out = search(params, jax.random.key(0), contexts, observation, action)
        return out.visit_counts, replay(params, contexts, observation, action)[2]

    def symbolic(x):
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    given = rows()
    platforms = ("cpu", "cuda", "tpu")
    made = export.export(jax.jit(plan), platforms=platforms)(PARAMS, *jax.tree.map(symbolic, given))
    assert made.platforms == platforms
    counts, _ = made.call(PARAMS, *given)
    np.testing.assert_array_equal(counts, expected()[0][1].visit_counts)


def test_donation():
    """Contexts that a program of one's own gives away are written over."""
    contexts, *seen = rows()
    step = quick(lambda c, *x: search(PARAMS, jax.random.key(0), c, *x), donate_argnums=0)
    after, _ = step(contexts, *seen)
    assert contexts.window.kv.is_deleted()
    close(after, expected()[0][0])


def test_flax_serialization():
    contexts = expected()[0][0]
    store = kvjax.init_store(TINY, 2, 1, root_slots=2, eviction="lru")
    store = dataclasses.replace(store, counters=store.counters + 7)
    kept = jax.tree.map(lambda x: x + 1, kvjax.init_kept(TINY, 2, KEEPS))
    for state in (contexts, store, kept):
        empty = jax.tree.map(jnp.zeros_like, state)
        for back in (
            flax.serialization.from_bytes(empty, flax.serialization.to_bytes(state)),
            flax.serialization.from_state_dict(empty, flax.serialization.to_state_dict(state)),
        ):
            chex.assert_trees_all_equal(back, state)
            assert jax.tree.structure(back) == jax.tree.structure(state)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (kvjax.init_contexts(TINY, 3), r"Window.kv must be float32\[3, 4, 1, 2, 2, 4\], got"),
        (kvjax.init_store(TINY, 2, 1, root_slots=2), "a Store has counters, epoch|a Store has "),
    ],
)
def test_flax_serialization_of_another_state(target, message):
    data = flax.serialization.to_bytes(kvjax.init_contexts(TINY, 2))
    with pytest.raises(ValueError, match=message):
        flax.serialization.from_bytes(target, data)


def test_flax_serialization_of_another_eviction():
    lru, fifo = (
        kvjax.init_store(TINY, 2, 1, root_slots=2, eviction=name) for name in ("lru", "fifo")
    )
    with pytest.raises(ValueError, match="Pool.eviction must be 'fifo', got 'lru'"):
        flax.serialization.from_bytes(fifo, flax.serialization.to_bytes(lru))


def test_temperature_and_discount_compile_nothing():
    expected()
    before = _search._cache_size()
    cold, warm = (
        [
            search(PARAMS, jax.random.key(seed), *rows(), search=one)[1]
            for seed in range(6)
            for one in [dataclasses.replace(THREE, temperature=temperature, discount=discount)]
        ]
        for temperature, discount in ((0.0, 0.5), (9.0, 1.0))
    )
    assert _search._cache_size() == before
    assert (cold[0].root_value != warm[0].root_value).any()
    assert len({tuple(out.action.tolist()) for out in cold}) == 1
    assert len({tuple(out.action.tolist()) for out in warm}) > 1


def test_a_traced_row_without_a_legal_action_is_told():
    legal = jnp.asarray([[True, True, True], [False, False, False]] * 2)
    planned = quick(lambda legal: search(PARAMS, jax.random.key(0), *rows(), legal=legal))
    assert planned(legal)[1].finite.tolist() == [True, False] * 2
    assert search(PARAMS, jax.random.key(0), *rows(), legal=legal)[1].finite[::2].all()
    assert not planned(legal)[1].action_weights[1].any()


def test_programs_do_not_grow_with_the_number_of_actions():
    def size(num_actions, group=8):
        config = dataclasses.replace(
            TINY, num_actions=num_actions, embed_dim=128, simnorm_group=group
        )
        plan = functools.partial(search, config=config, search=KEEPS)
        given = shaped_params(config), jax.random.key(0), *rows(config=config)
        return str(jax.make_jaxpr(plan)(*given)).count(" = ")

    assert size(200) == size(2000)
    assert size(2000) <= size(18)
    assert size(200, group=128) <= size(200, group=64)


@pytest.mark.parametrize("num_actions", [2, 32, 33, 300])
def test_sums_run_from_the_first_action_to_the_last(num_actions):
    x = np.random.default_rng(0).normal(size=(3, num_actions)).astype(np.float32)
    total = x[:, 0]
    for action in range(1, num_actions):
        total = total + x[:, action]
    np.testing.assert_array_equal(jax.jit(puct._sum)(x), total)
