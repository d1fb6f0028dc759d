"""What `verify` is made of beside kvfold's own calls: inputs, judgements on results, and the steps of `--random`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .. import reference
from ..backend_torch.finish import finish
from ..contract import pooled_bound
from ..debug.check import EPILOGUE
from ..debug.compare import Difference, bytes_of, explained, off, put_bytes
from ..debug.exact import exact_rows
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.formats import FORMATS
from ..storage.pack import bf16_bits
from ..storage.window_state import WindowState

UNTOUCHED = 0xA5  # what a cache holds before
UNWRITTEN = 7.0  # what `rows` holds before a call; no pooled row is the same in all channels
Device = torch.device | str
Pages = Sequence[Sequence[int]]
Step = tuple[int, tuple[tuple[int, int, int, int], ...], tuple[int, ...], int, bool]  # the fields of `verify_random.Step`


class Mismatch(Exception):
    """Something is not what it must be; the text says what and where."""


def make_tokens(
    spec: CompressorSpec, lengths: list[int], values: str, draw: torch.Generator, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """kv_score rows `[n, 2 * channels]` of each sequence.

    values: "normal"; "peaked", scores of which one outweighs the rest; "tied", all scores 0; "masked", many scores -inf, but
    not all of a window; "hidden", more of them, and so entries that are NaN; "zeros", masked too, and half of all channels
    only 0 and -0, mostly -0.
    """
    found = []
    for n in lengths:
        k, s = torch.randn(n, 2 * spec.channels, generator=draw).split(spec.channels, dim=1)
        mask = torch.rand(s.shape, generator=draw) < {"masked": 0.5, "zeros": 0.4, "hidden": 0.7}.get(values, 0)
        if values != "hidden":
            mask[:: spec.ratio] = False
        s = torch.zeros_like(s) if values == "tied" else 8 * s if values == "peaked" else s
        if values == "zeros":
            zeros = torch.where(torch.rand(k.shape, generator=draw) < 0.9, -0.0, 0.0)
            k = torch.where(torch.rand(spec.channels, generator=draw) < 0.5, zeros, k)
        found.append(torch.cat((k, s.masked_fill(mask, -torch.inf)), dim=1).to(device, dtype))
    return found


def make_weights(
    spec: CompressorSpec, length: int, values: str, draw: torch.Generator, norm_dtype: torch.dtype, device: Device
) -> dict[str, CompressorSpec | Tensor | None]:
    """spec, ape, norm_weight and rope, as `compress` takes them; `length`: tokens of the longest sequence."""
    ape = torch.randn(spec.ratio, spec.channels, generator=draw) * (values != "tied")
    norm_weight = (1 + 0.2 * torch.randn(spec.head_dim, generator=draw)).to(device, norm_dtype)
    rope = reference.rope_table(length + 1, spec.rope_dim).to(device) if spec.rope_dim else None
    return {"spec": spec, "ape": ape.to(device) if spec.has_ape else None, "norm_weight": norm_weight, "rope": rope}


def make_state(spec: CompressorSpec, slots: int, max_new_tokens: int, dtype: torch.dtype, device: Device) -> FoldState:
    """A `FoldState` whose rows are NaN."""
    state = FoldState.allocate(spec, slots, max_new_tokens, dtype=dtype, device=device)
    state.rows.fill_(torch.nan)
    return state


def make_pools(
    spec: CompressorSpec, pages: int, page_size: int, dtype: torch.dtype, device: Device, *, joined: bool = False
) -> WindowState:
    """A `WindowState` of NaN. joined: both pools are columns of one tensor."""
    if not joined:
        return WindowState(*torch.full((2, pages, page_size, spec.channels), torch.nan, dtype=dtype, device=device).unbind(0))
    pool = torch.full((pages, page_size, 2 * spec.channels), torch.nan, dtype=dtype, device=device)
    return WindowState(pool[..., : spec.channels], pool[..., spec.channels :])


def make_cache(
    fmt: str, spec: CompressorSpec, pages: int, rows_per_page: int, device: Device, *, scale: float = 1.0, gap: int = 0
) -> EntryCache:
    """A cache of bytes `UNTOUCHED`, `gap` more of them behind each page."""
    known = FORMATS[fmt]
    sizes = known.page_bytes(spec, rows_per_page), rows_per_page * known.tail_bytes(spec)
    wide = [torch.full((pages, size + gap), UNTOUCHED, dtype=torch.uint8, device=device)[:, :size] for size in sizes]
    return EntryCache(wide[0], known, rows_per_page, spec, scales=wide[1] if known.separate else None, scale=scale)


@dataclass
class Run:
    """Where a run of a case keeps things. Tables are by sequence, and -1 stands for no page.

    Attributes:
        slots: of a `FoldState`. kv, score: pages of a `WindowState`, instead; `freed`: those that a step does not need are -1.
        pages: of the cache. entries: what plans are given of them, "table", "slots" or "none".
    """

    spec: CompressorSpec
    lengths: list[int]
    device: str
    slots: list[int]
    pages: Pages
    rows_per_page: int
    entries: str
    kv: Pages = ()
    score: Pages = ()
    page_size: int = 0
    freed: bool = False
    snapshots: Pages = ()
    snapshot_page_size: int = 0

    @property
    def entry_slots(self) -> list[list[int]]:
        """The cache slot of each window, by sequence; -1 where it has no page."""
        return [self.slots_of(b, range(n // self.spec.ratio)) for b, n in enumerate(self.lengths)]

    def slots_of(self, sequence: int, windows: range) -> list[int]:
        found = [(self.pages[sequence][w // self.rows_per_page], w % self.rows_per_page) for w in windows]
        return [-1 if page < 0 else page * self.rows_per_page + row for page, row in found]

    def ints(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def table(self, pages: Pages, step: Step) -> Tensor:
        """Pages of the sequences of a step, -1 behind the last one of each."""
        rows = [*(pages[b] for b, *_ in step[1]), *[()] * len(step[2])]
        width = max(1, *map(len, rows))
        return self.ints([[*row, *[-1] * (width - len(row))] for row in rows])

    def plan(self, step: Step) -> StepPlan:
        bound, parts, absent, _, loose = step
        ratio, lengths = self.spec.ratio, [*(new for _, _, new, _ in parts), *absent]
        options: dict = {}
        if self.page_size:
            options = {"block_tables": (self.table(self.kv, step), self.table(self.score, step)), "page_size": self.page_size}
            for pages in options["block_tables"] if self.freed else ():
                for i, (_, start, _, _) in enumerate(parts):
                    needed = (start // ratio - int(self.spec.overlap)) * ratio // self.page_size
                    pages[i, : max(needed, 0)] = -1
        else:
            options["state_slots"] = self.ints([*(self.slots[b] for b, *_ in parts), *[-1] * len(absent)])
        if self.entries == "table":
            options |= {"cache_block_table": self.table(self.pages, step), "rows_per_page": self.rows_per_page}
        elif self.entries == "slots":
            ended = [(b, range(start // ratio, (start + new) // ratio)) for b, start, new, _ in parts]
            slots = [slot for b, windows in ended for slot in self.slots_of(b, windows)]
            options["entry_slots"] = torch.tensor([*slots, -1, -1], dtype=torch.int64, device=self.device)
        if self.snapshot_page_size:
            options["snapshot_table"] = self.table(self.snapshots, step)
            options["snapshot_page_size"] = self.snapshot_page_size
        starts = [*(start for _, start, _, _ in parts), *[7] * len(absent)]
        room, offsets = None if loose else sum(lengths), self.ints([0, *accumulate(lengths)])
        return StepPlan.build(ratio, self.ints(starts), offsets, bound, max_tokens=room, **options)

    def play(
        self, steps: Sequence[Step], width: int, rows: torch.dtype, call: Callable[[Step, StepPlan, Tensor], None]
    ) -> list[Tensor]:
        """Makes the calls. The last pooled row of each window `[width]`, by sequence."""
        ratio, like = self.spec.ratio, {"dtype": rows, "device": self.device}
        found = [torch.full((n // ratio, width), UNWRITTEN, **like) for n in self.lengths]
        for step in steps:
            plan, parts = self.plan(step), step[1]
            out = torch.full((plan.entry_capacity, width), UNWRITTEN, **like)
            call(step, plan, out)
            assert int(plan.errors) == 0, f"{int(plan.errors)} refused in {step}"
            first = plan.cu_entries.tolist()
            for i, (b, start, new, _) in enumerate(parts):
                begin, end = start // ratio, (start + new) // ratio
                found[b][begin:end] = out[first[i] : first[i] + end - begin]
            assert bool((out[first[len(parts)] :] == UNWRITTEN).all()), "a row of no entry was written"
        return found


def new_rows(tokens: list[Tensor], step: Step, left: int = 0, right: int = 0) -> Tensor:
    """kv_score of a step, columns of something wider; NaN for what is not kept or not of a sequence."""
    _, parts, absent, behind, _ = step
    nan = torch.full_like(tokens[0][:1], torch.nan)
    rows = [x for b, start, new, kept in parts for x in (tokens[b][start : start + kept], nan.repeat(new - kept, 1))]
    kv_score = torch.cat([*rows, nan.repeat(sum(absent) + behind, 1)])
    wide = torch.nn.functional.pad(kv_score, (left, right), value=torch.nan)
    return wide[:, left : left + kv_score.shape[1]]


def close_to_fp64(
    rows: list[Tensor], tokens: list[Tensor], spec: CompressorSpec, ape: Tensor | None, state: FoldState | WindowState
) -> None:
    """Raises Mismatch unless the pooled rows `[windows, head_dim]` of each sequence are within the bound of the exact ones."""
    for b, (got, text) in enumerate(zip(rows, tokens, strict=True)):
        want = exact_rows(text, spec, ape, state)
        blame(off(got, want, pooled_bound(spec.window_rows)), "pooled row", b, got, want, "fp64")


def same_rows(rows: list[Tensor], whole: list[Tensor], slots: list[list[int]] | None, against: str = "one prefill") -> None:
    """Raises Mismatch unless the pooled rows have the bits of `whole`, rounded to their dtype; a NaN is as good as another.

    slots: of each window, -1 where its row must have been left alone; None for no such.
    """
    for b, (got, want) in enumerate(zip(rows, whole, strict=True)):
        if got.dtype == torch.bfloat16:
            want = bf16_bits(want).view(torch.bfloat16)
        if slots is not None:
            there = torch.tensor(slots[b], dtype=torch.int64, device=got.device)[:, None] >= 0
            want = torch.where(there, want, torch.full_like(want, UNWRITTEN))
        bits = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
        wrong = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
        blame(wrong, "pooled row", b, got, want, against, "bits")


def records(cache: EntryCache, slots: list[list[int]]) -> list[Tensor]:
    """uint8 `[windows, record bytes]` of each sequence; of a window without a slot those of slot 0."""
    return [bytes_of(cache, _ids(some, cache).clamp(min=0)) for some in slots]


def same_records(cache: EntryCache, slots: list[list[int]], whole: list[Tensor], against: str = "one prefill") -> None:
    """Raises Mismatch unless the records have the bytes of `whole`; a window without a slot has none."""
    for b, (got, want) in enumerate(zip(records(cache, slots), whole, strict=True)):
        wrong = (got != want) & (_ids(slots[b], cache) >= 0)[:, None]
        if cache.format.element == "fp32":  # a NaN there has whatever bits it had
            nan = got.view(torch.float32).isnan() & want.view(torch.float32).isnan()
            wrong &= ~nan.repeat_interleave(4, dim=1)
        blame(wrong, "record bytes", b, got, want, against)


def untouched(cache: EntryCache, slots: list[list[int]]) -> None:
    """Raises Mismatch if a byte was written that is of no record of these slots; bytes between pages are looked at too."""
    ids = torch.tensor(sorted({slot for some in slots for slot in some if slot >= 0}), dtype=torch.int64, device=cache.device)
    gap = cache.storage.untyped_storage().nbytes() // cache.num_pages - cache.page_bytes
    blank = make_cache(cache.format.name, cache.spec, cache.num_pages, cache.rows_per_page, str(cache.device), gap=gap)
    put_bytes(blank, ids, bytes_of(cache, ids))
    for name, got, want in (("page", cache.storage, blank.storage), ("scale page", cache.scales, blank.scales)):
        if got is not None and want is not None:
            a, b = (x.as_strided((x.untyped_storage().nbytes(),), (1,), 0) for x in (got, want))
            if not torch.equal(a, b):
                at = int((a != b).nonzero()[0])
                page, byte = divmod(at, len(a) // cache.num_pages)
                raise Mismatch(f"{name} {page}, byte {byte}: outside of all records, yet written")


def untouched_slots(state: FoldState, slots: list[int]) -> None:
    """Raises Mismatch if anything was written to a slot of no sequence."""
    others = [slot for slot in range(state.num_slots) if slot not in slots]
    if not bool(state.rows[others].isnan().all()) or bool((state.positions[others] != -1).any()):
        raise Mismatch(f"state slots {others}: of no sequence, yet written")


def untouched_pages(state: WindowState, kv: Pages, score: Pages) -> None:
    """Raises Mismatch if anything was written to a page of no sequence."""
    for name, pool, pages in (("kv", state.kv, kv), ("score", state.score, score)):
        known = {page for some in pages for page in some}
        others = [page for page in range(len(pool)) if page not in known]
        if not bool(pool[others].isnan().all()):
            raise Mismatch(f"pages {others} of state.{name}: of no sequence, yet written")


def packed(cache: EntryCache, slots: list[list[int]], rows: list[Tensor], norm_weight: Tensor, rope: Tensor | None) -> bool:
    """Raises Mismatch unless the records are what the torch packer makes of pooled rows, but for roundings of the norm.

    Returns whether the bytes are the same.
    """
    exact = True
    for b, some in enumerate(slots):
        if not some:
            continue
        pooled = rows[b].bfloat16().float() if cache.format.round_rows else rows[b]
        position = torch.arange(len(some), device=pooled.device) * cache.spec.ratio
        y = finish(pooled, cache.spec, norm_weight, rope, position)
        at = _ids(some, cache)
        data, norm = bytes_of(cache, at), y.norm(dim=1, keepdim=True)
        fine = explained(cache, data, y, torch.zeros_like(norm))
        if not bool(fine.all()):
            exact = False
            fine |= explained(cache, data, y, EPILOGUE * norm)  # which may be NaN
        if cache.format.element == "fp32":
            fine |= y.isnan() & cache.read(at).isnan()
        blame(~fine, "record bytes", b, cache.read(at), y, "the packer")
    return exact


def _ids(slots: list[int], cache: EntryCache) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=cache.device)


def blame(wrong: Tensor, stage: str, sequence: int, got: Tensor, want: Tensor, against: str, where: str = "") -> None:
    """Raises for the first place that is wrong."""
    if bool(wrong.any()):
        window, place = wrong.nonzero()[0].tolist()
        channel, at = (None, f"byte {place}") if got.dtype == torch.uint8 else (place, where)
        values = (x[window, place].item() for x in (got, want))
        raise Mismatch(str(Difference(sequence, window, stage, channel, *values, against, at)))
