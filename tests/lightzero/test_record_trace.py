"""Traces of a live LightZero model: kvjax verifies them, and the model does not notice."""

import copy
import itertools
import json

import numpy as np
import pytest

from kvjax import lightzero
from kvjax.lightzero.traces import record
from kvjax.tools import cli
from kvjax.tools.bench import lightzero_020
from kvjax.tools.parity.verify import verify

torch = pytest.importorskip("torch")
pytest.importorskip("lzero")

SIZES = {"num_actions": 3, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "context_length": 6}


def build(**changes):
    sizes = SIZES | {"num_envs": 3, "num_simulations": 8, "support": 4, "seed": 1} | changes
    return lightzero_020.build_model(observation_size=4, **sizes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "live.npz"
    trace = lightzero.record_trace(build(), path, steps=8, simulations=8)
    return path, trace


@pytest.mark.parametrize("route", ["tree", "store"])
def test_kvjax_verifies_what_was_recorded(recorded, route):
    report = verify(recorded[0], route=route)
    assert report.ok, report
    assert (
        report.found["steps"],
        report.found["simulations"],
        report.found["length_mismatches"],
    ) == (8, 64, 0)
    assert max(report.found["max_abs_error"].values()) < 1e-4


def test_the_command_line_verifies_it_too(recorded, capsys):
    assert cli.main(["verify", str(recorded[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_the_walks_see_what_matters(recorded):
    """Restarts, several depths in one batch, windows that slid."""
    _, trace = recorded
    steps = list(trace.steps())
    starts = [bool((step["action"] == -1).all()) for step in steps]
    assert starts == [True, False, False, False, True, False, False, False]
    assert sum(int((step["action"] == -1).sum()) for step in steps) == 2 * trace.num_envs
    assert [step["timestep"][0] for step in steps] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert any(len(set(depth)) > 1 for step in steps for depth in step["depth"])
    assert max(step["depth"].max() for step in steps) >= 3
    assert [step["length"][0] for step in steps] == [1, 3, 3, 3, 1, 3, 3, 3]
    assert trace.pads_are_read
    for step in steps:
        depths = np.vstack([np.zeros((1, trace.num_envs), int), step["depth"]])
        parents = np.take_along_axis(depths, step["parent"], axis=0)
        np.testing.assert_array_equal(step["depth"], parents + 1)
    for step, following in itertools.pairwise(steps):
        np.testing.assert_array_equal(step["latent"], following["prev_latent"])


def rewritten(source, target, change):
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays)
    np.savez(target, **arrays)
    return target


@pytest.mark.parametrize(
    "name",
    [
        "weights/pos_emb.weight",
        "weights/act_embedding_table.weight",
        "weights/transformer.blocks.1.attn.key.weight",
        "weights/head_policy.head_module.2.bias",
    ],
)
def test_perturbed_weights_are_found_out(recorded, tmp_path, name):
    def perturb(arrays):
        arrays[name] = arrays[name] + np.float32(0.01) * np.arange(arrays[name].size).reshape(
            arrays[name].shape
        )

    report = verify(rewritten(recorded[0], tmp_path / "perturbed.npz", perturb))
    assert not report.ok


def test_encoders_stay_at_home(recorded):
    _, trace = recorded
    assert trace.config.observation_size is None
    assert trace.config.embed_dim == 16


def state_of(model):
    """All that a recording could leave behind."""
    world = model.world_model
    scalars = {k: v for k, v in vars(world).items() if isinstance(v, int | float | bool)}
    return copy.deepcopy(
        {
            "scalars": scalars,
            "config": dict(world.config),
            "keys": [dict(d) for d in world.past_kv_cache_init_infer_envs],
            "nodes": dict(world.past_kv_cache_recurrent_infer),
            "rings": world.shared_pool_index_init_envs,
            "sizes": world.keys_values_wm_size_list,
            "modes": [module.training for module in model.modules()],
            "methods": [k for k in vars(world) if callable(getattr(world, k))],
            "table": [t.clone() for layer in world.positional_embedding_k for t in [layer]],
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
        }
    )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_the_model_is_left_as_it_was(tmp_path):
    model = build()
    searcher = lightzero_020.Searcher(model)
    observation = np.random.default_rng(0).standard_normal((3, 4))
    searcher.step(observation, np.full(3, -1))
    model.world_model.latent_recon_loss = torch.ones(1, requires_grad=True) * 2  # of a graph
    model.train()
    before, random_state = state_of(model), torch.get_rng_state()
    lightzero.record_trace(model, tmp_path / "a.npz", steps=3, simulations=4)
    assert equal(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()
    searcher.step(observation + 1.0, np.zeros(3, np.int64))
    assert model.world_model.root_hit_cnt == 3


def test_a_stale_table_of_corrections_is_refreshed_in_the_copy_only(tmp_path):
    """Loading weights into a 0.2.0 model leaves the table of the old ones behind."""
    model = build()
    stale = model.world_model.pos_emb_diff_k[0][(2, 5)].clone()
    with torch.no_grad():
        model.world_model.pos_emb.weight.mul_(3.0)
    lightzero.record_trace(model, tmp_path / "a.npz", steps=4, simulations=4)
    assert verify(tmp_path / "a.npz").ok
    assert torch.equal(model.world_model.pos_emb_diff_k[0][(2, 5)], stale)


def test_walks_are_reproducible_and_differ_by_seed(tmp_path):
    model = build()

    def recorded_with(seed):
        path = tmp_path / "a.npz"
        return lightzero.record_trace(model.world_model, path, steps=2, simulations=2, seed=seed)

    first, again, other = (recorded_with(seed).arrays for seed in (1, 1, 2))
    assert first.keys() == again.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    assert not np.array_equal(first["step1/latent"], other["step1/latent"])


def test_one_row_and_one_action(tmp_path):
    model = build(num_envs=1, num_actions=1, context_length=4)
    trace = lightzero.record_trace(model, tmp_path / "a.npz", steps=3, simulations=3)
    assert trace.num_envs == 1
    assert verify(tmp_path / "a.npz").ok


def untrained():
    model = build()
    for parameter in model.world_model.head_observations.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def attached():
    """A model whose caches something else keeps."""
    model = build()
    model.world_model.update_cache_context = lambda *args, **kwargs: None
    return model


def by_kvjax():
    model = build()
    lightzero.attach(model.world_model)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (untrained, {"simulations": 8}, "two nodes of one step have the same latent"),
        (attached, {"simulations": 8}, "stored no root window: something else manages its caches"),
        (by_kvjax, {"simulations": 8}, "stored no root window: something else manages its caches"),
        (build, {"rows": 4}, "rows must be at most the model's env_num 3, got 4"),
        (build, {"rows": 0}, "rows must be a positive integer, got 0"),
        (build, {"steps": 0}, "steps must be a positive integer, got 0"),
        (build, {"simulations": 9}, "simulations must be at most the model's num_simulations 8"),
        (lambda: torch.nn.Linear(2, 2), {}, "expected a LightZero WorldModel"),
    ],
)
def test_bad_input(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        lightzero.record_trace(make(), tmp_path / "a.npz", **options)


def test_a_name_without_suffix(tmp_path):
    with pytest.raises(ValueError, match="must end in .npz, got .*trace.txt"):
        lightzero.record_trace(build(), tmp_path / "trace.txt")


def with_tasks(model, count):
    """A model of one task with the interface of main's `WorldModelMT`; only task 1 is its own."""
    real = type(model)

    class WithTasks(real):
        def state_dict(self, *args, **kwargs):
            named = {}
            for name, tensor in super().state_dict(*args, **kwargs).items():
                head, _, rest = name.partition(".head_module.")
                copies = [f"{head}_multi_task.{task}.head_module.{rest}" for task in range(count)]
                own = copies[1] if rest else name
                named |= dict.fromkeys(copies if rest else (), torch.zeros_like(tensor))
                named[own] = tensor
            return named

        def retrieve_or_generate_kvcache(self, latent, rows, index=0, depth=None, task_id=0):
            return super().retrieve_or_generate_kvcache(latent, rows, index, depth)

        def reset_for_initial_inference(self, asked, task_id=0):
            assert task_id == 1
            parts = [
                self.tokenizer.encode_to_obs_embeddings(asked[x]) for x in ("obs", "current_obs")
            ]
            timestep = np.zeros(len(parts[0]), int)
            root = real.wm_forward_for_initial_infererence
            out = root(self, parts[0], asked["action"], parts[1], timestep)
            self.latent_state = parts[1]
            return out, self.latent_state

        def forward_recurrent_inference(self, history, index, depth=None, task_id=0):
            assert task_id == 1
            return super().forward_recurrent_inference(history, index, [1] * len(history[0][0]))

    model.__class__ = WithTasks
    return model


def restarts(trace):
    return [bool((step["action"] == -1).all()) for step in trace.steps()]


def test_a_task_is_asked_alone(tmp_path, monkeypatch):
    """A stand-in for main's multi-task model, of which `test_tasks` has real traces."""
    model = with_tasks(build().world_model, count=3)
    path = tmp_path / "task.npz"
    with pytest.raises(ValueError, match="the model has 3 tasks: pass task_id"):
        lightzero.record_trace(model, path)
    trace = lightzero.record_trace(model, path, steps=4, simulations=8, task_id=1)
    report = verify(path)
    assert report.ok, report
    assert restarts(trace) == [True, False] * 2
    monkeypatch.setattr(record, "_is_main", lambda model: True)  # others of main restart by row
    trace = lightzero.record_trace(model, path, steps=2, simulations=1, task_id=1)
    assert restarts(trace) == [True, True]
