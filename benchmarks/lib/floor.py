"""The floor of a case: how long it takes to move the bytes that a variant must read and write, and nothing else.

`traffic` counts them: each byte once, however many programs want it. `floor_us` measures a kernel that reads and writes as
many, with the timer and the cold buffers of the protocol.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import kvfold
from kvfold.backend_triton.kernels.pdl import wait_for_inputs
from kvfold.backend_triton.launcher import supports_pdl
from kvfold.storage.fold_state import state_kind

from . import protocol
from .protocol import Case, Variant

PAGE_SIZE = 128  # positions per page of WindowState in every benchmark
NEVER = tl.constexpr(-1)
# int32 words per program and its warps: one access of 16 bytes per thread for small sizes, eight for large ones.
ARRANGEMENTS = ((512, 4), (2048, 4), (8192, 8))


class Traffic(NamedTuple):
    """Bytes that must be read and bytes that must be written."""

    read: int
    write: int

    @property
    def total(self) -> int:
        return self.read + self.write


def fold_state(case: Case, spec: kvfold.CompressorSpec, **options: object) -> kvfold.FoldState:
    """The FoldState that a case is measured with: input rows, where it keeps them, in bf16, as kv_score has them."""
    dtype = torch.bfloat16 if state_kind(spec) == "rows" else torch.float32
    return kvfold.FoldState.allocate(spec, max_new_tokens=min(case.new, 8), dtype=dtype, **options)


def held_state(case: Case, spec: kvfold.CompressorSpec, start_pos: torch.Tensor) -> kvfold.FoldState:
    """One in which every slot holds what it would after decoding to its start, at home, with finite rows."""
    state = fold_state(case, spec, num_slots=start_pos.shape[0], device=start_pos.device)
    state.rows.normal_().abs_()
    last = start_pos[:, None] - 1
    if state.kind == "fold":
        held = last - torch.arange(state.ring, dtype=torch.int32, device=start_pos.device)
        state.positions.scatter_(1, held.remainder(state.ring).long(), held.clamp(min=-1))
        return state
    first = 0
    for places in filter(None, state.places):
        window = last // spec.ratio - torch.arange(places, dtype=torch.int32, device=start_pos.device)
        tags = torch.minimum(last, (window + 1) * spec.ratio - 1).where((window >= 0) & (last >= 0), -1)
        state.positions[:, first : first + places].scatter_(1, window.remainder(places).long(), tags)
        first += places
    return state


def traffic(case: Case, variant: Variant, page_size: int = PAGE_SIZE) -> Traffic:
    """The bytes of one call. Weights and tables count once per call, everything else once per sequence.

    The state of the variant may also be "ring", which reads and writes as "window" does, or "none". page_size: of the state.
    """
    starts = Counter(case.start_positions())
    parts = [_plan(case, starts, records=variant.outputs != ("rows",))]
    for spec, output in zip(variant.specs(case), variant.outputs, strict=True):
        if variant.state == "none":
            parts.append(_tokens(case, spec))
        else:
            raw = variant.state in ("window", "ring")
            parts += _window(case, spec, starts, page_size) if raw else _fold(case, spec, starts)
        parts.append(_entries(case, spec, output, starts))
    return _sum(parts)


def stored(case: Case, spec: kvfold.CompressorSpec, output: str) -> Traffic:
    """The bytes of `store` with a plan, but for the rows that it is given."""
    starts = Counter(case.start_positions())
    return _sum([_plan(case, starts, records=True), _entries(case, spec, output, starts)])


def _sum(parts: list[Traffic]) -> Traffic:
    return Traffic(sum(part.read for part in parts), sum(part.write for part in parts))


def _ended(case: Case, start: int) -> range:
    """The windows that end in a step."""
    return range(start // case.ratio, (start + case.new) // case.ratio)


def _plan(case: Case, starts: Counter, records: bool) -> Traffic:
    """Their number, the work items, and where the entries go."""
    items = sum(count * ((start + case.new - 1) // case.ratio - start // case.ratio + 1) for start, count in starts.items())
    entries = sum(count * len(_ended(case, start)) for start, count in starts.items())
    return Traffic(4 + 32 * items + (8 * entries if records else 0), 0)


def _entries(case: Case, spec: kvfold.CompressorSpec, output: str, starts: Counter) -> Traffic:
    """Norm weight and rotations, and what is stored of every entry."""
    entries = sum(count * len(_ended(case, start)) for start, count in starts.items())
    if output == "rows" or not entries:
        return Traffic(0, entries * spec.head_dim * 2)
    fmt = kvfold.storage.formats.get_format(output)
    windows = {window for start in starts for window in _ended(case, start)}
    record = fmt.record_bytes(spec) - (0 if fmt.pad_written else fmt.pad)
    return Traffic(spec.head_dim * 4 + len(windows) * spec.rope_dim * 4, entries * record)


def _tokens(case: Case, spec: kvfold.CompressorSpec) -> Traffic:
    """Every new row of kv_score, in bf16."""
    return Traffic(case.batch * case.new * spec.kv_score_width * 2, 0)


def _bias_of_tokens(case: Case, spec: kvfold.CompressorSpec, starts: Counter) -> Traffic:
    """The rows of ape that any new token is biased with."""
    if not spec.has_ape:
        return Traffic(0, 0)
    places = {(start + i) % spec.ratio for start in starts for i in range(min(case.new, spec.ratio))}
    return Traffic(len(places) * spec.channels * 4, 0)


def _old_halves(case: Case, spec: kvfold.CompressorSpec, start: int) -> int:
    """Half rows (head_dim wide) from before the step that its entries are made of."""
    count = 0
    for window in _ended(case, start):
        first = [window, window - 1] if spec.overlap and window else [window]
        count += sum(min(max(start - w * spec.ratio, 0), spec.ratio) for w in first)
    return count


def _fold(case: Case, spec: kvfold.CompressorSpec, starts: Counter) -> list[Traffic]:
    """kv_score, ape, and the rows and tags of a FoldState."""
    state = fold_state(case, spec, num_slots=1, device="meta")
    row = state.rows[0, 0].numel() * state.rows.element_size()
    parts = [_tokens(case, spec)]
    for start, count in starts.items():
        end, (window, inside) = start + case.new, divmod(start, spec.ratio)
        if state.kind == "fold":
            # The row of a window's last token is never read again, so only its tag is written.
            stored = range(max(start, end - state.ring), end)
            kept = sum(1 for x in stored if x % spec.ratio != spec.ratio - 1)
            read, tags, written = row * len(state.history_of(start)), len(state.history_of(start)), len(stored)
        else:
            read, tags, kept, written = row * _old_halves(case, spec, start), int(spec.overlap and window > 0), 0, 0
            for places, rows in zip(state.places, (spec.ratio, spec.ratio - 1), strict=True):
                last = (end - 1) // spec.ratio
                windows = {*range(max(window, last - places // 2 + 1), last + 1)} | ({window} if inside else set())
                tags, written = tags + (places > 0 and inside > 0), written + (places > 0) * len(windows)
                there = (x for x in range(start, end) if places and x // spec.ratio in windows)
                kept += sum(1 for x in there if x % spec.ratio < rows)
        parts.append(Traffic(count * (read + 4 * tags), count * (kept * row + 4 * written)))
    if state.kind == "fold":
        parts.append(_bias_of_tokens(case, spec, starts))
    elif spec.has_ape:  # the rows are kept without bias: only entries need it
        halves = {half for start in starts for w in _ended(case, start) for half in (0, int(spec.overlap and w > 0))}
        parts.append(Traffic(len(halves) * spec.ratio * spec.head_dim * 4, 0))
    return parts


def _window(case: Case, spec: kvfold.CompressorSpec, starts: Counter, page_size: int) -> list[Traffic]:
    """kv_score, ape, and the pages and block tables of a WindowState in fp32."""
    parts = [_tokens(case, spec), _bias_of_tokens(case, spec, starts)]
    for start, count in starts.items():
        ended = _ended(case, start)
        first = max(ended[0] - int(spec.overlap), 0) * spec.ratio if ended else start
        pages = (start + case.new - 1) // page_size - first // page_size + 1
        read = _old_halves(case, spec, start) * 2 * spec.head_dim * 4 + pages * 2 * 4
        parts.append(Traffic(count * read, count * case.new * 2 * spec.channels * 4))
    return parts


@triton.jit
def move_kernel(src, dst, read_words, write_words, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Reads and writes int32 words, 16 bytes at a time; what is written depends on what was read, as it does in a step."""
    wait_for_inputs(PDL)
    lane = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0) * BLOCK
    stride = tl.num_programs(0) * BLOCK
    for at in range(first, read_words, stride):
        held ^= tl.load(src + at + lane, mask=at + lane < read_words, other=0)
    for at in range(first, write_words, stride):
        tl.store(dst + at + lane, held, mask=at + lane < write_words)
    # Programs that only read must not be optimized away; the words are not negative, so this stores nothing.
    tl.store(dst + lane, held, mask=held == NEVER)


