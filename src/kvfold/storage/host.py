"""Numbers of the host on the device, without waiting for it."""

from __future__ import annotations

import torch


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy to a GPU from memory that is not pinned would wait for all that its stream has to do."""
    from_host = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if from_host else x.to(device)
