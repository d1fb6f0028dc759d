"""A case of `verify --random` as a program: what is run, and what is printed where it fails, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import count
from pprint import pformat

from .random import LONG, RandomCase, Shape, Step

WIDTH = 120
Pages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a program runs: `device` as torch names it, and the backend of `compress`."""

    device: str
    backend: str


def program(case: RandomCase, place: Place) -> str:
    """Python that makes the case's calls and raises `Mismatch` where something is not what it must be."""
    blocks = [_inputs(case, place), *(_whole(case, end, shape) for end, shape in _compressors(case)), _in_pieces(case)]
    blocks += [_store(case)] * case.store + [_hit(case)] * (case.hit is not None)
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _compressors(case: RandomCase) -> Iterator[tuple[str, Shape]]:
    """With the end of their names: those of the second compressor end in 2."""
    yield "", case.shape
    if case.shape.other is not None:
        yield "2", case.shape.other


def _inputs(case: RandomCase, place: Place) -> Iterator[str]:
    yield f'"""Case {case.index} of `kvfold verify --random --seed {case.seed}`."""'
    yield "import torch\n\nimport kvfold\nfrom kvfold import verify_case as judge\n"
    yield f"device, backend = {place.device!r}, {place.backend!r}"
    yield f"lengths = {list(case.lengths)}"
    yield f"draw = torch.Generator().manual_seed({case.draw})"
    for end, shape in _compressors(case):
        yield f"spec{end} = kvfold.{shape.spec!r}"
        yield f"tokens{end} = judge.make_tokens(spec{end}, lengths, {case.values!r}, draw, torch.{shape.kv_dtype}, device)"
        yield (f"weights{end} = judge.make_weights(spec{end}, {max(case.lengths)}, {case.values!r}, draw, "
               f"torch.{shape.norm_dtype}, device)")  # fmt: skip
    yield "# Steps: the plan's bound, (sequence, start, new tokens, kept ones), absent sequences, rows behind, spare room."
    whole = Step(max(LONG, *case.lengths), tuple((b, 0, n, n) for b, n in enumerate(case.lengths)))
    yield f"prefill = {astuple(whole)}"
    yield f"steps = {_shown([astuple(step) for step in case.steps])}"
    for name, kept in zip(("plain", "where"), _kept(case), strict=True):
        yield f"{name} = judge.Run(spec, lengths, device, **{_shown(kept)})"


def _shown(value: object) -> str:
    return pformat(value, width=WIDTH, compact=True)


def _kept(case: RandomCase) -> tuple[dict, dict]:
    """Where the two runs keep things, as `verify_case.Run` takes it."""
    shape, size = case.shape, {"rows_per_page": case.rows_per_page}
    plain = size | {"slots": list(range(len(case.lengths))), "pages": _in_order(case.entry_pages)}
    where = size | {"slots": list(case.slots), "pages": case.entry_pages, "entries": shape.addressing}
    plain["entries"] = "none" if shape.addressing == "none" else "table"
    if shape.state == "window":
        plain |= {"page_size": shape.page_size, "kv": _in_order(case.kv_pages), "score": _in_order(case.score_pages)}
        where |= {"page_size": shape.page_size, "kv": case.kv_pages, "score": case.score_pages, "freed": case.freed}
    if shape.snapshot:
        where |= {"snapshots": case.snapshot_pages, "snapshot_page_size": shape.snapshot}
    return plain, where


def _in_order(pages: Pages) -> Pages:
    """As many pages for each, one after the other."""
    number = count()
    return tuple(tuple(next(number) for _ in row) for row in pages)


def _state(case: RandomCase, shape: Shape, first: bool, end: str) -> str:
    if shape.state == "fold":
        slots, most = (len(case.lengths), 1) if first else (len(case.slots) + 1, shape.max_new_tokens)
        return f"judge.make_state(spec{end}, {slots}, {most}, torch.{shape.state_dtype}, device)"
    joined = ", joined=True" if case.joined and not first else ""
    pages = sum(map(len, case.kv_pages)) if first else case.pages
    return f"judge.make_pools(spec{end}, {pages}, {shape.page_size}, torch.{shape.state_dtype}, device{joined})"


def _cache(case: RandomCase, shape: Shape, gap: int, end: str) -> str:
    if shape.fmt is None:
        return "None"
    pages = sum(map(len, case.entry_pages))
    more = f", scale={shape.scale}" * (shape.scale != 1.0) + f", gap={gap}" * (gap > 0)
    return f"judge.make_cache({shape.fmt!r}, spec{end}, {pages}, {case.rows_per_page}, device{more})"


def _compress(shape: Shape, steps: str, more: str = "") -> str:
    """A run of calls into `state` and `cache`."""
    rest = ", rows=out" * (shape.rows is not None) + ", snapshots=kept" * (shape.snapshot > 0)
    return (f"where.play({steps}, spec.head_dim, torch.{shape.rows or 'float32'}, lambda step, plan, out: kvfold.compress(\n"
            f"    judge.new_rows(tokens, step{more}), plan, state, cache, **weights{rest}, backend=backend))")  # fmt: skip


