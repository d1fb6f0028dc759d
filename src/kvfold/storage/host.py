"""Numbers of the host on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy to a GPU from memory that is not pinned would wait for all that its stream has to do."""
    from_host = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if from_host else x.to(device)


def numbers_on(device: torch.device, values: Sequence, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return on_device(torch.tensor(values, dtype=dtype), device)
