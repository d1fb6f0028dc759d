"""Times training calls: forward, backward and both of packed sequences, the forward with fake quantization (`quant`), what they
cost the host, and the memory they need.

python -m benchmarks.run.training --out benchmarks/results/training.jsonl [--only SUBSTRING] [--sweep | --floor]

kv_score and the gradients of entries are bf16, ape and norm_weight fp32, pooled rows are rounded. Each buffer set has inputs
and results of its own, so all is cold. `host` is an eager forward and backward through autograd; `memory` is what such a step
has allocated at most beyond inputs, entries and gradients. --sweep: other rows of the table, one kernel at a time.
--floor: `floor_us` of fwd and bwd, too: what a kernel takes that only reads and writes as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

import kvfold
from kvfold.storage.formats import FORMATS
from kvfold.training import Packing, compress, compress_backward, compress_forward, keys, launch, problem, table
from kvfold.training.variants import TrainingKey

from ..lib import protocol
from ..lib.floor import Traffic, floor_us
from ..lib.table import show
from .overhead import host_us

DEVICE = "cuda"
VARIANTS = ("fwd", "bwd", "both", "quant")
FAKE_QUANT = {512: "fp8_ds_mla", 128: "indexer_mxfp4"}  # of `quant`, by head_dim
BF16 = torch.bfloat16
# What is tried beside the rows of the table, for each kernel: fields that change together.
SWEEP: dict[str, tuple[dict[str, int], ...]] = {
    "forward": (
        *({"num_warps": w, "registers": r, "ahead": a} for w in (2, 4, 8) for r in (0, 64, 128) for a in (4, 8, 16)),
        *({"num_warps": w, "slice": s} for w, s in ((8, 0), (2, 128), (4, 128), (4, 256), (8, 256))),
    ),
    "entries": tuple({"num_warps": w} for w in (2, 4, 8)),
    "again": (
        *({"num_warps": w, "registers": r} for w, r in ((1, 0), (1, 128), (2, 0), (2, 80), (4, 0), (4, 128), (8, 0), (8, 96))),
        *({"groups": g} for g in (128, 256, 384, 512, 768, 1024, 2048)),
        {"fetch": 1},
    ),
    "finish": tuple({"num_warps": w, "groups": g} for w in (2, 4) for g in (64, 128, 256, 512)),
    "spread": (
        *({"rows": r, "num_warps": w} for r, w in ((2, 2), (2, 4), (4, 4), (4, 8), (8, 4), (8, 8), (16, 8))),
        *({"columns": c, "num_warps": w} for c, w in ((128, 1), (128, 2), (256, 2), (256, 4), (512, 4))),
        *({"groups": g} for g in (8, 16, 20, 32, 64)),
    ),
    "sum": tuple({"num_warps": w, "columns": c} for w in (2, 4, 8) for c in (16, 32, 64)),
}


class Spread(NamedTuple):
    """Sequences of one length."""

    batch: int
    tokens: int


@dataclass(frozen=True)
class Case:
    """One compressor of V4 over packed sequences."""

    spec: kvfold.CompressorSpec
    shape: Spread

    @property
    def name(self) -> str:
        return f"train hd{self.spec.head_dim} r{self.spec.ratio} b{self.shape.batch} s{self.shape.tokens}"

    @property
    def tokens(self) -> int:
        return self.shape.batch * self.shape.tokens

    @property
    def capacity(self) -> int:
        return self.tokens // self.spec.ratio

    @property
    def traffic(self) -> tuple[Traffic, Traffic]:
        """What the forward and the backward must move: inputs, entries, gradients, and what is kept; weights aside."""
        rows, entries = self.tokens * self.spec.kv_score_width * 2, self.capacity * self.spec.head_dim * 2
        kept = self.capacity * self.spec.head_dim * 12 * (self.spec.window_rows > 8)
        return Traffic(rows, entries + kept), Traffic(rows + entries + kept, rows)

    @property
    def bytes(self) -> tuple[int, int]:
        forward, backward = self.traffic
        return forward.total, backward.total


def cases() -> list[Case]:
    shapes = Spread(1, 8192), Spread(3, 8192), Spread(1, 65536)
    found = [Case(spec, shape) for spec in (kvfold.V4_HCA, kvfold.V4_CSA, kvfold.V4_INDEXER) for shape in shapes]
    return [*found, Case(kvfold.V4_HCA, Spread(1, 131072))]


class Buffers:
    """Inputs of one set, and the last results of its calls, which stay until the next: else all calls would share memory."""

    def __init__(self, case: Case, packing: Packing, given: dict) -> None:
        self.rows = torch.randn(case.tokens, case.spec.kv_score_width, device=DEVICE).to(BF16)
        self.g = torch.randn(case.capacity, case.spec.head_dim, device=DEVICE).to(BF16)
        self.packing, self.given = packing, given
        self.kept = compress_forward(self.rows, packing, **given).kept
        self.held: list = []

    def run(self, variant: str) -> None:
        held, kept = [], self.kept
        if variant == "quant":
            name = FAKE_QUANT[self.given["spec"].head_dim]
            held = [compress_forward(self.rows, self.packing, **self.given, fake_quant=name)]
        elif variant != "bwd":
            held = [compress_forward(self.rows, self.packing, **self.given)]
            kept = held[0].kept
        if variant in ("bwd", "both"):
            held.append(compress_backward(self.g, self.rows, self.packing, kept, **self.given))
        self.held = held


def weights_of(case: Case) -> dict:
    """Keyword arguments of every call, and a packing."""
    spec = case.spec
    rope = kvfold.reference.rope_table(case.shape.tokens, spec.rope_dim).to(DEVICE)
    weight = torch.ones(spec.head_dim, device=DEVICE)
    return {"spec": spec, "ape": torch.randn(spec.ratio, spec.channels, device=DEVICE), "norm_weight": weight, "rope": rope}


def packing_of(case: Case) -> Packing:
    cu_seqlens = torch.arange(case.shape.batch + 1, dtype=torch.int32, device=DEVICE) * case.shape.tokens
    return Packing.build(cu_seqlens, case.tokens, case.spec.ratio, max_seqlen=case.shape.tokens)


def device_us(case: Case, variants: tuple[str, ...] = VARIANTS) -> dict[str, float]:
    packing, given = packing_of(case), weights_of(case)
    sets = [Buffers(case, packing, given) for _ in range(protocol.buffer_sets(case.bytes[0]))]
    found = {}
    for variant in variants:
        found[variant] = protocol.time_graph([partial(b.run, variant) for b in sets])
        for b in sets:
            b.held = []
        torch.cuda.empty_cache()
    return found


def autograd_step(case: Case) -> Callable[[], None]:
    """An eager step: entries, and the gradients of all inputs."""
    packing, given = packing_of(case), weights_of(case)
    rows = torch.randn(case.tokens, case.spec.kv_score_width, device=DEVICE).to(BF16).requires_grad_()
    g = torch.randn(case.capacity, case.spec.head_dim, device=DEVICE).to(BF16)
    leaves = [rows, given["ape"].requires_grad_(), given["norm_weight"].requires_grad_()]
    return lambda: torch.autograd.grad(compress(rows, packing, **given), leaves, g)


def memory_mb(case: Case) -> float:
    step = autograd_step(case)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    results = case.tokens * case.spec.kv_score_width * 2 + case.capacity * case.spec.head_dim * 2
    return (torch.cuda.max_memory_allocated() - before - results) / 2**20


def other_rows(case: Case) -> Iterator[tuple[str, str, bool]]:
    """The kernel and what changes, with the table changed meanwhile; and whether it is as it was."""
    for kernel in keys_of(case):
        config = table.choose(kernel, case.spec, case.capacity)
        for fields in SWEEP[kernel]:
            changed = replace(config, **fields)
            with_row(changed)
            try:
                yield kernel, " ".join(f"{name}={value}" for name, value in fields.items()), changed == config
            finally:
                without_rows()


def sweep(case: Case) -> list[tuple[str, float]]:
    """Times of the half of a call that a row belongs to, with fields of it changed."""
    found = []
    for kernel, told, as_it_is in other_rows(case):
        variant = "fwd" if kernel == "forward" else "bwd"
        try:
            us = device_us(case, (variant,))[variant]
        except Exception as error:  # a row that does not compile or does not fit is no reason to stop
            print(f"{case.name} {kernel} {told}: {type(error).__name__}", flush=True)
            continue
        print(f"{case.name} {kernel} {told}{' (as it is)' * as_it_is} {variant} {us:.2f} us", flush=True)
        found.append((f"{variant} {kernel} {told}", us))
    return found


def keys_of(case: Case, quantized: bool = False) -> dict[str, TrainingKey]:
    """Of each launch of a step, by its kernel."""
    fmt = FORMATS[FAKE_QUANT[case.spec.head_dim]] if quantized else None
    how = problem.How(case.spec, problem.rounds_rows(None, fmt, BF16), BF16, fmt, False, "")
    return keys.keys_of(how, (BF16, False, torch.float32), case.capacity)


_CONFIGS = table.CONFIGS


def with_row(config: table.Config) -> None:
    table.CONFIGS = (config, *_CONFIGS)
    launch.launches_of.cache_clear()


def without_rows() -> None:
    table.CONFIGS = _CONFIGS
    launch.launches_of.cache_clear()


def main() -> int:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--floor", action="store_true")
    args = parser.parse_args()
    where, rows = protocol.environment(args.commit), []

    def add(case: Case, variant: str, **figures: float) -> None:
        row = {"bench": "training", "case": case.name, "variant": variant, **{k: round(v, 3) for k, v in figures.items()}}
        rows.append(row)
        print(*row.values(), flush=True)
        protocol.append_rows(args.out, [row | where])

    for case in cases():
        if args.only not in case.name:
            continue
        if args.sweep:
            for name, us in sweep(case):
                add(case, name, us=us)
            continue
        floors = {name: floor_us(one) for name, one in zip(("fwd", "bwd"), case.traffic, strict=True)} if args.floor else {}
        for variant, us in device_us(case).items():
            floor = {"floor_us": floors[variant]} if variant in floors else {}
            add(case, variant, us=us, **floor, gb_per_s=sum(case.bytes[slice(*_HALVES[variant])]) / us / 1e3)
        add(case, "host", us=host_us(autograd_step(case)))
        torch.cuda.empty_cache()
        add(case, "memory", mb=memory_mb(case))
        torch.cuda.empty_cache()
    cells = [[row["case"], row["variant"], f"{row.get('us', row.get('mb')):.2f}"] for row in rows]
    show("Training, microseconds per call and megabytes", ("case", "variant", "us or MB"), cells)
    return 0


_HALVES = {"fwd": (0, 1), "bwd": (1, 2), "both": (0, 2), "quant": (0, 1)}

if __name__ == "__main__":
    raise SystemExit(main())
