"""Judgements on what calls wrote, for the cases of `verify`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend_torch.finish import finish
from ..contract import pooled_bound
from ..debug.compare import Difference, bytes_of, explained, off, put_bytes
from ..debug.exact import exact_rows
from ..debug.records import EPILOGUE, latents_explained
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.pack import to_bf16
from ..storage.step import Compressor
from ..testing.data import make_cache
from ..testing.engine import UNWRITTEN, Engine


class Mismatch(Exception):
    """Something is not what it must be; the text says what and where."""


def close_to_fp64(engine: Engine, more: float = 0.0) -> float:
    """Raises Mismatch unless an engine's pooled rows are within the bound, or so much `more`, of the exact ones.

    Returns their largest relative error.
    """
    exact = [exact_rows(text, engine.spec, engine.weights["ape"], engine.state) for text in engine.tokens]
    return close(engine.pooled, exact, pooled_bound(engine.spec.window_rows) + more, "fp64")


def close(rows: list[Tensor], wanted: list[Tensor], bound: float, against: str) -> float:
    """Raises Mismatch unless rows `[windows, head_dim]` of each sequence are as near as `bound`; their largest distance."""
    for b, (got, want) in enumerate(zip(rows, wanted, strict=True)):
        blame(off(got, want, bound), "pooled row", b, got, want, against)
    got, want = torch.cat(rows).double(), torch.cat(wanted).double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def same(engine: Engine, whole: Engine, since: tuple[int, int] | None = None) -> None:
    """Raises Mismatch unless all that is made has the bits of one prefill, and nothing else of the cache was written.

    Pooled rows are rounded to their dtype, and a NaN is as good as another. A window without a slot has its row left alone.

    since: sequence and window, from which on its windows are looked at; default: all that there are.
    """
    for b, first, slots in _windows(engine, since):
        asked = [("pooled row", engine.pooled[b], whole.pooled[b])] * (engine.rows is not None)
        asked += [("latent", engine.latents[b], whole.latents[b])] * (engine.latent and whole.latent)
        for what, got, want in asked:
            if got.dtype == torch.bfloat16 and want.dtype == torch.float32:
                want = to_bf16(want)
            if engine.addressing != "none":
                want = torch.where(slots[:, None] >= 0, want, torch.full_like(want, UNWRITTEN))
            bits = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
            wrong = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
            wrong[:first] = False
            blame(wrong, what, b, got, want, "one prefill", "bits")
    if engine.cache is not None:
        same_records(engine, whole, "one prefill", since)
        untouched(engine, since)


def same_records(engine: Engine, whole: Engine, against: str, since: tuple[int, int] | None = None) -> None:
    """Raises Mismatch unless the records have the same bytes; a window without a slot has none."""
    for (b, first, slots), (_, _, others) in zip(_windows(engine, since), _windows(whole, since), strict=True):
        got, want = (bytes_of(e.cache, ids.clamp(min=0)) for e, ids in ((engine, slots), (whole, others)))
        wrong = (got != want) & (slots >= 0)[:, None]
        if engine.cache.format.element == "fp32":  # a NaN there has whatever bits it had
            nan = got.view(torch.float32).isnan() & want.view(torch.float32).isnan()
            wrong &= ~nan.repeat_interleave(4, dim=1)
        wrong[:first] = False
        blame(wrong, "record bytes", b, got, want, against)


def untouched(engine: Engine, since: tuple[int, int] | None = None) -> None:
    """Raises Mismatch if a byte was written that is of no record; bytes between pages are looked at too."""
    cache, ids = engine.cache, torch.cat([slots[first:] for _, first, slots in _windows(engine, since)])
    ids = ids[ids >= 0].unique()
    gap = cache.storage.untyped_storage().nbytes() // cache.num_pages - cache.format.page_bytes(cache.spec, cache.rows_per_page)
    blank = make_cache(cache.format.name, cache.spec, cache.num_pages, cache.rows_per_page, str(cache.device), gap=gap)
    put_bytes(blank, ids, bytes_of(cache, ids))
    for name, got, want in (("page", cache.storage, blank.storage), ("scale page", cache.scales, blank.scales)):
        if got is not None and want is not None:
            a, b = (x.as_strided((x.untyped_storage().nbytes(),), (1,), 0) for x in (got, want))
            if not torch.equal(a, b):
                at = int((a != b).nonzero()[0])
                page, byte = divmod(at, len(a) // cache.num_pages)
                raise Mismatch(f"{name} {page}, byte {byte}: outside of all records, yet written")


def _windows(engine: Engine, since: tuple[int, int] | None = None) -> list[tuple[int, int, Tensor]]:
    """Sequences to look at, the first window of each that counts, and the slots of all its windows."""
    slots = [torch.tensor(some, dtype=torch.int64, device=engine.device) for some in engine.entry_slots]
    return [(b, 0, some) for b, some in enumerate(slots)] if since is None else [(*since, slots[since[0]])]


def untouched_state(engine: Engine) -> None:
    """Raises Mismatch if anything was written to a slot, or a page, of no sequence."""
    state = engine.state
    if state is None:
        return
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


def normed(engine: Engine) -> None:
    """Raises Mismatch unless the latents are what becomes of the pooled rows of the same calls."""
    c = Compressor(engine.tokens[0], None, engine.cache, engine.spec, None, engine.weights["norm_weight"], None)
    for b, (got, pooled) in enumerate(zip(engine.latents, engine.pooled, strict=True)):
        fine, want = latents_explained(c, got, pooled.float())
        blame(~fine, "latent", b, got, want, "the norm")


def packed(engine: Engine, rows: list[Tensor], cache: EntryCache | None = None, *, norm: bool = True) -> str:
    """Raises Mismatch unless the records are what the torch packer makes of pooled rows; says how nearly they are.

    cache: another one, with the same places. norm: whether rows still need it.
    """
    exact, cache = True, engine.cache if cache is None else cache
    for b, _, slots in _windows(engine):
        if not len(slots):
            continue
        position = torch.arange(len(slots), device=rows[b].device) * cache.spec.ratio
        weight = engine.weights["norm_weight"] if norm else None
        y = finish(rows[b].float(), cache.spec, weight, engine.weights["rope"], position, cache.format)
        data, size = bytes_of(cache, slots), y.norm(dim=1, keepdim=True)
        fine = explained(cache, data, y, torch.zeros_like(size))
        if not bool(fine.all()):
            exact = False
            fine |= explained(cache, data, y, EPILOGUE * size)  # which may be NaN
        if cache.format.element == "fp32":
            fine |= y.isnan() & cache.read(slots).isnan()
        blame(~fine, "record bytes", b, cache.read(slots), y, "the packer")
    return "bytes equal" if exact else "bytes equal but for roundings of the norm"


def blame(wrong: Tensor, stage: str, sequence: int, got: Tensor, want: Tensor, against: str, where: str = "") -> None:
    """Raises for the first place that is wrong."""
    if bool(wrong.any()):
        window, place = wrong.nonzero()[0].tolist()
        channel, at = (None, f"byte {place}") if got.dtype == torch.uint8 else (place, where)
        values = (x[window, place].item() for x in (got, want))
        raise Mismatch(str(Difference(sequence, window, stage, channel, *values, against, at)))
