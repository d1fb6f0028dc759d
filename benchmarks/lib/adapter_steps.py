"""Decode steps inside each engine, over its own classes and pages where it can be imported: through kvfold's adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

END = 512  # tokens that each sequence has after a step in which it ends a window of every ratio


class Case(NamedTuple):
    """A decode step. mode: "hit" ends windows of 4 and of 128 in every sequence, "spread" has them at all phases."""

    shape: str
    batch: int
    new: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.shape} b{self.batch} n{self.new} {self.mode}"

    @property
    def starts(self) -> list[int]:
        return [END - self.new - (b * 128 // self.batch if self.mode == "spread" else 0) for b in range(self.batch)]


class Ready(NamedTuple):
    """A step, ready to be called, and how many sequences and entries kvfold has refused."""

    call: Callable[[], object]
    refused: Callable[[], int]


Layers = tuple[int, ...]  # the ratio of each


@contextmanager
def vllm_step(case: Case, variant: str, layers: Layers, device: str) -> Iterator[Ready]:
    """A step over vLLM's own classes, or over kvfold's in their place. variant: "own", or the state of `register`."""
    from .vllm_platform import take_no_platform

    if "vllm.models" not in sys.modules:
        take_no_platform(device)
    from kvfold.integrations.vllm import config as adapter
    from kvfold.integrations.vllm import refused, register, unregister

    from .vllm_world import Layer, Sizes, Step, World, make_config

    if variant != "own":
        register(variant)
    try:
        sizes = Sizes(case.batch, case.batch * 128, END + 256, case.new - 1, device)
        config = make_config(sizes)
        made = []
        for i, ratio in enumerate(layers):
            widths = (512, 128) if ratio == 4 else (512,)
            made += [Layer(sizes, config, ratio, width, name=f"layers.{i}") for width in widths]
        world = World(made, config, sizes)
        with mock.patch.object(adapter, "compile_before"):  # it compiles what no case here calls
            # The windows that the step goes on with.
            world.run([Step.of(*((b, start // 128 * 128, start % 128) for b, start in enumerate(case.starts)))])
            step = Step.of(*((b, start, case.new) for b, start in enumerate(case.starts)))
            metadata, positions = world.prepare(step)
            kv_scores = [world.kv_score(step, layer.kv_width, len(positions)) for layer in made]
            yield Ready(lambda: world.forward(metadata, kv_scores, positions), refused)
    finally:
        unregister()


@contextmanager
def sglang_step(case: Case, variant: str, layers: Layers, device: str) -> Iterator[Ready]:
    """A step over SGLang's own pools and metadata, by kvfold's hooks. variant: the state of `register`."""
    with mock.patch.object(torch.cuda, "is_available", return_value=False):  # or SGLang asks for its own binaries
        from .sglang_world import Backend, config, make_compressor, plugged, rope_freqs
    from kvfold.integrations.sglang import errors

    drafts = case.new if case.new > 1 else 0
    with plugged(variant), config(drafts, device):
        backend, freqs = Backend([*layers], drafts=drafts, requests=case.batch, device=device), rope_freqs().to(device)
        made = []
        for i, ratio in enumerate(layers):
            widths = (512, 128) if ratio == 4 else (512,)
            made += [make_compressor(i, ratio, width, freqs, i) for width in widths]
        starts = [*enumerate(case.starts, 1)]  # slot 0 is nobody's
        for request, start in starts:
            backend.allocate(request, start + case.new)
        batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False, is_target_verify=lambda: False))
        rows: dict[tuple[int, int], torch.Tensor] = {}

        def forward(metadata: object, tokens: int) -> Callable[[], None]:
            calls = []
            for c in made:
                width = 2 * c.head_dim * (1 + c.overlap)
                if (tokens, width) not in rows:
                    rows[tokens, width] = torch.randn(tokens, width, device=device)
                # Each layer of a step has rows of its own; a prompt's, which are not timed, may be all layers'.
                x = rows[tokens, width].clone() if tokens == case.batch * case.new else rows[tokens, width]
                calls.append((x, batch, c.layer_id, c))

            def run() -> None:
                backend.forward_metadata = metadata
                for call in calls:
                    backend.forward_unified(*call)

            return run

        prompt = [(request, 0, start) for request, start in starts]
        forward(backend.extend(prompt), sum(case.starts))()
        step = [(request, start, case.new) for request, start in starts]
        call = forward((backend.verify if drafts else backend.decode)(step), case.batch * case.new)
        before = errors()
        yield Ready(call, lambda: errors() - before)


@contextmanager
def trtllm_step(case: Case, variant: str, layers: Layers, device: str) -> Iterator[Ready]:
    """A step over tensors as TensorRT-LLM passes them: by its operators, or with one call in place of two for a main
    compressor. variant: "operators" or "records"."""
    from kvfold.integrations import tensorrt_llm

    from .adapter_trtllm import step_of

    tensorrt_llm.forget()
    count = tensorrt_llm.errors(device)
    count.zero_()
    try:
        yield Ready(step_of(layers, case.starts, case.new, variant, device), lambda: int(count))
    finally:
        tensorrt_llm.forget()


class Engine(NamedTuple):
    """How a step of an engine is made, and its variants, those that are asked for most first."""

    step: Callable
    variants: tuple[str, ...]


ENGINES = {
    "vllm": Engine(vllm_step, ("window", "fold", "own")),
    "sglang": Engine(sglang_step, ("pools", "fold")),
    "trtllm": Engine(trtllm_step, ("records", "operators")),
}
