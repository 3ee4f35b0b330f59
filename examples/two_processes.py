"""One batch of environments over two processes of two devices each, as over the hosts of a cluster.

Every process plays the environments whose rows lie on its own devices, and calls `kvjax.search`
like anybody else: contexts lie on a mesh of all four, and nothing moves between them. One device
plays the same episodes beside them, and every action and all visits must be the same.

    python examples/two_processes.py --episodes 8 --simulations 25
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import gymnasium
import jax
import numpy as np

import kvjax
from kvjax import checkpoint

PROCESSES, DEVICES = 2, 2
STEPS = 200  # CartPole-v0's


def play(episodes, simulations, mesh=None):
    """Plays episodes until all have ended, those of this process if there is a mesh.

    Returns:
      Visits [200, R, A] and actions [200, R] of the R rows here, -1 behind an episode's end.
    """
    agent = checkpoint.load(checkpoint.shipped()["cartpole_masked"])
    params = kvjax.prepare(agent.params, config=agent.config)
    contexts = kvjax.init_contexts(agent.config, episodes, mesh=mesh)
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(params, everywhere)
    lie = contexts.timestep.sharding
    rows = range(episodes)[local_rows(contexts.timestep)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # CartPole-v0 is meant
        envs = [gymnasium.make(agent.environment.env_id) for _ in rows]
    seen = np.stack([env.reset(seed=row)[0] for env, row in zip(envs, rows, strict=True)])
    action, alive = np.full(len(rows), -1, np.int32), np.full(len(rows), True)
    visits = np.full((STEPS, len(rows), agent.config.num_actions), -1)
    actions = np.full((STEPS, len(rows)), -1)
    step = 0
    while alive.any():
        scaled = (seen * agent.environment.observation_scale).astype(np.float32)
        given = (jax.make_array_from_process_local_data(lie, x) for x in (scaled, action))
        contexts, out = kvjax.search(
            params,
            jax.random.key(step),
            contexts,
            *given,
            config=agent.config,
            search=kvjax.SearchConfig(num_simulations=simulations),
        )
        action = local(out.action)
        visits[step, alive] = local(out.visit_counts)[alive]
        actions[step, alive] = action[alive]
        step += 1
        for row in np.flatnonzero(alive):
            seen[row], _, terminated, truncated, _ = envs[row].step(int(action[row]))
            alive[row] = not (terminated or truncated)
    return visits, actions


def shards(array):
    """What of an array [B, ...] is here, in the order of its rows."""
    return sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)


def local(array):
    """The rows that are here: numpy."""
    return np.concatenate([shard.data for shard in shards(array)])


def local_rows(array):
    """Which rows are here: a slice."""
    first, *_, last = [shard.index[0] for shard in shards(array)] * 2
    return slice(first.start, last.stop)


def one_process(number, address, folder, *how):
    """One of the two: joins the other, plays, and writes down what it did."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(address, PROCESSES, number)
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("rows",), axis_types=automatic)
    visits, actions = play(*how, mesh)
    np.savez(folder / f"{number}.npz", visits=visits, actions=actions)


def main(*words):
    """Compares both ways; raises `AssertionError` where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--simulations", type=int, default=25)
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(words or None)
    how = args.episodes, args.simulations
    if args.process:
        number, address, folder = args.process
        one_process(int(number), address, Path(folder), *how)
        return
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
        free.close()
        command = [sys.executable, __file__, *map(str, ("--episodes", how[0], "--simulations"))]
        both = [
            subprocess.Popen([*command, str(how[1]), "--process", str(number), address, folder])
            for number in range(PROCESSES)
        ]
        try:
            visits, actions = play(*how)
            assert [process.wait() for process in both] == [0] * PROCESSES
        finally:
            for process in both:
                process.kill()
        parts = [np.load(Path(folder) / f"{number}.npz") for number in range(PROCESSES)]
    for name, wanted in {"visits": visits, "actions": actions}.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], 1), wanted)
    returns = (actions >= 0).sum(axis=0)
    print(f"returns {returns.tolist()}: all {returns.sum()} searches as on one device")


if __name__ == "__main__":
    main()
