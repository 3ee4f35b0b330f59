"""Atari games: frames and moves are LightZero's own, step by step."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from conftest import FULL

from kvjax import lightzero
from kvjax.config import EnvironmentConfig, FramesConfig, SearchConfig, WorldModelConfig
from kvjax.lightzero.checkpoint import played
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools import cli, environments, play, routes
from kvjax.tools.agent import find_agent
from kvjax.tools.bench import lightzero_020
from kvjax.tools.parity import near_ties, nodes, reference_tree
from kvjax.tools.parity.host_search import encode
from kvjax.tools.parity.report import compare

for package in ("ale_py", "cv2"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'kvjax[atari]'")

needs_lightzero = pytest.mark.skipif(
    not lightzero_020.available(), reason="needs torch and LightZero 0.2.0"
)

STEPS, SIMULATIONS = (1000, 50) if FULL else (30, 8)
EPISODE = FramesConfig(max_episode_steps=STEPS)
ACTIONS, SEED = 6, 0
NEAR_TIE = 5e-5
"""Values of about -10 are exact to 1e-5, and the scores of a tree that spans 0.5 to twice that."""

VALUE_ERROR = 5e-3
"""Of a root's value; below the root a near tie may go unseen by its visits."""


def model_of(shape, actions=ACTIONS):
    return WorldModelConfig(64, 2, 4, actions, 8, 20, image_shape=shape)


def game(name, side, frames, actions):
    shape = (frames.channels, side, side)
    environment = EnvironmentConfig(f"ALE/{name}-v5", frames=frames)
    return environments.make(environment, model_of(shape, actions), render=False)


def noops_of(env):
    """How many no-ops the game began with."""
    return env.unwrapped.ale.getEpisodeFrameNumber()


@needs_lightzero
@pytest.mark.parametrize(
    ("name", "side", "actions", "frames"),
    [
        ("Pong", 64, 6, FramesConfig()),
        ("MsPacman", 96, 9, FramesConfig(frame_stack=2, clip_rewards=True)),
        ("SpaceInvaders", 64, 6, FramesConfig(max_episode_steps=30, frame_skip=3)),
        (
            "Breakout",
            84,
            4,
            FramesConfig(gray_scale=True, frame_stack=4, episode_life=True, clip_rewards=True),
        ),
    ],
)
def test_frames_rewards_and_ends_are_lightzeros(name, side, actions, frames):
    """Its own wrappers beside kvjax's, the same random actions; lives end and games go on."""
    from lightzero_atari import Game

    said = dataclasses.asdict(frames)
    stack, channels = said.pop("frame_stack"), 1 if frames.gray_scale else 3
    for other in ("noop_max", "repeat_action_probability", "full_action_space"):
        del said[other]
    theirs = Game(name, (channels, side, side), stack=stack, **said)
    ours, rng = game(name, side, frames, actions), np.random.default_rng(0)
    observation, _ = ours.reset(seed=1)
    seen, lives = theirs.reset(noops_of(ours)), []
    rewards = ends = 0
    for _ in range(STEPS if FULL else 200):
        assert observation.dtype == seen.dtype == np.float32
        np.testing.assert_array_equal(observation, seen)
        action = int(rng.integers(actions))
        observation, reward, terminated, truncated, info = ours.step(action)
        seen, their_reward, done = theirs.step(action)
        assert (reward, terminated or truncated) == (their_reward, done)
        rewards, ends, lives = rewards + abs(reward), ends + done, [*lives, info["lives"]]
        if done:
            observation, _ = ours.reset()
            seen = theirs.reset(noops_of(ours))
    assert rewards > 0 or name == "SpaceInvaders"
    assert ends > 1 or name in ("Pong", "MsPacman")
    assert len(set(lives)) > 1 or name != "Breakout"
    ours.close()


def test_ale_says_nothing(capfd):
    game("Pong", 64, FramesConfig(), ACTIONS).close()
    assert capfd.readouterr() == ("", "")


def test_a_seed_is_an_episode_and_its_number_of_noops():
    env = game("Pong", 64, FramesConfig(), ACTIONS)
    begins = [(env.reset(seed=seed)[0], noops_of(env)) for seed in (0, 1, 2, 3, 0)]
    np.testing.assert_array_equal(begins[0][0], begins[-1][0])
    numbers = [number for _, number in begins]
    assert len(set(numbers)) > 2
    assert all(1 <= number <= 30 for number in numbers)
    for noops in (0, 1):
        env = game("Pong", 64, FramesConfig(noop_max=noops), ACTIONS)
        env.reset(seed=0)
        assert noops_of(env) == noops


