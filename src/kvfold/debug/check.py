"""`check`: whether a call is right, and where it first goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backend_torch.items import Items
from ..contract import pooled_bound
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState, state_kind
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, Outputs
from ..storage.window_state import WindowState
from .call import Call, History, Places, check_history, check_outside, copy_plan
from .compare import Difference, first_channels, off, pooled_differences, written
from .exact import exact_of_call
from .placed import examine_placed
from .records import entry_differences, latent_differences, slots_of, value_differences
from .refusals import Refusal, call_refusals, heads, plan_refusals
from .undefined import undefined_between, undefined_in_call, undefined_in_plan

MOST_LINES = 8  # of each kind in the text of a report
STAGES = ("plan", "errors", "pooled row", "latent", "record bytes", "read-back value", "state row", "snapshot row")


@dataclass(frozen=True)
class Report:
    """What `check` returns; true if `equal`. `differences` has one for each sequence, window and stage, in that order.

    Attributes:
        entries, referenced: how many entries were made, and how many of them were compared with the fp64 reference; for
            `compress_many` of both compressors together.
        errors: sequences and entries that the step refused, when its plan was made and by the call.
        sequences: sequences of the step that no compressor refused, whose state and entries were compared; 0 without a plan.
        rows: for a `store` without a plan: its rows that were stored and compared.
        refusals: the reasons, one for each of `errors` that the rules explain.
        undefined: misuse that no counter shows, such as two sequences in one state slot. Whatever was compared, the next run
            may give something else.
    """

    backend: str
    entries: int
    referenced: int
    errors: int
    differences: tuple[Difference, ...]
    sequences: int = 0
    refusals: tuple[Refusal, ...] = ()
    undefined: tuple[Refusal, ...] = ()
    rows: int = 0

    @property
    def equal(self) -> bool:
        """Whether something was compared, nothing was refused or undefined, and no difference was found."""
        return self.headline == "equal"

    @property
    def headline(self) -> str:
        """The verdict in one line: "equal" only if the whole step was compared and is right."""
        if self.undefined:
            return "NOT COMPARABLE"
        if self.differences:
            return "DIFFERENT"
        if self.errors:
            gone = sum(r.row >= 0 for r in self.refusals)
            whole = len({r.sequence for r in self.refusals if r.window < 0 and r.row < 0})
            windows, rest = sum(r.window >= 0 for r in self.refusals), max(self.errors - len(self.refusals), 0)
            parts = [f"{whole} of {self.sequences + whole} sequences"] * (whole > 0)
            parts += [f"{gone} of {self.rows + gone} rows"] * (gone > 0)
            parts += [f"{windows} window{'s' * (windows > 1)}"] * (windows > 0) + [f"{rest} unexplained"] * (rest > 0)
            return f"REFUSED: {', '.join(parts)}"
        return "equal" if self.sequences or self.rows else "nothing compared"

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is undefined and what was refused, each in a sentence."""
        said = [str(one) for one in (*self.undefined, *self.refusals)]
        more = self.errors - len(self.refusals)
        said += [f"{more} more refused, for reasons that the rules of the plan do not explain"] * (more > 0)
        said += [f"{-more} of these not counted in errors"] * (more < 0)
        return tuple(said)

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        lines = [f"kvfold.check, backend {self.backend}: {self.headline}"]
        lines += [f"  {self.entries} entries against torch, {self.referenced} of them against fp64; {self.errors} refused"]
        lines += [f"  {line}" for line in _some(self.notes)]
        lines += [f"  {'first: ' if i == 0 else '       '}{line}" for i, line in enumerate(_some(self.differences))]
        return "\n".join(lines)


