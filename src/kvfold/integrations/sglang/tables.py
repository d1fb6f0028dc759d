"""SGLang's addresses as kvfold's tables, computed on the device without a host sync. Request slot 0 is SGLang's padding."""

from __future__ import annotations

import torch

GROUP = 4  # rows of a page of kvfold's table over SGLang's rings of ratio 4


def request_rings(slots: torch.Tensor, pages: int) -> torch.Tensor:
    """int64 `[B, pages]`: the pages of each request's own ring, -1 for padding."""
    table = slots[:, None] * pages + torch.arange(pages, device=slots.device)
    return torch.where(slots[:, None] > 0, table, -1)


class SwaPages:
    """SGLang's two maps: tokens of a request to slots of the whole pool, and those to slots of the sliding-window pool."""

    def __init__(self, req_to_token: torch.Tensor, full_to_swa: torch.Tensor, page_size: int) -> None:
        self.req_to_token, self.full_to_swa, self.page_size = req_to_token, full_to_swa.detach(), page_size

    def slot(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The sliding-window slot of each position, which must not be negative; same shape."""
        return self.full_to_swa[self.req_to_token[slots, positions].long()].long()

    def groups(self, slots: torch.Tensor, start: torch.Tensor, end: torch.Tensor, ring: int, width: int) -> torch.Tensor:
        """int64 `[B, width]`: where a step finds its groups of 4 positions in rings of SWA pages.

        Group g is in column `g % width`: those from the one before `start` on that begin before `end`; else -1.
        """
        group = start[:, None] // GROUP - 1 + torch.arange(width, device=slots.device)
        there = (group >= 0) & (group * GROUP < end[:, None]) & (slots[:, None] > 0)
        at = self.slot(slots[:, None], torch.where(there, group * GROUP, 0))
        block = at // self.page_size * (ring // GROUP) + at % ring // GROUP
        return torch.full_like(group, -1).scatter_(1, group % width, torch.where(there, block, -1))

    def ring_rows(self, slots: torch.Tensor, positions: torch.Tensor, ring: int) -> torch.Tensor:
        """The row of a pool of rings for each position; same shape."""
        at = self.slot(slots, positions)
        return at // self.page_size * ring + at % ring

    def pages(self, slots: torch.Tensor, count: int) -> torch.Tensor:
        """int32 `[B, count]`: the page of each `page_size` positions."""
        first = self.req_to_token[:, : count * self.page_size : self.page_size].index_select(0, slots)
        return (self.full_to_swa[first.long()] // self.page_size).to(torch.int32)

    def hits(self, slots: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `restore` takes: slots, pages and starts of the requests that go on at the end of a page; slot -1 for others."""
        hit = (start > 0) & (start % self.page_size == 0) & (slots > 0)
        page = self.slot(slots, (start - 1).clamp(min=0)) // self.page_size
        made = torch.where(hit, slots, -1), page, torch.where(hit, start, 0)
        return made[0].to(torch.int32), made[1].to(torch.int32), made[2].to(torch.int32)


def kept_positions(positions: torch.Tensor, end: torch.Tensor, ring: int, page_size: int) -> torch.Tensor:
    """Which positions of a step up to `end` a later one may read at ratio 4: the last `ring`, and the last group of a page."""
    return (positions >= end - ring) | (positions % page_size >= page_size - GROUP)


def kept_tokens(seq_lens: list[int], extend_lens: list[int], ring: int, page_size: int) -> torch.Tensor:
    """The same on the host: int64, numbers of the kept tokens among all of the step."""
    new, end = (torch.tensor(lengths, device="cpu") for lengths in (extend_lens, seq_lens))
    position = (end - new.cumsum(0)).repeat_interleave(new) + torch.arange(int(new.sum()), device="cpu")
    return kept_positions(position, end.repeat_interleave(new), ring, page_size).nonzero().flatten()
