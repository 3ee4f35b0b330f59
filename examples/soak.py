"""Long use: searches and stores with restarts, new weights, evictions, saved and loaded states.

    python examples/soak.py --simulations 1000000

Random environments are searched by `kvjax.search`, which keeps subtrees, and by the steps of stores
of all eviction policies, with pools so small that they evict in every round. After each round
everything that must hold is looked at. After the first rounds nothing may be compiled, no array may
be left behind, and the process may not grow.
"""

import argparse
import dataclasses
import gc
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import serialization

import kvjax

ROWS, SIMULATIONS, ROOT_SLOTS = 32, 20, 3
SEARCHES = 4
"""Of `kvjax.search` for each of a store: it takes less time."""

PERIOD = 10
"""Rounds in which everything happens once at least."""
MOST_GROWTH = 64 * 2**20
CONFIG = kvjax.WorldModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_actions=4,
    context_length=8,
    max_tokens=12,
    observation_size=3,
    support=(-3, 3),
)
SEARCH = kvjax.SearchConfig(SIMULATIONS, noise_fraction=0.25, temperature=1.0, kept_nodes=8)


def weights(seed):
    """Random variables, prepared."""
    params = kvjax.world_model.init_params(jax.random.key(seed), CONFIG)
    return kvjax.prepare(params, config=CONFIG)


class Searched:
    """Environments by `kvjax.search`, and the clocks that they must have."""

    def __init__(self, params):
        self.params, self.kept = params, None
        self.contexts = kvjax.init_contexts(CONFIG, ROWS)
        self.clock, self.action = np.full(ROWS, -1), np.full(ROWS, -1)
        self.steps = np.zeros(ROWS, int)  # since the windows were last empty

    def round(self, draw, key):
        """One step of all rows, some of them restarted; returns the simulations that it took."""
        action = np.where(draw.random(ROWS) < 0.1, -1, self.action).astype(np.int32)
        legal = draw.random((ROWS, CONFIG.num_actions)) < 0.8
        legal[:, draw.integers(CONFIG.num_actions)] = True
        seen = draw.normal(size=(ROWS, CONFIG.observation_size)).astype(np.float32)
        arguments = self.params, key, self.contexts, seen, action, legal
        self.contexts, out = kvjax.search(*arguments, config=CONFIG, search=SEARCH, kept=self.kept)
        self.kept, self.action = out.kept, np.asarray(out.action)
        self.clock = np.where(action == -1, 0, self.clock + 1)
        self.steps = np.where(action == -1, 1, self.steps + 1)
        self.check(jax.device_get(out), legal)
        return ROWS * SIMULATIONS

    def check(self, out, legal):
        """What must hold after every search."""
        window, visits = self.contexts.window, out.visit_counts
        np.testing.assert_array_equal(self.contexts.timestep, self.clock)
        tokens = np.minimum(2 * self.steps - 1, CONFIG.context_length - 1)
        assert (np.asarray(window.length) <= tokens).all()
        assert (np.asarray(window.length) >= 1).all()
        assert np.isfinite(window.kv).all()
        assert out.finite.all()
        assert np.isfinite(out.root_value).all()
        assert (visits[~legal] == 0).all()
        assert legal[np.arange(ROWS), out.action].all()
        assert (visits.sum(axis=1) >= SIMULATIONS).all()  # and those of what was kept
        assert (visits.sum(axis=1) <= SIMULATIONS * (self.steps + 1)).all()

    def update(self, params):
        """New weights: windows are emptied, clocks run on."""
        self.params, self.kept = params, None
        self.contexts = kvjax.on_params_update(self.contexts, params, config=CONFIG)
        assert (np.asarray(self.contexts.window.length) == 0).all()
        self.steps[:] = 0

    def saved_and_loaded(self, path):
        """The same bits from a file."""
        self.contexts, self.kept = through(path, (self.contexts, self.kept))


