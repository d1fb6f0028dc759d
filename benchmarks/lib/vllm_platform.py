"""vLLM without its binaries."""

from __future__ import annotations


def take_no_platform(device: str) -> None:
    """Makes vLLM think that it runs on no platform it knows, with tensors on `device`: "cpu", or "cuda" where its own kernels
    are then its Triton ones, which need no binaries. Before any other module of it is imported."""
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    class Platform(UnspecifiedPlatform):
        device_type = device

        def num_compute_units(self, *_: object) -> int:
            if device == "cpu":
                return 1
            import torch

            return torch.cuda.get_device_properties(0).multi_processor_count

    vllm.platforms._current_platform = Platform()
