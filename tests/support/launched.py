"""Which kernels calls on a CPU would launch on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from kvfold.backend_triton import launch, launcher
from kvfold.backend_triton.keys import Key
from kvfold.calls import checks
from kvfold.integrations.tensorrt_llm import postprocess


class _Launcher:
    """In place of a launcher: notes its key, and does nothing."""

    def __init__(self, key: Key, found: list[Key]) -> None:
        self.key, self.found = key, found

    def __call__(self, grid: int, *args: Any, **kwargs: Any) -> None:
        assert grid > 0
        self.found.append(self.key)


@contextmanager
def launched() -> Iterator[list[Key]]:
    """The keys of all kernels that are called inside, in order; nothing is computed but plans."""
    found: list[Key] = []

    def launcher_of(key: Key, device: torch.device) -> _Launcher:
        return _Launcher(key, found)

    with (
        mock.patch.object(checks, "choose_backend", lambda *_: "triton"),
        mock.patch.object(launch, "launcher_of", launcher_of),
        mock.patch.object(launcher, "launcher_of", launcher_of),
        mock.patch.object(postprocess, "_with_torch", postprocess._with_triton),
    ):
        yield found
