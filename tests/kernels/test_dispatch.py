"""Launching: straight to the compiled kernel, but by Triton's own way where a profiler of Triton's listens."""

from __future__ import annotations

import pytest
import torch

from kvfold.backend_triton import launcher as dispatch


class Compiled:
    """Stands for a compiled kernel: records what it is asked to launch."""

    def __init__(self) -> None:
        self.straight: list[tuple] = []
        self.listened: list[tuple] = []

    def run(self, *arguments: object) -> None:
        self.straight.append(arguments)

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.listened.append((grid, *arguments))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[dispatch.Launcher, dict[tuple[bool, bool], Compiled]]:
    """A launcher with a recording kernel in the place of each variant, on a device that is taken to be there."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77 + index, raising=False)
    launcher = dispatch.Launcher(("a kernel of the test",), torch.device("cuda", 0))
    kernels = {(aligned, pdl): Compiled() for aligned in (True, False) for pdl in (True, False)}
    launcher.built = {kind: (kernel, kernel.run, "function", "metadata", (None,)) for kind, kernel in kernels.items()}
    return launcher, kernels


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("pdl", [True, False])
def test_straight_to_the_kernel(launched, aligned: bool, pdl: bool) -> None:
    launcher, kernels = launched
    launcher(5, (16, 2.5, None), 32 if aligned else 40, pdl)
    assert kernels.pop((aligned, pdl)).straight == [
        (5, 1, 1, 77, "function", "metadata", None, None, None, 16, 2.5, None, None)
    ]
    assert not any(kernel.straight or kernel.listened for kernel in kernels.values())


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_is_told(launched, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    launcher, kernels = launched
    launcher(5, (16,), 0)
    monkeypatch.setattr(dispatch._HOOKS, which, lambda metadata: None)
    launcher(6, (32,), 0)
    kernel = kernels[True, False]
    assert [call[0] for call in kernel.straight] == [5]
    assert kernel.listened == [((6, 1, 1), 32, None)]


def test_addresses_are_packed_and_numbers_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    tensor = torch.zeros(4)
    assert dispatch.pack(tensor, 3, None, 0.5) == ((tensor.data_ptr(), 3, None, 0.5), tensor.data_ptr())