def test_actions_of_the_whole_joystick_and_sticky_ones():
    env = game("Pong", 64, FramesConfig(full_action_space=True), 18)
    assert env.action_space.n == 18
    for sticky in (0.0, 0.25):
        env = game("Pong", 64, FramesConfig(repeat_action_probability=sticky), ACTIONS)
        assert env.unwrapped.ale.getFloat("repeat_action_probability") == sticky
        assert env.unwrapped.ale.getInt("frame_skip") == 1


@functools.cache
def torch_model():
    """A random model; the statistics of its encoder are those of frames, as training leaves them.

    An encoder that never saw a frame is nearly blind.
    """
    import torch

    torch.set_num_threads(1)
    model = lightzero_020.build_model(
        observation_size=(3, 64, 64),
        num_actions=ACTIONS,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        context_length=8,
        num_envs=1,
        num_simulations=SIMULATIONS,
    )
    env, rng = game("Pong", 64, FramesConfig(), ACTIONS), np.random.default_rng(0)
    env.reset(seed=99)
    frames = np.stack([env.step(int(rng.integers(ACTIONS)))[0] for _ in range(100)])
    encoder = model.tokenizer.encoder.train()
    for part in encoder.modules():
        part.momentum = None  # the mean over all batches
    with torch.no_grad():
        encoder(torch.from_numpy(frames))
    encoder.eval()
    return model


@functools.cache
def pong_agent():
    config, params = lightzero.load(torch_model())
    return Checkpoint(config, params, EnvironmentConfig("ALE/Pong-v5", frames=EPISODE))


@pytest.fixture
def recorded(monkeypatch):
    """What the searches of each begun route were asked and answered."""
    runs, begin = [], routes.ROUTES["tree"]

    def beginning(*arguments):
        step, steps = begin(*arguments), []
        runs.append(steps)

        def recording(rng, observation, last_action):
            answer = step(rng, observation, last_action)
            steps.append((observation, last_action, answer))
            return answer

        return recording

    monkeypatch.setitem(routes.ROUTES, "tree", beginning)
    return runs


def begin_again(agent, steps, search):
    """The host's tree of the last of some steps, see `kvjax.tools.parity.near_ties`."""
    carried = nodes.Carried(agent.params, agent.config, 1)
    for t, (observation, last_action, _) in enumerate(steps):
        latent = encode(agent.params, observation, config=agent.config)
        policy, _ = carried.observe(latent, last_action, latent, np.array([t]))
    tree = reference_tree.init(np.asarray(policy[0]), np.ones(ACTIONS, bool), search)
    return tree, nodes.network(carried, agent.config)


def values_by_near_ties(begin):
    """Root values of a search, had it chosen the second best where two are nearly as good."""
    _, margins = near_ties._replay(begin, None)
    return [reference_tree.root_value(near_ties._replay(begin, tie)[0]) for tie in margins]


@needs_lightzero
def test_pong_is_played_as_lightzero_plays_it(recorded, monkeypatch):
    """Frames, visits and moves of LightZero's games, model and tree; its ties take the first."""
    from lightzero_atari import FirstOfTies, Game

    mcts_ctree = lightzero_020._load("lzero.mcts.tree_search.mcts_ctree")
    monkeypatch.setattr(near_ties, "LIMIT", NEAR_TIE)
    monkeypatch.setattr(mcts_ctree, "tree_muzero", FirstOfTies(mcts_ctree.tree_muzero))
    agent, search = pong_agent(), SearchConfig(num_simulations=SIMULATIONS)
    searcher = lightzero_020.Searcher(torch_model(), discount=search.discount)
    theirs = Game("Pong", (3, 64, 64), max_episode_steps=STEPS)
    env = game("Pong", 64, EPISODE, ACTIONS)
    compared, seed = [], SEED
    while len(compared) < STEPS:
        recorded.clear()
        summary = play.play(agent, episodes=1, search_config=search, seed=seed)
        env.reset(seed=seed)
        seen, done, score = theirs.reset(noops_of(env)), False, 0.0
        steps = recorded[0]
        for t, (observation, last_action, answer) in enumerate(steps):
            np.testing.assert_array_equal(seen[None], observation)
            found = searcher.step(seen[None], last_action)
            names = ("visit_counts", "root_value", "action")
            pair = [routes.Answer(*(x[0] for x in y)) for y in (answer, [found[n] for n in names])]
            begin = functools.partial(begin_again, agent, steps[: t + 1], search)
            compared.append(compare(f"seed {seed}, step {t}", *pair, begin))
            ours, wanted = (answer.root_value for answer in pair)
            if abs(ours - wanted) > VALUE_ERROR:
                others = values_by_near_ties(begin)
                print(f"seed {seed}, step {t}: {ours} is {wanted}, near ties make {others}")
                assert min(abs(value - wanted) for value in others) < VALUE_ERROR
            assert not done
            seen, reward, done = theirs.step(int(answer.action[0]))
            score += reward
        assert done
        assert summary.returns == (score,)
        seed += 1
    unlike = [one for one in compared if not one.same_visits]
    print(len(compared), "steps,", len(unlike), "of other visits:", unlike)
    assert all(one.tie for one in unlike)
    assert len(unlike) <= 0.01 * len(compared)
    assert len({int(one.ours.action) for one in compared}) > 1
    assert len({tuple(one.ours.visits.tolist()) for one in compared}) > 2


