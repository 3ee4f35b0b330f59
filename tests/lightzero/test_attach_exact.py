"""Models that compute full windows anew: every output is that of a full pass over raw tokens."""

import numpy as np
import pytest
from torch_models import make, with_exact_windows

from kvjax import lightzero
from kvjax.tools.bench import lightzero_020

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROWS, CONTEXT, TOLERANCE = 4, 8, 2e-5
KEPT = {"rebuild_kv_window_from_tokens": CONTEXT - 3, "exact_kv_window_reset": 1}


class Checked:
    """Drives an attached model and remembers the raw tokens of every node's context."""

    def __init__(self, flag):
        self.torch = pytest.importorskip("torch")
        self.torch.set_num_threads(1)  # small matrices: a second thread only waits
        self.kept = KEPT[flag]
        self.model = with_exact_windows(make(), flag)
        self.wm = self.model.world_model
        self.handle = lightzero.attach(self.wm, padding="masked")
        self.rng = np.random.default_rng(0)
        self.last = self.torch.zeros(ROWS, 4)
        self.roots = [[] for _ in range(ROWS)]
        self.error = 0.0

    def compare(self, out, contexts, *, imagined):
        """What the model said of its rows, against full passes; what remains of their contexts."""
        wm = self.wm
        for row, tokens in enumerate(contexts):
            sequence = self.torch.stack(tokens) + wm.pos_emb.weight[: len(tokens)]
            hidden = wm.transformer(sequence[None])[0]
            heads = [(out.policy_logits, wm.head_policy, -1), (out.value, wm.head_value, -1)]
            if imagined:
                heads.append((out.latent_state, wm.head_observations, -2))
                heads.append((out.reward, wm.head_rewards, -2))
            for ours, head, token in heads:
                expected = head.head_module(hidden)[token]
                error = (ours[row].reshape(-1) - expected).abs().max()
                self.error = max(self.error, float(error))
        full = CONTEXT - 1
        return [x[-self.kept :] if len(x) >= full else x for x in contexts]

    def encode_last(self):
        with self.torch.no_grad():
            return self.wm.tokenizer.encode_to_obs_embeddings(self.last).reshape(ROWS, -1)

    def embed(self, action):
        return self.wm.act_embedding_table(self.torch.tensor(action)).detach().clone()

    def extend(self, contexts, actions, latents):
        latents = latents.reshape(ROWS, -1)
        joined = zip(contexts, actions, latents, strict=True)
        return [[*old, self.embed(a), new] if a >= 0 else [new] for old, a, new in joined]

    def step(self, restarts=(), simulations=5):
        """A root step in which some rows restart, and its simulations."""
        observation = self.torch.tensor(self.rng.normal(size=(ROWS, 4))).float()
        action = self.rng.integers(3, size=ROWS).tolist()
        action = [-1 if row in restarts else a for row, a in enumerate(action)]
        time = np.zeros(ROWS, int)
        with self.torch.no_grad():
            out = self.model.initial_inference(self.last, action, observation, time)
            latent = out.latent_state.clone()
            contexts = self.extend(self.roots, action, latent)
            self.roots = self.compare(out, contexts, imagined=False)
            self.last = observation
            nodes = [(latent, self.roots)]
            for index in range(simulations):
                nodes.append(self.simulate(nodes, index, time))

    def simulate(self, nodes, index, time):
        parents = [nodes[node] for node in self.rng.integers(len(nodes), size=ROWS)]
        latent = np.stack([latents[row].numpy() for row, (latents, _) in enumerate(parents)])
        action = self.torch.tensor(self.rng.integers(3, size=ROWS))
        out = self.model.recurrent_inference([(latent, action)], index, [1] * ROWS, time)
        contexts = [contexts[row] for row, (_, contexts) in enumerate(parents)]
        latent = out.latent_state.clone()
        contexts = self.extend(contexts, action.tolist(), latent)
        return latent, self.compare(out, contexts, imagined=True)


@pytest.mark.parametrize("flag", KEPT)
def test_outputs_are_those_of_full_passes(flag):
    """Rows restart at different times, so that full and growing windows share batches."""
    checked = Checked(flag)
    for restarts in (range(ROWS), (), (1,), (), (3,), (), (), ()):
        checked.step(restarts)
    assert checked.error < TOLERANCE
    assert checked.handle.stats()["misses"] == 0


@pytest.mark.parametrize("flag", KEPT)
def test_contexts_outlive_a_weight_update_where_tokens_are_kept(flag):
    """Row 0 was cleared, the others have windows of 5, 3 and 5 tokens."""
    checked = Checked(flag)
    for restarts in (range(ROWS), (2,), ()):
        checked.step(restarts, 2)
    checked.wm.past_kv_cache_init_infer_envs[0].clear()
    with checked.torch.no_grad():
        for parameter in checked.model.parameters():
            parameter.mul_(1.1)
        latents = checked.encode_last()
    keeps = flag == "rebuild_kv_window_from_tokens"
    old = [[], *checked.roots[1:]] if keeps else [[]] * ROWS
    assert not keeps or [len(tokens) for tokens in old] == [0, 5, 3, 5]
    checked.roots = [[*x[:-1], new] for x, new in zip(old, latents, strict=True)]
    hits = checked.handle.stats()["root_hits"]
    checked.step()
    stats = checked.handle.stats()
    assert checked.error < TOLERANCE
    assert (stats["rebuilt"], stats["root_hits"] - hits) == (3 if keeps else 0, 0)
    for _ in range(3):
        checked.step()
    assert checked.error < TOLERANCE
    assert checked.handle.stats()["root_hits"] == hits + 3 * ROWS
    checked.last = checked.last + 1  # misses for another reason are not rebuilt
    checked.roots = [[x] for x in checked.encode_last()]
    checked.step(simulations=0)
    assert checked.error < TOLERANCE
    assert checked.handle.stats()["rebuilt"] == stats["rebuilt"]
    checked.handle.on_params_update()
    if not keeps:
        checked.roots = [[x] for x in checked.encode_last()]
    checked.step()
    assert checked.error < TOLERANCE
    assert checked.handle.stats()["rebuilt"] == stats["rebuilt"] + ROWS * keeps


def test_only_rows_that_go_on_are_computed_again():
    checked = Checked("rebuild_kv_window_from_tokens")
    for restarts in (range(ROWS), (2,), ()):
        checked.step(restarts, 2)
    with checked.torch.no_grad():
        for parameter in checked.model.parameters():
            parameter.mul_(1.1)
    latents = checked.encode_last()
    checked.roots = [[*x[:-1], new] for x, new in zip(checked.roots, latents, strict=True)]
    checked.step((0,))
    assert checked.error < TOLERANCE
    assert checked.handle.stats()["rebuilt"] == ROWS - 1
