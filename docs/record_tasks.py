"""Records `tests/data/lightzero_main_task_*.npz`: LightZero's own multi-task model, one task of it.

    PYTHONPATH=../LightZero python docs/record_tasks.py tests/data

LightZero's main branch must be importable. As it is in August 2026, `WorldModelMT` reads attributes
that only `WorldModel` sets; they are set here on the class, to what they are by default.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from lzero.model.unizero_world_models.world_model_multitask import WorldModelMT

from kvjax.lightzero import record_trace

MISSING = ("exact_kv_window_reset", "rebuild_kv_window_from_tokens", "use_new_cache_manager")

OPTIONS = {"none": None, "add": "add_task_embed", "concat": "concat_task_embed"}
TASKS, TASK = 3, 1

SIZES = {
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "group_size": 4,
    "task_embed_dim": 4,
    "tokens_per_block": 2,
    "max_blocks": 4,
    "max_tokens": 8,
    "context_length": 6,
    "action_space_size": 3,
    "support_size": 7,
    "env_num": 3,
    "num_simulations": 5,
    "max_cache_size": 9,
}
OFF = (
    *("rotary_emb", "gru_gating", "continuous_action_space", "analysis_sim_norm", "share_head"),
    *("moe_in_transformer", "multiplication_moe_in_transformer", "use_moe_head"),
    *("use_softmoe_head", "use_policy_logits_clip"),
)
ZERO = (
    *("embed_pdrop", "resid_pdrop", "attn_pdrop", "latent_recon_loss_weight", "lora_r"),
    *("perceptual_loss_weight", "policy_entropy_weight", "dormant_threshold", "gamma"),
    *("predict_latent_loss_type", "analysis_dormant_ratio_weight_rank", "norm_type"),
    "analysis_dormant_ratio",
)


def build(option: str | None, latent_norm: str) -> Any:
    """A model with random weights whose observations are latents."""
    for name in MISSING:
        setattr(WorldModelMT, name, False)
    said: dict[str, Any] = {"task_embed_option": option, "use_task_embed": option is not None}
    said |= {"task_num": TASKS, "use_normal_head": True, "num_experts_in_moe_head": 1}
    said |= {"final_norm_option_in_obs_head": latent_norm, "device": "cpu", "obs_type": "vector"}
    config = EasyDict(SIZES | dict.fromkeys(OFF, False) | dict.fromkeys(ZERO, 0) | said)
    torch.manual_seed(0)
    tokenizer = Tokenizer(encoder=torch.nn.Identity(), decoder=None, with_lpips=False)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        model = WorldModelMT(config, tokenizer)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        if option is not None:
            model.task_emb.weight.mul_(2.0)  # rows longer than 1: LightZero shortens what it reads
    return model.eval()


def main(folder: str) -> None:
    """Writes the traces."""
    for name, option in OPTIONS.items():
        model = build(option, "SimNorm" if name == "add" else "LayerNorm")
        path = Path(folder) / f"lightzero_main_task_{name}.npz"
        record_trace(model, path, steps=8, simulations=5, task_id=TASK)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
