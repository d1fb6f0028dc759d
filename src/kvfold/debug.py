"""`check`: is a call right, and where is it first wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from . import reference
from .backend_torch import Items, _Rows, finish, history_starts
from .checks import check_type
from .compress import Compressor
from .contract import pooled_bound
from .debug_call import Call
from .debug_compare import Difference, bytes_of, explained, off, pooled_differences, put_bytes, written
from .pack import unpack_records
from .plan import StepPlan
from .records import EntryCache
from .snapshots import Snapshots
from .spec import CompressorSpec
from .state import FoldState, state_kind
from .window_state import WindowState

EPILOGUE = 5e-7  # of an entry, of its norm: what the order of fp32 operations behind the pooling can change
STAGES = ("plan", "errors", "pooled row", "record bytes", "read-back value", "state row", "snapshot row")


@dataclass(frozen=True)
class Report:
    """What `check` found. `differences` has one for each sequence, window and stage, in that order.

    Attributes:
        errors: sequences and entries that the call refused; `notes` says why where that is known.
        entries, referenced: entries that were made, and those of them that were compared with the fp64 reference; of
            `compress_many` those of both compressors.
    """

    backend: str
    entries: int
    referenced: int
    errors: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        lines = [f"kvfold.check, backend {self.backend}: {'equal' if self.equal else 'DIFFERENT'}"]
        lines += [f"  {self.entries} entries against torch, {self.referenced} of them against fp64; {self.errors} refused"]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {'first: ' if i == 0 else '       '}{d}" for i, d in enumerate(self.differences[:8])]
        lines += [f"  and {len(self.differences) - 8} more"] * (len(self.differences) > 8)
        return "\n".join(lines)


def check(
    kv_score: torch.Tensor | Sequence[Compressor | tuple],
    plan: StepPlan,
    state: FoldState | WindowState | EntryCache | None = None,
    cache: EntryCache | None = None,
    *,
    spec: CompressorSpec | None = None,
    ape: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    snapshots: Snapshots | None = None,
    backend: str | None = None,
    full_history: Sequence[torch.Tensor | None] | None = None,
) -> Report:
    """Makes a call on copies of what it writes, and says where it first differs from the torch backend.

    Takes the arguments of `compress`, as named here, of `compress_many`, `check(compressors, plan)`, or of `store`,
    `check(rows, plan, cache, spec=..., norm_weight=..., rope=...)`.

    Entries of sequences that start at 0, or whose history is given, are compared with the fp64 reference too. Nothing of the
    caller's is written. Takes two or three times the memory of what the call writes, and synchronizes with the host.

    Differences within the bounds are none: a pooled or fold row may differ by 2e-6 of its norm, and a record by codes that the
    rounding of fp32 operations behind the pooling explains, given the pooled row of this very call. Input rows are copied, and
    so are compared to the bit, in snapshots too.

    Args:
        full_history: of `compress`: for each sequence of the plan the `kv_score` rows `[start_pos[b], 2 * channels]` of its
            positions before this step, or None where they are not known.
        The others are those of the call.

    Raises:
        TypeError, ValueError: as the call does, and naming `full_history`.
    """
    weights = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope}
    call = Call.of(kv_score, plan, state, cache, **weights, rows=rows, snapshots=snapshots, backend=backend)
    check_history(full_history, call)
    return compare(call, full_history)


def compare(call: Call, full_history: Sequence[torch.Tensor | None] | None = None) -> Report:
    """`check` of a call whose arguments were checked."""
    plan, backend, fp32 = call.plan, call.backend, torch.float32
    items = plan.items[: int(plan.num_items)].long()
    live = items[(items[:, 5] >= 0) & (items[:, 5] < plan.entry_capacity)]
    found, notes, entries, referenced, errors = _plan_differences(plan), [], 0, 0, 0
    got = call.on_copies(None if call.rows is None else call.rows.dtype, backend)
    for i, (c, done) in enumerate(zip(call.compressors, got.compressors, strict=True)):
        if call.name == "store":
            want = call.on_copies(None, "torch")
            made = live[_slots(plan, c.cache, live) >= 0]
            made = made if c.rope is None else made[made[:, 0] * c.spec.ratio < len(c.rope)]
            here, exact = _record_differences(c, done.cache, want.compressors[0].cache, c.kv_score.float(), made, plan), 0
        else:
            want = call.alone(i).on_copies(fp32, "torch")
            probe = got if call.rows is not None and call.rows.dtype == fp32 else call.alone(i).on_copies(fp32, backend)
            here, made, exact = _step_differences(c, done, want, probe, got.rows, live, items, plan, full_history)
        entries, referenced, errors = entries + len(made), referenced + exact, errors + int(want.plan.errors)
        which = f"compressors[{i}]" if len(call.compressors) > 1 else ""
        found += [replace(d, where=", ".join(filter(None, (which, d.where)))) for d in here]
        notes += [f"{which}: {note}" if which else note for note in _notes(c, plan)] if int(got.plan.errors) else []
    if int(got.plan.errors) != errors:
        found.append(Difference(-1, -1, "errors", None, int(got.plan.errors), errors, "torch"))
    found.sort(key=lambda d: (d.sequence, d.window, STAGES.index(d.stage)))
    return Report(backend, entries, referenced, int(got.plan.errors), tuple(found), tuple(notes))


def _step_differences(
    c: Compressor,
    got: Compressor,
    want: Call,
    probe: Call,
    rows: torch.Tensor | None,
    live: torch.Tensor,
    items: torch.Tensor,
    plan: StepPlan,
    history: Sequence[torch.Tensor | None] | None,
) -> tuple[list[Difference], torch.Tensor, int]:
    """Of one compressor: what differs, the items whose entries were made, and how many of them fp64 was there for.

    want, probe: `compress` with fp32 pooled rows, by the torch backend and by the one that is checked. rows: those of the call.
    """
    assert probe.rows is not None and want.rows is not None
    due = want.compressors[0]
    there = written(want.rows)[live[:, 5]]
    found = pooled_differences(probe.rows, want.rows, live, pooled_bound(c.spec.window_rows), "torch")
    if rows is not None and rows.dtype == torch.bfloat16:
        found += pooled_differences(rows, want.rows, live, pooled_bound(c.spec.window_rows) + 2.0**-8, "torch")
    made = live[there]
    if got.cache is not None:
        found += _record_differences(c, got.cache, due.cache, probe.rows, made, plan)
    exact, known = _exact(c, plan, made, history)
    if known.numel():
        expected = made[known]
        truth = torch.zeros_like(want.rows, dtype=torch.float64)
        truth[expected[:, 5]] = exact
        found += pooled_differences(probe.rows, truth, expected, pooled_bound(c.spec.window_rows), "fp64")
        if got.cache is not None:
            found += _value_differences(c, got.cache, exact, expected, plan)
    if isinstance(got.state, WindowState):
        return found + _page_differences(got.state, due.state), made, known.numel()
    owner = dict(zip(items[:, 4].tolist(), items[:, 6].tolist(), strict=True))
    found += _row_differences(got.state, due.state, "state", owner)
    if got.snapshots is not None:
        found += _row_differences(got.snapshots, due.snapshots, "snapshot", _owners(plan, items))
    return found, made, known.numel()


def check_history(history: Sequence[torch.Tensor | None] | None, call: Call) -> None:
    """Checks `full_history`, of a call whose other arguments were checked."""
    if history is None:
        return
    if call.name != "compress":
        raise TypeError(f"full_history must be left out for {call.name}, got {type(history).__name__}")
    plan, spec = call.plan, call.compressors[0].spec
    if isinstance(history, torch.Tensor) or not isinstance(history, Sequence) or len(history) != plan.batch:
        raise ValueError(f"full_history must have a tensor or None for each of the plan's {plan.batch} sequences")
    for b, (start, one) in enumerate(zip(plan.start_pos.tolist(), history, strict=True)):
        if one is not None:
            check_type(f"full_history[{b}]", one, torch.Tensor)
            if tuple(one.shape) != (start, 2 * spec.channels):
                raise ValueError(f"full_history[{b}] must be [{start}, {2 * spec.channels}], got {list(one.shape)}")


def _plan_differences(plan: StepPlan) -> list[Difference]:
    """A plan whose tensors were written again since `update` plans another step than they say."""
    slots = plan.entry_slots if plan.cache_block_table is None else None
    now = StepPlan.build(
        plan.ratio, plan.start_pos, plan.cu_seqlens, plan.max_new_tokens, state_slots=plan.state_slots,
        block_tables=plan.block_tables, page_size=plan.page_size, entry_slots=slots, max_tokens=plan.max_tokens,
        cache_block_table=plan.cache_block_table, rows_per_page=plan.rows_per_page, snapshot_table=plan.snapshot_table,
        snapshot_page_size=plan.snapshot_page_size,
    )  # fmt: skip
    n, entries = int(now.num_items), min(int(now.cu_entries[-1]), now.entry_capacity)
    for name, count in (("num_items", 1), ("items", n), ("entry_slots", entries)):
        have, should = getattr(plan, name), getattr(now, name)
        if have is not None and not torch.equal(have[:count], should[:count]):
            row = int((have[:count] != should[:count]).reshape(count, -1).any(1).nonzero()[0])
            sequence = int(now.items[row, 6]) if name == "items" else -1
            where = f"plan.{name}[{row}]; was a tensor of the plan written after update?"
            return [Difference(sequence, -1, "plan", None, have[row].tolist(), should[row].tolist(), "a new plan", where)]
    return []


def _slots(plan: StepPlan, cache: EntryCache, live: torch.Tensor) -> torch.Tensor:
    """The cache slot of each item, -1 for none that can be."""
    assert plan.entry_slots is not None
    slot = plan.entry_slots[live[:, 5]]
    return torch.where((slot >= 0) & (slot < cache.num_slots), slot, -1)


def _record_differences(
    c: Compressor, got: EntryCache, want: EntryCache, rows: torch.Tensor, made: torch.Tensor, plan: StepPlan
) -> list[Difference]:
    """Records that the pooled rows of this call do not explain, and bytes of pages that are in no record of the step."""
    slots, found = _slots(plan, got, made), []
    have, due = bytes_of(got, slots), bytes_of(want, slots)
    other = (have != due).any(1).nonzero()[:, 0]
    item, size = made[other], got.format.row_bytes(c.spec)
    if other.numel():
        pooled = rows[item[:, 5]]
        pooled = pooled.bfloat16().float() if got.format.round_rows else pooled
        y = finish(pooled, c.spec, c.norm_weight, c.rope, item[:, 0] * c.spec.ratio)
        fine = explained(got, have[other], y, EPILOGUE * y.norm(dim=1, keepdim=True))
        for i in (~fine).any(1).nonzero()[:, 0].tolist():
            byte = int((have[other[i]] != due[other[i]]).nonzero()[0])
            where = f"slot {int(slots[other[i]])}, {f'record byte {byte}' if byte < size else f'tail byte {byte - size}'}"
            values = (f"{int(x[other[i], byte]):#04x}" for x in (have, due))
            channel = int((~fine[i]).nonzero()[0])
            found.append(Difference(int(item[i, 6]), int(item[i, 0]), "record bytes", channel, *values, "torch", where))
    put_bytes(want, slots, have)
    for name, a, b in (("page", got.pages, want.pages), ("scale page", got.scale_pages, want.scale_pages)):
        for page in [] if a is None else (a != b).any(1).nonzero()[:, 0].tolist():
            byte = int((a[page] != b[page]).nonzero()[0])
            values, where = (int(x[page, byte]) for x in (a, b)), f"{name} {page}, byte {byte}, outside of the step's records"
            found.append(Difference(-1, -1, "record bytes", None, *values, "torch", where))
    return found


def _exact(
    c: Compressor, plan: StepPlan, made: torch.Tensor, history: Sequence[torch.Tensor | None] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 pooled rows `[k, head_dim]` of the entries whose sequence is known from its start, and which of `made` they are."""
    spec, ape, found, known = c.spec, c.ape, [], []
    starts, offsets = plan.start_pos.tolist(), plan.cu_seqlens.tolist()
    for b in made[:, 6].unique().tolist():
        before = c.kv_score[:0] if starts[b] == 0 else None if history is None else history[b]
        if before is None:
            continue
        mine = (made[:, 6] == b).nonzero()[:, 0]
        skip = max(int(made[mine[0], 0]) - int(spec.overlap), 0)
        tokens = (before[skip * spec.ratio :].to(c.kv_score), c.kv_score[offsets[b] : offsets[b + 1]])
        tokens = torch.cat(tokens)[-(starts[b] + offsets[b + 1] - offsets[b] - skip * spec.ratio) :].float()
        found.append(exact_rows(tokens, spec, ape, c.state)[made[mine, 0] - skip])
        known.append(mine)
    if not known:
        return torch.zeros(0, spec.head_dim, device=made.device), torch.zeros(0, dtype=torch.int64, device=made.device)
    return torch.cat(found), torch.cat(known)


