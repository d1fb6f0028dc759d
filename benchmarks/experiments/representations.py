"""Times the two states that a ratio-4 compressor with overlap could keep: input rows, as kvfold does, and fold rows.

python -m benchmarks.experiments.representations --out benchmarks/results/representations.jsonl

A fold row is the state after a position: the fold of the entry that its window makes (`cur`) and, begun by the lo halves of its
window, that of the next entry (`next`). After the last position of a window `next` has become `cur`, and that is all there is.
Input rows are folded in groups of 4, fold rows token by token, so both give the same entries up to fp32 rounding: of the values
stored at most one in a thousand is another, by one step of e4m3. That is checked before anything is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import kvfold
from kvfold.backend_triton.args import Output, Plan, flat
from kvfold.backend_triton.kernels.finish import emit, entry_address, slot_valid
from kvfold.backend_triton.kernels.fold import empty_fold, fold_step, spread
from kvfold.backend_triton.kernels.pdl import wait_for_inputs
from kvfold.backend_triton.launcher import supports_pdl

from ..lib import floor, protocol, table
from ..lib.calls import Step, Weights, calls_of
from ..lib.constants import constants
from ..lib.protocol import Case, Variant

FORMATS = {512: "fp8_ds_mla", 128: "indexer_fp8_vllm"}  # the 584-byte record is for 512 channels only
WARPS = {512: (4, 8), 128: (1, 2)}  # all are tried, the fastest is what counts
COLUMNS = ("case", "variant", "us", "bytes", "state_bytes")
DRAFTS = 4  # for which the size of the state is given
CHECKED = ((4, 1, 4), (1, 4, 4), (1, 1, 1), (4, 4, 1), (4, 1, 4), (1, 1, 1), (1, 4, 4), (4, 4, 4))  # new tokens in each step


class FoldRows(NamedTuple):
    """The state: `cur` then `next`, each (m, l, a), fp32 `[slots, ring + 1, 6, head_dim]`; int32 tags `[slots, ring + 1]`.

    Position x lives at `x % ring`. The spare row is that of a `FoldState` of kind "fold"; short steps never use it.
    """

    rows: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def allocate(cls, spec: kvfold.CompressorSpec, num_slots: int, max_new_tokens: int, device: str | None = None) -> FoldRows:
        rows = torch.zeros(num_slots, max_new_tokens + 2, 6, spec.head_dim, device=device)
        return cls(rows, torch.full(rows.shape[:2], -1, dtype=torch.int32, device=device))

    @property
    def bytes_per_slot(self) -> int:
        return 4 * (self.rows[0].numel() + self.positions[0].numel())


@triton.jit
def load_each(
    base, stride, start, end, other, OFFSET: tl.constexpr, WRAP: tl.constexpr, NEW: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Channels `[OFFSET, OFFSET + HEAD_DIM)` of row x of `base`, or of row x % WRAP, for each new position x."""
    found = ()
    for i in tl.static_range(NEW):
        x = start + i
        at = base + (x % WRAP if WRAP else x).to(tl.int64) * stride + OFFSET + tl.arange(0, HEAD_DIM)
        found = found + (tl.load(at, mask=spread(x < end, HEAD_DIM), other=other).to(tl.float32),)
    return found


@triton.jit
def load_fold(row, wanted, HEAD_DIM: tl.constexpr):
    """Three rows (m, l, a), or the empty fold."""
    at = row + tl.arange(0, HEAD_DIM)
    there = spread(wanted, HEAD_DIM)
    m, l, a = empty_fold(HEAD_DIM)
    m = tl.load(at, mask=there, other=m)
    l = tl.load(at + HEAD_DIM, mask=there, other=l)
    return m, l, tl.load(at + 2 * HEAD_DIM, mask=there, other=a)


