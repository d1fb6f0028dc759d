"""DeepSeek-V4 in SGLang on kvfold: `python examples/sglang_plugin.py MODEL [pools|fold]` on GPUs; without arguments on a CPU.

With a model it starts SGLang with kvfold switched on and completes a sentence. Without, it shows what `fold` is about, and
needs no SGLang: a request is prefilled in one pool, sent to another slot of another one, and goes on there with drafts of which
half are rejected; a second request starts behind the pages of the first.
"""

import os
import sys

import torch

import kvfold
from kvfold.integrations.sglang import FoldStatePool

PAGE, TEXT, DRAFTS = 256, 700, 3
SPEC = kvfold.V4_CSA


def generate(model: str, state: str) -> None:
    # Read by kvfold's entry point in each process that SGLang starts, so set before any is.
    os.environ |= {"KVFOLD_ENGINES": f"sglang:{state}"}
    import sglang

    engine = sglang.Engine(model_path=model, trust_remote_code=True)
    print(engine.generate("The KV cache of a long text", {"max_new_tokens": 64, "temperature": 0})["text"])
    engine.shutdown()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


text = torch.randn(TEXT, SPEC.kv_score_width, generator=torch.Generator().manual_seed(1))  # stands for the projection
ape, errors = torch.zeros(SPEC.ratio, SPEC.channels), ints(0)


def step(pool: FoldStatePool, slot: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
    """New tokens of the request in a slot; the entries that end in them, pooled."""
    pages = torch.arange(3, dtype=torch.int32)[None]  # SGLang's: where each 256 positions of the request are
    plan = kvfold.StepPlan.build(
        SPEC.ratio,
        ints(start),
        ints(0, len(tokens)),
        len(tokens),
        state_slots=ints(slot),
        snapshot_table=pages,
        snapshot_page_size=PAGE,
        errors=errors,
    )
    rows, rest = torch.zeros(plan.entry_capacity, SPEC.head_dim), {"spec": SPEC, "norm_weight": None, "rope": None}
    kvfold.compress(tokens, plan, pool.state, None, ape=ape, **rest, rows=rows, snapshots=pool.snapshots)
    return rows[: int(plan.cu_entries[-1])]


def show() -> None:
    prefill, decode = (FoldStatePool(SPEC, 8, 1 + DRAFTS, num_pages=16, page_size=PAGE) for _ in range(2))
    whole = step(prefill, 5, 0, text)

    step(prefill, 2, 0, text[:600])
    sent, got = prefill.transfer_indices(2, 600), decode.transfer_indices(7, 600)
    decode.slot_rows[got] = prefill.slot_rows[sent]
    print(f"sent: slot {sent[0]} to slot {got[0]}, {prefill.buf_infos()[2][0]:,} bytes")

    at, rows = 600, []
    while at < 660:
        drafts = torch.cat([text[at : at + 2], torch.zeros(2, SPEC.kv_score_width)])  # the last two are wrong
        rows.append(step(decode, 7, at, drafts)[: (at + 2) // 4 - at // 4])
        at += 2  # and rejected: nothing more to do
    print("decoded with rejected drafts, to the bit:", torch.equal(torch.cat(rows), whole[150:165]))

    prefill.on_prefix_hit(ints(3), ints(1), ints(2 * PAGE), errors)
    rows = step(prefill, 3, 2 * PAGE, text[2 * PAGE :])
    print("behind two shared pages, to the bit:", torch.equal(rows, whole[2 * PAGE // 4 :]), "- refused:", int(errors))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        generate(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "pools")
    else:
        show()
