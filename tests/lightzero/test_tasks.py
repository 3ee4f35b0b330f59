"""One task of a multi-task model: held against traces of LightZero's own class, main's.

`docs/record_tasks.py` writes the traces. `WorldModelMT` of August 2026 reads three attributes that
it does not set (`exact_kv_window_reset`, `rebuild_kv_window_from_tokens`, `use_new_cache_manager`):
the script sets them on the class, to False as they are in `WorldModel` by default.
"""

import dataclasses
import functools
import json
import types

import flax_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, SMALL, in_full, random_params

from kvjax import lightzero
from kvjax.lightzero.checkpoint import described, tasks
from kvjax.lightzero.checkpoint.reading import read
from kvjax.lightzero.traces import npz, recording
from kvjax.model import checkpoint
from kvjax.model.checks import validate_model
from kvjax.tools import cli
from kvjax.tools.parity import verify

NAMES = ("none", "add", "concat")
OPTIONS = {"num_heads": 2, "context_length": 6, "simnorm_group": 4}
ADD = {"task_embed_option": "add_task_embed"}
W = "_orig_mod.world_model."

arrays = functools.cache(lambda name: npz.read_arrays(path(name)))


def path(name):
    return DATA / f"lightzero_main_task_{name}.npz"


def weights(name):
    """Tensors of a model of three tasks; no encoder."""
    return dict(recording.under(arrays(name), "weights/"))


def load(state, **options):
    return lightzero.load(state, **(OPTIONS | options))


def leaves(params):
    return jax.tree.leaves(params)


def differ(one, other):
    return [not np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True)]


@pytest.mark.parametrize(
    ("name", "route"), [*((name, "tree") for name in NAMES), *in_full(("add", "store"))]
)
def test_lightzeros_answers(name, route):
    """Roots, nodes at several depths and windows that slide, all with the task's embedding."""
    report = verify.verify(path(name), route=route, tolerance=1e-5)
    assert report.ok, report
    assert report.found["simulations"] == 40


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", {"task_id": 0}),
        ("add", {"task_id": 2}),
        ("add", {"task_embed_option": "none"}),
        ("concat", {"task_id": 0}),
    ],
)
def test_another_task_answers_otherwise(monkeypatch, name, said):
    """And so does the right one without its embedding."""
    config = json.dumps(json.loads(str(arrays(name)["config"])) | said)
    changed = arrays(name) | {"config": np.array(config)}
    for module in (verify.npz, recording):
        monkeypatch.setattr(module, "read_arrays", lambda _: changed)
    report = verify.verify("trace.npz", tolerance=1e-3)
    assert not report.ok
    assert report.found["max_abs_error"]["policy_logits"] > 1e-2


@pytest.mark.parametrize("task", range(3))
def test_the_tasks_own_heads_are_taken(task):
    state = weights("none")
    config, params = load(state, task_id=task)
    assert (config.head_expansion, config.task_size, config.layout) == (1, 0, "main")
    for ours, theirs in (("reward", "rewards"), ("latent", "observations"), ("policy", "policy")):
        kernel = state[f"head_{theirs}_multi_task.{task}.head_module.1.weight"].T
        np.testing.assert_array_equal(params["params"][f"{ours}_head"]["hidden"]["kernel"], kernel)


def test_what_other_tasks_have_is_told():
    state = {f"{W}{name}": tensor for name, tensor in weights("add").items()}
    state |= {f"{W}tokenizer.encoder.{i}.fc_representation.0.weight": np.zeros(2) for i in (1, 2)}
    ignored = read(state, **OPTIONS, **ADD, task_id=0).ignored
    assert set(ignored) <= set(state)
    assert f"{W}head_policy_multi_task.1.head_module.0.weight" in ignored
    assert f"{W}head_policy_multi_task.0.head_module.0.weight" not in ignored
    assert f"{W}head_policy.head_module.0.weight" in ignored  # of `WorldModel`, not read
    assert f"{W}transformer.task_embed.weight" in ignored
    assert f"{W}tokenizer.encoder.2.fc_representation.0.weight" in ignored


def shared(state):
    """All tasks with the heads of the first."""
    return {k: v for k, v in state.items() if not any(f"_task.{i}." in k for i in (1, 2))}


