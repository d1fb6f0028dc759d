"""kvfold in Hugging Face transformers: a DeepSeek-V4 model generates with and without it. Runs on a CPU.

python examples/transformers_generate.py
"""

import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config

from kvfold.integrations.transformers import patch, register, unpatch, unregister

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"], "mlp_layer_types": ["moe", "moe"],
    "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "hc_mult": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip

register()  # models that are made from here on are on kvfold; `from_pretrained` goes the same way
model = AutoModelForCausalLM.from_config(DeepseekV4Config(**SMALL)).eval()
unregister()
print(model.model.layers[0].self_attn.compressor)

prompt = torch.randint(1, 128, (2, 300))
with_kvfold = model.generate(prompt, max_new_tokens=40, do_sample=False)
unpatch(model)
without = model.generate(prompt, max_new_tokens=40, do_sample=False)
print("the same tokens:", torch.equal(with_kvfold, without))

patch(model, max_new_tokens=4)  # or one model by itself; with more than 1, drafts can be taken back
print("and beams:", model.generate(prompt, max_new_tokens=8, num_beams=3).shape)