class Stored:
    """Environments by the steps of a store, and which of them must find their windows."""

    def __init__(self, params, eviction):
        self.params, self.eviction = params, eviction
        self.store = kvjax.init_store(
            CONFIG, ROWS, SIMULATIONS, root_slots=ROOT_SLOTS, eviction=eviction
        )
        self.latent = np.zeros((ROWS, CONFIG.embed_dim), np.float32)
        self.clock, self.known = np.full(ROWS, -1), np.full(ROWS, False)
        self.adds, self.by_handle = np.zeros(ROWS, int), False

    def round(self, draw):
        """A root step of all rows in any order, and a search of random parents."""
        env_id = draw.permutation(ROWS).astype(np.int32)
        action = draw.integers(CONFIG.num_actions, size=ROWS).astype(np.int32)
        starts = (draw.random(ROWS) < 0.1) | (self.clock[env_id] < 0)
        action = np.where(starts, -1, action).astype(np.int32)
        self.clock[env_id] = np.where(starts, 0, self.clock[env_id] + 1)
        timestep = self.clock[env_id].astype(np.int32)
        latent = draw.normal(size=self.latent.shape).astype(np.float32)
        arguments = self.latent[env_id], action, latent, env_id, timestep
        self.store, root = kvjax.initial_inference(
            self.params, self.store, *arguments, config=CONFIG
        )
        np.testing.assert_array_equal(root.hit, self.known[env_id] & ~starts)
        self.latent[env_id], self.known[env_id] = latent, True
        self.adds += 1
        self.by_handle = not self.by_handle
        self.search(draw, root, env_id, timestep)
        return ROWS * SIMULATIONS

    def search(self, draw, root, env_id, timestep):
        """From the roots, by latents or by handles; every parent is found."""
        every = np.arange(ROWS)
        latents = np.zeros((SIMULATIONS + 1, *root.latent.shape), np.float32)
        slots = np.zeros((SIMULATIONS + 1, ROWS), np.int32)
        latents[0], slots[0] = root.latent, root.slot
        for node in range(SIMULATIONS):
            parent = draw.integers(node + 1, size=ROWS)
            latent, slot = latents[parent, every], slots[parent, every]
            action = draw.integers(CONFIG.num_actions, size=ROWS).astype(np.int32)
            arguments = latent, action, env_id, np.ones(ROWS, np.int32), timestep
            self.store, out = kvjax.recurrent_inference(
                self.params,
                self.store,
                *arguments,
                config=CONFIG,
                slot=slot if self.by_handle else None,
            )
            out = jax.device_get(out)
            assert (out.hit & out.valid & ~out.full & (out.slot >= 0)).all()
            assert np.isfinite(out.value).all()
            latents[node + 1], slots[node + 1] = out.latent, out.slot
        told = kvjax.stats(self.store)
        assert told["roots_stored"] == np.minimum(self.adds, ROOT_SLOTS).sum()
        assert told["nodes_stored"] <= ROWS * SIMULATIONS
        assert told["node_evictions"] == told["not_stored"] == 0

    def update(self, params):
        """New weights: nothing is found any more."""
        self.params = params
        self.store = kvjax.on_params_update(self.store, params, config=CONFIG)
        assert kvjax.stats(self.store)["roots_stored"] == 0
        self.known[:], self.adds[:] = False, 0

    def saved_and_loaded(self, path):
        """The same bits from a file."""
        self.store = through(path, self.store)


def through(path, state):
    """A state that was written to a file and read again."""
    path.write_bytes(serialization.to_bytes(state))
    loaded = serialization.from_bytes(state, path.read_bytes())
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    return loaded


@dataclasses.dataclass
class Watch:
    """What has been compiled, and what the process holds."""

    compiled: int = 0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.heard)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.heard)

    def heard(self, event, seconds, **_):
        """As jax tells what it has done."""
        del seconds
        self.compiled += event == "/jax/core/compile/backend_compile_duration"

    def now(self):
        """Programs compiled so far, arrays, and resident bytes."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return self.compiled, len(jax.live_arrays()), pages * resource.getpagesize()


def run(simulations, seed=0, evictions=("fifo", "lru", "priority"), say=print):
    """Goes on for that many simulations; raises `AssertionError` where something does not hold.

    Returns:
      Numbers of simulations, rounds, evictions, updates, files, programs, and of bytes at first
      and at last.
    """
    draw, started = np.random.default_rng(seed), time.perf_counter()
    both = weights(1), weights(2)
    everybody = [Searched(both[0]), *(Stored(both[0], eviction) for eviction in evictions)]
    done, rounds, first, told = 0, 0, None, dict.fromkeys(("updates", "files"), 0)
    with tempfile.TemporaryDirectory() as folder, Watch() as watch:
        while done < simulations or rounds < 2 * PERIOD:
            keys = jax.random.split(jax.random.key(rounds), SEARCHES)
            done += sum(everybody[0].round(draw, key) for key in keys)
            done += sum(stored.round(draw) for stored in everybody[1:])
            rounds += 1
            if rounds % PERIOD == 5:
                for one in everybody:
                    one.update(both[rounds // PERIOD % 2])
                told["updates"] += 1
            if rounds % PERIOD == 9:
                for one in everybody:
                    one.saved_and_loaded(Path(folder) / "state")
                told["files"] += len(everybody)
            if rounds % PERIOD == 0:
                now = watch.now()
                first = first or now
                check(first, now)
                say(f"{done:,} simulations, {now[0]} programs, {now[2] / 2**20:.0f} MiB")
        last = watch.now()
    evicted = sum(kvjax.stats(one.store)["root_evictions"] for one in everybody[1:])
    seconds = time.perf_counter() - started
    told |= {"evictions": evicted, "programs": last[0], "bytes": (first[2], last[2])}
    return {"simulations": done, "rounds": rounds, "seconds": seconds} | told


def check(first, now):
    """What must hold of the process."""
    assert now[0] == first[0], f"{now[0] - first[0]} programs were compiled anew"
    assert now[1] <= first[1], f"{now[1] - first[1]} arrays were left behind"
    assert now[2] <= first[2] + MOST_GROWTH, f"{(now[2] - first[2]) / 2**20:.0f} MiB more"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(run(args.simulations, args.seed))
