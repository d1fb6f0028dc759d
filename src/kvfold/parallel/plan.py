"""`ParallelPlan`: one rank's part of a step, for all compressors that read the same, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..arguments.checks import check_int, check_numbers, check_tensor
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState, carry_shape
from ..storage.host import numbers_on, on_device
from ..storage.step import Compressor
from .message import message_bytes
from .schedule import Message, Reads, Schedule, schedule
from .shards import Segment, Shards, numbers_of
from .spots import Spots, spots_of


class Tail(NamedTuple):
    """The last tokens of segments, folded alone and first: what their carries are made of.

    step: their plan. rows: which of the rank's tokens they are, a slice or int64 indices. pretended: those whose step reads
    what no carry depends on.
    """

    step: StepPlan
    rows: slice | torch.Tensor
    pretended: Spots


class Sent(NamedTuple):
    """A message that this rank sends, or gets. inside: whether any of its carries starts inside of a window. passes_on: whether
    any that it brings is needed to send another one."""

    message: Message
    spots: Spots
    inside: bool
    passes_on: bool


class End(NamedTuple):
    """Sequences that end in this round's tails. spots: in the tail's states. among: which these are of the rank's `Ends`."""

    spots: Spots
    among: slice


class Round(NamedTuple):
    """What this rank does in one round: fold tails, keep the carries of sequences that end in them, send, receive."""

    tail: Tail | None
    ends: End
    sent: tuple[Sent, ...]
    received: tuple[Sent, ...]


class Ends(NamedTuple):
    """The sequences that end in a rank's tokens. slots: in the states; positions: their ends. over: int64, slots of those of
    which the next step reads nothing; only the others have carries."""

    slots: list[int]
    positions: list[int]
    over: torch.Tensor


class First(NamedTuple):
    """Segments that go on from an earlier step: their sequences' slots in the states, int32, and their homes in scratch states.
    passes_on: see `Sent`."""

    slots: torch.Tensor
    spots: Spots
    passes_on: bool