def _some(lines: Sequence[object]) -> list[str]:
    return [str(line) for line in lines[:MOST_LINES]] + [f"and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES)


def check(
    kv_score: Tensor | tuple[Tensor, Tensor] | Sequence[Compressor | tuple],
    plan: StepPlan | EntryCache | None = None,
    state: FoldState | WindowState | EntryCache | None = None,
    cache: EntryCache | None = None,
    *,
    spec: CompressorSpec | None = None,
    ape: Tensor | None = None,
    norm_weight: Tensor | None = None,
    rope: Tensor | None = None,
    rows: Tensor | None = None,
    latent: Tensor | None = None,
    snapshots: Snapshots | None = None,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
    also: Sequence[EntryCache] = (),
    errors: Tensor | None = None,
    backend: str | None = None,
    full_history: Sequence[Tensor | None] | None = None,
) -> Report:
    """Makes a call on copies of what it writes, and says where it first differs from the torch backend.

    Takes the arguments of `compress`, as named here, of `compress_many`, `check(compressors, plan)`, or of `store`,
    `check(rows, plan, cache, spec=..., norm_weight=..., rope=...)` and `check(rows, cache, slots=..., positions=..., ...)`.

    The report's `headline` is "equal" only if something was compared, nothing was refused and no difference was found. Every
    refusal comes with its reason (`refusals`). Misuse that no counter shows is named too (`undefined`).

    Entries of sequences that start at 0, or whose history is given, are also compared with the fp64 reference. The caller's
    tensors are not written. `check` takes two or three times the memory of what the call writes, and synchronizes with the
    host.

    Small differences are accepted. A pooled row or a fold row may differ by 2e-6 of its norm. A record or a latent may differ
    by what rounding of the fp32 operations after the pooling explains, given the pooled row of this very call. Input rows are
    copies, and so are compared to the bit, in snapshots too. NaN and infinities are compared as docs/numerics.md says.

    Args:
        full_history: for `compress`: for each sequence of the plan the `kv_score` rows of its positions before this step, as
            one tensor `[start_pos[b], spec.kv_score_width]`, or None if they are not known.
        All others are those of the call.

    Raises:
        TypeError, ValueError: as the call does, and naming `full_history`.
        RuntimeError: in a CUDA graph's capture, or traced.
    """
    check_outside("check", kv_score)
    call = Call.of(
        Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots), plan, Outputs(rows, latent), backend,
        Places(slots, positions, also, errors),
    )  # fmt: skip
    check_history(full_history, call)
    return compare(call, full_history)


def compare(call: Call, full_history: History = None) -> Report:
    """`check` of a call whose arguments were checked."""
    if call.places is not None:
        return _compare_placed(call)
    plan, items = call.plan, Items.of(call.plan)
    found, planned = _plan_differences(plan)
    refusals, undefined = plan_refusals(plan) if planned else [], undefined_in_plan(plan)
    entries, referenced, errors = 0, 0, 0
    got = call.on_copies(None if call.rows is None else call.rows.dtype, call.backend)
    counted, seen = int(got.plan.errors), set()
    for i, c in enumerate(call.compressors):
        which = f"compressors[{i}]" if len(call.compressors) > 1 else ""
        if call.name == "store":
            here, made, exact, due = _store_differences(call, got)
        else:
            here, made, exact, due = _step_differences(call, i, got, full_history)
        seen |= set((made if call.name == "store" else items).sequence.tolist())
        entries, referenced, errors = entries + len(made.entry), referenced + exact, errors + due
        undefined += [replace(r, where=which) for r in undefined_in_call(c, plan, call.room)]
        if counted or due:
            refusals += [replace(r, where=which) for r in call_refusals(c, plan, call.name == "store", call.room)]
        found += [replace(d, where=", ".join(filter(None, (which, d.where)))) for d in here]
    undefined += undefined_between(call.compressors, plan)
    if counted != errors:
        found.append(Difference(-1, -1, "errors", None, counted, errors, "torch"))
    found.sort(key=lambda d: (d.sequence, d.window, STAGES.index(d.stage)))
    seen -= {r.sequence for r in refusals if r.window < 0}
    why = tuple(refusals), tuple(undefined)
    return Report(call.backend, entries, referenced, planned + counted, tuple(found), len(seen), *why)


def _compare_placed(call: Call) -> Report:
    """Of a `store` without a plan."""
    got = call.on_copies(None, call.backend)
    found, stored, refusals, undefined, due = examine_placed(call, got)
    counted = int(got.errors)
    if counted != due:
        found.append(Difference(-1, -1, "errors", None, counted, due, "torch"))
    why = tuple(refusals) if counted or due else (), tuple(undefined)
    return Report(call.backend, stored, 0, counted, tuple(found), 0, *why, rows=stored)


def _entries(call: Call) -> Items:
    """The items whose entries have a place in what the call is given."""
    items = Items.of(call.plan)
    return items[(items.entry >= 0) & (items.entry < (call.plan.entry_capacity if call.room is None else call.room))]


def _store_differences(call: Call, got: Call) -> tuple[list[Difference], Items, int, int]:
    """What differs, the items whose entries were made, how many of them fp64 was there for, and how many are refused."""
    c, live, want = call.compressors[0], _entries(call), call.on_copies(None, "torch")
    made = live[slots_of(call.plan, c.cache, live) >= 0]
    made = made if c.rope is None else made[made.window * c.spec.ratio < len(c.rope)]
    caches = got.compressors[0].cache, want.compressors[0].cache
    return entry_differences(c, *caches, c.kv_score.float(), made, call.plan), made, 0, int(want.plan.errors)