def test_shared_heads_serve_every_task():
    state = shared(weights("add"))
    first, second = (load(state, **ADD, task_id=task)[1] for task in (0, 1))
    assert sum(differ(first, second)) == 1  # the embedding, in the positions
    with pytest.raises(ValueError, match="has 3 tasks"):  # by the embeddings
        load(state, **ADD)
    state = shared(weights("none"))
    everybody = load(state)[1]
    assert not any(differ(everybody, load(state, task_id=25)[1]))
    with pytest.raises(ValueError, match="task_id must be an integer of at least 0, got -1"):
        load(state, task_id=-1)


def encoder(width, seed):
    """A vector's encoder as LightZero's tensors, which ends in LayerNorm."""
    rng = np.random.default_rng(seed)
    sizes = {"0": (width, 4), "1": (width,), "3": (width, width)}
    tensors = {f"fc_representation.{i}.weight": rng.normal(size=s) for i, s in sizes.items()}
    tensors |= {f"fc_representation.{i}.bias": rng.normal(size=width) for i in sizes}
    tensors |= {"fc_representation.1.running_mean": rng.normal(size=width)}
    tensors |= {"fc_representation.1.running_var": rng.uniform(1, 2, size=width)}
    tensors |= {"norm.weight": rng.normal(size=width), "norm.bias": rng.normal(size=width)}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("encoders", "task", "taken"), [(3, 2, 2), (1, 2, 0), (2, 2, 0)])
def test_a_task_without_an_encoder_has_the_first(encoders, task, taken):
    """LightZero's `Tokenizer` does it so, and its models of today have one for all tasks."""
    state = weights("none")
    for index in range(encoders):
        own = encoder(16, seed=index)
        state |= {f"tokenizer.encoder.{index}.{name}": x for name, x in own.items()}
        state |= {f"representation_network.{index}.{name}": x for name, x in own.items()}
    config, params = load(state, task_id=task)
    assert (config.observation_size, config.encoder_norm) == (4, "layernorm")
    scale = params["params"]["encoder"]["final"]["norm"]["scale"]
    np.testing.assert_array_equal(scale, encoder(16, seed=taken)["norm.weight"])


def test_a_concatenated_embedding_ends_encoded_latents_and_actions():
    state, own = weights("concat"), encoder(12, seed=0)
    state |= {f"representation_network.0.{name}": x for name, x in own.items()}
    config, params = load(state, task_id=1)
    assert (config.task_size, config.embed_dim) == (4, 16)
    row = state["task_emb.weight"][1]
    vector = np.exp(row / max(1.0, np.linalg.norm(row)))
    vector /= vector.sum()
    validate_model(params, config)
    observation = np.random.default_rng(0).normal(size=4).astype(np.float32)
    latent = flax_model.encode(params, jnp.asarray(observation), config=config)
    x = own["fc_representation.0.weight"] @ observation + own["fc_representation.0.bias"]
    x = (x - own["fc_representation.1.running_mean"]) / np.sqrt(
        own["fc_representation.1.running_var"] + 1e-5
    )
    x = x * own["fc_representation.1.weight"] + own["fc_representation.1.bias"]
    x = own["fc_representation.3.weight"] @ jax.nn.gelu(x) + own["fc_representation.3.bias"]
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * own["norm.weight"] + own["norm.bias"]
    np.testing.assert_allclose(latent, np.concatenate([x, vector]), atol=2e-5)
    table = params["params"]["action_embedding"]["embedding"]
    np.testing.assert_allclose(table[:, 12:], np.tile(vector, (3, 1)), atol=1e-6)
    np.testing.assert_array_equal(table[:, :12], state["act_embedding_table.weight"])


def test_an_added_embedding_is_in_the_rows_of_observations():
    state = weights("add")
    shown = load(state, **ADD, task_id=1)[1]["params"]["position_embedding"]["embedding"]
    added = np.asarray(shown) - state["pos_emb.weight"]
    np.testing.assert_array_equal(added[1::2], 0.0)
    np.testing.assert_allclose(added[::2].reshape(-1, 4, 4).sum(axis=2), 1.0, atol=1e-5)


