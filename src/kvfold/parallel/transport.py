"""Sending between ranks: everything that calls torch.distributed, and what it raises."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from .errors import RankError

# The older name of the two says that it is old, from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Parcel(NamedTuple):
    """A tensor for another rank, or from it. rank: in the group."""

    rank: int
    data: torch.Tensor


class Transport:
    """One process group as ranks 0 to size - 1.

    Attributes:
        group: the process group; None for a single process without one.
        on_host: whether calls return when the data is there, as gloo's do. NCCL's are done in the order of the stream.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: timedelta | None) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self.on_host = group is None or "nccl" not in str(dist.get_backend(group))

    @property
    def device(self) -> torch.device:
        """Where the group's small numbers live."""
        return torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())

    def exchange(self, sent: Sequence[Parcel], received: Sequence[Parcel], what: str) -> None:
        """Sends and receives all of these at once; `received` are written."""
        operations = [(dist.isend, parcel) for parcel in sent] + [(dist.irecv, parcel) for parcel in received]
        if not operations:
            return
        ranks = sorted({parcel.rank for _, parcel in operations})
        with _answered_by(ranks, what):
            works = dist.batch_isend_irecv(
                [dist.P2POp(call, parcel.data, group=self.group, group_peer=parcel.rank) for call, parcel in operations]
            )
        for i, work in enumerate(works):
            waited_for = [operations[i][1].rank] if len(works) == len(operations) else ranks
            self._wait(work, waited_for, what)

    def gather(self, data: torch.Tensor, what: str) -> torch.Tensor:
        """`data`, uint8 or int64 `[n]` and of the same n on every rank, of all ranks: `[size, n]`."""
        if self.size == 1:
            return data[None]
        found = data.new_empty(self.size, *data.shape)
        with _answered_by(self._others, what):
            work = _all_gather(found.view(-1), data, group=self.group, async_op=True)
        self._wait(work, self._others, what)
        return found

    def reduce(self, data: torch.Tensor, what: str) -> torch.Tensor:
        """The sum over all ranks, added in whatever order the group does it. `data` is written."""
        if self.size > 1:
            with _answered_by(self._others, what):
                work = dist.all_reduce(data, group=self.group, async_op=True)
            self._wait(work, self._others, what)
        return data

    def agree(self, **arguments: object) -> None:
        """Checks that all ranks have the same arguments, by a number of each. Waits for the others."""
        if self.size == 1:
            return
        numbers = [int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:7], "big") for x in arguments.values()]
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        found = self.gather(mine, "the arguments of all ranks").tolist()
        for i, (name, value) in enumerate(arguments.items()):
            others = [rank for rank, row in enumerate(found) if row[i] != numbers[i]]
            if others:
                raise RankError(
                    f"{name} must be the same on all ranks, got {_short(value)} on rank {self.rank}, not so on {others}"
                )

    def _wait(self, work: dist.Work, ranks: list[int], what: str) -> None:
        with _answered_by(ranks, what):
            # With a timeout of its own NCCL would hold up the host; its group's watchdog looks after it.
            if self.on_host and self.timeout is not None:
                work.wait(self.timeout)
            else:
                work.wait()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextmanager
def _answered_by(ranks: list[int], what: str) -> Iterator[None]:
    """An error of torch.distributed becomes a `RankError`, which names these ranks and what they were asked for."""
    try:
        yield
    except RuntimeError as error:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of ranks {ranks}"
        raise RankError(f"{who} did not answer, for {what}: {str(error).splitlines()[0]}") from error
