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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ..records import FORMATS, RecordFormat
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from ..state import FoldState
from . import plan, step
from .configs import CONFIGS, Config, choose
from .launch import epilogue_constants

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
KERNELS = {"fold": step.fold_kernel, "rows": step.rows_kernel, "store": step.store_kernel, "plan": plan.plan_kernel}

# The type of each argument that is no constant, by name, as `launch.py` and `plan.py` pass it. Counts that exceed 32 bits make
# Triton specialize again; these are the types of ordinary sizes.
ARGUMENTS = {
    "kv_score": "*bf16", "kv_stride": "i32", "num_tokens": "i32", "ape": "*fp32", "items": "*i32", "num_items": "*i32",
    "state_rows": "*fp32", "state_tags": "*i32", "num_slots": "i32", "ring": "i32", "rows": "*fp32", "pooled": "*fp32",
    "entry_slots": "*i64", "entry_capacity": "i32", "norm_weight": "*fp32", "rope": "*fp32", "max_position": "i32",
    "pages": "*u8", "page_stride": "i32", "scales": "*u8", "scales_stride": "i32", "rows_per_page": "i32",
    "cache_slots": "i32", "cache_scale": "fp32", "errors": "*i32",
    "start_pos": "*i32", "cu_seqlens": "*i32", "state_slots": "*i32", "batch": "i32", "max_new_tokens": "i32",
    "max_tokens": "i32", "own_start_pos": "*i32", "own_cu_seqlens": "*i32", "cu_entries": "*i32", "item_capacity": "i32",
    "table": "*i32", "table_width": "i32",
}  # fmt: skip
# Multiples of 16 in every engine, which Triton specializes on like pointers.
_ALIGNED = ("kv_stride", "page_stride", "scales_stride")


@dataclass(frozen=True)
class Combination:
    """One kernel to compile. Without `fmt` there is no cache, only pooled rows; the plan's kernel has no `config` either."""

    kind: str
    spec: CompressorSpec
    fmt: RecordFormat | None = None
    config: Config | None = None

    @property
    def name(self) -> str:
        parts = [self.kind, f"hd{self.spec.head_dim}", f"R{self.spec.ratio}"]
        if self.config is not None:
            record = self.fmt.name if self.fmt is not None else "rows"
            parts += [record, f"ahead{self.config.ahead}", f"warps{self.config.num_warps}"]
        return " ".join(parts)

    @property
    def num_warps(self) -> int:
        return self.config.num_warps if self.config is not None else 4

    def constants(self) -> dict[str, object]:
        """Every compile-time argument, and None for those that this launch leaves out."""
        spec = self.spec
        if self.config is None:
            return {"RATIO": spec.ratio, "BLOCK": plan.BLOCK, "CHUNK": plan.CHUNK}
        constants: dict[str, object] = {"RATIO": spec.ratio, **epilogue_constants(self.fmt, spec)}
        if self.fmt is None:
            constants |= dict.fromkeys(("norm_weight", "rope", "pages", "scales"))
        elif not self.fmt.separate:
            constants["scales"] = None
        if self.kind != "store":
            ahead = self.config.ahead if self.kind == "fold" else min(self.config.ahead, spec.window_rows)
            constants |= {"OVERLAP": int(spec.overlap), "HISTORY": _state(spec).history, "AHEAD": ahead}
            if self.fmt is not None:
                constants["rows"] = None
        return constants


def _state(spec: CompressorSpec) -> FoldState:
    return FoldState.allocate(spec, 1, 1, device="meta")


def combinations() -> Iterator[Combination]:
    """Every kernel, format, spec and configuration that dispatch can choose, but for dtypes."""
    for ratio in sorted({spec.ratio for spec in SPECS}):
        yield Combination("plan", next(spec for spec in SPECS if spec.ratio == ratio))
    for config in CONFIGS:
        specs = [spec for spec in SPECS if config.kind in ("store", _state(spec).kind)]
        for spec in specs:
            if choose(config.kind, spec.head_dim, config.max_new_tokens) != config:
                continue
            if config.kind == "store" and any(s.head_dim == spec.head_dim for s in SPECS[: SPECS.index(spec)]):
                continue  # the ratio is all that would differ
            if config.kind != "store":
                yield Combination(config.kind, spec, None, config)
            for fmt in FORMATS.values():
                try:
                    fmt.check(spec)
                except ValueError:
                    continue
                yield Combination(config.kind, spec, fmt, config)


def sample() -> list[tuple[Combination, str]]:
    """A combination and a target for each format, and more: every kernel, format and target at least once."""
    every, targets = list(combinations()), list(TARGETS)
    bare = [c for c in every if c.fmt is None]
    chosen = [(bare[0], "sm_90"), (bare[0], "gfx942"), (bare[-1], "sm_80"), (bare[-1], "gfx950")]
    for i, name in enumerate(FORMATS):
        # Three kernels and eight targets have no common factor, so each kernel comes to meet each target.
        kind = ("fold", "rows", "store")[i % 3]
        fitting = [c for c in every if c.kind == kind and c.fmt is not None and c.fmt.name == name]
        chosen.append((fitting[i % len(fitting)], targets[i % len(targets)]))
    return chosen


def compile_one(combination: Combination, target: str) -> int:
    """Compiles for a name of `TARGETS`; returns the size of the binary in bytes."""
    kernel, constants = KERNELS[combination.kind], combination.constants()
    signature = {name: "constexpr" if name in constants else ARGUMENTS[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in _ALIGNED}
    options = {"num_warps": combination.num_warps, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return len(compiled.asm["cubin" if TARGETS[target].backend == "cuda" else "hsaco"])


def _run(job: tuple[Combination, str]) -> tuple[str, str, int, float]:
    start = time.perf_counter()
    size = compile_one(*job)
    return job[1], job[0].name, size, time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Compiles and prints one line for each; returns how many failed."""
    if not isinstance(step.fold_kernel, JITFunction):
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
