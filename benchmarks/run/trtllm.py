"""Times TensorRT-LLM's operators as kvfold has them, beside `compress` into records: what an engine that calls them pays.

python -m benchmarks.run.trtllm --out benchmarks/results/trtllm.jsonl [--only SUBSTRING]

Four new tokens of each request, which end a window. bf16 kv_score, fp32 pools of 128 rows per page. `ratio` is to the same
work without rows between: `update + compress`, or `compress` where one plan update of the step is for all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import kvfold
from kvfold.integrations import tensorrt_llm
from kvfold.integrations.tensorrt_llm.pooling import paged_kv_compress
from kvfold.integrations.tensorrt_llm.postprocess import FORMATS_BY_TYPE, postprocess_scatter

from ..lib import protocol
from ..lib.protocol import Case

DEVICE = "cuda"
PAGE, RECORDS, NEW = 128, 32, 4  # positions of a page, records of a block, new tokens
SHAPES = ((512, 128), (512, 4), (128, 4))  # head_dim, ratio
CASES = tuple(Case("decode", *shape, batch, NEW, "hit") for shape in SHAPES for batch in (16, 64, 256))
KINDS = (0, 1, 2)  # `cache_scale_type`
# What is timed, and what that is compared with.
TO = {
    "compress": "compress",
    "update + compress": "update + compress",
    "compress_records": "update + compress",
    "compress_records, plan there": "compress",
    "pool": "update + compress",
    "finish": "compress",
    "pool + finish": "update + compress",
    "pool + finish, plan there": "compress",
}


class Inputs:
    """All that the calls of one case share, on `device`: metadata, weights and block tables."""

    def __init__(self, case: Case, kind: int, device: str = DEVICE) -> None:
        self.case, self.kind, self.device = case, kind, device
        batch, ratio, start = case.batch, case.ratio, case.start_positions()
        self.spec = kvfold.CompressorSpec(case.head_dim, ratio, overlap=ratio == 4, hadamard=case.head_dim == 128)
        self.lens = self.ints([at + NEW for at in start])
        self.cu_seq, self.cu_comp = self.ints(range(0, NEW * (batch + 1), NEW)), self.ints(range(batch + 1))
        self.first, self.made = self.ints([at // ratio for at in start]), self.ints([1] * batch)
        self.positions = self.first * ratio
        self.mask = torch.ones(batch, dtype=torch.bool, device=device)
        self.pages = max(start) // PAGE + 1
        self.table = self.ints(range(batch * self.pages)).view(batch, -1)
        self.blocks = self.ints(range(batch))[:, None].contiguous()
        self.ape = torch.randn(ratio, self.spec.channels, device=device)
        self.weight = torch.ones(case.head_dim, dtype=torch.bfloat16, device=device)
        self.rope = kvfold.reference.rope_table(max(start) + NEW, 64).to(device).view(-1, 2, 32)
        self.fmt = kvfold.storage.formats.get_format(FORMATS_BY_TYPE[kind] or "bf16_trtllm")
        self.plan = kvfold.StepPlan.build(
            ratio, None, self.cu_seq, NEW, seq_lens=self.lens, block_tables=(self.table, self.table), page_size=PAGE,
            cache_block_table=self.blocks, rows_per_page=RECORDS,
        )  # fmt: skip

    def ints(self, values: object) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def calls(self) -> tuple[dict[str, Callable[[], None]], torch.Tensor]:
        """One call of each of TO, over a buffer set of its own; and the blocks that they store into."""
        case, spec, batch = self.case, self.spec, self.case.batch
        made = {"dtype": torch.float32, "device": self.device}
        kv, score = (torch.randn(batch * self.pages, PAGE, spec.channels, **made) for _ in range(2))
        kv_score = torch.randn(batch * NEW, 2 * spec.channels, **made).bfloat16()
        output = torch.empty(batch, case.head_dim, dtype=torch.bfloat16, device=self.device)
        cache = torch.zeros(batch, self.fmt.page_bytes(spec, RECORDS), dtype=torch.uint8, device=self.device)
        state, entries = kvfold.WindowState(kv, score), kvfold.EntryCache(cache, self.fmt, RECORDS, spec)
        rest = {"spec": spec, "ape": self.ape, "norm_weight": self.weight, "rope": self.rope.view(-1, 64)}

        def compress() -> None:
            kvfold.compress(kv_score, self.plan, state, entries, **rest)

        def both() -> None:
            self.plan.update(seq_lens=self.lens, cu_seqlens=self.cu_seq)
            compress()

        def records_alone() -> None:
            tensorrt_llm.compress_records(
                kv_score, tensorrt_llm.Pools(kv, score, self.table, self.table, PAGE), cache, ape=self.ape,
                norm_weight=self.weight, norm_eps=1e-6, cos_sin_table=self.rope, kv_lens=self.lens, cu_seq_lens=self.cu_seq,
                block_table=self.blocks, tokens_per_block=RECORDS, cache_scale_type=self.kind, rotate_activation=spec.hadamard,
                max_new_tokens=NEW,
            )  # fmt: skip

        def records() -> None:
            tensorrt_llm.step()
            records_alone()

        def pool_alone() -> None:
            paged_kv_compress(
                kv_score, self.ape, kv, score, self.table, self.table, output, self.lens, self.cu_seq, self.cu_comp,
                batch_size=batch, page_size=PAGE, head_dim=case.head_dim, compress_ratio=case.ratio, next_n=NEW,
            )  # fmt: skip

        def pool() -> None:
            tensorrt_llm.step()
            pool_alone()

        def finish() -> None:
            postprocess_scatter(
                output, None, self.weight, 1e-6, self.rope, self.positions, case.head_dim - 64, 64, cache, self.made,
                self.cu_comp, self.first, self.blocks, compressed_mask=self.mask, tokens_per_block=RECORDS,
                cache_scale_type=self.kind, rotate_activation=spec.hadamard,
            )  # fmt: skip

        def pool_and_finish() -> None:
            pool()
            finish()

        def both_operators_alone() -> None:
            pool_alone()
            finish()

        ways = compress, both, records, records_alone, pool, finish, pool_and_finish, both_operators_alone
        return dict(zip(TO, ways, strict=True)), cache

    def check(self) -> None:
        errors = int(self.plan.errors) + int(tensorrt_llm.errors(self.device))
        if errors:
            raise RuntimeError(f"{self.case.name}: {errors} of the benchmark's own requests or entries were refused")


def calls_of(case: Case, kind: int, device: str = DEVICE, sets: int = 0) -> dict[str, list[Callable[[], None]]]:
    """Of each way one call for each buffer set. sets: other than the protocol wants."""
    inputs = Inputs(case, kind, device)
    size = 4 * case.batch * inputs.spec.channels * 2 * (inputs.spec.window_rows + NEW)
    made = [inputs.calls()[0] for _ in range(sets or protocol.buffer_sets(size))]
    for call in made[0].values():
        call()
    inputs.check()
    return {name: [one[name] for one in made] for name in TO}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    where = protocol.environment(args.commit)
    for case in CASES:
        for kind in KINDS if args.only in case.name else ():
            found = {name: protocol.time_graph(calls) for name, calls in calls_of(case, kind).items()}
            torch.cuda.empty_cache()
            tensorrt_llm.forget()
            name = FORMATS_BY_TYPE[kind] or "bf16_trtllm"
            rows = []
            for way, us in found.items():
                ratio = us / found[TO[way]]
                print(f"{case.name:28s} {name:18s} {way:30s} {us:7.2f} us {ratio:5.2f}", flush=True)
                head = {"bench": "trtllm", "case": case.name, "variant": f"{way}:{name}"}
                rows.append(head | {"us": round(us, 3), "ratio": round(ratio, 3)})
            protocol.append_rows(args.out, [row | where for row in rows])


if __name__ == "__main__":
    main()