def _step_differences(call: Call, i: int, got: Call, history: History) -> tuple[list[Difference], Items, int, int]:
    """The same of compressor i, which is called again by itself for pooled rows in fp32, also of the torch backend."""
    c, done, plan, fp32, alone = call.compressors[i], got.compressors[i], call.plan, torch.float32, call.alone(i)
    want = alone.on_copies(fp32, "torch")
    probe = got if got.rows is not None and got.rows.dtype == fp32 else alone.on_copies(fp32, call.backend)
    due, items, live, bound = want.compressors[0], Items.of(plan), _entries(call), pooled_bound(c.spec.window_rows)
    found = pooled_differences(probe.rows, want.rows, live, bound, "torch")
    if got.rows is not None and got.rows.dtype == torch.bfloat16:
        found += pooled_differences(got.rows, want.rows, live, bound + 2.0**-8, "torch")
    made = live[written(want.rows)[live.entry]]
    if got.latent is not None:
        found += latent_differences(c, got.latent, probe.rows, made)
    if c.cache is not None:
        found += entry_differences(c, done.cache, due.cache, probe.rows, made, plan)
    exact, known, bounds = exact_of_call(c, plan, made, history, probe.rows)
    if known.numel():
        expected = made[known]
        truth = torch.zeros_like(want.rows, dtype=torch.float64)
        truth[expected.entry] = exact
        found += pooled_differences(probe.rows, truth, expected, bounds, "fp64")
        if c.cache is not None:
            found += value_differences(c, done.cache, exact, bounds, expected, plan)
    if isinstance(c.state, WindowState):
        found += _page_differences(done.state, due.state)
    elif c.state is not None:
        owner = {slot: b for b, slot, *_ in heads(items)}
        found += _row_differences(done.state, due.state, "state", owner)
    if c.snapshots is not None:
        found += _row_differences(done.snapshots, due.snapshots, "snapshot", _owners(plan, items))
    return found, made, known.numel(), int(want.plan.errors)


def _plan_differences(plan: StepPlan) -> tuple[list[Difference], int]:
    """Where a plan is not what its tensors say, as one was written after `update`; and how many `update` refuses."""
    now = copy_plan(plan)
    now.update(plan.start_pos, plan.cu_seqlens)
    n, entries = int(now.num_items), min(int(now.cu_entries[-1]), now.entry_capacity)
    for name, count in (("num_items", 1), ("items", n), ("entry_slots", entries)):
        have, should = getattr(plan, name), getattr(now, name)
        if have is not None and not torch.equal(have[:count], should[:count]):
            row = int((have[:count] != should[:count]).reshape(count, -1).any(1).nonzero()[0])
            sequence = int(now.items[row, 6]) if name == "items" else -1
            where = f"plan.{name}[{row}]; was a tensor of the plan written after update?"
            found = Difference(sequence, -1, "plan", None, have[row].tolist(), should[row].tolist(), "a new plan", where)
            return [found], int(now.errors)
    return [], int(now.errors)


def _page_differences(got: WindowState, want: WindowState) -> list[Difference]:
    found: list[Difference] = []
    for name, a, b in (("kv", got.kv, want.kv), ("score", got.score, want.score)):
        integers = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
        same = (a.contiguous().view(integers) == b.contiguous().view(integers)) | (a.isnan() & b.isnan())
        for page, row, channel in first_channels(~same):
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
    due, have = (x.held() if isinstance(x, FoldState) else x.positions for x in (want, got))
    held = (due >= 0) & (due == have)
    a, b = (x.rows.flatten(2).unflatten(2, (3 if fold else 1, -1))[held] for x in (got, want))
    if fold:
        wrong = _fold_rows_off(a, b, pooled_bound(got.spec.ratio))
    else:
        wrong = off(a.flatten(0, 1), b.flatten(0, 1), 0.0).view(a.shape)
    indices = held.nonzero()
    for i, part, channel in first_channels(wrong):
        index, row = indices[i].tolist()
        position = int(due[index, row])
        where = f"{place} {index}, {name}.rows row {row}, position {position}" + (f", {'mla'[part]}" if fold else "")
        whose = (owner.get(index, -1), position // got.spec.ratio) if index in owner else (-1, -1)
        values = (x[i, part, channel].item() for x in (a, b))
        found.append(Difference(*whose, f"{what} row", channel, *values, "torch", where))
    return found


def _fold_rows_off(got: Tensor, want: Tensor, bound: float) -> Tensor:
    """Channels to blame of fold rows `[n, 3, head_dim]`: m is a maximum of inputs, and so exact."""
    (m, l, a), due = got.unbind(1), want.unbind(1)
    over = (l.isnan() & due[1].isnan())[:, None]  # such a channel gives NaN, whatever its m and a are
    wrong = torch.stack((off(m, due[0], 0.0), off(l, due[1], bound), off(a, due[2], bound, flushed=True)), dim=1)
    return wrong & ~over


def _owners(plan: StepPlan, items: Items) -> dict[int, int]:
    """Whose sequence's each snapshot of the step is."""
    found, size = {}, plan.snapshot_page_size
    for b, _, start, end, _ in heads(items):
        found |= dict.fromkeys(plan.snapshot_table[b, start // size : -(-end // size)].tolist(), b)
    return found