def test_short_embeddings_keep_their_norm():
    """Only rows longer than 1 are made shorter, as torch does it with `max_norm`."""
    torch = pytest.importorskip("torch")
    rows = np.array([[0.1, 0.2, 0.3, 0.2], [3.0, -1.0, 2.0, 0.0]], np.float32)
    layer = torch.nn.Embedding(2, 4, max_norm=1, _weight=torch.tensor(rows))
    for row in range(2):
        theirs = layer(torch.tensor(row)).detach().softmax(dim=0).numpy()
        state = weights("concat") | {"task_emb.weight": rows}
        table = load(shared(state), task_id=row)[1]["params"]["action_embedding"]["embedding"]
        np.testing.assert_allclose(table[0, 12:], theirs, atol=1e-7)


def without(name, *gone):
    return {k: v for k, v in weights(name).items() if k not in gone}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (weights("none"), {}, r"the model has 3 tasks: pass task_id=, 0 .. 2"),
        (weights("none"), {"task_id": 3}, r"task_id must be an integer in 0 .. 2, got 3"),
        (weights("none"), {"task_id": -1}, r"task_id must be an integer in 0 .. 2, got -1"),
        (weights("none"), {"task_id": True}, r"task_id must be an integer in 0 .. 2, got True"),
        (weights("none"), {"task_id": 0} | ADD, "add_task_embed, but there is no task_emb.weight"),
        (
            without("none", "head_value_multi_task.1.head_module.4.bias"),
            {"task_id": 1},
            "missing tensor head_value.head_module.4.bias",
        ),
        (
            weights("add"),
            {"task_id": 0},
            "do not tell what task_emb.weight is for: pass task_embed_option=",
        ),
        (
            weights("add"),
            {"task_id": 0, "task_embed_option": "concat_task_embed"},
            "concat_task_embed, but tokens of actions are as wide as others",
        ),
        (
            weights("add"),
            {"task_id": 0, "task_embed_option": "register_task_embed"},
            "unsupported variant: register_task_embed: its register tokens are computed anew",
        ),
        (
            weights("add") | {"transformer.register_tokens": np.zeros((4, 16), np.float32)},
            {"task_id": 0} | ADD,
            "unsupported variant: register tokens",
        ),
        (weights("add"), {"task_id": 0, "task_embed_option": "sum"}, "must be one of add_task_"),
        (
            weights("add"),
            {"task_id": 0, "window_mode": "reset"} | ADD,
            'add_task_embed excludes window_mode "reset"',
        ),
        (
            weights("concat"),
            {"task_id": 0} | ADD,
            "add_task_embed, but tokens of actions are 4 narrower than others",
        ),
        (
            weights("concat") | {"task_emb.weight": np.zeros((3, 8), np.float32)},
            {"task_id": 0},
            r"task_emb.weight has shape \(8,\), expected \(4,\)",
        ),
        (
            weights("add") | {"task_emb.weight": np.zeros(3, np.float32)},
            {"task_id": 0} | ADD,
            r"task_emb.weight has shape \(3,\), expected a row for task 0",
        ),
        (
            weights("add"),
            {"task_id": 0, "simnorm_group": 32} | ADD,
            "simnorm_group must divide embed_dim 16, got 32",
        ),
        (
            without("add", "pos_emb.weight"),
            {"task_id": 0} | ADD,
            r"pos_emb.weight has shape \(0,\), expected \(0, 16\)",
        ),
        (
            {
                k.replace(".1.weight", ".1.experts.0.w1.weight"): v
                for k, v in weights("none").items()
            },
            {"task_id": 0},
            "unsupported variant: heads with a mixture of experts",
        ),
    ],
)
def test_refusals(state, options, message):
    with pytest.raises(ValueError, match=message):
        load(state, **options)


def test_models_of_one_task_have_no_task_id(data):
    torch_file = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="task_id is for multi-task models, this model has one"):
        lightzero.load(torch_file, num_heads=2, context_length=8, task_id=0)


def test_a_run_tells_what_its_embeddings_are_for(tmp_path):
    torch = pytest.importorskip("torch")
    said = {"num_heads": 2, "context_length": 6, "group_size": 4, "task_num": 3}
    said |= {"use_task_embed": True} | ADD
    text = "exp_config = " + str({"policy": {"model": {"world_model_cfg": said}}})
    (tmp_path / "total_config.py").write_text(text)
    saved = tmp_path / "ckpt.pth.tar"
    torch.save({k: torch.tensor(v) for k, v in weights("add").items()}, saved)
    expected = load(weights("add"), **ADD, task_id=1)[1]
    assert not any(differ(expected, lightzero.load(saved, task_id=1)[1]))
    (tmp_path / "total_config.py").write_text(
        text.replace("'use_task_embed': True", "'use_task_embed': False")
    )
    plain = load(weights("add"), task_embed_option="none", task_id=1)[1]
    assert not any(differ(plain, lightzero.load(saved, task_id=1)[1]))
    (tmp_path / "total_config.py").write_text(text.replace("add_task", "register_task"))
    with pytest.raises(ValueError, match="unsupported variant: register_task_embed"):
        lightzero.load(saved, task_id=1)