def _whole(case: RandomCase, end: str, shape: Shape) -> Iterator[str]:
    yield "# Each sequence in one call: against fp64, and the records against the packer."
    yield f"first{end}, first_cache{end} = {_state(case, shape, True, end)}, {_cache(case, shape, 0, end)}"
    yield f"whole{end} = plain.play([prefill], spec{end}.head_dim, torch.float32, lambda step, plan, out: kvfold.compress("
    yield (f"    judge.new_rows(tokens{end}, step), plan, first{end}, first_cache{end}, **weights{end}, rows=out, "
           "backend=backend))")  # fmt: skip
    yield f"judge.close_to_fp64(whole{end}, tokens{end}, spec{end}, weights{end}['ape'], first{end})"
    if shape.fmt is not None:
        yield (f"judge.packed(first_cache{end}, plain.entry_slots, whole{end}, weights{end}['norm_weight'], "
               f"weights{end}['rope'])")  # fmt: skip
        yield f"records{end} = judge.records(first_cache{end}, plain.entry_slots)"


def _in_pieces(case: RandomCase) -> Iterator[str]:
    shape, beside = case.shape, f", {case.left}, {case.right}" if case.left + case.right else ""
    yield "# In pieces: the same bits, and nothing else is written."
    for end, one in _compressors(case):
        yield f"state{end}, cache{end} = {_state(case, one, False, end)}, {_cache(case, one, case.gap, end)}"
    if shape.snapshot:
        pages = max(1, sum(map(len, case.snapshot_pages)))
        yield f"kept = kvfold.Snapshots.allocate(spec, {pages}, {shape.snapshot}, dtype=state.rows.dtype, device=device)"
    if shape.other is not None:
        yield "where.play(steps, spec.head_dim, torch.float32, lambda step, plan, out: kvfold.compress_many(["
        for end in ("", "2"):
            yield f"    (judge.new_rows(tokens{end}, step{beside}), state{end}, cache{end}, *weights{end}.values()),"
        yield "], plan, backend=backend))"
    else:
        yield f"found = {_compress(shape, 'steps', beside)}"
        if shape.rows is not None:
            yield f"judge.same_rows(found, whole, {'None' if shape.addressing == 'none' else 'where.entry_slots'})"
    for end, one in _compressors(case):
        if one.fmt is not None:
            yield f"judge.same_records(cache{end}, where.entry_slots, records{end})"
            yield f"judge.untouched(cache{end}, where.entry_slots)"
    if shape.state == "window":
        yield "judge.untouched_pages(state, where.kv, where.score)"
    else:
        yield "judge.untouched_slots(state, where.slots)"


def _store(case: RandomCase) -> Iterator[str]:
    yield "# The same bytes by `store`."
    yield f"apart = {_cache(case, case.shape, 0, '')}"
    yield "plan = plain.plan(prefill)"
    yield "rows = torch.full((plan.entry_capacity, spec.head_dim), torch.nan, device=device)"
    yield "rows[: sum(map(len, whole))] = torch.cat(whole)"
    yield "kvfold.store(rows, plan, apart, **{k: x for k, x in weights.items() if k != 'ape'}, backend=backend)"
    yield "assert int(plan.errors) == 0"
    yield "judge.same_records(apart, plain.entry_slots, records, 'compress')"


def _hit(case: RandomCase) -> Iterator[str]:
    assert case.hit is not None
    (b, k), size, shape = case.hit, case.shape.snapshot, case.shape
    start, free = (k + 1) * size, next(i for i in range(len(case.slots) + 1) if i not in case.slots)
    rest = Step(LONG, ((b, start, case.lengths[b] - start, case.lengths[b] - start),))
    yield "# A prefix hit at the end of a page: another slot goes on from its snapshot."
    yield "errors = torch.zeros(1, dtype=torch.int32, device=device)"
    yield f"slot, page, start = map(where.ints, ([{free}], [{case.snapshot_pages[b][k]}], [{start}]))"
    yield "kvfold.restore(state, kept, slot, page, start, errors, backend=backend)"
    yield "assert int(errors) == 0, 'the snapshot was refused'"
    yield f"where.slots[{b}] = {free}"
    if shape.fmt is not None:
        yield f"cache = {_cache(case, shape, case.gap, '')}"
    yield f"again = {_compress(shape, f'[{astuple(rest)}]')}"
    since = f"[{b}][{start // shape.spec.ratio}:]"
    if shape.rows is not None:
        some = "None" if shape.addressing == "none" else f"[where.entry_slots{since}]"
        yield f"judge.same_rows([again{since}], [whole{since}], {some})"
    if shape.fmt is not None:
        yield f"judge.same_records(cache, [where.entry_slots{since}], [records{since}])"
        yield f"judge.untouched(cache, [where.entry_slots{since}])"
