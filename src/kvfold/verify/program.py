"""A case of `verify --random` as a program: what is run, and what is printed where it fails, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pprint import pformat

from ..testing.engine import Step
from ..testing.told import PLAIN
from .random import LONG, Pages, RandomCase, Shape

shown = partial(pformat, width=120, compact=True)


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
    yield "import torch\n\nimport kvfold\nfrom kvfold import testing\nfrom kvfold.verify import case as judge\n"
    yield f"device, backend = {place.device!r}, {place.backend!r}"
    yield f"lengths = {list(case.lengths)}"
    yield f"draw = torch.Generator().manual_seed({case.draw})"
    for end, shape in _compressors(case):
        yield f"spec{end} = kvfold.{shape.spec!r}"
        yield f"tokens{end} = testing.make_tokens(spec{end}, lengths, {case.values!r}, draw, torch.{shape.kv_dtype}, device)"
        yield (f"weights{end} = testing.make_weights(spec{end}, {max(case.lengths)}, {case.values!r}, draw, "
               f"torch.{shape.norm_dtype}, device)")  # fmt: skip
    yield "# Steps: the plan's bound, (sequence, start, new tokens, kept ones), absent sequences, rows behind, spare room."
    if case.shape.told != PLAIN:
        yield f"told = testing.{case.shape.told!r}"
    whole = Step(max(LONG, *case.lengths), tuple((b, 0, n, n) for b, n in enumerate(case.lengths)))
    yield f"prefill = {tuple(whole)}"
    yield f"steps = {shown([tuple(step) for step in case.steps])}"
    for name, kept in zip(("plain", "where"), _kept(case), strict=True):
        yield f"{name} = {shown(kept)}"


def _kept(case: RandomCase) -> tuple[dict, dict]:
    """Where the two runs keep things, as `testing.Engine` takes it."""
    shape, size = case.shape, {"rows_per_page": case.rows_per_page}
    plain = size | {"slots": list(range(len(case.lengths))), "pages": _in_order(case.entry_pages)}
    where = size | {"slots": list(case.slots), "pages": case.entry_pages, "entries": shape.addressing}
    plain["entries"] = "none" if shape.addressing == "none" else "table"
    if shape.state == "window":
        columns = tuple((0,) * -(-n // shape.page_size) for n in case.lengths)
        plain |= {"kv": _in_order(columns), "score": _in_order(columns)}
        where |= {"kv": case.kv_pages, "score": case.score_pages, "freed": case.freed} | ({"ring": True} if shape.ring else {})
    if shape.snapshot:
        where["snapshot_pages"] = case.snapshot_pages
    return plain, where


def _in_order(pages: Pages) -> Pages:
    """As many pages for each, one after the other."""
    number = count()
    return tuple(tuple(next(number) for _ in row) for row in pages)


def _engine(case: RandomCase, name: str, shape: Shape, end: str = "", *, pieces: bool, state: str = "") -> str:
    """An engine for sequences that come whole or in `pieces`. state: another's; default: one of its own."""
    first = shape.nobodys if pieces else 0
    own = ""
    if shape.state == "fold":
        slots, most = (first + len(case.slots) + 1, shape.max_new_tokens) if pieces else (len(case.lengths), 1)
        more = ", round_inputs=True" * shape.rounds + f", gap={case.gap // 4 * 4}" * (shape.in_pages and pieces)
        own = f"make_state(spec{end}, {slots}, {most}, torch.{shape.state_dtype}, device{more})"
    elif shape.state == "window":
        whole = sum(-(-n // shape.page_size) for n in case.lengths)
        pages, joined = (first + case.pages, case.joined) if pieces else (whole, False)
        own = f"make_pools(spec{end}, {pages}, {shape.page_size}, torch.{shape.state_dtype}, device{', joined=True' * joined})"
    cache, where = "None", "**plain"
    if shape.fmt is not None:
        scale = f"torch.tensor({shape.scale}, device=device)" if shape.scale_on_device and pieces else str(shape.scale)
        more = f", scale={scale}" * (scale != "1.0") + f", gap={case.gap}" * (pieces and case.gap > 0)
        more += ", blocks=True" * (pieces and case.blocks)
        pages = first + sum(map(len, case.entry_pages))
        cache = f"testing.make_cache({shape.fmt!r}, spec{end}, {pages}, {case.rows_per_page}, device{more})"
    if pieces:
        where = f"**where, rows={f'torch.{shape.rows}' if shape.rows else None}"
        where += f", beside=({case.left}, {case.right})" * bool(case.left + case.right)
        where += ", snapshots=kept" * (shape.snapshot > 0) + ", two=True" * shape.two + ", told=told" * (shape.told != PLAIN)
    where += ", latent=True" * shape.latent
    inputs = f"tokens{end}, weights{end}, {state or (f'testing.{own}' if own else None)}"
    return f"{name}{end} = testing.Engine(\n    {inputs},\n    {cache}, {where}, backend=backend)"


def _whole(case: RandomCase, end: str, shape: Shape) -> Iterator[str]:
    yield "# Each sequence in one call: against fp64, and the records against the packer."
    yield _engine(case, "whole", shape, end, pieces=False)
    yield f"whole{end}.run([prefill])\njudge.close_to_fp64(whole{end})"
    if shape.fmt is not None:
        yield f"judge.packed(whole{end}, whole{end}.pooled)"
    if shape.latent:
        yield f"judge.normed(whole{end})"


def _in_pieces(case: RandomCase) -> Iterator[str]:
    shape = case.shape
    yield "# In pieces: the same bits, and nothing else is written."
    if shape.snapshot:
        pages = max(1, sum(map(len, case.snapshot_pages)))
        yield (f"kept = kvfold.Snapshots.allocate(spec, {pages}, {shape.snapshot}, dtype=torch.{shape.state_dtype}, "
               "device=device)")  # fmt: skip
    for end, one in _compressors(case):
        yield _engine(case, "run", one, end, pieces=True)
    yield "run.run(steps)" if shape.other is None else "testing.run_many([run, run2], steps)"
    for end, _ in _compressors(case):
        yield f"judge.same(run{end}, whole{end})\njudge.untouched_state(run{end})"


def _store(case: RandomCase) -> Iterator[str]:
    shape = case.shape
    yield "# The same bytes by `store`, with a plan and without."
    for name in ("apart", "placed"):
        yield _engine(case, name, shape, pieces=False, state="whole.state")
    yield "apart.store(whole.pooled)\njudge.same_records(apart, whole, 'compress')"
    if shape.also is None:
        yield "placed.store_placed(whole.pooled)"
    else:
        pages = sum(map(len, case.entry_pages))
        yield f"also = testing.make_cache({shape.also!r}, spec, {pages}, {case.rows_per_page}, device)"
        yield "placed.store_placed(whole.pooled, [also])\njudge.packed(placed, whole.pooled, also)"
    yield "judge.same_records(placed, whole, 'compress')"


def _hit(case: RandomCase) -> Iterator[str]:
    (b, k), shape = case.hit, case.shape
    start, free = (k + 1) * shape.snapshot, next(i for i in range(shape.nobodys, len(case.slots) + 2) if i not in case.slots)
    rest = Step(LONG, ((b, start, case.lengths[b] - start, case.lengths[b] - start),))
    yield "# A prefix hit at the end of a page: another slot goes on from its snapshot."
    yield _engine(case, "again", shape, pieces=True, state="run.state")
    yield f"again.hit({b}, {start}, {free})\nagain.run([{tuple(rest)}])"
    yield f"judge.same(again, whole, since=({b}, {start // shape.spec.ratio}))"
