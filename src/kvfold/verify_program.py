"""A case of `verify --random` as a program: what is run, and what is printed where it fails, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pprint import pformat

from .verify_random import LONG, RandomCase, Shape, Step

WIDTH = 120


@dataclass(frozen=True)
class Place:
    """Where a program runs: `device` as torch names it, and the backend of `compress`."""

    device: str
    backend: str


def program(case: RandomCase, place: Place) -> str:
    """Python that makes the case's calls and raises `Mismatch` where something is not what it must be."""
    lines = [f'"""Case {case.index} of `kvfold verify --random --seed {case.seed}`."""']
    lines += ["from itertools import accumulate", "", "import torch", "", "import kvfold"]
    lines += ["from kvfold import verify_case as judge", ""]
    lines += [f"device, backend = {place.device!r}, {place.backend!r}", *_inputs(case)]
    lines += ["# Steps: the plan's bound, (sequence, start, new tokens, kept ones), absent sequences, rows behind, spare room."]
    whole = Step(max(LONG, *case.lengths), tuple((b, 0, n, n) for b, n in enumerate(case.lengths)))
    lines += [f"prefill = {_step(whole)}", *_literal("steps", [_step(step) for step in case.steps]), *_tables(case)]
    for block in (_function_ints(), _function_plan(case), _function_rows(), _function_play(case), _main(case)):
        lines += ["", "", *block]
    return "\n".join(lines) + "\n"


def _parts(case: RandomCase) -> list[Shape]:
    return [case.shape, case.shape.other] if case.shape.other else [case.shape]


def _suffixes(case: RandomCase) -> Iterator[tuple[str, Shape]]:
    """The names of the second compressor end in 2."""
    yield from zip(("", "2"), _parts(case), strict=False)


def _inputs(case: RandomCase) -> Iterator[str]:
    yield f"lengths = {list(case.lengths)}"
    yield f"draw = torch.Generator().manual_seed({case.draw})"
    for end, shape in _suffixes(case):
        yield f"spec{end} = kvfold.{shape.spec!r}"
        yield f"tokens{end} = judge.make_tokens(spec{end}, lengths, {case.values!r}, draw, torch.{shape.kv_dtype}, device)"
        yield (f"weights{end} = judge.make_weights(spec{end}, {max(case.lengths)}, {case.values!r}, draw, "
               f"torch.{shape.norm_dtype}, device)")  # fmt: skip


def _step(step: Step) -> tuple:
    return step.bound, list(step.parts), list(step.absent), step.behind, step.loose


def _literal(name: str, value: object) -> list[str]:
    return f"{name} = {pformat(value, width=WIDTH, compact=True)}".split("\n")


def _nested(pages: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(row) for row in pages]


