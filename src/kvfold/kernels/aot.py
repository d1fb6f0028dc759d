"""Ahead-of-time compilation of every kernel, for GPUs that need not be there: `python -m kvfold.kernels.aot --all`.

What is compiled follows the tables: every row of `configs.CONFIGS`, for a spec that it serves, with every format defined for
that spec. Without `--all`, a sample in which every kernel, format and target occurs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from ..records import FORMATS, RecordFormat
from ..snapshots import Snapshots
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from ..state import state_kind
from .build import INTERPRETED, Variant
from .configs import ANY, CONFIGS, Config, choose
from .pdl import AVAILABLE
from .variants import pair_key, plan_key, restore_key, step_key, store_key, variant_of, window_key

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 103, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
# The presets, and one for each width of the table of configurations that no preset has.
SPECS = (
    V4_HCA,
    V4_CSA,
    V4_INDEXER,
    CompressorSpec(256, 128),
    CompressorSpec(128, 128),
    CompressorSpec(256, 4, overlap=True, hadamard=True),
)


@dataclass(frozen=True)
class Combination:
    """One kernel to compile. Without `fmt` there is no cache, only pooled rows; "plan" and "restore" have no `config` either.

    Attributes:
        kind: of a row of the table, or `"pair"` for `compress_many`, or `"plan"` or `"restore"`.
        other: of a pair, the second spec and its format.
        page_size: of a `WindowState`.
        snapshots: whether the call leaves any.
    """

    kind: str
    spec: CompressorSpec
    fmt: RecordFormat | None = None
    config: Config | None = None
    other: tuple[CompressorSpec, RecordFormat] | None = None
    page_size: int = 1
    snapshots: bool = False

    @property
    def name(self) -> str:
        parts = [self.kind, f"hd{self.spec.head_dim}", f"R{self.spec.ratio}"]
        if self.config is not None:
            record = self.fmt.name if self.fmt is not None else "rows"
            parts += [record, f"ahead{self.config.ahead}", f"warps{self.config.num_warps}"]
            parts += [f"n{self.config.max_new_tokens}"] if self.config.max_new_tokens < ANY else []
            parts += [f"items{self.config.most_items}"] if self.config.most_items < ANY else []
        if self.other is not None:
            parts += [f"hd{self.other[0].head_dim}", self.other[1].name]
        if self.kind in ("window", "restore"):
            parts += [f"page{self.page_size}"]
        parts += ["snapshots"] * self.snapshots
        return " ".join(parts)

    def variant(self, pdl: bool = False) -> Variant:
        """As dispatch builds it for bf16 input, fp32 state and, without a cache, fp32 rows."""
        return variant_of(self._key(), True, pdl)

    def _key(self) -> tuple:
        bf16, fp32 = torch.bfloat16, torch.float32
        if self.kind == "restore":
            return restore_key(self.spec, fp32, Snapshots.allocate(self.spec, 0, self.page_size, device="meta").rows_per_page)
        if self.config is None:
            return plan_key(self.spec.ratio, 1, False, False)
        if self.kind == "store":
            assert self.fmt is not None
            return store_key(self.spec, self.fmt, (fp32, fp32))
        types = (bf16, fp32, fp32 if self.fmt is None else None, fp32, True)
        bound = self.config.max_new_tokens
        if self.kind == "window":
            return window_key(self.spec, self.fmt, bound, types, self.page_size)
        items = self.config.most_items
        first = step_key(self.spec, self.fmt, self.config.kind, bound, types, self.snapshots, items)
        if self.other is None:
            return first
        spec, fmt = self.other
        return pair_key(first, step_key(spec, fmt, state_kind(spec), bound, types, self.snapshots, items))


def combinations() -> Iterator[Combination]:
    """Every kernel, format, spec and configuration that dispatch can choose, but for dtypes."""
    for ratio in sorted({spec.ratio for spec in SPECS}):
        yield Combination("plan", next(spec for spec in SPECS if spec.ratio == ratio))
    for spec in SPECS:
        for page_size in (64, 128):
            yield Combination("restore", spec, page_size=page_size)
    for config in CONFIGS:
        specs = [spec for spec in SPECS if config.kind in ("store", "window", state_kind(spec))]
        for spec in specs:
            if choose(config.kind, spec, config.max_new_tokens, config.most_items) != config:
                continue
            if config.kind == "store" and any(s.head_dim == spec.head_dim for s in SPECS[: SPECS.index(spec)]):
                continue  # the ratio is all that would differ
            if config.kind != "store":
                yield Combination(config.kind, spec, None, config)
            if config.kind in ("fold", "rows"):
                yield Combination(config.kind, spec, None, config, snapshots=True)
            for fmt in FORMATS.values():
                try:
                    fmt.check(spec)
                except ValueError:
                    continue
                yield Combination(config.kind, spec, fmt, config, page_size=spec.ratio if config.kind == "window" else 1)
            if spec == V4_CSA and config.kind == "rows":
                for fmt in (fmt for fmt in FORMATS.values() if fmt.name.startswith("indexer")):
                    yield Combination("pair", spec, FORMATS["fp8_ds_mla"], config, (V4_INDEXER, fmt))
                yield Combination("pair", spec, FORMATS["fp8_ds_mla"], config, (V4_INDEXER, fmt), snapshots=True)


def sample() -> list[tuple[Combination, str]]:
    """A combination and a target for each format, and more: every kernel, format and target at least once."""
    every, targets = list(combinations()), list(TARGETS)
    chosen = [(next(c for c in every if c.kind == "fold" and c.fmt is None), "sm_80")]
    few = {
        "plan": ("sm_90", "gfx942"),
        "window": ("sm_90", "sm_80", "gfx950"),
        "pair": ("sm_90", "gfx942"),
        "restore": ("sm_80", "gfx950"),
    }
    for kind, wanted in few.items():
        some = [c for c in every if c.kind == kind]
        chosen += [(some[i * (len(some) - 1) // (len(wanted) - 1)], target) for i, target in enumerate(wanted)]
    for i, name in enumerate(FORMATS):
        # Three kernels and eight targets have no common factor, so each kernel comes to meet each target.
        kind = ("fold", "rows", "store")[i % 3]
        fitting = [c for c in every if c.kind == kind and c.fmt is not None and c.fmt.name == name]
        chosen.append((fitting[i % len(fitting)], targets[i % len(targets)]))
    return chosen


def compile_one(combination: Combination, target: str) -> int:
    """Compiles for a name of `TARGETS`; returns the size of the binary in bytes."""
    gpu = TARGETS[target]
    dependent = AVAILABLE and gpu.backend == "cuda" and gpu.arch >= 90
    compiled = combination.variant(pdl=dependent).compile(gpu)
    return len(compiled.asm["cubin" if gpu.backend == "cuda" else "hsaco"])


def _run(job: tuple[Combination, str]) -> tuple[str, str, int, float]:
    start = time.perf_counter()
    size = compile_one(*job)
    return job[1], job[0].name, size, time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Compiles and prints one line for each; returns how many failed."""
    if INTERPRETED:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    unknown = [argument for argument in arguments if argument != "--all" and argument not in TARGETS]
    if unknown:
        sys.exit(f"usage: python -m kvfold.kernels.aot [--all] [target ...]; targets are {', '.join(TARGETS)}, got {unknown}")
    jobs = [(c, target) for c in combinations() for target in TARGETS] if "--all" in arguments else sample()
    wanted = [argument for argument in arguments if argument in TARGETS] or list(TARGETS)
    jobs = [job for job in jobs if job[1] in wanted]
    failed, start = 0, time.perf_counter()
    with ProcessPoolExecutor() as pool:
        pending = {pool.submit(_run, job): job for job in jobs}
        for done in as_completed(pending):
            combination, target = pending[done]
            try:
                _, name, size, seconds = done.result()
                print(f"{target}\t{name}\t{size} bytes\t{seconds:.1f} s", flush=True)
            except Exception as error:
                failed += 1
                print(f"{target}\t{combination.name}\tfailed: {type(error).__name__}: {error}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} compiled in {time.perf_counter() - start:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
