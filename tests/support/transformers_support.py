"""A small DeepSeek-V4 of transformers, and how the tests call it."""

import copy
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from kvfold.integrations.transformers import patch, unpatch

BOUND = 1e-4
# How a model calls its cache: `past_key_values` before transformers renamed it, which warns of the old name since.
CACHE = "cache" if "cache" in signature(DeepseekV4ForCausalLM.forward).parameters else "past_key_values"
# transformers 5.17 reorders and resets the sliding keys of a cache and forgets its compressors; 5.23 does both.
LAYERS_MOVE = "reorder_cache" in vars(v4.DeepseekV4HCACache)
LAYERS = ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"]
TWO = LAYERS[:2]
NAMES = ((0, "compressor"), (1, "compressor"), (1, "indexer"))


def tiny(dtype=torch.float32, layer_types=None, **changes):
    layer_types = layer_types or LAYERS
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "mlp_layer_types": ["moe"] * len(layer_types),
        "head_dim": 64,
        "partial_rotary_factor": 0.25,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 512,
        "sliding_window": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    } | changes
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position_bias"):
                parameter.normal_()
    return model.to(dtype)


@pytest.fixture
def two_patched():
    """Two layers with a compressor each, patched."""
    made = tiny(layer_types=TWO)
    patch(made, max_new_tokens=5)
    return made


def ids(length, batch=1, seed=1):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, tokens, cuts=(), use_cache=True):
    """Logits of every token, the sequence fed in pieces that end at `cuts`, and the cache."""
    cache = DynamicCache(config=model.config) if use_cache else None
    pieces = torch.tensor_split(tokens.to(model.device), list(cuts), dim=1)
    logits = [model(piece, **{CACHE: cache}, use_cache=use_cache).logits for piece in pieces]
    return torch.cat(logits, dim=1), cache


def theirs(model, *args, **kwargs):
    """The same call on transformers' own compressors."""
    return run(unpatched(model), *args, **kwargs)


def close(got, want, bound=BOUND):
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


def compressors(model):
    """The compressors of a model, in order of its layers."""
    return [layer.self_attn.compressor for layer in model.model.layers if layer.self_attn.compressor is not None]


def step(model, tokens, cache, **options):
    """Logits of tokens that go behind those in the cache."""
    with torch.no_grad():
        return model(tokens, **{CACHE: cache}, **options).logits


def begun(model, tokens):
    """A cache that holds these tokens."""
    cache = DynamicCache(config=model.config)
    step(model, tokens, cache)
    return cache


def unpatched(model):
    """A copy of a patched model without its patch."""
    made = copy.deepcopy(model)
    unpatch(made)
    return made
