"""Trains LightZero's UniZero on CartPole with hidden velocities, with and without kvjax's caches.

    python examples/train_masked_cartpole.py --seeds 0 2 --output training.png

Runs LightZero 0.2.0's own `train_unizero` twice per seed with the same settings. The difference is
one line, `kvjax.lightzero.attach(world_model)`, and that collector and evaluator, which share one
model, get a store each. A run ends when the evaluator's mean return reaches 195. Needs
`pip install -e '.[training]'` beside LightZero 0.2.0 and DI-engine as `make test` installs them.

The agent sees the cart's position and the pole's angle, no velocities: it must infer them from its
context, so a run that loses its caches does not learn. Runs of the same seed differ, since the tree
breaks ties by the clock; most reach 195 in 2,000 to 8,000 steps, or 5 to 20 minutes of one core.

`--only attached --seeds 0 > run.json` trains once and keeps the curve; `--draw *.json` draws curves
that were kept.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ENV_TYPE = "masked_cartpole"
SCALE = np.array([1.0, 0.0, 10.0, 0.0], np.float32)  # hides velocities, spreads the angle
STOP_VALUE = 195
RUNS = {"original": "LightZero's caches", "attached": "kvjax attached"}

WORLD_MODEL = {
    "obs_type": "vector",
    "action_space_size": 2,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 8,
    "max_blocks": 10,
    "max_tokens": 20,
    "num_simulations": 25,
    "device": "cpu",
    "norm_type": "BN",
    "rotary_emb": False,
}


def main():
    """Runs all trainings, each in a process of its own, and draws their curves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="training.png", metavar="PNG")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-env-steps", type=int, default=30_000)
    parser.add_argument("--only", choices=RUNS, help="train once and print the curve as JSON")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSON", help="draw kept curves")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(train(args.only, args.seeds[0], args.max_env_steps)))
        return
    if args.draw:
        curves = [json.loads(path.read_text()) for path in args.draw]
    else:
        curves = [in_a_process(name, seed, args) for seed in args.seeds for name in RUNS]
    for curve in curves:
        last = curve["evaluations"][-1]
        print(
            f"{RUNS[curve['name']]:<20} seed {curve['seed']}: {last['return']:.1f} after"
            f" {last['env_steps']} environment steps, {curve['seconds']:.0f} s,"
            f" {curve['cpu_seconds']:.0f} s of one core"
        )
    draw(curves, args.output)


def in_a_process(name, seed, args):
    """Trains in a fresh interpreter; returns its curve."""
    command = [sys.executable, __file__, "--only", name, "--seeds", str(seed)]
    command += ["--max-env-steps", str(args.max_env_steps)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def train(name, seed, max_env_steps):
    """One run of `train_unizero`: its evaluations, its wall time and its processor time."""
    import torch

    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), quiet() as log:
        entry = import_entry()
        register_environment()
        evaluations = record_evaluations(entry)
        handles = attach_to_policy(entry) if name == "attached" else []
        started, cpu_started = time.perf_counter(), time.process_time()
        entry.train_unizero(configuration(), seed=seed, max_env_step=max_env_steps)
        times = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
        }
        del log
    stats = {scope: dict(h.stats(scope)) for h in handles for scope in ("collect", "evaluate")}
    return {"name": name, "seed": seed, **times, "evaluations": evaluations, "stats": stats}


@contextlib.contextmanager
def quiet():
    """LightZero prints a lot; what it printed is shown only if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            with contextlib.redirect_stdout(log):
                yield log
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-5000:])
            raise


def import_entry():
    """The module `lzero.entry.train_unizero`; it can do without tensorboard."""
    import importlib

    import tensorboardX

    sys.modules.setdefault("torch.utils.tensorboard", tensorboardX)
    return importlib.import_module("lzero.entry.train_unizero")


def register_environment():
    """LightZero's CartPole with observations scaled by `SCALE`."""
    from ding.utils import ENV_REGISTRY
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    class MaskedCartPoleEnv(CartPoleEnv):
        def reset(self):
            return self._masked(super().reset())

        def step(self, action):
            timestep = super().step(action)
            return timestep._replace(obs=self._masked(timestep.obs))

        def _masked(self, observation):
            seen = np.asarray(observation["observation"], np.float32) * SCALE
            return observation | {"observation": seen}

    ENV_REGISTRY.register(ENV_TYPE)(MaskedCartPoleEnv)


