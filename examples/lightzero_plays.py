"""Plays an agent of kvjax's in LightZero 0.2.0, by its own model, policy, tree and evaluator.

    kvjax train --env cartpole_masked --seed 1 --output run --set window_mode=learned
    python examples/lightzero_plays.py run/best.safetensors --episodes 20

Writes the agent as a LightZero checkpoint (`kvjax.lightzero.save`), which LightZero's own
`eval_muzero` loads and plays CartPole with, the velocities hidden, with as many simulations as
`kvjax play`, whose returns are printed beside. Needs what `train_masked_cartpole.py` needs.

A model with rotary positions is played with LightZero's gap below the root, as
`kvjax play --window-mode rope_lightzero` does.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import train_masked_cartpole as training

from kvjax import SearchConfig, checkpoint, lightzero

MODE = {False: "learned", True: "rope_lightzero"}
"""Window modes of 0.2.0, of learned and of rotary positions."""


def main():
    """Prints both means as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="a shipped agent's name or a .safetensors file")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--simulations", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = checkpoint.shipped().get(args.checkpoint, Path(args.checkpoint))
    agent = checkpoint.load(path)
    given = args.episodes, args.simulations, args.seed
    theirs, ours = lightzero_plays(agent, *given), kvjax_plays(agent, *given)
    print(
        json.dumps(
            {
                "lightzero": {"mean_return": float(np.mean(theirs)), "returns": theirs},
                "kvjax": {"mean_return": float(np.mean(ours)), "returns": ours},
            }
        )
    )


def lightzero_plays(agent, episodes, simulations, seed):
    """Returns of episodes in LightZero's evaluator."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), training.quiet():
        settings = lightzero.save(agent.params, agent.config, "agent.pth.tar", compiled=True)
        training.import_entry()
        entry = importlib.import_module("lzero.entry.eval_muzero")
        ready_after_loading(entry)
        if training.ENV_TYPE not in registered():
            training.register_environment()
        run, create = training.configuration()
        fill(run, settings, episodes, simulations)
        path = os.path.abspath("agent.pth.tar")
        _, returns = entry.eval_muzero([run, create], seed=seed, model_path=path)
    return [float(score) for score in np.ravel(returns)]


def ready_after_loading(entry):
    """Has the policy compute what it keeps of learned positions, as `train_unizero` does.

    `eval_muzero` leaves the table as it was before the weights were loaded.
    """
    create = entry.create_policy

    def create_ready(*args, **kwargs):
        policy = create(*args, **kwargs)
        load = policy._load_state_dict_learn

        def load_and_compute(state):
            load(state)
            policy.recompute_pos_emb_diff_and_clear_cache()

        policy._load_state_dict_learn = load_and_compute
        return policy

    entry.create_policy = create_ready


def registered():
    """Names of environments that DI-engine knows."""
    from ding.utils import ENV_REGISTRY

    return ENV_REGISTRY


def fill(run, settings, episodes, simulations):
    """Makes a configuration of training one of playing the agent."""
    world_model = settings.pop("world_model_cfg")
    run.policy.model.update(settings)
    run.policy.model.world_model_cfg.update(world_model)
    run.policy.num_simulations = run.policy.model.world_model_cfg.num_simulations = simulations
    for part in (run.env, run.policy, run.policy.model.world_model_cfg):
        part.evaluator_env_num = min(episodes, 5)
    run.env.n_evaluator_episode = episodes
    run.env.stop_value = float("inf")


def kvjax_plays(agent, episodes, simulations, seed):
    """Returns of episodes by `kvjax play`, in the mode that LightZero has for the agent."""
    from kvjax.tools.play import play

    config = dataclasses.replace(agent.config, window_mode=MODE[agent.config.is_rotary])
    search = SearchConfig(num_simulations=simulations)
    played = play(
        dataclasses.replace(agent, config=config),
        episodes=episodes,
        search_config=search,
        seed=seed,
    )
    return list(played.returns)


if __name__ == "__main__":
    main()
