"""Training through a compressor: `python examples/train.py`, on a GPU or a CPU.

A layer learns the entries of another one, over sequences of new lengths, packed, in each step. In the end what it makes in
training is what `kvfold.compress` makes in serving, to the bit.
"""

import torch

import kvfold
from kvfold import training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = kvfold.CompressorSpec(head_dim=64, ratio=4, overlap=True)
HIDDEN, TOKENS, STEPS = 32, 192, 60  # width of a hidden state, tokens of a packed step
ROPE = kvfold.reference.rope_table(TOKENS, SPEC.rope_dim).to(DEVICE)
torch.set_num_threads(1)  # on a CPU these tensors are too small to share


class Layer(torch.nn.Module):
    """A projection and what its compressor learns."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(HIDDEN, 2 * SPEC.channels, bias=False)
        self.ape = torch.nn.Parameter(torch.randn(SPEC.ratio, SPEC.channels))
        self.norm_weight = torch.nn.Parameter(torch.ones(SPEC.head_dim))
        self.given = {"spec": SPEC, "ape": self.ape, "norm_weight": self.norm_weight, "rope": ROPE}


torch.manual_seed(0)
with torch.device(DEVICE):
    teacher, layer = Layer(), Layer()
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
for step in range(STEPS):
    ends = torch.randperm(TOKENS - 1)[:5].sort().values + 1
    cu_seqlens = torch.cat([torch.tensor([0]), ends, torch.tensor([TOKENS])]).int().to(DEVICE)  # six sequences
    packing = training.Packing.build(cu_seqlens, TOKENS, SPEC.ratio)  # once for all layers of the ratio
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    with torch.no_grad():
        target = training.compress(teacher.project(hidden), packing, **teacher.given)
    loss = torch.nn.functional.mse_loss(training.compress(layer.project(hidden), packing, **layer.given), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, STEPS - 1):
        print(f"step {step}: loss {loss:.3f}")

with torch.no_grad():
    kv_score = layer.project(hidden)
    trained = training.compress(kv_score, packing, **layer.given)
    # The same step in serving: with a slot of a state and a row of a cache for each sequence and entry.
    start, slots = torch.zeros_like(cu_seqlens[1:]), torch.arange(6, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(len(trained), device=DEVICE)
    plan = kvfold.StepPlan.build(SPEC.ratio, start, cu_seqlens, TOKENS, max_tokens=TOKENS, state_slots=slots, entry_slots=rows)
    cache = kvfold.EntryCache.allocate("fp32", len(rows), 1, SPEC, device=DEVICE)
    kvfold.compress(kv_score, plan, kvfold.FoldState.allocate(SPEC, 6, 1, device=DEVICE), cache, **layer.given)
assert int(plan.errors) == 0 and torch.equal(cache.read(rows), trained), "not the entries of serving"
print(f"the {int(plan.cu_entries[-1])} entries of the last step are those of kvfold.compress, to the bit ({DEVICE})")
