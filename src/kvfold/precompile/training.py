"""The kernels of training for `aot`, as `combinations.Combination`s are those of serving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from ..backend_triton.build import Variant
from ..backend_triton.variants import variant_of
from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from ..training.keys import Calls, training_keys
from ..training.table import Config
from ..training.variants import TrainingKey
from .choices import fits


@dataclass(frozen=True)
class TrainingKernel:
    """One launch of a training call. words: the compressor. fmt: of fake quantization, None without."""

    words: tuple[str, ...]
    fmt: RecordFormat | None
    key: TrainingKey

    @property
    def name(self) -> str:
        """Says all that kernels of one selection can differ in, so no two have the same."""
        key, config = self.key, self.config
        kernel, forward = config.kernel, config.kernel in ("forward", "entries", "read")
        parts = [f"train_{kernel}", *self.words]
        if forward:
            parts += [self.fmt.name if self.fmt is not None else "plain"]
        fields = {"ahead": config.ahead, "slice": config.slice, "rows": config.rows, "columns": config.columns,
                  "registers": config.registers, "warps": config.num_warps}  # fmt: skip
        parts += [f"{name}{value}" for name, value in fields.items() if value]
        parts += ["fetch"] * config.fetch
        parts += ["rounded"] * (key.record.round_rows and kernel not in ("spread", "sum"))
        if kernel == "sum":
            parts += [f"groups{key.groups}", f"groups{key.weight_groups}"]
        else:
            parts += ["latent"] * key.latent + ["apart"] * key.apart + ["kv_fp32"] * (key.kv_score == torch.float32)
        return " ".join(parts)

    @property
    def config(self) -> Config:
        return self.key.config

    @property
    def spills(self) -> int:
        """Bytes that a thread may spill on sm_90, by the row of the table."""
        return self.config.spills

    def variant(self, pdl: bool = False) -> Variant:
        return variant_of(self.key, True, pdl)


def training_kernels(
    specs: tuple[tuple[CompressorSpec, tuple[str, ...]], ...],
    formats: tuple[RecordFormat | None, ...],
    dtypes: tuple[torch.dtype, ...],
    tokens: tuple[int, ...],
) -> Iterator[TrainingKernel]:
    """Each once. specs: with their words. Without a cache of one and of two tensors, and without ape with latents too."""
    found: dict[Variant, TrainingKernel] = {}
    for (spec, words), fmt in product(specs, formats):
        if not fits(spec, fmt):
            continue
        latents = (False, True) if fmt is None and not spec.has_ape else (False,)
        calls = Calls(tokens, dtypes, apart=(False, True) if fmt is None else (False,), latents=latents)
        for key in training_keys(spec, fmt, calls):
            one = TrainingKernel(words, fmt, key)
            found.setdefault(one.variant(), one)
    yield from found.values()
