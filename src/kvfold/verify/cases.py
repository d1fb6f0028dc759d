"""Is kvfold right on this machine: every configuration against fp64, and every equivalence it promises, as a list of cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..backend_triton.launcher import multiprocessors
from ..backend_triton.table import ANY, BUCKETS, CONFIGS, Config, choose
from ..calls.checks import choose_backend
from ..compress import compress_many
from ..contract import pooled_bound
from ..debug.compare import off
from ..debug.exact import exact_rows
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from ..storage.formats import FORMATS
from ..store import store
from .case import Mismatch, blame, packed, records, same_records, same_rows, untouched
from .engine import Engine, Schedule, Streams, chunks, drafts, prefill

BF16, FP32 = torch.bfloat16, torch.float32
# (state, kv_score) for each kind of kernel; the first is what engines use, and all that `quick` looks at.
DTYPES = {
    "fold": ((FP32, BF16), (FP32, FP32)),
    "rows": ((FP32, BF16), (FP32, FP32), (BF16, BF16)),
    "window": ((FP32, BF16), (FP32, FP32), (BF16, BF16), (BF16, FP32)),
    "store": ((FP32, BF16), (FP32, FP32)),
}
NO_KERNEL = "no kernel runs on the torch backend"
DRAFTS = 4  # tokens of a step in the equivalences
LONG = 4096  # the bound of a step that no row for short steps serves


@dataclass(frozen=True)
class Case:
    """One configuration or promise. `run` returns the figure to show, and raises if it does not hold.

    Attributes:
        skip: why it cannot be run here; "" where it can.
    """

    group: str
    name: str
    run: Callable[[], str]
    skip: str = ""


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        problem: the first difference, or the error; "" when there was none.
        skipped: why it was not run; "" when it was.
    """

    group: str
    name: str
    figure: str
    seconds: float
    problem: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether it was run, and holds."""
        return not self.problem and not self.skipped


def verify(cases: Iterable[Case]) -> Iterator[Result]:
    """Runs cases one by one. An error in one is its result, and the others run all the same."""
    for case in cases:
        if case.skip:
            yield Result(case.group, case.name, "", 0.0, skipped=case.skip)
            continue
        begin, figure, problem = time.perf_counter(), "", ""
        try:
            figure = case.run()
        except Mismatch as error:
            problem = str(error)
        except Exception as error:  # a kernel that does not compile here is what the user wants to know
            problem = f"{type(error).__name__}: {error}"
        yield Result(case.group, case.name, figure, time.perf_counter() - begin, problem)


def list_cases(device: torch.device | str = "cpu", *, backend: str | None = None, quick: bool = False) -> list[Case]:
    """What there is to verify: each row of the kernels' table and dtype, each record format, each equivalence.

    Args:
        device: of all tensors. On a CPU shapes are small; on a GPU they are V4's, with 16 sequences.
        backend: as for `compress`. With "torch" no kernel runs, so the cases of the kernels' table are skipped.
        quick: one pair of dtypes for each row of the table.

    Raises:
        ValueError: naming the argument, for a backend that cannot run there.
    """
    device = torch.device(device)
    lab = Lab(device, choose_backend(backend, "device", torch.empty(0, device=device)))
    table = list(_table_cases(lab, quick))
    if lab.backend == "torch":
        table = [replace(case, skip=NO_KERNEL) for case in table]
    return [*table, *_format_cases(lab), *_equivalence_cases(lab)]


@dataclass(frozen=True)
class Lab:
    """Where cases run, and how large they are."""

    device: torch.device
    backend: str

    @property
    def real(self) -> bool:
        return self.device.type != "cpu"

    @property
    def batch(self) -> int:
        return 16 if self.real else 2

    def spec(self, spec: CompressorSpec) -> CompressorSpec:
        """V4's compressor, with shorter windows on a CPU: of the same kind of state, and a tile of raw rows per entry."""
        return spec if self.real or spec.ratio <= 32 else replace(spec, ratio=32)

    def streams(self, spec: CompressorSpec, dtype: torch.dtype, batch: int | None = None) -> Streams:
        length = max(2 * spec.ratio + spec.ratio // 2 + 1, 5 * spec.ratio if spec.ratio <= 8 else 0)
        return Streams.make(spec, batch or self.batch, length, dtype, self.device)

    def engine(self, streams: Streams, kind: str, **options: object) -> Engine:
        options = {"fmt": _format_for(streams.spec)} | options
        return Engine(streams, kind="window" if kind == "window" else "fold", backend=self.backend, **options)  # type: ignore[arg-type]


def representative(config: Config) -> tuple[CompressorSpec, int]:
    """A spec and a bound of new tokens that this row of the table serves, as like V4 as its bounds allow.

    Raises:
        LookupError: there is none among the usual shapes.
    """
    low, high = config.head_dims
    widths = [width for width in (512, 128, 256, low) if low <= width <= high]
    bound = min(config.max_new_tokens, LONG)
    for width in widths:
        base = replace(V4_INDEXER if width == 128 else V4_CSA, head_dim=width, rope_dim=min(64, width))
        for ratio, overlap in ((4, True), (32, False), (128, False), (16, True), (4, False), (config.window_rows[0], False)):
            spec = replace(base, ratio=ratio, overlap=overlap, hadamard=base.hadamard and overlap)
            kinds = {"fold": not overlap and ratio > 8, "rows": overlap or ratio <= 8}
            serves = config.serves(config.kind, width, spec.window_rows, bound, config.bucket) and kinds.get(config.kind, True)
            if serves and choose(config.kind, spec, bound, config.bucket) is config:
                return spec, bound
    raise LookupError(f"no usual shape is served by {config}")


def _format_for(spec: CompressorSpec) -> str:
    return {512: "fp8_ds_mla", 128: "indexer_mxfp4"}.get(spec.head_dim, "bf16")


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


def _table_cases(lab: Lab, quick: bool) -> Iterator[Case]:
    for index, config in enumerate(CONFIGS):
        some = DTYPES.get(config.kind, DTYPES["fold"])
        for state, rows in some[:1] if quick else some:
            limit = "any" if config.max_new_tokens > LONG else str(config.max_new_tokens)
            name = f"{index}: {config.kind} hd {config.head_dims[0]}-{config.head_dims[1]}, "
            name += f"{config.window_rows[0]}-{config.window_rows[1]} rows, new <= {limit}"
            name += f", windows <= {config.bucket:g} per multiprocessor; " if config.bucket < ANY else "; "
            if config.kind == "store":
                yield Case("table", name + f"rows {_name(rows)}", partial(check_store, lab, config, rows))
            else:
                name += f"state {_name(state)}, kv_score {_name(rows)}"
                yield Case("table", name, partial(check_config, lab, config, state, rows))


def _format_cases(lab: Lab) -> Iterator[Case]:
    for fmt in FORMATS.values():
        for spec in (V4_CSA, V4_INDEXER):
            if not fmt.head_dims or spec.head_dim in fmt.head_dims:
                yield Case("format", f"{fmt.name} hd {spec.head_dim}", partial(check_format, lab, spec, fmt.name))


def _equivalence_cases(lab: Lab) -> Iterator[Case]:
    for label, preset in (("hca", V4_HCA), ("csa", V4_CSA), ("indexer", V4_INDEXER)):
        spec = lab.spec(preset)
        label += f" at ratio {spec.ratio}" * (spec != preset)
        for kind in ("fold", "window"):
            state = {"fold": "FoldState", "window": "WindowState"}[kind]
            ways = {
                "chunks": partial(check_cut, chunks),
                "decode": partial(check_cut, partial(drafts, new=1, first=spec.ratio - 1)),
                f"{DRAFTS} tokens, 0 to {DRAFTS} accepted": partial(
                    check_cut, partial(drafts, new=DRAFTS, first=spec.ratio + 1)
                ),
                "padding": partial(check_cut, chunks, padding=True),
                "slots of an owner that left NaN": partial(check_cut, chunks, reused=True),
            }
            for way, run in ways.items():
                yield Case("same bits as prefill", f"{label} {state}: {way}", partial(run, lab, spec, kind))
        yield Case("equivalence", f"{label}: WindowState against FoldState", partial(check_states, lab, spec))
    yield Case("equivalence", "csa and indexer: one launch against two", partial(check_many, lab))


def check_config(lab: Lab, config: Config, state: torch.dtype, rows: torch.dtype) -> str:
    """One row of the table: its entries against fp64, against one prefill to the bit, and its last step by `kvfold.check`."""
    spec, bound = representative(config)
    # A row for many windows is taken when there are many.
    others = [n for n in BUCKETS if n < config.bucket and choose(config.kind, spec, bound, n) is not config]
    batch = int(max(others) * multiprocessors(lab.device)) // 2 + 4 if others and lab.real else lab.batch
    streams = lab.streams(lab.spec(spec) if config.kind == "window" or spec.ratio > 32 else spec, rows, batch)
    if choose(config.kind, streams.spec, bound, config.bucket) is not config:
        raise LookupError(f"{streams.spec} is not served by {config}")
    short = bound < streams.length
    if short:
        schedule = drafts(streams.batch, streams.length, bound, streams.spec.ratio - 1)
    else:
        schedule = chunks(streams.batch, streams.length)
    whole = lab.engine(streams, config.kind, dtype=state)
    whole.run(prefill(streams.batch, streams.length))
    cut = lab.engine(streams, config.kind, dtype=state, most=bound if short else DRAFTS)
    cut.run(schedule[:-1], bound=bound)
    report = cut.check(schedule[-1], bound)
    if report.first is not None or report.errors:
        raise Mismatch(str(report))
    cut.run(schedule[-1:], bound=bound)
    error = compare_exact(cut)
    compare_bits(cut, whole, "one prefill")
    return f"{error:.1e}, bits equal"


def check_store(lab: Lab, config: Config, dtype: torch.dtype) -> str:
    """`kvfold.store` of this row of the table: records that its rows explain."""
    spec, _ = representative(config)
    streams = lab.streams(spec, dtype)
    engine = lab.engine(streams, "fold")
    rows = streams.tokens[:, : streams.windows, : spec.head_dim]
    store_rows(engine, rows)
    return explain_records(engine, rows.float())


def store_rows(engine: Engine, pooled: Tensor) -> None:
    """`kvfold.store` of `[batch, windows, head_dim]`."""
    s = engine.streams
    plan = engine.plan(*prefill(s.batch, s.length))
    rows = pooled.new_zeros(plan.entry_capacity, s.spec.head_dim)
    rows[: s.batch * s.windows] = pooled.flatten(0, 1)
    weights = {name: value for name, value in s.weights.items() if name != "ape"}
    store(rows, plan, engine.cache, **weights, backend=engine.backend)


def check_format(lab: Lab, spec: CompressorSpec, fmt: str) -> str:
    """The bytes of one record format: packed from kvfold's own pooled rows, the same by `store`, none outside of records."""
    streams = lab.streams(lab.spec(spec), BF16)
    engine = lab.engine(streams, "fold", fmt=fmt)
    schedule = chunks(streams.batch, streams.length)
    engine.run(schedule[:-1])
    report = engine.check(schedule[-1])
    if report.first is not None or report.errors:
        raise Mismatch(str(report))
    engine.run(schedule[-1:])
    figure = explain_records(engine, engine.pooled)
    apart = lab.engine(streams, "fold", fmt=fmt)
    store_rows(apart, engine.pooled)
    compare_bits(apart, engine, "compress", pooled=False)
    for one in (engine, apart):
        untouched(one.cache, one.entry_slots)
    return figure


def check_cut(
    cut: Callable[[int, int], Schedule],
    lab: Lab,
    spec: CompressorSpec,
    kind: str,
    *,
    padding: bool = False,
    reused: bool = False,
) -> str:
    """A sequence cut in some way has the bits of one prefill.

    padding: absent sequences and rows of NaN behind the batch. reused: the slots or pages had an owner whose tokens were NaN.
    """
    streams = lab.streams(spec, BF16)
    whole, other = lab.engine(streams, kind), lab.engine(streams, kind)
    whole.run(prefill(streams.batch, streams.length))
    if reused:
        other.run(drafts(streams.batch, streams.length, DRAFTS, spec.ratio), wrong=True)
    other.run(cut(streams.batch, streams.length), padding=padding)
    error = compare_exact(other)
    compare_bits(other, whole, "one prefill")
    return f"{error:.1e}, bits equal"


def check_states(lab: Lab, spec: CompressorSpec) -> str:
    """Both states give the same entries up to fp32 rounding."""
    streams = lab.streams(spec, BF16)
    fold, window = lab.engine(streams, "fold"), lab.engine(streams, "window")
    for engine in (fold, window):
        engine.run(chunks(streams.batch, streams.length))
        compare_exact(engine)
    return f"{compare_within(window.pooled, fold.pooled.double(), 2 * pooled_bound(spec.window_rows), 'FoldState'):.1e}"


def check_many(lab: Lab) -> str:
    """`compress_many` writes the records of two calls of `compress`."""
    both = [lab.streams(spec, BF16) for spec in (V4_CSA, V4_INDEXER)]
    alone, together = ([lab.engine(streams, "fold") for streams in both] for _ in range(2))
    schedule = drafts(both[0].batch, both[0].length, DRAFTS, V4_CSA.ratio + 1)
    for engine in alone:
        engine.run(schedule)
    for parts in schedule:
        plan = together[0].plan(parts)
        compress_many([engine.compressor(parts) for engine in together], plan, backend=lab.backend)
        if int(plan.errors):
            raise RuntimeError(f"{int(plan.errors)} sequences or entries were refused")
    for one, other in zip(together, alone, strict=True):
        compare_bits(one, other, "compress", pooled=False)
    return "bits equal"


def compare_exact(engine: Engine) -> float:
    """The largest relative error of a pooled row against fp64. Raises Mismatch where it is beyond the bound."""
    s = engine.streams
    exact = torch.stack([exact_rows(tokens, s.spec, s.weights["ape"], engine.state) for tokens in s.tokens])
    return compare_within(engine.pooled, exact, pooled_bound(s.spec.window_rows), "fp64")


def compare_within(got: Tensor, want: Tensor, bound: float, against: str) -> float:
    """The largest relative distance of two rows `[batch, windows, head_dim]`; raises Mismatch if it is over `bound`."""
    for b, (one, due) in enumerate(zip(got, want, strict=True)):
        blame(off(one, due, bound), "pooled row", b, one, due, against)
    return float(((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max())


def compare_bits(got: Engine, want: Engine, against: str, *, pooled: bool = True) -> None:
    """Pooled rows and records of two engines, to the bit."""
    if pooled:
        same_rows(list(got.pooled), list(want.pooled), None, against)
    same_records(got.cache, got.entry_slots, records(want.cache, want.entry_slots), against)


def explain_records(engine: Engine, pooled: Tensor) -> str:
    """Raises unless the torch packer makes the records of `pooled` `[batch, windows, head_dim]`; says how nearly it does."""
    weights = engine.streams.weights
    exact = packed(engine.cache, engine.entry_slots, list(pooled), weights["norm_weight"], weights["rope"])
    return "bytes equal" if exact else "bytes equal but for roundings of the norm"
