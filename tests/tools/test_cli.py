"""The command line as a user meets it: results, exit codes, messages."""

import json
import os
import sys

import pytest
from conftest import FULL

from kvjax.tools import cli, play


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_play_reaches_the_return_that_the_agent_was_trained_to(capsys):
    code, out, _ = run(capsys, "play", "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["mean_return"] >= 195
    assert len(summary["returns"]) == 8
    assert summary["steps"] == sum(summary["returns"])
    assert summary["searches_per_second"] > 0
    assert summary["compile_seconds"] > 0


def test_without_context_the_masked_agent_cannot_balance(capsys):
    code, out, _ = run(capsys, "play", "--json", "--no-context")
    assert code == 0
    assert json.loads(out)["mean_return"] < 80


@pytest.mark.skipif(not FULL, reason="another agent is compiled")
def test_the_unmasked_agent_needs_no_context(capsys):
    arguments = ("play", "cartpole", "--json", "--seed", 1000, "--episodes", 1)
    for flags in ((), ("--no-context",)):
        code, out, _ = run(capsys, *arguments, *flags)
        assert code == 0
        assert json.loads(out)["mean_return"] > 150


def test_more_episodes_than_rows_restart_inside_the_batch(capsys):
    """Episodes beyond the batch start when a row is free; each is that seed's own episode."""
    few = json.loads(run(capsys, "play", "--json", "--no-context", "--episodes", 11)[1])
    again = json.loads(run(capsys, "play", "--json", "--no-context", "--episodes", 11)[1])
    assert len(few["returns"]) == 11
    assert min(few["returns"]) > 0
    assert few["returns"] == again["returns"]


def test_summary_for_people_and_a_gif(capsys, tmp_path):
    from PIL import Image

    path = tmp_path / "episode.gif"
    code, out, err = run(capsys, "play", "--no-context", "--episodes", 1, "--gif", path)
    assert code == 0
    assert "mean return" in out
    assert "compile time" in out
    assert "episodes" in err
    with Image.open(path) as gif:
        assert gif.n_frames > 10
        assert gif.size == (300, 200)


def test_explore_writes_one_search_as_a_page(capsys, tmp_path):
    path = tmp_path / "tree.html"
    short = ("--output", path, "--simulations", 5)
    code, out, _ = run(capsys, "explore", *short, "--step", 1, "--json")
    explored = json.loads(out)
    assert (code, explored["step"], explored["simulations"]) == (0, 1, 5)
    text = path.read_text()
    assert "CartPole-v0, step 1" in text
    assert '"w": [[0, 3]]' in text  # the second step of an episode: three tokens
    assert explored["action"] in (0, 1)
    code, out, _ = run(capsys, "explore", *short, "--step", 999)
    assert code == 0
    assert "the episode's last, action" in out
    code, _, err = run(capsys, "explore", *short, "--step", -1)
    assert (code, err) == (2, "kvjax explore: step must be at least 0, got -1\n")


def test_convert_and_play_either_file(capsys, data, tmp_path):
    pytest.importorskip("torch")
    source = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    model = ("--num-heads", 2, "--context-length", 8)
    environment = ("--env", "CartPole-v0", "--observation-scale", "1,0,10,0")
    output = tmp_path / "agent.safetensors"
    code, out, _ = run(capsys, "convert", source, output, *model, *environment, "--json")
    assert code == 0
    converted = json.loads(out)
    assert converted["config"]["num_heads"] == 2
    assert any("decoder_network" in name for name in converted["ignored"])
    short = ("--episodes", 1, "--simulations", 3, "--no-context", "--json")
    from_torch = json.loads(run(capsys, "play", source, *model, *environment, *short)[1])
    from_converted = json.loads(run(capsys, "play", output, *short)[1])
    assert from_torch["returns"] == from_converted["returns"]


CONFIGURATION = (
    "exp_config = {'policy': {'model': {'world_model_cfg': {'num_heads': 2, 'context_length': 8}}}}"
)
ENVIRONMENT = ("--env", "CartPole-v0", "--observation-scale", "1,0,10,0")


def test_convert_and_play_say_who_said_what(capsys, data, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "ckpt").mkdir()
    source, output = tmp_path / "ckpt" / "a.pth.tar", tmp_path / "a.safetensors"
    source.write_bytes((data / "cartpole_masked_lightzero_0.2.0.pth.tar").read_bytes())
    (tmp_path / "total_config.py").write_text(CONFIGURATION)
    beside = f"from {tmp_path}/total_config.py"
    code, out, _ = run(capsys, "convert", source, output)
    assert code == 0
    assert f"2 heads, {beside}" in out
    assert f"context of 8 tokens, {beside}" in out
    code, out, err = run(capsys, "convert", source, output, "--num-heads", 4, "--support=0,100")
    assert "4 heads, as you said" in out
    assert "support (0, 100), as you said" in out
    assert f"num_heads=4 as you said, though {tmp_path}/total_config.py says 2" in err
    converted = json.loads(run(capsys, "convert", source, output, "--json")[1])
    assert converted["origins"]["num_heads"] == beside
    assert converted["origins"]["embed_dim"] == "from the tensors"
    assert converted["notes"] == []
    short = ("--episodes", 1, "--simulations", 3, "--no-context", *ENVIRONMENT)
    played = json.loads(run(capsys, "play", source, *short, "--json")[1])
    assert played["origins"] == converted["origins"]
    out = run(capsys, "play", output, *short)[1]
    assert "2 heads, from" in out
    assert "context of 8 tokens, from" in out


def test_convert_takes_every_option_of_load(capsys, data, tmp_path):
    pytest.importorskip("torch")
    source = data / "cartpole_masked_rope_lightzero_main.pth.tar"
    output = tmp_path / "a.safetensors"
    options = {
        "--num-heads": 4,
        "--context-length": 10,
        "--window-mode": "rope_consistent",
        "--simnorm-group": 16,
        "--rope-theta": 500.0,
        "--support": "-20,80",
    }
    said = [f"{name}={value}" for name, value in options.items()]
    code, out, _ = run(capsys, "convert", source, output, *said, "--json")
    assert code == 0
    config = json.loads(out)["config"]
    for name, value in options.items():
        expected = [-20, 80] if name == "--support" else value
        assert config[name.removeprefix("--").replace("-", "_")] == expected
    assert run(capsys, "convert", output, tmp_path / "b.safetensors", *said)[0] == 0
    for wrong in ("--simnorm-group=8", "--rope-theta=501", "--support=-50,50", "--num-heads=2"):
        code, _, err = run(capsys, "convert", output, tmp_path / "b.safetensors", wrong)
        assert code == 2
        assert "a.safetensors was converted with" in err
    code, _, err = run(capsys, "convert", source, output, *said, "--image-shape=3,84,84")
    assert code == 2
    assert "exclude each other" in err
    for option, text, expected in (
        ("--image-shape", "large", "three integers, as in 3,84,84"),
        ("--image-shape", "84,84", "three integers, as in 3,84,84"),
        ("--support", "50", "two integers, as in -50,50"),
        ("--support", "0,1,2", "two integers, as in -50,50"),
        ("--observation-scale", "a,1", "numbers, as in 1,0,2.5"),
    ):
        with pytest.raises(SystemExit):
            run(capsys, "convert", source, output, option, text)
        assert f"expected {expected}, got '{text}'" in capsys.readouterr().err


def test_clipped_logits_are_read_on_request(capsys, data, tmp_path):
    pytest.importorskip("torch")
    source, output = tmp_path / "a.pth.tar", tmp_path / "a.safetensors"
    source.write_bytes((data / "cartpole_masked_lightzero_0.2.0.pth.tar").read_bytes())
    clips = CONFIGURATION.replace("'num_heads'", "'use_policy_logits_clip': True, 'num_heads'")
    (tmp_path / "total_config.py").write_text(clips)
    code, _, err = run(capsys, "convert", source, output)
    assert code == 2
    assert "unsupported variant: use_policy_logits_clip" in err
    code, out, err = run(
        capsys, "convert", source, output, "--use-policy-logits-clip", "ignore", "--json"
    )
    assert code == 0
    assert "logits of the policy are not clipped" in json.loads(out)["notes"][0]
    assert "not clipped" in err
    assert "not clipped" in run(capsys, "convert", output, tmp_path / "b.safetensors")[2]


def test_an_environment_that_imports_a_module_must_be_said(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebody.py").write_text("raise RuntimeError('imported')")
    path = tmp_path / "a.safetensors"
    said = ("--env", "somebody:CartPole-v0")
    assert run(capsys, "convert", "cartpole_masked", path, *said)[0] == 0
    for command in (("play", path), ("convert", path, tmp_path / "b.safetensors")):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "names the environment 'somebody:CartPole-v0'" in err
    assert run(capsys, "convert", path, tmp_path / "b.safetensors", *said)[0] == 0
    code, _, err = run(capsys, "play", path, *said)
    assert code == 2
    assert "cannot make environment 'somebody:CartPole-v0': imported" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent/a", "no such folder"), ("folder", "it is a folder"), ("n" * 250, "name too long")],
)
def test_convert_where_nothing_can_be_written(capsys, tmp_path, name, message):
    (tmp_path / "folder.safetensors").mkdir()
    code, out, err = run(capsys, "convert", "cartpole_masked", tmp_path / f"{name}.safetensors")
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_verify(capsys, data):
    code, out, _ = run(capsys, "verify", data / "lightzero_020_abs.npz", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"]
    assert report["route"] == "tree"
    assert report["length_mismatches"] == 0
    code, out, _ = run(capsys, "verify", data / "lightzero_020_abs.npz", "--tolerance", "1e-9")
    assert code == 1
    assert "NOT within" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("play", "absent.safetensors"), "no such checkpoint: absent.safetensors"),
        (("play", "absent"), "no such checkpoint: absent"),
        (("play", "--simulations", "0"), "num_simulations must be a positive integer, got 0"),
        (("play", "--episodes", "0"), "episodes must be at least 1, got 0"),
        (("play", "--episodes", 10**12), "episodes must be at most 1000000, got 1000000000000"),
        (("play", "--seed", "-5"), "seed must be in 0 .. 4294967295, got -5"),
        (("play", "--seed", 10**30), "seed must be in 0 .. 4294967295, got 1000000000"),
        (("play", "--env", ""), "env_id must name a Gymnasium environment, got ''"),
        (("play", "--env", "..:Env"), "cannot make environment '..:Env'"),
        (("play", "--env", "no.such.module:Env"), "cannot make environment 'no.such.module:Env'"),
        (("play", "--observation-scale", "nan,0,1,0"), "observation_scale must be numbers"),
        (("play", "--env", "NoSuchEnv-v0"), "cannot make environment 'NoSuchEnv-v0'"),
        (
            ("play", "--env", "MountainCar-v0"),
            r"MountainCar-v0 observes (2,), the model reads (4,)",
        ),
        (("play", "--env", "Acrobot-v1"), "Acrobot-v1 observes (6,), the model reads (4,)"),
        (
            ("play", "--observation-scale", "1,0"),
            "observation_scale needs 4 factors, got (1.0, 0.0)",
        ),
        (
            ("convert", "cartpole_masked", "out.safetensors", "--observation-scale", "1,0"),
            "observation_scale needs 4 factors, got (1.0, 0.0)",
        ),
        (("play", "--devices", "0"), "devices must be at least 1, got 0"),
        (("play", "--devices", "9"), "devices must be at most 1 here, got 9"),
        (("play", "--num-heads", "4"), "was converted with num_heads 2, got 4"),
        (("play", "--context-length", "10"), "was converted with context_length 8, got 10"),
        (("play", "--gif", "a.png"), "an animation's name must end in .gif, got a.png"),
        (("play", "--gif", "absent/a.gif"), "no such folder for the animation: absent"),
        (("play", "--gif", "/proc/a.gif"), "cannot write /proc/a.gif"),
        (("verify", "/dev/zero"), "/dev/zero is no file, expected a trace"),
        (("verify", "/"), "/ is a folder, expected a trace"),
        (("verify", "a" * 5000), "File name too long"),
        (("verify", "absent.npz", "--tolerance", "inf"), "tolerance must be at least 0 and finite"),
        (("bench", "exactness", "--plot", "absent/a.png"), "no such folder"),
        (("bench", "exactness", "--plot", "a.xyz"), "a plot's name must end in one of"),
        (("bench", "ops", "--only", "embed=3"), "no op matches 'embed=3'"),
        (("bench", "exactness", "--only", "mode=none"), "no row matches 'mode=none'"),
        (("verify", "absent.npz"), "no such trace: absent.npz"),
        (("convert", "absent.pth.tar", "x.safetensors"), "no such checkpoint"),
        (("bench", "search", "--only", "embed=3"), "no benchmark row matches 'embed=3'"),
    ],
)
def test_bad_input_is_an_error_message_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith(f"kvjax {arguments[0]}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("one\ntwo"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes."),
        RuntimeError("Unable to initialize backend 'x'"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_fault_of_the_program_is_one_line(capsys, monkeypatch, error):
    monkeypatch.setattr(cli, "_verify", lambda args: (_ for _ in ()).throw(error))
    code, out, err = run(capsys, "verify", "a.npz")
    told = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or "MemoryError"
    assert (code, out) == (130 if told == "interrupted" else 2, "")
    assert err == f"kvjax verify: {' '.join(told.split())}\n"


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_closed_pipe_is_one_line(capsys, monkeypatch, flags):
    """Rich would end the process with exit code 1, which means that a trace is not verified."""
    summary = play.Summary((7.0,), 7.0, 7, 1.0, 1.0, 1.0)
    monkeypatch.setattr(play, "play", lambda *args, **options: summary)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        code = cli.main(["play", *flags])
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # it still holds what it could not write
    assert code == 2
    assert capsys.readouterr().err.endswith("kvjax play: [Errno 32] Broken pipe\n")


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_verify", lambda args: next(iter([])))
    with pytest.raises(StopIteration):
        cli.main(["verify", "a.npz"])


def test_bad_torch_checkpoints(capsys, data, tmp_path):
    pytest.importorskip("torch")
    source = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    assert "pass num_heads" in run(capsys, "play", source)[2]
    assert (
        "names no environment"
        in run(capsys, "play", source, "--num-heads", 2, "--context-length", 8)[2]
    )
    output = tmp_path / "out.bin"
    model = ("--num-heads", 2, "--context-length", 8)
    assert "must end in .safetensors" in run(capsys, "convert", source, output, *model)[2]
    scale = ("--observation-scale", "1,0,10,0")
    assert "--observation-scale needs --env" in run(capsys, "play", source, *model, *scale)[2]


@pytest.mark.parametrize(
    "arguments", [(), ("fly",), ("play", "--episodes", "many"), ("bench",), ("verify",)]
)
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    assert "usage: kvjax" in capsys.readouterr().err
