"""Real LightZero 0.2.0 models for tests, driven without a tree so that runs can be compared."""

import copy
import functools
import types
import warnings

import numpy as np

from kvjax.tools.bench import lightzero_020

SMALL = {
    "observation_size": 4,
    "num_actions": 3,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "context_length": 8,
    "num_envs": 4,
    "num_simulations": 6,
}


@functools.cache
def _built(changes):
    return lightzero_020.build_model(**(SMALL | dict(changes)))


def make(**changes):
    """A model with random weights, the same for the same sizes."""
    import torch

    torch.set_num_threads(1)  # small matrices: a second thread only waits
    with warnings.catch_warnings(action="ignore"):
        built = _built(tuple(sorted(changes.items())))
        return copy.deepcopy(built, {id(x): x for x in _tables_of_heads(built)})


def _tables_of_heads(model):
    """Which tokens a head reads: nearly all tensors of a model, and nobody writes to them."""
    return [part.cache for part in model.modules() if hasattr(part, "compute_slice")]


def with_exact_windows(model, flag):
    """Makes a model compute full windows anew, with the names that LightZero main has for that."""
    import torch

    class ExactWindows(type(model.world_model)):
        def forward(self, tokens, past_keys_values=None, *args, **options):
            if "search_depth" in options and self.rebuild_kv_window_from_tokens:
                ((name, raw),) = tokens.items()
                raw = self.act_embedding_table(raw) if name == "act_tokens" else raw
                self._append_inference_token_context(raw)
            return super().forward(tokens, past_keys_values, *args, **options)

        def _append_inference_token_context(self, raw):
            pairs = zip(self.keys_values_wm_token_context_list, raw, strict=True)
            joined = [torch.cat([old, new.reshape(-1, new.shape[-1])]) for old, new in pairs]
            self.keys_values_wm_token_context_list = joined

        def _prepare_exact_cache_resets(self, latent, lengths):
            full = [row for row, length in enumerate(lengths) if length >= self.context_length - 1]
            if not full:
                return types.SimpleNamespace(cache=None, offsets={}, retained_contexts={})
            kept = latent[full]
            if self.rebuild_kv_window_from_tokens:
                tokens = self.keys_values_wm_token_context_list
                assert len(tokens) == len(latent)
                kept = torch.stack([tokens[row][3 - self.context_length :] for row in full])
            size = {"n": len(full), "max_tokens": self.context_length}
            cache = self.transformer.generate_empty_keys_values(**size)
            self.transformer(kept + self.pos_emb.weight[: kept.shape[1]], past_keys_values=cache)
            offsets = {row: offset for offset, row in enumerate(full)}
            return types.SimpleNamespace(cache=cache, offsets=offsets, retained_contexts={})

    wm = model.world_model
    wm.__class__ = ExactWindows
    wm.exact_kv_window_reset = wm.rebuild_kv_window_from_tokens = False
    setattr(wm, flag, True)
    return model


class Driver:
    """Drives a model as a policy and its tree do, with random parents and actions."""

    def __init__(self, model, rows, seed=0):
        import torch

        self.torch, self.model, self.rows = torch, model, rows
        self.rng = np.random.default_rng(seed)
        self.actions = model.world_model.action_space_size
        self.last = torch.zeros(rows, 4)
        self.steps = 0

    def step(self, simulations=6, first=None, start=None):
        """One root step and its simulations: all outputs, [..] arrays in order."""
        observation = self.torch.tensor(self.rng.normal(size=(self.rows, 4))).float()
        action = self.rng.integers(self.actions, size=self.rows).tolist()
        if self.steps == 0 if first is None else first:
            action = [-1] * self.rows
        time = np.full(self.rows, self.steps) if start is None else start
        with self.torch.no_grad():
            out = self.model.initial_inference(self.last, action, observation, time)
            self.last, self.steps = observation, self.steps + 1
            outputs = [out.value, out.policy_logits, out.latent_state]
            nodes = [out.latent_state.numpy()]
            for simulation in range(simulations):
                out = self.simulate(nodes, simulation, time)
                outputs += [out.value, out.policy_logits, out.latent_state, out.reward]
        return [np.array(x) for x in outputs]

    def simulate(self, nodes, index, time):
        """Expands one node per row, rows at different depths."""
        chosen = self.rng.integers(len(nodes), size=self.rows)
        parents = np.stack([nodes[node][row] for row, node in enumerate(chosen)])
        action = self.torch.tensor(self.rng.integers(self.actions, size=self.rows))
        depth = [1] * self.rows
        with self.torch.no_grad():
            out = self.model.recurrent_inference([(parents, action)], index, depth, time)
        nodes.append(out.latent_state.numpy())
        return out


def difference(ones, others):
    """The largest difference of two lists of outputs."""
    assert len(ones) == len(others)
    return max(float(np.abs(a - b).max()) for a, b in zip(ones, others, strict=True))
