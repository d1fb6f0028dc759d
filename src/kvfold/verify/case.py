"""Judgements on what calls wrote, for the cases of `verify`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend_torch.finish import finish
from ..contract import pooled_bound
from ..debug.check import EPILOGUE
from ..debug.compare import Difference, bytes_of, explained, off, put_bytes
from ..debug.exact import exact_rows
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.pack import bf16_bits
from ..testing.data import make_cache
from ..testing.engine import UNWRITTEN, Engine


class Mismatch(Exception):
    """Something is not what it must be; the text says what and where."""


def close_to_fp64(engine: Engine) -> float:
    """Raises Mismatch unless an engine's pooled rows are within the bound of the exact ones; their largest relative error."""
    exact = [exact_rows(text, engine.spec, engine.weights["ape"], engine.state) for text in engine.tokens]
    return close(engine.pooled, exact, pooled_bound(engine.spec.window_rows), "fp64")


def close(rows: list[Tensor], wanted: list[Tensor], bound: float, against: str) -> float:
    """Raises Mismatch unless rows `[windows, head_dim]` of each sequence are as near as `bound`; their largest distance."""
    for b, (got, want) in enumerate(zip(rows, wanted, strict=True)):
        blame(off(got, want, bound), "pooled row", b, got, want, against)
    got, want = torch.cat(rows).double(), torch.cat(wanted).double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


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
    ids = _ids(sorted({slot for some in slots for slot in some if slot >= 0}), cache)
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


def untouched_state(engine: Engine) -> None:
    """Raises Mismatch if anything was written to a slot, or a page, of no sequence."""
    state = engine.state
    if isinstance(state, FoldState):
        others = [slot for slot in range(state.num_slots) if slot not in engine.slots]
        if not bool(state.rows[others].isnan().all()) or bool((state.positions[others] != -1).any()):
            raise Mismatch(f"state slots {others}: of no sequence, yet written")
        return
    for name, pool, pages in (("kv", state.kv, engine.kv), ("score", state.score, engine.score)):
        known = {page for some in pages for page in some}
        others = [page for page in range(len(pool)) if page not in known]
        if not bool(pool[others].isnan().all()):
            raise Mismatch(f"pages {others} of state.{name}: of no sequence, yet written")


def packed(engine: Engine, rows: list[Tensor]) -> str:
    """Raises Mismatch unless the records are what the torch packer makes of pooled rows; says how nearly they are."""
    exact, cache = True, engine.cache
    for b, some in enumerate(engine.entry_slots):
        if not some:
            continue
        pooled = rows[b].bfloat16().float() if cache.format.round_rows else rows[b]
        position = torch.arange(len(some), device=pooled.device) * cache.spec.ratio
        y = finish(pooled, cache.spec, engine.weights["norm_weight"], engine.weights["rope"], position)
        at = _ids(some, cache)
        data, norm = bytes_of(cache, at), y.norm(dim=1, keepdim=True)
        fine = explained(cache, data, y, torch.zeros_like(norm))
        if not bool(fine.all()):
            exact = False
            fine |= explained(cache, data, y, EPILOGUE * norm)  # which may be NaN
        if cache.format.element == "fp32":
            fine |= y.isnan() & cache.read(at).isnan()
        blame(~fine, "record bytes", b, cache.read(at), y, "the packer")
    return "bytes equal" if exact else "bytes equal but for roundings of the norm"


def _ids(slots: list[int], cache: EntryCache) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=cache.device)


def blame(wrong: Tensor, stage: str, sequence: int, got: Tensor, want: Tensor, against: str, where: str = "") -> None:
    """Raises for the first place that is wrong."""
    if bool(wrong.any()):
        window, place = wrong.nonzero()[0].tolist()
        channel, at = (None, f"byte {place}") if got.dtype == torch.uint8 else (place, where)
        values = (x[window, place].item() for x in (got, want))
        raise Mismatch(str(Difference(sequence, window, stage, channel, *values, against, at)))