def _in_order(pages: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """As many pages for each, one after the other."""
    found, at = [], 0
    for row in pages:
        found.append(list(range(at, at + len(row))))
        at += len(row)
    return found


def _tables(case: RandomCase) -> Iterator[str]:
    """Where the two runs keep things."""
    plain: dict = {"slots": list(range(len(case.lengths))), "pages": _in_order(case.entry_pages)}
    where: dict = {"slots": list(case.slots), "pages": _nested(case.entry_pages)}
    if case.shape.state == "window":
        plain |= {"kv": _in_order(case.kv_pages), "score": _in_order(case.score_pages)}
        where |= {"kv": _nested(case.kv_pages), "score": _nested(case.score_pages)}
    if case.shape.snapshot:
        where["snapshots"] = _nested(case.snapshot_pages)
    yield from _literal("plain", plain)
    yield from _literal("where", where)


def _function_ints() -> list[str]:
    return [
        "def ints(values):",
        "    return torch.tensor(values, dtype=torch.int32, device=device)",
        "",
        "",
        "def table(pages, parts, absent):",
        '    """Pages of the sequences of a step, -1 behind the last one of each."""',
        "    rows = [pages[b] for b, *_ in parts] + [[]] * len(absent)",
        "    width = max(1, *map(len, rows))",
        "    return ints([[*row, *[-1] * (width - len(row))] for row in rows])",
    ]


def _function_plan(case: RandomCase) -> Iterator[str]:
    shape, ratio = case.shape, case.shape.spec.ratio
    pages = f'options |= {{"cache_block_table": table(where["pages"], parts, absent), "rows_per_page": {case.rows_per_page}}}'
    yield "def plan_of(step, where):"
    yield "    bound, parts, absent, _, loose = step"
    yield "    lengths, options = [new for _, _, new, _ in parts] + absent, {}"
    if shape.state == "fold":
        yield '    options["state_slots"] = ints([where["slots"][b] for b, *_ in parts] + [-1] * len(absent))'
    else:
        yield f'    options["page_size"] = {shape.page_size}'
        yield '    options["block_tables"] = table(where["kv"], parts, absent), table(where["score"], parts, absent)'
    if case.freed:
        yield '    for pages in options["block_tables"] if where is not plain else ():  # what is not read any more has no page'
        yield "        for i, (_, start, _, _) in enumerate(parts):"
        back = f"(start // {ratio} - {int(shape.spec.overlap)}) * {ratio} // {shape.page_size}"
        yield f"            pages[i, : max({back}, 0)] = -1"
    if shape.addressing == "table":
        yield f"    {pages}"
    if shape.addressing == "slots":
        yield "    if where is plain:"
        yield f"        {pages}"
        yield "    else:"
        windows = f"range(start // {ratio}, (start + new) // {ratio})"
        slots = f'judge.slots_of(where["pages"][b], {case.rows_per_page}, {windows})'
        yield f"        slots = [{slots} for b, start, new, _ in parts]"
        yield '        options["entry_slots"] = torch.tensor([*sum(slots, []), -1, -1], dtype=torch.int64, device=device)'
    if shape.snapshot:
        yield "    if where is not plain:"
        yield '        options["snapshot_table"] = table(where["snapshots"], parts, absent)'
        yield f'        options["snapshot_page_size"] = {shape.snapshot}'
    yield "    starts = [start for _, start, _, _ in parts] + [7] * len(absent)"
    yield "    room = None if loose else sum(lengths)"
    yield "    offsets = ints([0, *accumulate(lengths)])"
    yield f"    return kvfold.StepPlan.build({ratio}, ints(starts), offsets, bound, max_tokens=room, **options)"


def _function_rows() -> list[str]:
    return [
        "def new_rows(tokens, step, left=0, right=0):",
        '    """kv_score of a step, columns of something wider; NaN for what is not kept or not of a sequence."""',
        "    _, parts, absent, behind, _ = step",
        "    nan = torch.full_like(tokens[0][:1], torch.nan)",
        "    rows = [x for b, start, new, kept in parts for x in (tokens[b][start : start + kept], nan.repeat(new - kept, 1))]",
        "    rows = torch.cat([*rows, nan.repeat(sum(absent) + behind, 1)])",
        '    wide = torch.nn.functional.pad(rows, (left, right), value=float("nan"))',
        "    return wide[:, left : left + rows.shape[1]]",
    ]


def _function_play(case: RandomCase) -> Iterator[str]:
    ratio = case.shape.spec.ratio
    yield "def play(steps, where, call, rows=torch.float32):"
    yield '    """Makes the calls. The last pooled row of each window, by sequence."""'
    yield (f"    found = [torch.full((n // {ratio}, spec.head_dim), judge.UNWRITTEN, dtype=rows, device=device) "
           "for n in lengths]")  # fmt: skip
    yield "    for step in steps:"
    yield "        plan = plan_of(step, where)"
    yield "        out = torch.full((plan.entry_capacity, spec.head_dim), judge.UNWRITTEN, dtype=rows, device=device)"
    yield "        call(step, plan, out)"
    yield '        assert int(plan.errors) == 0, f"{int(plan.errors)} refused in {step}"'
    yield "        first = plan.cu_entries.tolist()"
    yield "        for i, (b, start, new, _) in enumerate(step[1]):"
    yield f"            begin, end = start // {ratio}, (start + new) // {ratio}"
    yield "            found[b][begin:end] = out[first[i] : first[i] + end - begin]"
    yield "        assert bool((out[first[len(step[1])] :] == judge.UNWRITTEN).all()), 'a row of no entry was written'"
    yield "    return found"


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


def _main(case: RandomCase) -> Iterator[str]:
    shape, ratio = case.shape, case.shape.spec.ratio
    slots = f"[judge.slots_of(pages, {case.rows_per_page}, range(n // {ratio})) for pages, n in zip({{}}['pages'], lengths)]"
    yield f"slots = {slots.format('where')}"
    yield f"plain_slots = {slots.format('plain')}"
    for end, one in _suffixes(case):
        yield ""
        yield "# Each sequence in one call: against fp64, and the records against the packer."
        yield f"first{end}, first_cache{end} = {_state(case, one, True, end)}, {_cache(case, one, 0, end)}"
        if end:
            yield "spec, first_spec = spec2, spec"
        yield f"whole{end} = play([prefill], plain, lambda step, plan, out: kvfold.compress("
        yield (f"    new_rows(tokens{end}, step), plan, first{end}, first_cache{end}, **weights{end}, rows=out, "
               "backend=backend))")  # fmt: skip
        if end:
            yield "spec = first_spec"
        yield f"judge.close_to_fp64(whole{end}, tokens{end}, spec{end}, weights{end}['ape'], first{end})"
        if one.fmt is not None:
            yield f"judge.packed(first_cache{end}, plain_slots, whole{end}, weights{end}['norm_weight'], weights{end}['rope'])"
            yield f"records{end} = judge.records(first_cache{end}, plain_slots)"
    yield ""
    yield "# In pieces: the same bits, and nothing else is written."
    for end, one in _suffixes(case):
        yield f"state{end}, cache{end} = {_state(case, one, False, end)}, {_cache(case, one, case.gap, end)}"
    if shape.snapshot:
        pages = max(1, sum(map(len, case.snapshot_pages)))
        yield f"kept = kvfold.Snapshots.allocate(spec, {pages}, {shape.snapshot}, dtype=state.rows.dtype, device=device)"
    yield from _pieces(case)
    for end, one in _suffixes(case):
        if one.fmt is not None:
            yield f"judge.same_records(cache{end}, slots, records{end})"
            yield f"judge.untouched(cache{end}, slots)"
    if shape.state == "window":
        yield "judge.untouched_pages(state, where['kv'], where['score'])"
    else:
        yield "judge.untouched_slots(state, where['slots'])"
    if case.store:
        yield from _store(case)
    if case.hit is not None:
        yield from _hit(case)


def _pieces(case: RandomCase) -> Iterator[str]:
    shape, beside = case.shape, f", {case.left}, {case.right}" if case.left + case.right else ""
    if shape.other is not None:
        yield "play(steps, where, lambda step, plan, out: kvfold.compress_many(["
        for end in ("", "2"):
            yield f"    (new_rows(tokens{end}, step{beside}), state{end}, cache{end}, *weights{end}.values()),"
        yield "], plan, backend=backend))"
        return
    rows = "" if shape.rows is None else ", rows=out"
    snapshots = ", snapshots=kept" if shape.snapshot else ""
    yield "found = play(steps, where, lambda step, plan, out: kvfold.compress("
    yield f"    new_rows(tokens, step{beside}), plan, state, cache, **weights{rows}{snapshots}, backend=backend),"
    yield f"    rows=torch.{shape.rows or 'float32'})"
    if shape.rows is not None:
        yield f"judge.same_rows(found, whole, {'None' if shape.addressing == 'none' else 'slots'})"


def _store(case: RandomCase) -> Iterator[str]:
    yield ""
    yield "# The same bytes by `store`."
    yield f"apart = {_cache(case, case.shape, 0, '')}"
    yield "plan = plan_of(prefill, plain)"
    yield "rows = torch.full((plan.entry_capacity, spec.head_dim), torch.nan, device=device)"
    yield "rows[: sum(map(len, whole))] = torch.cat(whole)"
    yield "kvfold.store(rows, plan, apart, **{k: x for k, x in weights.items() if k != 'ape'}, backend=backend)"
    yield "assert int(plan.errors) == 0"
    yield "judge.same_records(apart, plain_slots, records, 'compress')"


def _hit(case: RandomCase) -> Iterator[str]:
    assert case.hit is not None
    (b, k), size, shape = case.hit, case.shape.snapshot, case.shape
    start, free = (k + 1) * size, next(i for i in range(len(case.slots) + 1) if i not in case.slots)
    rest = Step(LONG, ((b, start, case.lengths[b] - start, case.lengths[b] - start),))
    yield ""
    yield "# A prefix hit at the end of a page: another slot goes on from its snapshot."
    yield "errors = ints([0])"
    yield (f"kvfold.restore(state, kept, ints([{free}]), ints([where['snapshots'][{b}][{k}]]), ints([{start}]), errors, "
           "backend=backend)")  # fmt: skip
    yield "assert int(errors) == 0, 'the snapshot was refused'"
    yield f"where['slots'][{b}] = {free}"
    if shape.fmt is not None:
        yield f"cache = {_cache(case, shape, case.gap, '')}"
    rows = "" if shape.rows is None else ", rows=out"
    yield f"again = play([{_step(rest)}], where, lambda step, plan, out: kvfold.compress("
    yield f"    new_rows(tokens, step), plan, state, cache, **weights{rows}, snapshots=kept, backend=backend),"
    yield f"    rows=torch.{shape.rows or 'float32'})"
    window = start // shape.spec.ratio
    only = f"slots[{b}][{window}:]"
    if shape.rows is not None:
        some = "None" if shape.addressing == "none" else f"[{only}]"
        yield f"judge.same_rows([again[{b}][{window}:]], [whole[{b}][{window}:]], {some})"
    if shape.fmt is not None:
        yield f"judge.same_records(cache, [{only}], [records[{b}][{window}:]])"
        yield f"judge.untouched(cache, [{only}])"