def record_evaluations(entry):
    """A list to which every evaluation of the run will be appended."""
    evaluations, started = [], time.perf_counter()

    class Evaluator(entry.Evaluator):
        def eval(self, save_ckpt_fn=None, train_iter=-1, envstep=-1, **options):
            stop, info = super().eval(save_ckpt_fn, train_iter, envstep, **options)
            score = float(np.mean(info["eval_episode_return"]))
            seconds = time.perf_counter() - started
            evaluations.append({"env_steps": envstep, "return": score, "seconds": seconds})
            print(f"{seconds:.0f} s, {envstep} steps: {score:.1f}", file=sys.stderr)
            return stop, info

    entry.Evaluator = Evaluator
    return evaluations


def attach_to_policy(entry):
    """Attaches to the model of the policy that the run will create."""
    from kvjax import lightzero

    create, handles = entry.create_policy, []

    def create_attached(*args, **kwargs):
        policy = create(*args, **kwargs)
        handle = lightzero.attach(policy._collect_model.world_model)
        handles.append(handle)
        scopes = {"collect": "collect", "eval": "evaluate"}
        for suffix, scope in scopes.items():
            for prefix in ("_forward_", "_reset_"):
                method = getattr(policy, prefix + suffix)
                setattr(policy, prefix + suffix, in_scope(handle, scope, method))
        return policy

    entry.create_policy = create_attached
    return handles


def in_scope(handle, scope, method):
    """A method that runs with a store of its own."""

    def run(*args, **kwargs):
        with handle.scope(scope):
            return method(*args, **kwargs)

    return run


def configuration():
    """LightZero's settings for a small model and many small updates."""
    from easydict import EasyDict

    envs = {"collector_env_num": 8, "evaluator_env_num": 5}
    model = {
        "observation_shape": 4,
        "action_space_size": 2,
        "self_supervised_learning_loss": True,
        "discrete_action_encoding_type": "one_hot",
        "norm_type": "BN",
        "model_type": "mlp",
        "world_model_cfg": WORLD_MODEL | envs | {"env_num": 8},
    }
    policy = envs | {
        "model": model,
        "cuda": False,
        "use_wandb": False,
        "env_type": "not_board_games",
        "num_unroll_steps": 10,
        "game_segment_length": 50,
        "replay_ratio": 0.5,
        "batch_size": 256,
        "optim_type": "AdamW",
        "piecewise_decay_lr_scheduler": False,
        "learning_rate": 3e-4,
        "grad_clip_value": 5,
        "num_simulations": 25,
        "reanalyze_ratio": 0.0,
        "n_episode": 8,
        "eval_freq": 200,
        "replay_buffer_size": 1_000_000,
    }
    env = envs | {
        "env_id": "CartPole-v0",
        "n_evaluator_episode": 5,
        "stop_value": STOP_VALUE,
        "manager": {"shared_memory": False},
    }
    run = EasyDict(exp_name="masked_cartpole", env=env, policy=policy)
    create = EasyDict(
        env={"type": ENV_TYPE, "import_names": []},
        env_manager={"type": "base"},
        policy={"type": "unizero", "import_names": ["lzero.policy.unizero"]},
    )
    return [run, create]


def draw(curves, output):
    """Every run's mean evaluation returns by environment steps."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.5))
    colors = dict(zip(RUNS, ("tab:blue", "tab:orange"), strict=True))
    for curve in curves:
        name, evaluations = curve["name"], curve["evaluations"]
        steps, returns = ([e[key] for e in evaluations] for key in ("env_steps", "return"))
        axis.plot(steps, returns, color=colors[name], linewidth=1)
        axis.plot(steps[-1:], returns[-1:], color=colors[name], marker="o")
        axis.annotate(f" {curve['seed']}", (steps[-1], returns[-1]), fontsize="small")
    for name, color in colors.items():
        axis.plot([], [], color=color, label=RUNS[name])
    axis.axhline(STOP_VALUE, color="grey", linewidth=0.5)
    axis.set(xlabel="environment steps", ylabel="mean return of 5 episodes")
    axis.legend(fontsize="small", loc="lower right")
    figure.suptitle("UniZero (LightZero 0.2.0) on CartPole without velocities", fontsize="medium")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
