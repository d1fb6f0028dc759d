"""`ParallelPlan`: one rank's part of a step, for all compressors of one ratio and overlap, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ..arguments.checks import check_int, check_numbers, check_tensor
from ..plan import StepPlan
from .schedule import Message, Schedule, reach, reads_history
from .shards import Segment, Shards


class Spots(NamedTuple):
    """Some segments of a rank: their slots in its scratch states, and a position of each; int32 `[n]` both."""

    slots: torch.Tensor
    positions: torch.Tensor


class Tail(NamedTuple):
    """The last tokens of segments, folded alone and first, to send what the next rank needs.

    step: their plan. rows: which rows of the rank's tokens they are: a slice, or int64 indices. blank: of those whose step
    would read a history that changes nothing of what is sent.
    """

    step: StepPlan
    rows: slice | torch.Tensor
    blank: Spots


class Sent(NamedTuple):
    """A message that this rank sends or gets. inside: whether any of its carries starts inside of a window. passes_on: whether
    any that it brings is needed to send another one."""

    message: Message
    spots: Spots
    inside: bool
    passes_on: bool


class Round(NamedTuple):
    """What this rank does in one round: fold tails, send, receive."""

    tail: Tail | None
    sent: tuple[Sent, ...]
    received: tuple[Sent, ...]


class Owned(NamedTuple):
    """What a rank makes. entries: the cache slots of its entries, int64 `[n]`, in this rank's cache. ends: the state slots of
    the sequences that end in its tokens, and the positions there."""

    entries: torch.Tensor
    ends: Spots


class ParallelPlan:
    """Who sends what to whom, and the plans of this rank's calls. Made by `ContextParallel.plan`.

    Attributes:
        shards, rank, ratio, overlap: what it is for.
        step: the `StepPlan` of the rank's own tokens, of which each segment is a sequence; None without tokens.
        errors: int32 `[1]`: grows where something was refused, on this rank or, after a `gather`, on any. One refusal may be
            counted more than once, as all that needs it is refused as well.
        entry_slots: int64 `[E]`, the cache slots of all entries of the step in the order of one process, or None.
        rounds: of the exchange, in order. In most steps it is one; none if every cut is where nothing is needed.
    """

    def __init__(
        self,
        shards: Shards,
        made: Schedule,
        rank: int,
        ratio: int,
        overlap: bool,
        state_slots: torch.Tensor,
        *,
        entry_slots: torch.Tensor | None,
        cache_block_table: torch.Tensor | None,
        rows_per_page: int | None,
        errors: torch.Tensor | None,
    ) -> None:
        self.shards, self.rank, self.ratio, self.overlap = shards, rank, ratio, overlap
        self.device, self.state_slots = state_slots.device, state_slots
        count = len(shards.lengths)
        check_numbers("state_slots", state_slots, (count,), self.device)
        if errors is not None:
            check_tensor("errors", errors, (1,), (torch.int32,), self.device)
        self.errors = torch.zeros(1, dtype=torch.int32, device=self.device) if errors is None else errors
        self._own = {segment: i for i, segment in enumerate(shards.segments[rank])}
        self._entries = self._entry_numbers()
        self.entry_slots = self._slots(entry_slots, cache_block_table, rows_per_page)
        self.step = self._step([*self._own], [s.start for s in self._own], self._owned_slots(rank))
        self._left = shards.before()
        self.rounds = tuple(self._round(made, number) for number in range(made.rounds))
        first = [s for s in self._own if s not in self._left and reads_history(s.start, ratio, overlap)]
        self.first, self.first_passes_on = self._spots(first, [s.start for s in first]), self._pass_on(first, made)
        self.first_sequences = self._state_slots(first)
        self.owned = tuple(self._owned(other) for other in range(shards.ranks))
        own_ends = self._ends(rank)
        self.ends = self._spots(own_ends, [s.end for s in own_ends])

    @property
    def messages(self) -> list[Message]:
        """What this rank sends, in order."""
        return [sent.message for each in self.rounds for sent in each.sent]

    def _entry_numbers(self) -> list[tuple[int, int]]:
        """Of each sequence: the number of its first entry of the step, and that one's window; one more for their number."""
        spans = [
            (s // self.ratio, (s + n) // self.ratio) for s, n in zip(self.shards.start_pos, self.shards.lengths, strict=True)
        ]
        firsts = [0, *accumulate(b - a for a, b in spans)]
        return [*zip(firsts, [a for a, _ in spans] + [0], strict=True)]

    def _numbers(self, rank: int) -> list[int]:
        """The entries of a rank, by their numbers in the whole step."""
        found = []
        for sequence, windows in self.shards.windows(rank, self.ratio):
            number, window = self._entries[sequence]
            found += range(number + windows.start - window, number + windows.stop - window)
        return found

    def _slots(
        self, entry_slots: torch.Tensor | None, table: torch.Tensor | None, rows_per_page: int | None
    ) -> torch.Tensor | None:
        """The cache slot of every entry of the step."""
        if entry_slots is not None and table is not None:
            raise ValueError("entry_slots and cache_block_table exclude each other, got both")
        total, lengths = self._entries[-1][0], self.shards.lengths
        if entry_slots is not None:
            check_numbers("entry_slots", entry_slots, (total,), self.device)
            return entry_slots.long()
        if table is None:
            return None
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        check_numbers("cache_block_table", table, (len(lengths), None), self.device)
        counts = [b[0] - a[0] for a, b in zip(self._entries, self._entries[1:], strict=False)]
        most = max((w + n for (_, w), n in zip(self._entries, counts, strict=False) if n), default=0)
        if table.shape[1] * rows_per_page < most:
            raise ValueError(f"cache_block_table must have pages for {most} entries, got {table.shape[1]} of {rows_per_page}")
        firsts = torch.tensor([(n, w) for n, w in self._entries[:-1]], dtype=torch.int64).reshape(-1, 2)
        sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
        window = torch.arange(total) - firsts[sequence, 0] + firsts[sequence, 1]
        sequence, window = sequence.to(self.device), window.to(self.device)
        page = table[sequence, window // rows_per_page].long()
        return torch.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)

    def _owned_slots(self, rank: int) -> torch.Tensor | None:
        return None if self.entry_slots is None else self.entry_slots[self._indices(self._numbers(rank))]

    def _owned(self, rank: int) -> Owned:
        ends, entries = self._ends(rank), self._owned_slots(rank)
        if entries is None:
            entries = torch.zeros(0, dtype=torch.int64, device=self.device)
        return Owned(entries, Spots(self._state_slots(ends), self._ints([s.end for s in ends])))

    def _ends(self, rank: int) -> list[Segment]:
        """The segments of a rank with which their sequences end."""
        shards = self.shards
        return [s for s in shards.segments[rank] if s.end == shards.start_pos[s.sequence] + shards.lengths[s.sequence]]

    def _round(self, made: Schedule, number: int) -> Round:
        sent = [self._sent(m, m.lefts, [s.end for s in m.lefts], made) for m in made.sent(self.rank, number)]
        received = [self._sent(m, m.rights, [s.start for s in m.rights], made) for m in made.received(self.rank, number)]
        tails = [s for one in sent for s in one.message.lefts]
        return Round(self._tail(tails) if tails else None, tuple(sent), tuple(received))

    def _sent(self, message: Message, own: Sequence[Segment], positions: list[int], made: Schedule) -> Sent:
        inside = any(position % self.ratio for position in positions)
        return Sent(message, self._spots(own, positions), inside, self._pass_on(message.rights, made))

    def _pass_on(self, segments: Sequence[Segment], made: Schedule) -> bool:
        """Whether any of them has too few tokens to send its own carry without the one that it gets."""
        sends = {s for m in made.messages for s in m.lefts}
        return any(s in sends and reach(s.end, self.ratio, self.overlap) < s.start for s in segments)

    def _tail(self, segments: list[Segment]) -> Tail:
        starts = [max(reach(s.end, self.ratio, self.overlap), s.start) for s in segments]
        rows = [(s.row + start - s.start, s.row + s.end - s.start) for s, start in zip(segments, starts, strict=True)]
        blank = [(s, start) for s, start in zip(segments, starts, strict=True) if self._is_blank(s, start)]
        return Tail(
            self._step(segments, starts, None),
            slice(*rows[0]) if len(rows) == 1 else self._indices([x for first, last in rows for x in range(first, last)]),
            self._spots([s for s, _ in blank], [start for _, start in blank]),
        )

    def _is_blank(self, segment: Segment, start: int) -> bool:
        whole = reach(segment.end, self.ratio, self.overlap) >= segment.start
        return whole and reads_history(start, self.ratio, self.overlap)

    def _step(self, segments: list[Segment], starts: list[int], entry_slots: torch.Tensor | None) -> StepPlan | None:
        """A plan of segments from these positions to their ends."""
        lengths = [s.end - start for s, start in zip(segments, starts, strict=True)]
        if not lengths:
            return None
        return StepPlan.build(
            self.ratio,
            self._ints(starts),
            self._ints([0, *accumulate(lengths)]),
            max(lengths),
            max_tokens=sum(lengths),
            state_slots=self._ints([self._own[s] for s in segments]),
            entry_slots=entry_slots,
            errors=self.errors,
        )

    def _spots(self, segments: Sequence[Segment], positions: list[int]) -> Spots:
        return Spots(self._ints([self._own[s] for s in segments]), self._ints(positions))

    def _state_slots(self, segments: Sequence[Segment]) -> torch.Tensor:
        return self.state_slots[self._indices([s.sequence for s in segments])]

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)
