"""Is kvfold right on this machine: every configuration against fp64, and every equivalence it promises, as a list of cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend_triton.launcher import multiprocessors
from ..backend_triton.table import ANY, BUCKETS, CONFIGS, Config, choose
from ..calls.checks import choose_backend
from ..contract import pooled_bound, resumed_bound
from ..debug.check import check
from ..precompile.combinations import reaches
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec
from ..storage.formats import FORMATS
from ..testing.data import make_cache, make_state, make_tokens, make_weights
from ..testing.engine import Engine, Step, chunks, drafts, prefill, run_many
from ..testing.projected import ProjectedEngine, make_hidden, make_scaled_weight, make_weight
from ..testing.told import Told
from .case import Mismatch, close, close_to_fp64, normed, packed, same, same_records, untouched
from .project import check_cut as check_projected_cut
from .project import check_kv_score, check_scaled, kv_score_of
from .training import check_training

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}
Cut = Callable[[list[int]], list[Step]]  # of sequences of these lengths
Inputs = tuple[list[Tensor], dict]  # tokens and weights, as `Engine.make` takes them
# (state, kv_score) for each kind of kernel; the first is what engines use, and all that `quick` looks at.
DTYPES = {
    "fold": ((FP32, BF16), (FP32, FP32)),
    "rows": ((FP32, BF16), (FP32, FP32), (BF16, BF16)),
    "window": ((FP32, BF16), (FP32, FP32), (BF16, BF16), (BF16, FP32)),
    "mean": ((FP32, BF16), (FP32, FP32)),
    "store": ((FP32, BF16), (FP32, FP32)),
}
NO_KERNEL = "no kernel runs on the torch backend"
DRAFTS = 4  # tokens of a step in the equivalences
# What an engine's metadata has of its own: total lengths, int64 between other numbers, places and slots with gaps, 0 for none.
TOLD = Told(totals=True, wide=True, apart=3, before=5, reserved=2, null=0)
LONG = 4096  # the bound of a step that no row for short steps serves


@dataclass(frozen=True)
class Case:
    """One configuration or promise. `run` returns the figure to show, and raises if it does not hold. skip: why not to."""

    group: str
    name: str
    run: Callable[[], str]
    skip: str = ""


@dataclass(frozen=True)
class Result:
    """What came of a case. problem: the first difference, or the error. skipped: why it was not run."""

    group: str
    name: str
    figure: str
    seconds: float
    problem: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and not self.skipped


def verify(cases: Iterable[Case]) -> Iterator[Result]:
    """Runs cases one by one. An error in one, or a call that would exit, is its result, and the others run all the same."""
    for case in cases:
        if case.skip:
            yield Result(case.group, case.name, "", 0.0, skipped=case.skip)
            continue
        begin, figure, problem = time.perf_counter(), "", ""
        try:
            figure = case.run()
        except Mismatch as error:
            problem = str(error)
        except (Exception, SystemExit) as error:  # a kernel that does not compile here is what the user wants to know
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
    return [*_table_cases(lab, quick), *_format_cases(lab), *_equivalence_cases(lab)]


class Lab(NamedTuple):
    """Where cases run, and how large they are."""

    device: torch.device
    backend: str

    @property
    def real(self) -> bool:
        return self.device.type != "cpu"

    def spec(self, spec: CompressorSpec) -> CompressorSpec:
        """V4's compressor, with shorter windows on a CPU: of the same kind of state, and a tile of raw rows per entry."""
        return spec if self.real or spec.ratio <= 32 else replace(spec, ratio=32)

    def inputs(self, spec: CompressorSpec, dtype: torch.dtype = BF16, batch: int | None = None) -> Inputs:
        """Sequences of one length, the same on every machine."""
        length = max(2 * spec.ratio + spec.ratio // 2 + 1, 5 * spec.ratio if spec.ratio <= 8 else 0, 11)
        draw = torch.Generator().manual_seed(7)
        tokens = make_tokens(spec, [length] * (batch or (16 if self.real else 2)), "normal", draw, dtype, self.device)
        return tokens, make_weights(spec, length, "normal", draw, FP32, self.device)

    def engine(self, inputs: Inputs, **options: object) -> Engine:
        spec = inputs[1]["spec"]
        fmt = {512: "fp8_ds_mla" if spec.has_ape else "v41_mxfp8", 128: "indexer_mxfp4"}.get(spec.head_dim, "bf16")
        options = {"fmt": fmt, "backend": self.backend} | options
        return Engine.make(*inputs, **options)  # type: ignore[arg-type]


def representative(config: Config) -> tuple[CompressorSpec, int]:
    """A spec and a bound of new tokens that this row of the table serves, as like V4 as its bounds allow."""
    bound = min(config.max_new_tokens, LONG)
    shapes = ((4, True), (32, False), (128, False), (16, True), (4, False), (config.window_rows[0], False))
    for width, (ratio, overlap) in product((512, 128, 256, config.head_dims[0]), shapes):
        preset = V4_INDEXER if width == 128 else V4_CSA
        spec = replace(preset, head_dim=width, rope_dim=min(64, width), ratio=ratio, overlap=overlap)
        spec = replace(spec, hadamard=preset.hadamard and overlap)
        if reaches(config, spec):
            return spec, bound
    raise LookupError(f"no usual shape is served by {config}")


def _table_cases(lab: Lab, quick: bool) -> Iterator[Case]:
    skip = NO_KERNEL if lab.backend == "torch" else ""
    for index, config in enumerate(CONFIGS):
        for state, rows in DTYPES[config.kind][: 1 if quick else None]:
            limit = "any" if config.max_new_tokens > LONG else str(config.max_new_tokens)
            name = f"{index}: {config.kind} hd {config.head_dims[0]}-{config.head_dims[1]}, "
            name += f"{config.window_rows[0]}-{config.window_rows[1]} rows, new <= {limit}"
            name += f", windows <= {config.bucket:g} per multiprocessor; " if config.bucket < ANY else "; "
            if config.kind == "store":
                yield Case("table", name + f"rows {NAMES[rows]}", partial(check_store, lab, config, rows), skip)
                yield Case("table", name + f"kv_score {NAMES[rows]}, no gate", partial(check_ungated, lab, config, rows), skip)
            else:
                name += f"state {NAMES[state]}, kv_score {NAMES[rows]}"
                run = partial(check_config, lab, config, state, rows)
                run = partial(check_means, lab, config, rows) if config.kind == "mean" else run
                yield Case("table", name, run, skip)


def _format_cases(lab: Lab) -> Iterator[Case]:
    for fmt in FORMATS.values():
        for spec in (V4_CSA, V4_INDEXER):
            if not fmt.head_dims or spec.head_dim in fmt.head_dims:
                yield Case("format", f"{fmt.name} hd {spec.head_dim}", partial(check_format, lab, spec, fmt.name))


def _equivalence_cases(lab: Lab) -> Iterator[Case]:
    several = f"{DRAFTS} tokens, 0 to {DRAFTS} accepted"
    presets = {"hca": V4_HCA, "csa": V4_CSA, "indexer": V4_INDEXER, "v41-r2": V41_MAIN_R2}
    for label, preset in presets.items():
        spec = lab.spec(preset)
        label += f" at ratio {spec.ratio}" * (spec != preset)
        ways = {
            "chunks": partial(check_cut, chunks),
            "decode": partial(check_cut, partial(drafts, new=1, first=spec.ratio - 1)),
            several: partial(check_cut, partial(drafts, new=DRAFTS, first=spec.ratio + 1)),
            "padding": partial(check_cut, chunks, padding=True),
            "slots of an owner that left NaN": partial(check_cut, chunks, reused=True),
        }
        told = "an engine's metadata, two tensors, latents"
        for kind, state in (("fold", "FoldState"), ("window", "WindowState")):
            for way, run in (ways | {told: check_told}).items():
                yield Case("same bits as prefill", f"{label} {state}: {way}", partial(run, lab, spec, kind))
        for way, run in ((several, ways[several]), (told, check_told)):
            name = f"{label} WindowState of rings: {way}"
            yield Case("same bits as prefill", name, partial(run, lab, spec, "window", ring=True))
        yield Case("equivalence", f"{label}: WindowState against FoldState", partial(check_states, lab, spec))
        yield Case("equivalence", f"{label}: FoldState in an engine's pages", partial(check_pages, lab, spec))
    for way, run in {
        "chunks": partial(check_cut, chunks, lab, V41_MAIN_R1),
        several: partial(check_cut, partial(drafts, new=DRAFTS, first=2), lab, V41_MAIN_R1),
        "padding": partial(check_cut, chunks, lab, V41_MAIN_R1, padding=True),
        "an engine's metadata, latents": partial(check_told, lab, V41_MAIN_R1),
    }.items():
        yield Case("same bits as prefill", f"v41-r1, no state: {way}", run)
    yield Case("equivalence", "csa and indexer: one launch against two", partial(check_many, lab))
    yield Case("equivalence", "csa: fp32 rounded by the state against bf16", partial(check_rounded, lab))
    for spec in (V41_MAIN_R1, V41_MAIN_R2):
        run = partial(check_index_keys, lab, spec)
        yield Case("equivalence", f"v41 ratio {spec.ratio}: records from latents, index keys into two caches", run)
    for label, preset in (("hca", V4_HCA), ("csa", V4_CSA), ("indexer", V4_INDEXER)):
        yield Case("training", label, partial(check_gradients, lab, lab.spec(preset)))
        yield Case("projection", label, partial(check_projection, lab, lab.spec(preset)))
        yield Case("projection", f"{label}: weights in FP8", partial(check_fp8, lab, lab.spec(preset)))


def check_config(lab: Lab, config: Config, state: torch.dtype, rows: torch.dtype) -> str:
    """One row of the table: its entries against fp64, against one prefill to the bit, and its last step by `kvfold.check`."""
    inputs, bound = inputs_for(lab, config, rows)
    spec = inputs[1]["spec"]
    whole = lab.engine(inputs, kind=config.kind, dtype=state)
    short = bound < whole.lengths[0]
    steps = drafts(whole.lengths, bound, max(spec.ratio - 1, 1)) if short else chunks(whole.lengths)
    cut = lab.engine(inputs, kind=config.kind, dtype=state, most=bound if short else DRAFTS)
    run_checked(cut, [*steps[:1], *(step._replace(bound=bound) for step in steps[1:])])
    return same_as_prefill(cut, whole)


def check_means(lab: Lab, config: Config, rows: torch.dtype) -> str:
    """One row of the table for a `MeanState`: entries against fp64, and one prefill to the bit of that over a `FoldState`."""
    inputs, bound = inputs_for(lab, config, rows)
    whole, cut, fold = (lab.engine(inputs, kind=kind) for kind in ("mean", "mean", "fold"))
    first, length = cut.spec.ratio - 1, cut.lengths[0]
    steps = chunks(cut.lengths)
    if bound < length:
        starts = [0, *range(first, length, bound)]
        steps = [
            Step.of(*((b, start, end - start) for b in range(len(cut.lengths)))) for start, end in pairwise([*starts, length])
        ]
    cut.run([*steps[:1], *(step._replace(bound=bound) for step in steps[1:])])
    error = close_to_fp64(cut, resumed_bound(cut.spec.ratio))
    for engine in (whole, fold):
        engine.run(prefill(engine.lengths))
    same(whole, fold)
    return f"{error:.1e}"


def inputs_for(lab: Lab, config: Config, rows: torch.dtype) -> tuple[Inputs, int]:
    """Sequences for which a row of the table is chosen, with steps of so many tokens."""
    spec, bound = representative(config)
    # A row for many windows is taken when there are many.
    others = [n for n in BUCKETS if n < config.bucket and choose(config.kind, spec, bound, n) is not config]
    batch = int(max(others) * multiprocessors(lab.device)) // 2 + 4 if others and lab.real else None
    spec = lab.spec(spec)
    if choose(config.kind, spec, bound, config.bucket) is not config:
        raise LookupError(f"{spec} is not served by {config}")
    return lab.inputs(spec, rows, batch), bound


def check_store(lab: Lab, config: Config, dtype: torch.dtype) -> str:
    """`kvfold.store` of this row of the table: records that its rows explain."""
    spec, _ = representative(config)
    engine = lab.engine(lab.inputs(spec, dtype))
    rows = [text[: len(text) // spec.ratio, : spec.head_dim] for text in engine.tokens]
    engine.store(rows)
    return packed(engine, [some.float() for some in rows])


def check_ungated(lab: Lab, config: Config, dtype: torch.dtype) -> str:
    """`compress` without a gate, by this row of the table, with latents; its last step by `kvfold.check`."""
    spec = replace(representative(config)[0], ratio=1, overlap=False, has_ape=False, hadamard=False, gate=False)
    inputs = lab.inputs(spec, dtype)
    whole, cut = (lab.engine(inputs, latent=True) for _ in range(2))
    run_checked(cut, chunks(cut.lengths))
    figure = same_as_prefill(cut, whole)
    normed(whole)
    return figure


def check_format(lab: Lab, spec: CompressorSpec, fmt: str) -> str:
    """The bytes of one record format: packed from kvfold's own pooled rows, the same by `store`, none outside of records."""
    inputs = lab.inputs(spec)
    engine, apart, placed = (lab.engine(inputs, fmt=fmt) for _ in range(3))
    run_checked(engine, chunks(engine.lengths))
    figure = packed(engine, engine.pooled)
    apart.store(engine.pooled)
    same_records(apart, engine, "compress")
    placed.store_placed(engine.pooled)
    same_records(placed, engine, "compress")
    for one in (engine, apart, placed):
        untouched(one)
    return figure


def check_cut(
    cut: Cut, lab: Lab, spec: CompressorSpec, kind: str = "fold", *, padding: bool = False, reused: bool = False, **how: object
) -> str:
    """A sequence cut in some way has the bits of one prefill.

    padding: absent sequences and rows of NaN behind the batch. reused: the slots or pages had an owner whose tokens were NaN.
    how: as for `Engine.make`, of the engine whose sequences are cut.
    """
    inputs = lab.inputs(spec)
    whole, other = lab.engine(inputs, kind=kind, latent="latent" in how), lab.engine(inputs, kind=kind, **how)
    if reused:
        other.run(drafts(other.lengths, DRAFTS, spec.ratio), wrong=True)
    steps = cut(other.lengths)
    if padding:
        steps = [step._replace(bound=max(step.bound, 2), absent=(2, 0), behind=5) for step in steps]
    other.run(steps)
    return same_as_prefill(other, whole)


def check_told(lab: Lab, spec: CompressorSpec, kind: str = "fold", **how: object) -> str:
    """Plans of an engine's metadata, calls with values and scores in two tensors and with latents; drafts are rejected."""
    inputs = lab.inputs(spec)
    whole = lab.engine(inputs, kind=kind, latent=True)
    given = {"told": TOLD, "latent": True, "two": spec.gate, "beside": (16, 32), "entries": "tokens"}
    cut = lab.engine(inputs, kind=kind, **given | how)
    run_checked(cut, drafts(cut.lengths, DRAFTS, spec.ratio + 1))
    figure = same_as_prefill(cut, whole)
    normed(whole)
    return figure


def check_pages(lab: Lab, spec: CompressorSpec) -> str:
    """A state in pages of an engine, with room behind it."""
    inputs = lab.inputs(spec)
    whole, cut = (lab.engine(inputs) for _ in range(2))
    cut.state = make_state(spec, len(inputs[0]) + 1, DRAFTS, FP32, lab.device, gap=64)
    run_checked(cut, drafts(cut.lengths, DRAFTS, spec.ratio + 1))
    return same_as_prefill(cut, whole)


def check_rounded(lab: Lab) -> str:
    """A bf16 state that rounds fp32 inputs gives the entries of inputs that are rounded before."""
    tokens, weights = lab.inputs(V4_CSA, FP32)
    rounded = [text.bfloat16() for text in tokens]
    whole, cut = lab.engine((rounded, weights), dtype=BF16), lab.engine((tokens, weights))
    cut.state = make_state(V4_CSA, len(tokens) + 1, DRAFTS, BF16, lab.device, round_inputs=True)
    run_checked(cut, drafts(cut.lengths, DRAFTS, V4_CSA.ratio + 1))
    return same_as_prefill(cut, whole)


def check_index_keys(lab: Lab, spec: CompressorSpec) -> str:
    """What V4.1 does with latents: their own records by `store` without a norm, and an index key for each, into two caches."""
    inputs = lab.inputs(spec)
    main, again = lab.engine(inputs, latent=True, fmt="bf16"), lab.engine(inputs, fmt="bf16")
    main.run(chunks(main.lengths))
    normed(main)
    again.store_placed(main.latents, norm=False)
    packed(again, main.latents, norm=False)
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(512, 128, generator=draw, dtype=torch.float32).to(lab.device) / 512**0.5
    rows = [(some.float() @ weight).bfloat16() for some in main.latents]
    keys = lab.engine(lab.inputs(replace(V41_INDEX_K, ratio=spec.ratio, gate=spec.gate)))
    other = make_cache("bf16", keys.spec, keys.cache.num_pages, keys.rows_per_page, lab.device)
    keys.store_placed(rows, [other])
    figure = packed(keys, rows)
    packed(keys, rows, other)
    untouched(keys)
    return figure


def check_states(lab: Lab, spec: CompressorSpec) -> str:
    """Both states give the same entries up to fp32 rounding."""
    fold, window = (lab.engine(lab.inputs(spec), kind=kind) for kind in ("fold", "window"))
    for engine in (fold, window):
        engine.run(chunks(engine.lengths))
        close_to_fp64(engine)
    return f"{close(window.pooled, fold.pooled, 2 * pooled_bound(spec.window_rows), 'FoldState'):.1e}"


def check_many(lab: Lab) -> str:
    """`compress_many` writes the records of two calls of `compress`."""
    both = [lab.inputs(spec) for spec in (V4_CSA, V4_INDEXER)]
    alone, together = ([lab.engine(inputs) for inputs in both] for _ in range(2))
    steps = drafts(alone[0].lengths, DRAFTS, V4_CSA.ratio + 1)
    for engine in alone:
        engine.run(steps)
    run_many(together, steps)
    for one, other in zip(together, alone, strict=True):
        same_records(one, other, "compress")
    return "bits equal"


def check_gradients(lab: Lab, spec: CompressorSpec) -> str:
    """Entries and gradients of training, of kv_score in bf16, and on a GPU in fp32 too."""
    return "; ".join(check_training(lab.engine(lab.inputs(spec, dtype), fmt="fp32")) for dtype in (BF16, FP32)[: 1 + lab.real])


def check_projection(lab: Lab, spec: CompressorSpec) -> str:
    """From hidden states on: kv_score against fp64, and decoding with drafts to the bit of a prefill."""
    tokens, weights = lab.inputs(spec)
    width = 7168 if lab.real else 256
    lengths, weight = [len(text) for text in tokens], make_weight(spec.kv_score_width, width, device=lab.device)
    packed = make_hidden(sum(lengths), width, device=lab.device)
    worst, hidden = check_kv_score(packed, weight, weights, lab.backend), packed.split(lengths)
    inputs = [kv_score_of(text, weight, weights, lab.backend) for text in hidden], weights
    fmt = "indexer_mxfp4" if spec.head_dim == 128 else "fp8_ds_mla"
    cut = ProjectedEngine.make(*inputs, fmt=fmt, backend=lab.backend)
    check_projected_cut(cut.begin(hidden, weight), lab.engine(inputs), drafts(cut.lengths, DRAFTS, spec.ratio + 1))
    return f"{worst:.1e} of the bound, bits equal"


def check_fp8(lab: Lab, spec: CompressorSpec) -> str:
    """Weights in FP8 against those in bf16 that they stand for, in batches of any size."""
    tokens, weights = lab.inputs(spec)
    width = 7168 if lab.real else 320
    hidden = make_hidden(sum(map(len, tokens)), width, device=lab.device)
    weight = make_scaled_weight(spec.kv_score_width, width, device=lab.device)
    return f"{check_scaled(hidden, weight, weights, lab.backend):.1e} of the bound, bits equal"


def run_checked(engine: Engine, steps: list[Step]) -> None:
    """Runs steps, and raises unless `kvfold.check` of the last one finds nothing."""
    engine.run(steps[:-1])
    last = steps[-1]
    known = [engine.tokens[part.sequence][: part.start] for part in last.parts]
    args, named = engine.arguments(last)
    report = check(*args, **named, backend=engine.backend, full_history=known)
    if report.first is not None or report.errors:
        raise Mismatch(str(report))
    engine.run([last])


def same_as_prefill(engine: Engine, whole: Engine) -> str:
    """Raises unless what `engine` has is close to fp64, and to the bit what `whole` gets in one prefill."""
    whole.run(prefill(whole.lengths))
    error = close_to_fp64(engine)
    same(engine, whole)
    return f"{error:.1e}, bits equal"