class ParallelPlan:
    """Who sends what to whom, and the plans of this rank's calls. Made by `ContextParallel.plan`.

    Attributes:
        shards, rank, reads: what it is for; `reads` is what compressors of it have in common.
        step: the `StepPlan` of the rank's own tokens, of which each segment is a sequence; None without tokens.
        errors: int32 `[1]`: grows where something was refused, on this rank or, after a `gather`, on any. One refusal may be
            counted more than once, as all that needs it is refused as well.
        entry_slots: int64 `[E]`, the cache slots of all entries of the step in the order of one process, or None.
        first: the rank's segments that go on from an earlier step.
        rounds: of the exchange, in order. In most steps it is one.
        entries: of each rank, the cache slots that its entries have in this rank's cache, int64.
        ends: of each rank.
    """

    def __init__(
        self,
        shards: Shards,
        rank: int,
        spec: CompressorSpec,
        device: torch.device,
        *,
        state_slots: Sequence[int] | None,
        entry_slots: torch.Tensor | None,
        cache_block_table: torch.Tensor | None,
        rows_per_page: int | None,
        errors: torch.Tensor | None,
    ) -> None:
        self.shards, self.rank, self.reads, self.device = shards, rank, Reads.of(spec), device
        count = len(shards.lengths)
        self.state_slots = [*range(count)] if state_slots is None else numbers_of("state_slots", state_slots)
        if len(self.state_slots) != count or len({*self.state_slots}) != count:
            raise ValueError(f"state_slots must be {count} different numbers, one for each sequence, got {self.state_slots}")
        if errors is not None:
            check_tensor("errors", errors, (1,), (torch.int32,), device)
        self.errors = torch.zeros(1, dtype=torch.int32, device=device) if errors is None else errors
        self.like = FoldState.allocate(spec, 0, 1) if spec.gate else None  # whose rows lie as those of a scratch state
        self._own = {segment: i for i, segment in enumerate(shards.segments[rank])}
        self._entries = self._entry_numbers()
        self.entry_slots = self._slots(entry_slots, cache_block_table, rows_per_page)
        self.entries = tuple(self._owned_slots(other) for other in range(shards.ranks))
        own, left = [*self._own], shards.before()
        mine = None if self.entry_slots is None else self.entries[rank]
        self.step = self._step(own, [s.start for s in own], mine)
        made = schedule(shards, self.reads)
        first = [s for s in own if s not in left and self.reads.anything(s.start)]
        slots, spots = [self.state_slots[s.sequence] for s in first], self._spots(first, [s.start for s in first], True)
        self.first = First(self._ints(slots), spots, self._pass_on(first, made))
        self.ends = tuple(self._ends_of(other, made) for other in range(shards.ranks))
        rounds = max([made.rounds, *(made.ready[s] + 1 for s in self._ending(rank, made))])
        self.rounds = tuple(self._round(made, number) for number in range(rounds))
        self._state_spots: dict[tuple, tuple[Spots, ...]] = {}

    @property
    def messages(self) -> list[Message]:
        """What this rank sends, in order."""
        return [sent.message for each in self.rounds for sent in each.sent]

    def bytes_sent(self, compressors: Sequence[Compressor]) -> int:
        """Bytes that this rank sends in a `compress` of these compressors, to all of its neighbours."""
        return sum(self.message_bytes(compressors, sent) for each in self.rounds for sent in each.sent)

    def message_bytes(self, compressors: Sequence[Compressor], sent: Sent) -> int:
        """Bytes of one of the messages."""
        return message_bytes([c.state for c in compressors if c.state is not None], len(sent.spots), sent.inside)

    @property
    def ends_inside(self) -> bool:
        """Whether any sequence of the step ends inside of a window."""
        return any(position % self.reads.ratio for ends in self.ends for position in ends.positions)

    def state_spots(self, state: FoldState) -> tuple[Spots, ...]:
        """Of each rank: where the carries of the sequences that end there go in a caller's state."""
        key = state.ring, state.places
        if key not in self._state_spots:
            rows = carry_shape(state.spec, None if self.ends_inside else state.spec.ratio)[0]
            made = [spots_of(state, _long(ends.slots), _long(ends.positions), rows) for ends in self.ends]
            self._state_spots[key] = tuple(spots.to(self.device) for spots in made)
        return self._state_spots[key]

    def _entry_numbers(self) -> list[tuple[int, int]]:
        """Of each sequence: the number of its first entry of the step, and that one's window; last how many there are."""
        ratio, found, number = self.reads.ratio, [], 0
        for start, length in zip(self.shards.start_pos, self.shards.lengths, strict=True):
            found.append((number, start // ratio))
            number += (start + length) // ratio - start // ratio
        return [*found, (number, 0)]

    def _slots(
        self, entry_slots: torch.Tensor | None, table: torch.Tensor | None, rows_per_page: int | None
    ) -> torch.Tensor | None:
        """The cache slot of every entry of the step."""
        if entry_slots is not None and table is not None:
            raise ValueError("entry_slots and cache_block_table exclude each other, got both")
        total, batch = self._entries[-1][0], len(self.shards.lengths)
        if entry_slots is not None:
            check_numbers("entry_slots", entry_slots, (total,), self.device)
            return entry_slots.long()
        if table is None:
            return None
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        check_numbers("cache_block_table", table, (batch, None), self.device)
        counts = [after - before for (before, _), (after, _) in pairwise(self._entries)]
        most = max((window + n for (_, window), n in zip(self._entries, counts, strict=False) if n), default=0)
        if table.shape[1] * rows_per_page < most:
            raise ValueError(f"cache_block_table must have pages for {most} entries, got {table.shape[1]} of {rows_per_page}")
        sequence = torch.repeat_interleave(_long([*range(batch)]), _long(counts))
        first = _long([window - number for number, window in self._entries])
        window = on_device(torch.arange(total) + first[sequence], self.device)
        page = table[on_device(sequence, self.device), window // rows_per_page].long()
        return torch.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)

    def _owned_slots(self, rank: int) -> torch.Tensor:
        """Of the entries of a rank."""
        found = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        for sequence, windows in self.shards.windows(rank, self.reads.ratio) if self.entry_slots is not None else ():
            number, window = self._entries[sequence]
            found.append(self.entry_slots[number + windows.start - window : number + windows.stop - window])
        return torch.cat(found)

    def _last(self, rank: int) -> list[Segment]:
        """The segments of a rank with which sequences end."""
        ends = [start + length for start, length in zip(self.shards.start_pos, self.shards.lengths, strict=True)]
        return [s for s in self.shards.segments[rank] if s.end == ends[s.sequence]]

    def _ending(self, rank: int, made: Schedule) -> list[Segment]:
        """Those behind which there is a carry, by the round in which it can be known."""
        return sorted((s for s in self._last(rank) if self.reads.anything(s.end)), key=lambda s: made.ready[s])

    def _ends_of(self, rank: int, made: Schedule) -> Ends:
        some = self._ending(rank, made)
        over = [self.state_slots[s.sequence] for s in self._last(rank) if s not in some]
        return Ends([self.state_slots[s.sequence] for s in some], [s.end for s in some], on_device(_long(over), self.device))

    def _round(self, made: Schedule, number: int) -> Round:
        sent = [m for m in made.messages if (m.source, m.round) == (self.rank, number)]
        received = [m for m in made.messages if (m.target, m.round) == (self.rank, number)]
        ending = self._ending(self.rank, made)
        ends = [s for s in ending if made.ready[s] == number]
        before = sum(made.ready[s] < number for s in ending)
        tails = [*ends, *(s for m in sent for s in m.lefts)]
        return Round(
            self._tail(tails) if tails else None,
            End(self._tail_spots(ends, self.ends_inside), slice(before, before + len(ends))),
            tuple(self._sent(m, True, made) for m in sent),
            tuple(self._sent(m, False, made) for m in received),
        )

    def _sent(self, message: Message, leaves: bool, made: Schedule) -> Sent:
        positions = [s.start for s in message.rights]
        inside = any(position % self.reads.ratio for position in positions)
        spots = self._tail_spots(message.lefts, inside) if leaves else self._spots(message.rights, positions, inside)
        return Sent(message, spots, inside, self._pass_on(message.rights, made))

    def _pass_on(self, segments: Sequence[Segment], made: Schedule) -> bool:
        """Whether any of them has too few tokens to know its own carry without the one that it gets."""
        wanted = {s for m in made.messages for s in m.lefts} | {*self._ending(self.rank, made)}
        return any(s in wanted and self.reads.reach(s.end) < s.start for s in segments)

    def _tail(self, segments: list[Segment]) -> Tail:
        starts = [self._tail_start(s) for s in segments]
        rows = [(s.row + start - s.start, s.row + s.end - s.start) for s, start in zip(segments, starts, strict=True)]
        pretended = [
            (s, start)
            for s, start in zip(segments, starts, strict=True)
            if self.reads.reach(s.end) >= s.start and self.reads.anything(start)
        ]
        return Tail(
            self._step(segments, starts, None),
            slice(*rows[0]) if len(rows) == 1 else on_device(_long([x for row in rows for x in range(*row)]), self.device),
            self._spots([s for s, _ in pretended], [start for _, start in pretended], False),
        )

    def _tail_start(self, segment: Segment) -> int:
        return max(self.reads.reach(segment.end), segment.start)

    def _tail_spots(self, segments: Sequence[Segment], inside: bool) -> Spots:
        """Where the carries at the ends of segments are once their tails were folded."""
        spots = self._spots(segments, [s.end for s in segments], inside)
        for i, s in enumerate(segments):
            start = self._tail_start(s)
            # As `FoldState` has it: what would take the place of the row that the step reads goes to the spare one.
            if self.like.kind == "fold" and start % self.reads.ratio and (s.end - start) % self.like.ring == 0:
                spots.rows[i], spots.places[i] = self.like.ring, self.like.ring
        return spots

    def _step(self, segments: list[Segment], starts: list[int], entry_slots: torch.Tensor | None) -> StepPlan | None:
        """A plan of segments from these positions to their ends."""
        lengths = [s.end - start for s, start in zip(segments, starts, strict=True)]
        if not lengths:
            return None
        return StepPlan.build(
            self.reads.ratio,
            self._ints(starts),
            self._ints([0, *accumulate(lengths)]),
            max(lengths),
            max_tokens=sum(lengths),
            state_slots=self._ints([self._own[s] for s in segments]),
            entry_slots=entry_slots,
            errors=self.errors,
        )

    def _spots(self, segments: Sequence[Segment], positions: list[int], inside: bool) -> Spots:
        """Homes in scratch states."""
        if self.like is None:
            return Spots(*(torch.zeros(0, dtype=torch.int64, device=self.device) for _ in Spots._fields))
        rows = carry_shape(self.like.spec, None if inside else self.reads.ratio)[0]
        return spots_of(self.like, _long([self._own[s] for s in segments]), _long(positions), rows).to(self.device)

    def _ints(self, values: list[int]) -> torch.Tensor:
        return numbers_on(self.device, values)


def _long(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