def exact_rows(
    tokens: torch.Tensor, spec: CompressorSpec, ape: torch.Tensor | None, state: FoldState | WindowState
) -> torch.Tensor:
    """fp64 pooled rows `[windows, head_dim]` of tokens from the start of a window, of the rows as `state` keeps them."""
    if isinstance(state, WindowState) and state.dtype == torch.bfloat16:
        k, s = tokens.float().split(spec.channels, dim=1)
        s = s if ape is None else s + ape[torch.arange(len(s), device=s.device) % spec.ratio]
        tokens, ape, spec = torch.cat((k, s), dim=1).bfloat16(), None, replace(spec, has_ape=False)
    return reference.pooled(tokens, spec, ape)


def _value_differences(
    c: Compressor, cache: EntryCache, exact: torch.Tensor, made: torch.Tensor, plan: StepPlan
) -> list[Difference]:
    """Entries that read back as something which the fp64 entry, within the bound of its pooled row, does not round to."""
    spec, slots, found = c.spec, _slots(plan, cache, made), []
    y = reference.rms_norm(exact, c.norm_weight.double(), spec.norm_eps)
    if spec.rope_dim:
        y = reference.rope(y, c.rope, made[:, 0] * spec.ratio, spec.rope_dim)
    y = reference.hadamard(y) if spec.hadamard else y
    pooled = 2 * pooled_bound(spec.window_rows) * spec.head_dim**0.5 * c.norm_weight.abs().max().double()
    slack = pooled + EPILOGUE * y.norm(dim=1, keepdim=True)
    if cache.format.round_rows:
        slack = slack + 2.0**-8 * y.norm(dim=1, keepdim=True)  # the pooled row was rounded to bf16 before the norm
    fine = explained(cache, bytes_of(cache, slots), y.float(), slack.float())
    for i in (~fine).any(1).nonzero()[:, 0].tolist():
        channel = int((~fine[i]).nonzero()[0])
        value = float(unpack_records(cache, slots[i : i + 1])[0, channel])
        place = int(made[i, 6]), int(made[i, 0])
        found.append(Difference(*place, "read-back value", channel, value, float(y[i, channel]), "fp64"))
    return found


