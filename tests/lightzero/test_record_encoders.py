"""Traces and attaching do not depend on the encoder, nor on what main does to policies' logits."""

import copy
import json

import numpy as np
import pytest
import torch_models

from kvjax import lightzero
from kvjax.lightzero.traces import clip
from kvjax.lightzero.traces import trace as traces
from kvjax.lightzero.traces.clip import PolicyClip
from kvjax.tools.bench import lightzero_020
from kvjax.tools.parity.verify import verify

torch = pytest.importorskip("torch")
pytest.importorskip("lzero")
import torch_encoders  # noqa: E402

SIZES = {"num_layers": 1, "num_heads": 2, "context_length": 6, "num_envs": 2, "support": 4}


def build(encoder):
    """A 0.2.0 model with another encoder."""
    model = torch_models.make(embed_dim=torch_encoders.EMBED, **SIZES)
    model.representation_network = model.tokenizer.encoder = encoder
    return model.eval()


def record(model, tmp_path, **options):
    sizes = {"steps": 5, "simulations": 4} | options
    return lightzero.record_trace(model, tmp_path / "a.npz", **sizes)


class Text(torch.nn.Module):
    """A text encoder as far as its tensors tell; it cannot be copied, as if it were too large."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Embedding(7, torch_encoders.EMBED)
        self.register_buffer("position_ids", torch.arange(7))

    def forward(self, observation):
        return torch.softmax(self.model(observation.long()).mean(dim=1), dim=1)

    def __deepcopy__(self, memo):
        raise MemoryError


@pytest.mark.parametrize("kind", ["layernorm", "text"])
def test_a_trace_of_a_model_whatever_its_encoder(kind, tmp_path):
    model = build(Text() if kind == "text" else torch_encoders.resnet(channels=4)[0])
    trace = record(model, tmp_path)
    assert not trace.config.has_encoder
    report = verify(tmp_path / "a.npz")
    assert report.ok, report
    assert max(report.found["max_abs_error"].values()) < 1e-5


def test_an_image_model_with_layernorm_is_attached_in_shadow():
    module, shape = torch_encoders.resnet(channels=4)
    model = build(module)
    observed = torch_encoders.observations(shape, 12).unflatten(0, (6, 2)).numpy()
    handle = lightzero.attach(model.world_model, shadow=True)  # a disagreement is an error
    searcher = lightzero_020.Searcher(model)
    for step, batch in enumerate(observed):  # windows slide, and an episode starts again
        searcher.step(batch, np.array([1, 2] if step % 5 else [-1, -1]))
    assert handle.disagreements == []
    assert handle.comparisons > 0
    assert handle.stats()["misses"] == 0


METHODS = {
    "hard": lambda x: torch.clamp(x, -0.3, 0.5),
    "soft_tanh": lambda x: 0.5 * torch.tanh(x / (0.5 * 0.8)),
    "soft_sigmoid": lambda x: -0.3 + 0.8 * torch.sigmoid(x / 0.8),
    "normalize_max": lambda x: torch.clamp(x - x.max(dim=-1, keepdim=True).values, -0.3, 0.5),
    "normalize_mean": lambda x: torch.clamp(x - x.mean(dim=-1, keepdim=True), -0.3, 0.5),
    "adaptive": lambda x: torch.clamp(x, -0.2, 0.5),
    "none": lambda x: x,
}


def clipping(method):
    """A model that clips as main does, with the names that main has for that."""
    model = build(torch_encoders.vector()[0])
    if "Clipping" not in type(model.world_model).__name__:

        class Clipping(type(model.world_model)):
            def forward(self, *args, **options):
                out = super().forward(*args, **options)
                if self.use_policy_logits_clip:
                    out.logits_policy = METHODS[self.policy_logits_clip_method](out.logits_policy)
                return out

        model.world_model.__class__ = Clipping
    wm = model.world_model
    wm.use_policy_logits_clip, wm.policy_logits_clip_method = True, method
    wm.policy_logits_clip_min, wm.policy_logits_clip_max = -0.3, 0.5
    wm.policy_logits_soft_beta = 0.8
    if method == "adaptive":
        wm.register_buffer("policy_logits_running_max", torch.tensor(0.7))
        wm.register_buffer("policy_logits_running_min", torch.tensor(-0.2))
    wm.config = copy.copy(wm.config)
    wm.config.use_policy_logits_clip = True
    return model


@pytest.mark.parametrize("method", METHODS)
def test_clipped_logits_are_torchs(method):
    logits = 2 * np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    clipped = clip.of_model(clipping(method).world_model)
    assert (clipped is None) == (method == "none")
    ours = logits if clipped is None else clipped(logits)
    np.testing.assert_allclose(ours, METHODS[method](torch.from_numpy(logits)), atol=1e-6)


def test_no_clip_where_it_is_off_or_not_known():
    model = clipping("hard").world_model
    model.use_policy_logits_clip = False
    assert clip.of_model(model) is None
    assert clip.of_model(build(torch_encoders.vector()[0]).world_model) is None
    model.use_policy_logits_clip, model.policy_logits_clip_method = True, "other"
    with pytest.raises(ValueError, match="method must be one of hard, soft_tanh"):
        clip.of_model(model)


def test_a_trace_of_clipped_logits_is_verified(tmp_path):
    trace = record(clipping("adaptive"), tmp_path)
    low = float(np.float32(-0.2))
    assert trace.policy_clip == PolicyClip("hard", low, 0.5)
    path = tmp_path / "a.npz"
    assert verify(path).ok
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert not any("running" in name for name in arrays)
    described = json.loads(str(arrays["config"]))
    del described["policy_clip"]
    np.savez(path, **(arrays | {"config": np.array(json.dumps(described))}))
    errors = verify(path).found["max_abs_error"]  # it was the clip that made them equal
    assert min(errors["policy_logits"], errors["sim_policy_logits"]) > 0.1
    assert max(error for name, error in errors.items() if "policy" not in name) < 1e-5
    assert traces.read(path).policy_clip is None