@triton.jit(
    do_not_specialize=("plan_entry_capacity", "ring", "output_max_position", "output_rows_per_page", "output_num_slots")
)
def fold_rows_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    start_pos, cu_seqlens, state_slots, cu_entries, kv_score, kv_stride, ape, state_rows, state_tags, ring,
    NEW: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """One sequence: at most NEW <= ratio new tokens, so at most one entry. Every sequence must have tokens and a slot."""
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    RATIO: tl.constexpr = SPEC.RATIO
    HEAD_DIM: tl.constexpr = SPEC.HEAD_DIM
    b = tl.program_id(0)
    start = tl.load(start_pos + b)
    token = tl.load(cu_seqlens + b)
    end = start + tl.load(cu_seqlens + b + 1) - token
    slot = tl.load(state_slots + b).to(tl.int64)
    window = start // RATIO
    entry = tl.where(end // RATIO > window, tl.load(cu_entries + b), -1)
    cache_slot, weight, cos, sin = entry_address(entry, window * RATIO, plan, output, SPEC)
    lo_bias = load_each(ape, 2 * HEAD_DIM, start, end, 0.0, 0, RATIO, NEW, HEAD_DIM)
    hi_bias = load_each(ape, 2 * HEAD_DIM, start, end, 0.0, HEAD_DIM, RATIO, NEW, HEAD_DIM)
    tags = state_tags + slot * (ring + 1)
    state = state_rows + slot * (ring + 1) * (6 * HEAD_DIM)
    home = tl.maximum(start - 1, 0) % ring
    live = kv_score + (token - start).to(tl.int64) * kv_stride
    wait_for_inputs(HOW.PDL)
    tag = tl.load(tags + home)
    m, l, a = load_fold(state + home * (6 * HEAD_DIM), start > 0, HEAD_DIM)
    next_m, next_l, next_a = load_fold(state + home * (6 * HEAD_DIM) + 3 * HEAD_DIM, start % RATIO != 0, HEAD_DIM)
    lo_k = load_each(live, kv_stride, start, end, -0.0, 0, 0, NEW, HEAD_DIM)
    hi_k = load_each(live, kv_stride, start, end, -0.0, HEAD_DIM, 0, NEW, HEAD_DIM)
    lo_s = load_each(live, kv_stride, start, end, float("-inf"), 2 * HEAD_DIM, 0, NEW, HEAD_DIM)
    hi_s = load_each(live, kv_stride, start, end, float("-inf"), 3 * HEAD_DIM, 0, NEW, HEAD_DIM)
    held = (start == 0) | (tag == start - 1)
    entry_l, entry_a = l, a
    for i in tl.static_range(NEW):
        x = start + i
        next_m, next_l, next_a = fold_step(next_m, next_l, next_a, lo_k[i], lo_s[i] + lo_bias[i])
        m, l, a = fold_step(m, l, a, hi_k[i], hi_s[i] + hi_bias[i])
        inside = x % RATIO != RATIO - 1
        if inside == 0:
            entry_l, entry_a = l, a
            m, l, a = next_m, next_l, next_a
            next_m, next_l, next_a = empty_fold(HEAD_DIM)
        if held & (x < end):
            row = state + (x % ring) * (6 * HEAD_DIM) + tl.arange(0, HEAD_DIM)
            kept = (m, l, a, next_m, next_l, next_a)
            for j in tl.static_range(6):
                tl.store(row + j * HEAD_DIM, kept[j], mask=spread(inside | (j < 3), HEAD_DIM))
            tl.store(tags + x % ring, x)
    deliver, refused = slot_valid(entry, cache_slot, window * RATIO, plan.entry_capacity, output, SPEC.ROPE_DIM)
    if held & deliver:
        emit(entry_a / entry_l, entry, cache_slot, weight, cos, sin, output, SPEC, FMT, HOW.TARGET)
    if (held == 0) | refused:
        tl.atomic_add(plan.errors, 1)


def compress_fold_rows(
    kv_score: torch.Tensor, plan: kvfold.StepPlan, state: FoldRows, cache: kvfold.EntryCache, weights: Weights, warps: int = 4
) -> None:
    """What `kvfold.compress` does, with this state. The plan must not be the latest launch on the stream."""
    pdl, rope, pages, per_page = supports_pdl(kv_score.device), weights.rope, cache.pages, cache.rows_per_page
    work = Plan(None, None, plan.entry_slots, plan.entry_capacity, plan.errors)
    output = Output(
        None,
        None,
        weights.norm_weight,
        rope,
        rope.shape[0],
        pages,
        pages.stride(0),
        None,
        0,
        per_page,
        pages.shape[0] * per_page,
        None,
    )
    fold_rows_kernel[(plan.batch,)](
        *flat((work, output)), plan.start_pos, plan.cu_seqlens, plan.state_slots, plan.cu_entries,
        kv_score, kv_score.stride(0), weights.ape, state.rows, state.positions, state.rows.shape[1] - 1,
        NEW=plan.max_new_tokens, **constants(cache.spec, cache.format, pdl),
        num_warps=warps, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def check_records(spec: kvfold.CompressorSpec, warps: int, device: str = "cuda") -> int:
    """How many records of three sequences, from their start on, both states give; raises RuntimeError if they differ.

    A value may be a step of e4m3 off, which is at most an eighth of it, or near zero 2^-9 of a scale that is at most
    amax / 224. Pooled rows differ by about 1e-7, and so cross a threshold once in 1e5 values.
    """
    ape, norm_weight = torch.randn(spec.ratio, spec.channels), torch.rand(spec.head_dim) + 0.5
    weights = Weights(*(t.to(device) for t in (ape, norm_weight, kvfold.reference.rope_table(64, spec.rope_dim))))
    rows = kvfold.FoldState.allocate(spec, 3, 4, device=device, dtype=torch.bfloat16)
    folds = FoldRows.allocate(spec, 3, 4, device)
    caches = [kvfold.EntryCache.allocate(FORMATS[spec.head_dim], 3, 8, spec, device=device) for _ in range(2)]
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    start, made = torch.zeros(3, dtype=torch.int32), 0
    for i, new in enumerate(CHECKED):
        offsets = torch.tensor([0, *new]).cumsum(0).int()
        options = {"state_slots": slots, "cache_block_table": slots[:, None].contiguous(), "rows_per_page": 8}
        plan = kvfold.StepPlan.build(spec.ratio, start.to(device), offsets.to(device), max(new), **options)
        kv_score = torch.randn(sum(new), 2 * spec.channels, device=device).bfloat16()
        for cache in caches:
            cache.storage.fill_(0xA5)
        kvfold.compress(kv_score, plan, rows, caches[0], spec=spec, **weights._asdict(), backend="triton")
        compress_fold_rows(kv_score, plan, folds, caches[1], weights, warps)
        one, two = (cache.read(torch.arange(24, device=device)) for cache in caches)
        step = torch.maximum(one.abs(), two.abs()) / 8 + one.abs().amax(dim=1, keepdim=True) / (224 * 512)
        within = ((one - two).abs() <= step).all() and (one != two).sum() * 1000 <= one.numel()
        if int(plan.errors) or not bool(within):
            raise RuntimeError(f"the two states differ at {start.tolist()} with {new} new tokens ({int(plan.errors)} refused)")
        made += int(plan.cu_entries[-1])
        # After every other step all tokens but one are rejected.
        start += 1 if i % 2 else torch.tensor(new, dtype=torch.int32)
    return made


def traffic(case: Case, variant: Variant) -> floor.Traffic:
    """The bytes of one call with fold rows, counted as `floor.traffic` counts those with input rows."""
    starts, spec, fold = Counter(case.start_positions()), case.spec, 3 * 4 * case.head_dim
    (start,) = starts  # in these cases all sequences stand at the same position
    ended = (start + case.new) // case.ratio - start // case.ratio
    read = 4 * 4 + 8 * ended + 4 + fold * (2 if start % case.ratio else 1)  # plan, slot of the entry, tag, row
    own = floor.Traffic(case.batch * read, case.batch * (4 * case.new + fold * (2 * case.new - ended)))
    entries = floor._entries(case, spec, variant.outputs[0], starts)
    parts = (own, floor._tokens(case, spec), floor._bias_of_tokens(case, spec, starts), entries)
    return floor.Traffic(*(sum(column) for column in zip(*parts, strict=True)))


def fold_rows_calls(case: Case, variant: Variant, warps: int, sets: int, device: str = "cuda") -> list[Callable[[], None]]:
    """One checked call for each buffer set; every slot holds the row before the step, with finite numbers."""
    step, calls = Step(case, variant, device), []
    last = step.start_pos - 1
    for _ in range(sets):
        (b,) = step.buffers()
        state = FoldRows.allocate(case.spec, case.batch, case.new, device)
        state.rows.normal_().abs_()
        state.positions.scatter_(1, (last % (case.new + 1)).long()[:, None], last[:, None])
        args = (b.kv_score, step.plan, state, b.cache, step.weights[0], warps)
        calls.append(lambda args=args: compress_fold_rows(*args))
    step.check(calls[0])
    return calls


def measure(case: Case) -> list[dict]:
    """The result rows of a case: input rows, then fold rows."""
    variant, spec, most = Variant.parse(f"fold:{FORMATS[case.head_dim]}"), case.spec, DRAFTS + 1
    rows_us, moved = protocol.time_graph(calls_of(case, variant)), traffic(case, variant).total
    sets = protocol.buffer_sets(moved)
    folds_us = min(protocol.time_graph(fold_rows_calls(case, variant, warps, sets)) for warps in WARPS[case.head_dim])
    rows, folds = kvfold.FoldState.allocate(spec, 1, most, dtype=torch.bfloat16), FoldRows.allocate(spec, 1, most)
    figures = (
        ("rows", rows_us, floor.traffic(case, variant).total, rows.bytes_per_slot),
        ("fold-rows", folds_us, moved, folds.bytes_per_slot),
    )
    values = [(case.name, f"{name}:{variant.outputs[0]}", round(us, 3), *sizes) for name, us, *sizes in figures]
    return [dict(zip(COLUMNS, value, strict=True)) for value in values]


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    where, cells = protocol.environment(args.commit), []
    for head_dim, all_warps in WARPS.items():
        for warps in all_warps:
            made = check_records(Case("decode", head_dim, 4, 1, 1).spec, warps)
            print(f"head_dim {head_dim}, {warps} warps: {made} records agree", flush=True)
        for (new, mode), batch in product(((1, "hit"), (1, "miss"), (4, "hit")), (16, 64, 256)):
            rows = measure(Case("decode", head_dim, 4, batch, new, mode))
            torch.cuda.empty_cache()
            protocol.append_rows(args.out, [{"bench": "representations"} | row | where for row in rows])
            cells += [[str(row[name]) for name in COLUMNS] for row in rows]
            print(*cells[-2:], sep="\n", flush=True)
    table.show("Two states for ratio 4: microseconds and bytes per step, bytes per slot (4 drafts)", COLUMNS, cells)


if __name__ == "__main__":
    main()