def move(
    src: torch.Tensor, dst: torch.Tensor, read_bytes: int, write_bytes: int, block: int, warps: int, dependent: bool = False
) -> Callable[[], None]:
    """A call that reads and writes so many bytes, rounded up to 64. `src` is int32 and not negative."""
    read_words, write_words = _words(read_bytes), _words(write_bytes)
    programs = triton.cdiv(max(read_words, write_words), block)
    if src.is_cuda:  # as many threads as the device can hold at once, which then stride
        programs = min(programs, torch.cuda.get_device_properties(src.device).multi_processor_count * 64 // warps)
    options = {"launch_pdl": True} if dependent else {}
    grid = (max(programs, 1),)
    return lambda: move_kernel[grid](src, dst, read_words, write_words, BLOCK=block, PDL=dependent, num_warps=warps, **options)


def _words(count: int) -> int:
    """int32 words of so many bytes, a multiple of 16: a mask then never cuts a 16-byte access."""
    return -(-count // 64) * 16


@lru_cache
def floor_us(bytes_moved: Traffic, dependent: bool = True) -> float:
    """Microseconds per call, cold, of the fastest arrangement.

    Args:
        dependent: also try dependent launch, where there is one; leave it out beside calls that run without.
    """
    return chain_us((bytes_moved,), dependent)


@lru_cache
def chain_us(launches: tuple[Traffic, ...], dependent: bool = True) -> float:
    """Microseconds, cold, of launches one after the other that move so many bytes each, by the fastest arrangement."""
    can = dependent and supports_pdl(torch.device("cuda"))
    sets = protocol.buffer_sets(sum(one.total for one in launches))
    buffers = [[_buffers(one, "cuda") for one in launches] for _ in range(sets)]
    return min(
        protocol.time_graph([chain(own, launches, block, warps, launch) for own in buffers])
        for block, warps in ARRANGEMENTS
        for launch in ((False, True) if can else (False,))
    )


def chain(
    buffers: list[tuple[torch.Tensor, torch.Tensor]], launches: tuple[Traffic, ...], block: int, warps: int, dependent: bool
) -> Callable[[], None]:
    """`move` of each of the launches, over buffers of its own. It is arranged so where it is large, else as is best."""
    most = max(one.total for one in launches)
    shapes = [(block, warps) if 4 * one.total >= most else ARRANGEMENTS[0] for one in launches]
    moves = [move(*own, *one, *how, dependent) for own, one, how in zip(buffers, launches, shapes, strict=True)]

    def call() -> None:
        for one in moves:
            one()

    return moves[0] if len(moves) == 1 else call


def _buffers(bytes_moved: Traffic, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and destination, which has room for what any arrangement may store."""
    src = torch.randint(1 << 30, (_words(bytes_moved.read),), dtype=torch.int32, device=device)
    return src, torch.empty(
        max(_words(bytes_moved.write), max(block for block, _ in ARRANGEMENTS)), dtype=torch.int32, device=device
    )
