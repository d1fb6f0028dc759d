"""The counts of refusals that all plans of an integration share."""

from __future__ import annotations

import torch


class Errors(dict[torch.device, torch.Tensor]):
    """For each device an int32 `[1]`, the `errors` of all plans there. Made on first use, which must not be in a graph."""

    def __missing__(self, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):  # it outlives the step that makes it
            made = self[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return made

    def total(self) -> int:
        """The sum over all devices. Waits for them."""
        return sum(int(count) for count in self.values())
