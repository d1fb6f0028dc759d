"""The demo's model: a small DeepSeek-V4 with seeded random weights and the real geometry of attention and compressors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

HCA, CSA = "heavily_compressed_attention", "compressed_sparse_attention"
LAYER_TYPES = [HCA, CSA, HCA, CSA]


def build_model(seed: int, device: str) -> DeepseekV4ForCausalLM:
    """A byte-level model in fp32. head_dim 512, 64 rotated channels, index_head_dim 128, ratios 128 and 4, top-512
    indexer, sliding window 128 and YaRN are those of DeepSeek-V4; width, heads, experts and depth are small.

    Args:
        seed: of all weights. Uses and restores the global CPU generator.
        device: `"cpu"` or `"cuda"`; weights are drawn on the CPU, so they do not depend on it.
    """
    yarn = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=LAYER_TYPES,
        mlp_layer_types=["moe"] * len(LAYER_TYPES),
        num_attention_heads=2,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=4,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        rope_parameters=yarn,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("position_bias"):
                    parameter.normal_(std=0.5)
                # Scores spread by about 2, so that some tokens of a window matter much more than others; so do logits.
                elif name == "lm_head.weight" or (".compressor" in name and name.endswith("gate_proj.weight")):
                    parameter.normal_(std=2.0 * config.hidden_size**-0.5)
    return model.to(device)


def step(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits `[batch, new, vocab]` of tokens behind those in the cache, which is mutated."""
    return model(tokens, None, None, cache).logits  # by place: its name is not the same in all versions
