"""Ranks of `kvfold.parallel` in one process, one after the other, without torch.distributed.

What a rank sends stays in a mailbox, and whoever receives it gets what it was the last time. Once all ranks have made a step a
few times everything there is as it would be between processes, and the results have the bits of one process. Then the box is
closed: each rank's step can be made, and timed, by itself. Receiving is a copy on the same device, and sending is nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from kvfold.parallel import ContextParallel
from kvfold.parallel.transport import Parcel, Transport


class Mailbox:
    """What ranks sent, by who sent it to whom and by its number in a step; of an all-gather that of all ranks.

    closed: nothing that is sent changes it any more.
    """

    def __init__(self, size: int) -> None:
        self.size, self.closed = size, False
        self.letters: dict[tuple, torch.Tensor] = {}


class Mail(Transport):
    """A rank's transport.

    Attributes:
        messages, sent, gathered: of the step that was last begun: exchanges, bytes that it sent in them, and in all-gathers.
    """

    def __init__(self, box: Mailbox, rank: int) -> None:
        self.group, self.timeout, self.on_host = None, None, False
        self.rank, self.size, self._box = rank, box.size, box
        self.begin()

    def begin(self) -> None:
        """Messages are numbered from here on."""
        self._numbers: Counter = Counter()
        self.messages = self.sent = self.gathered = 0

    def exchange(self, sent: Sequence[Parcel], received: Sequence[Parcel], what: str) -> None:
        self.messages += bool(sent or received)
        for rank, data in sent:
            self.sent += data.nbytes
            place = self._place(self.rank, rank)
            if not self._box.closed:
                self._box.letters[place] = data.clone()
        for rank, data in received:
            letter = self._box.letters.get(self._place(rank, self.rank))
            data.zero_() if letter is None else data.copy_(letter)

    def gather(self, data: torch.Tensor, what: str) -> torch.Tensor:
        self.gathered += data.nbytes
        place = self._place("all")
        if not self._box.closed:
            self._box.letters.setdefault(place, data.new_zeros(self.size, *data.shape))[self.rank] = data
        return self._box.letters[place].clone()

    def agree(self, **arguments: object) -> None:
        """They are one process's."""

    def _place(self, *who: object) -> tuple:
        self._numbers[who] += 1
        return (*who, self._numbers[who])


Ranks = Sequence[tuple[ContextParallel, Mail]]


def ranks_of(size: int, layout: str) -> Ranks:
    """So many ranks that share a mailbox, and their transports."""
    box = Mailbox(size)
    found = [(ContextParallel(layout=layout), Mail(box, rank)) for rank in range(size)]
    for cp, mail in found:
        cp._transport = mail
    return found


def settle(ranks: Ranks, steps: Sequence[Callable[[], object]]) -> None:
    """Makes the ranks' steps, each of which begins with `Mail.begin`, until nothing that is sent changes; then closes the box.

    In each round one message more is right, of those that depend on another: of a step they are few more than ranks.
    """
    for _ in range(2 * len(ranks) + 2):
        for step in steps:
            step()
    close(ranks)


def close(ranks: Ranks) -> None:
    for _, mail in ranks:
        mail._box.closed = True