def test_a_live_model_tells_its_tasks():
    encoders = type("ModuleList", (list,), {})
    kind = types.SimpleNamespace(final_norm_option_in_encoder="RMSNorm")
    config = types.SimpleNamespace(num_heads=2, context_length=6, task_num=4, group_size=4)
    state = shared(weights("none"))
    model = types.SimpleNamespace(config=config, state_dict=lambda: state)
    with pytest.raises(ValueError, match="the model has 4 tasks: pass task_id"):
        lightzero.load(model)
    assert lightzero.load(model, task_id=3)[0].head_expansion == 1
    model.tokenizer = types.SimpleNamespace(encoder=encoders([kind]))
    with pytest.raises(ValueError, match="encoders that end in RMSNorm"):
        lightzero.load(model, task_id=3)
    assert described.by_module(types.SimpleNamespace(config=config)).tasks == 4


def test_the_command_line_converts_a_task(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    source, target = tmp_path / "ckpt.pth.tar", tmp_path / "task.safetensors"
    torch.save({k: torch.tensor(v) for k, v in weights("concat").items()}, source)
    command = ["convert", str(source), str(target), "--num-heads=2", "--context-length=6"]
    command += ["--simnorm-group=4"]
    assert cli.main(command) == 2
    assert "the model has 3 tasks: pass task_id=, 0 .. 2" in capsys.readouterr().err
    assert cli.main([*command, "--task=1"]) == 0
    found = checkpoint.load(target)
    assert not any(differ(found.params, load(weights("concat"), task_id=1)[1]))
    assert found.notes == ("this is task 1 of a multi-task model of 3 tasks, 0 .. 2",)
    assert cli.main(["play", str(target), "--task=1"]) == 2
    assert "holds one task: task_id is for LightZero's files" in capsys.readouterr().err


def test_a_converted_file_knows_that_its_positions_hold_the_task(tmp_path, capsys):
    """`load` refuses window mode "reset" for them, and so does the file."""
    path = tmp_path / "task.safetensors"
    found = read(weights("add"), **OPTIONS, **ADD, task_id=2)
    assert found.origins["task_in_positions"] == "as you said"
    checkpoint.save(path, checkpoint.Checkpoint(found.config, found.params, notes=found.notes))
    config = checkpoint.load(path).config
    assert config.task_in_positions
    assert dataclasses.replace(config, window_mode="rebuild").task_in_positions
    with pytest.raises(ValueError, match='task_in_positions excludes window_mode "reset"'):
        dataclasses.replace(config, window_mode="reset")
    assert cli.main(["play", str(path), "--env=CartPole-v1", "--window-mode=reset"]) == 2
    assert 'task_in_positions excludes window_mode "reset"' in capsys.readouterr().err
    plain, _ = load(weights("add"), task_id=2, task_embed_option="none")
    assert not plain.task_in_positions


def test_the_width_that_a_task_takes():
    for changes, message in (
        ({"task_size": 16}, "task_size must be >= 0 and less than embed_dim 16, got 16"),
        ({"task_size": 4}, "simnorm_group must divide the encoder's width 12, got 8"),
        ({"head_expansion": 0}, "head_expansion must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)
    config = dataclasses.replace(SMALL, task_size=8)
    params = random_params(config)
    assert params["params"]["encoder"]["output"]["kernel"].shape == (8, 8)
    validate_model(params, config)
    with pytest.raises(ValueError, match="task_embedding/embedding must be absent, got"):
        validate_model(params, SMALL)


def test_selection_leaves_odd_things_to_the_reader():
    assert tasks.select([1], None).state == [1]
    with pytest.raises(ValueError, match="a tensor is named 1, expected text"):
        load(weights("none") | {1: np.zeros(2)}, task_id=0)