def _page_differences(got: WindowState, want: WindowState) -> list[Difference]:
    found: list[Difference] = []
    for name in ("kv", "score"):
        a, b = getattr(got, name), getattr(want, name)
        integers = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
        same = (a.contiguous().view(integers) == b.contiguous().view(integers)) | (a.isnan() & b.isnan())
        for page, row, channel in _first_channels(~same):
            values = float(a[page, row, channel]), float(b[page, row, channel])
            where = f"page {page}, row {row} of state.{name}"
            found.append(Difference(-1, -1, "state row", channel, *values, "torch", where))
    return found


def _row_differences(
    got: FoldState | Snapshots, want: FoldState | Snapshots, what: str, owner: dict[int, int]
) -> list[Difference]:
    """Tags, and rows that have one, of state slots or of the snapshots of pages. `owner`: whose sequence's each of them is."""
    place, name = ("slot", "state") if what == "state" else ("page", "snapshots")
    fold, found = state_kind(got.spec) == "fold", []
    tags = got.positions != want.positions
    for index, row in tags.nonzero().tolist():
        values, where = (int(x.positions[index, row]) for x in (got, want)), f"{place} {index}, {name}.positions row {row}"
        found.append(Difference(owner.get(index, -1), -1, f"{what} row", None, *values, "torch", where))
    held = ~tags & (want.positions >= 0)
    a, b = (x.rows.flatten(2).unflatten(2, (3 if fold else 1, -1))[held] for x in (got, want))
    wrong = off(a.flatten(0, 1), b.flatten(0, 1), pooled_bound(got.spec.ratio) if fold else 0.0).view(a.shape)
    indices = held.nonzero()
    for i, part, channel in _first_channels(wrong):
        index, row = indices[i].tolist()
        position = int(want.positions[index, row])
        where = f"{place} {index}, {name}.rows row {row}, position {position}" + (f", {'mla'[part]}" if fold else "")
        whose = (owner.get(index, -1), position // got.spec.ratio) if index in owner else (-1, -1)
        values = (x[i, part, channel].item() for x in (a, b))
        found.append(Difference(*whose, f"{what} row", channel, *values, "torch", where))
    return found


def _owners(plan: StepPlan, items: torch.Tensor) -> dict[int, int]:
    """Whose sequence's each snapshot of the step is."""
    found: dict[int, int] = {}
    for b, start, end in items[:, [6, 1, 2]].unique(dim=0).tolist():
        ended = plan.snapshot_table[b, start // plan.snapshot_page_size : -(-end // plan.snapshot_page_size)]
        found |= dict.fromkeys(ended.tolist(), b)
    return found


def _first_channels(wrong: torch.Tensor) -> list[tuple[int, int, int]]:
    """The first channel of each row of `[n, rows, channels]` that has one."""
    return [(i, j, int(wrong[i, j].nonzero()[0])) for i, j in wrong.any(2).nonzero().tolist()]


def _notes(c: Compressor, plan: StepPlan) -> list[str]:
    """Which sequences a `FoldState` cannot continue."""
    if not isinstance(c.state, FoldState):
        return []
    items, held, notes = Items.of(plan), _Rows(c.state), []
    h0 = history_starts(c.spec, c.state.kind, items.start)
    sequence = plan.items[: len(items.window), 6].tolist()
    for i in (items.window == items.start // c.spec.ratio).nonzero()[:, 0].tolist():
        slot, start = items.slot[i : i + 1], int(items.start[i])
        if int(slot) >= c.state.num_slots:
            notes.append(f"sequence {sequence[i]} is refused: state slot {int(slot)} of {c.state.num_slots}")
            continue
        need = torch.arange(int(h0[i]), start, device=slot.device)
        gone = need[held.find(slot.expand_as(need), need) < 0].tolist()
        if gone:
            notes.append(f"sequence {sequence[i]} is refused: slot {int(slot)} holds no row of position {gone[0]}, "
                         f"which a start at {start} needs")  # fmt: skip
    return notes
