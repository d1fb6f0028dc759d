"""Ahead-of-time compilation, for GPUs that need not be there: which kernels there are, and one of them to a file.

What is compiled follows the table: every row of `table.CONFIGS`, for each spec that it serves, with every format defined for
that spec.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .._version import __version__
from ..backend_triton import table
from ..backend_triton.build import Variant
from ..backend_triton.keys import (
    TABLES,
    Key,
    PairKey,
    RestoreKey,
    Types,
    kind_of,
    page_sizes,
    plan_key,
    snapshot_rows,
    step_key,
    store_key,
    window_key,
)
from ..backend_triton.table import ANY, Config, choose
from ..backend_triton.variants import variant_of
from ..contract import UnsupportedError
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS, RecordFormat
from ..storage.snapshots import Snapshots
from .calls import CallKernel, spills_of
from .choices import fits
from .report import AotKernel
from .resources import resources
from .training import TrainingKernel, training_kernels
from .words import config_words, spec_words

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 103, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
# The presets, and one for each width of the table of configurations that no preset has.
SPECS = (
    V4_HCA,
    V4_CSA,
    V4_INDEXER,
    V41_MAIN_R1,
    V41_MAIN_R2,
    V41_INDEX_K,
    CompressorSpec(256, 128),
    CompressorSpec(128, 128),
    CompressorSpec(256, 4, overlap=True, hadamard=True),
)

OPTIONS = ("num_warps", "maxnreg", "launch_pdl", "enable_fp_fusion")  # that kernels are compiled with, by Triton's names


@dataclass(frozen=True)
class Combination:
    """One kernel to compile. Without `fmt` there is no cache, only pooled rows; "plan" and "restore" have no `config` either.

    kind: of a row of the table, or `"ungated"` for `compress` without a state, `"pair"` for `compress_many`, `"plan"` or
    `"restore"`. other: the second of a pair, or of `store` with `also`. page_size: of a `WindowState`. snapshots, latent:
    whether the call leaves any. apart: whether values and scores are two tensors. dtype: of them. placed: of `store`, without a
    plan; normed: whether its rows still need the norm. tables: one of `keys.TABLES`; of a plan, whether it is for an engine's
    metadata.
    """

    kind: str
    spec: CompressorSpec
    fmt: RecordFormat | None = None
    config: Config | None = None
    other: tuple[CompressorSpec, RecordFormat] | None = None
    page_size: int = 1
    snapshots: bool = False
    latent: bool = False
    apart: bool = False
    dtype: torch.dtype = torch.bfloat16
    placed: bool = False
    normed: bool = True
    tables: str = "plain"

    @property
    def name(self) -> str:
        """Says all that kernels of one selection can differ in, so no two have the same."""
        parts = [self.kind, *spec_words(self.spec)]
        if self.config is not None:
            record = self.fmt.name if self.fmt is not None else "rows"
            parts += [record, *config_words(self.config)]
        if self.other is not None:
            parts += [*spec_words(self.other[0]), self.other[1].name]
        if self.kind in ("window", "restore"):
            parts += [f"page{self.page_size}"]
        parts += ["slots"] * self.placed + ["no_norm"] * (not self.normed) + [self.tables] * (self.tables != "plain")
        parts += ["snapshots"] * self.snapshots + ["latent"] * self.latent + ["apart"] * self.apart
        parts += ["kv_fp32"] * (self.dtype == torch.float32)
        return " ".join(parts)

    @property
    def spills(self) -> int:
        return spills_of(self.key())

    def variant(self, pdl: bool = False) -> Variant:
        """As calls get it for fp32 state, weights and, without a cache, rows."""
        return variant_of(self.key(), True, pdl)

    def key(self) -> Key:
        fp32 = torch.float32
        if self.kind == "restore":
            return RestoreKey(self.spec, fp32, Snapshots.allocate(self.spec, 0, self.page_size, device="meta").rows_per_page)
        if self.config is None:
            return plan_key(self.spec.ratio, 1, False, False, self.tables == "engine")
        if self.kind == "store":
            places = (torch.int64, torch.int64 if self.spec.rope_dim else None) if self.placed else ()
            norm = fp32 if self.normed else None
            return store_key(self.spec, self.fmt, (fp32, norm, *places), self.other and self.other[1])
        finishes = self.fmt is not None or self.latent
        types = Types(
            self.dtype, fp32 if self.spec.gate else None, None if finishes else fp32, fp32 if finishes else None, True,
            self.latent, self.apart,
        )  # fmt: skip
        bound = self.config.max_new_tokens
        if self.kind == "window":
            return window_key(self.spec, self.fmt, bound, types, self.page_size, self.tables)
        both = [(self.spec, self.fmt), *([self.other] if self.other else [])]
        more = bound, types, self.snapshots, self.config.bucket
        found = [step_key(spec, fmt, "mean" if self.kind == "mean" else kind_of(spec), *more) for spec, fmt in both]
        return PairKey(*found) if self.other else found[0]


Kernel = Combination | TrainingKernel | CallKernel


def combinations(
    specs: tuple[CompressorSpec, ...] = SPECS,
    formats: tuple[RecordFormat | None, ...] = (None, *FORMATS.values()),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> Iterator[Combination]:
    """Every kernel that calls over these can get, but for the dtypes of state and weights: each once."""
    found: dict[Key, Combination] = {}
    for one in _all(specs, formats, dtypes):
        found.setdefault(one.key(), one)
    yield from found.values()


def _all(
    specs: tuple[CompressorSpec, ...], formats: tuple[RecordFormat | None, ...], dtypes: tuple[torch.dtype, ...]
) -> Iterator[Combination]:
    for spec in sorted(specs, key=lambda spec: spec.ratio):
        yield Combination("plan", spec)
        yield Combination("plan", spec, tables="engine")
    for spec in filter(lambda spec: spec.gate, specs):
        # Pages of fold rows may end inside windows.
        for page_size in (spec.ratio, 1) if state_kind(spec) == "fold" else (spec.ratio,):
            yield Combination("restore", spec, page_size=page_size)
    for config in table.CONFIGS:
        for i, spec in enumerate(specs):
            if not reaches(config, spec):
                continue
            fitting = [fmt for fmt in formats if fits(spec, fmt)]
            if config.kind == "store":
                if not any(_stores_alike(spec, other) for other in specs[:i]):
                    yield from _stores(spec, [fmt for fmt in fitting if fmt is not None], config)
                for dtype, fmt in product(dtypes, () if spec.gate else fitting):
                    yield Combination("ungated", spec, fmt, config, dtype=dtype)
                    yield Combination("ungated", spec, fmt, config, latent=True, dtype=dtype)
                continue
            few = (None,) if None in fitting else fitting
            if config.kind == "mean":
                for dtype, fmt, apart in product(dtypes, few, (False, True)):
                    yield Combination("mean", spec, fmt, config, apart=apart, dtype=dtype)
                continue
            latents = (False,) if spec.has_ape else (False, True)  # as in V4.1, whose index keys are made of them
            for dtype in dtypes:
                if config.kind == "window":
                    yield from _windows(Combination("window", spec, config=config, dtype=dtype), fitting, few, latents)
                    continue
                for fmt in fitting:
                    yield Combination(config.kind, spec, fmt, config, dtype=dtype)
                # With snapshots a call takes the row for many windows (`step_key`).
                for fmt in few if config.bucket == ANY and any(snapshot_rows(spec)) else ():
                    yield Combination(config.kind, spec, fmt, config, snapshots=True, dtype=dtype)
                for latent, apart, fmt in product(latents, (False, True), few):
                    yield Combination(config.kind, spec, fmt, config, latent=latent, apart=apart, dtype=dtype)
                if (config.kind, spec) == ("rows", V4_CSA) and V4_INDEXER in specs:
                    yield from _pairs(config, formats, dtype)


def of_training(
    specs: tuple[CompressorSpec, ...],
    formats: tuple[RecordFormat | None, ...],
    dtypes: tuple[torch.dtype, ...],
    tokens: tuple[int, ...],
) -> Iterator[TrainingKernel]:
    """Every kernel of training calls with so many rows of kv_score."""
    words = tuple((spec, tuple(spec_words(spec))) for spec in specs)
    return training_kernels(words, formats, dtypes, tokens)


def _windows(
    one: Combination, formats: list[RecordFormat | None], few: Sequence[RecordFormat | None], latents: tuple[bool, ...]
) -> Iterator[Combination]:
    """How windows lie on pages with every format, and with all else that a call may have without a cache, or with `few`."""
    sizes = page_sizes(one.spec)
    for page_size, fmt in product(sizes, formats):
        yield replace(one, page_size=page_size, fmt=fmt)
    for page_size, tables, latent, apart, fmt in product(sizes, TABLES, latents, (False, True), few):
        yield replace(one, page_size=page_size, tables=tables, latent=latent, apart=apart, fmt=fmt)


def _stores(spec: CompressorSpec, formats: list[RecordFormat], config: Config) -> Iterator[Combination]:
    """With a plan, without, and into a cache of plain rows as well; one of rows that have had their norm."""
    for fmt in formats[:1]:
        yield Combination("store", spec, fmt, config, placed=True, normed=False)
    for fmt in formats:
        yield Combination("store", spec, fmt, config)
        yield Combination("store", spec, fmt, config, placed=True)
        yield Combination("store", spec, fmt, config, (spec, FORMATS["bf16"]), placed=True)


def _pairs(config: Config, formats: tuple[RecordFormat | None, ...], dtype: torch.dtype) -> Iterator[Combination]:
    """Main compressor and indexer: each indexer format with `fp8_ds_mla`, or where that is not asked for with each main one."""
    known = [fmt for fmt in formats if fmt is not None]
    seconds = [fmt for fmt in known if fmt.name.startswith("indexer")] or [fmt for fmt in known if fits(V4_INDEXER, fmt)]
    firsts = [fmt for fmt in known if fmt.name == "fp8_ds_mla"] or [fmt for fmt in known if fits(V4_CSA, fmt)]
    for first in firsts:
        for second in seconds:
            yield Combination("pair", V4_CSA, first, config, (V4_INDEXER, second), dtype=dtype)
    if firsts and seconds and config.bucket == ANY:
        more = firsts[-1], config, (V4_INDEXER, seconds[-1])
        yield Combination("pair", V4_CSA, *more, snapshots=True, dtype=dtype)
        yield Combination("pair", V4_CSA, *more, apart=True, dtype=dtype)


def reaches(config: Config, spec: CompressorSpec) -> bool:
    """Whether some call of the spec gets this row of the table."""
    kinds = "store", kind_of(spec), *["window"] * spec.gate, *["mean"] * (kind_of(spec) == "fold")
    if config.kind not in kinds:
        return False
    try:
        return choose(config.kind, spec, config.max_new_tokens, config.bucket) == config
    except UnsupportedError:
        return False


def _stores_alike(spec: CompressorSpec, other: CompressorSpec) -> bool:
    """Whether the ratio is all that their store kernels differ in."""
    return spec == replace(other, ratio=spec.ratio, overlap=spec.overlap, has_ape=spec.has_ape, gate=spec.gate)


def compile_one(combination: Kernel, target: str) -> CompiledKernel:
    """For a name of `TARGETS`."""
    return combination.variant(dependent(target)).compile(TARGETS[target])


def dependent(target: str) -> bool:
    """Whether there are dependent launches, which all but the first of a step are."""
    return TARGETS[target].backend == "cuda" and TARGETS[target].arch >= 90


def file_of(combination: Kernel, target: str) -> str:
    end = "cubin" if TARGETS[target].backend == "cuda" else "hsaco"
    return f"{combination.name.replace(' ', '-')}.{end}"


def build(combination: Kernel, target: str, folder: Path, allowed: int | None) -> AotKernel:
    """Compiles, writes the binary under the kernel's name into `folder`, and says all about it."""
    gpu, variant, path = TARGETS[target], combination.variant(dependent(target)), folder / file_of(combination, target)
    compiled = variant.compile(gpu)
    binary = compiled.asm[path.suffix[1:]]
    path.write_bytes(binary)
    return AotKernel(
        name=combination.name,
        file=path.name,
        sha256=hashlib.sha256(binary).hexdigest(),
        bytes=len(binary),
        entry=compiled.metadata.name,
        resources=resources(compiled, gpu),
        allowed=allowed,
        constants={name: asdict(x) if is_dataclass(x) else x for name, x in variant.constants_for(gpu).items()},
        signature={name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"},
        options={name: getattr(compiled.metadata, name, None) for name in OPTIONS} | {"aligned": variant.aligned},
    )


def versions(target: str) -> dict[str, str]:
    """Of all that has a hand in the binaries."""
    found = {"kvfold": __version__, "torch": torch.__version__, "triton": triton.__version__}
    if TARGETS[target].backend == "cuda":
        from triton.backends.nvidia.compiler import get_ptxas_version

        said = get_ptxas_version(TARGETS[target].arch)
        match = re.search(r"V(\d+\.\d+\.\d+)", said)
        found["ptxas"] = match[1] if match else said.strip()
    return found