RUN = {
    "env": {
        "manager": {"shared_memory": False},
        "env_type": "Atari",
        "observation_shape": (3, 64, 64),
        "collect_max_episode_steps": 20,
        "eval_max_episode_steps": STEPS,
        "gray_scale": False,
        "frame_skip": 4,
        "episode_life": True,
        "clip_rewards": True,
        "channel_last": False,
        "scale": True,
        "warp_frame": True,
        "transform2string": False,
        "type": "atari_lightzero",
        "env_id": "PongNoFrameskip-v4",
    },
    "policy": {
        "model": {
            "observation_shape": (3, 64, 64),
            "frame_stack_num": 1,
            "world_model_cfg": {"num_heads": 4, "context_length": 8},
        }
    },
}


@needs_lightzero
def test_a_run_of_lightzero_is_converted_and_drawn(tmp_path, capsys):
    """Its configuration tells the game and its frames; the file that is made of it has them."""
    import torch
    from PIL import Image

    source, output = tmp_path / "run" / "ckpt_best.pth.tar", tmp_path / "pong.safetensors"
    source.parent.mkdir()
    torch.save({"model": torch_model().state_dict()}, source)
    (source.parent / "total_config.py").write_text(f"exp_config = {RUN}")
    expected = EnvironmentConfig("ALE/Pong-v5", frames=EPISODE)
    assert find_agent(source).agent.environment == expected
    assert find_agent(source, env="ALE/Pong-v5").agent.environment == expected
    other = find_agent(source, env="ALE/Breakout-v5").agent.environment
    assert other == EnvironmentConfig("ALE/Breakout-v5")
    assert cli.main(["convert", str(source), str(output)]) == 0
    assert checkpoint.load(output).environment == expected
    picture, short = tmp_path / "pong.gif", ["--frames", "max_episode_steps=4"]
    capsys.readouterr()
    run = ["play", str(output), "--episodes", "1", "--simulations", str(SIMULATIONS), "--json"]
    assert cli.main([*run, *short, "--gif", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    with Image.open(picture) as drawn:
        assert drawn.size == (160, 210)
        assert 1 <= drawn.n_frames <= 4


def of_run(**changes):
    env = {name: said for name, said in (RUN["env"] | changes).items() if said is not ...}
    return played.environment(env, {"frame_stack_num": changes.get("stack", 1)})


def test_what_a_run_says_of_its_environment(caplog):
    assert of_run() == EnvironmentConfig("ALE/Pong-v5", frames=EPISODE)
    gray = of_run(gray_scale=..., stack=4, eval_max_episode_steps=..., env_id="ALE/Pong-v5")
    assert gray.frames == FramesConfig(gray_scale=True, frame_stack=4)
    assert of_run(frame_skip=2, full_action_space=True).frames.frame_skip == 2
    cartpole = {"type": "cartpole_lightzero", "env_id": "CartPole-v0"}
    assert played.environment(cartpole, {}) == EnvironmentConfig("CartPole-v0")
    for other in ({"type": "jericho", "env_id": "zork1.z5"}, {"type": "atari_lightzero"}, {}):
        assert played.environment(other, {}) is None
    assert not caplog.records
    for wrong, why in (
        ({"scale": False}, "scale must be True, got False"),
        ({"channel_last": True}, "channel_last must be False, got True"),
        ({"frame_skip": 0}, "frame_skip must be a positive integer, got 0"),
        ({"env_id": "os:Pong"}, "names the environment 'os:Pong'"),
        ({"env_id": 3}, "env_id must name a Gymnasium environment, got 3"),
    ):
        caplog.clear()
        assert of_run(**wrong) is None
        assert why in caplog.text
