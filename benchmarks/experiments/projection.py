"""Experiment of one turn on the GPU: forms of the product of `project_compress`. python -m benchmarks.experiments.projection"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace

import torch

import kvfold
from kvfold.backend_triton import launch_product, table
from kvfold.backend_triton.keys import AddKey, PairKey, ProjectKey, step_key
from kvfold.backend_triton.launch_product import add, project
from kvfold.backend_triton.table import ANY, BUCKETS, Tiling
from kvfold.storage.formats import FORMATS

from ..lib import model_calls, models, protocol
from ..lib.model_calls import WholeStep
from ..lib.models import StepCase
from ..run.precompile import compile_all

FP32, BF16 = torch.float32, torch.bfloat16
T = Tiling
PRO, FLASH = models.MODELS[1], models.MODELS[0]
SHAPES = ((1024, 7168), (2560, 7168))


def parts(columns, tokens, depth, count, stages, warps, **more):
    return T(ANY, columns, tokens, depth, count, stages, warps, **more)


# By width of kv_score and tokens.
PARTS = {
    (1024, 16): [
        parts(64, 16, 128, 8, 5, 4), parts(64, 16, 128, 8, 3, 4, ahead=512), parts(64, 16, 64, 8, 3, 4, ahead=512),
        parts(64, 16, 64, 8, 5, 4, ahead=256), parts(64, 16, 128, 8, 2, 4, ahead=512), parts(64, 16, 64, 4, 3, 4, ahead=512),
    ],
    (2560, 16): [
        parts(64, 16, 128, 8, 2, 4), parts(64, 16, 64, 8, 3, 4, ahead=256), parts(64, 16, 64, 4, 3, 4, ahead=512),
        parts(128, 16, 64, 8, 2, 8, ahead=256), parts(128, 16, 64, 4, 3, 8, ahead=256), parts(64, 16, 64, 8, 2, 4, ahead=512),
    ],
    (1024, 64): [
        parts(64, 64, 64, 8, 6, 4), parts(64, 64, 64, 8, 4, 4, ahead=256), parts(64, 64, 64, 8, 3, 4, ahead=512),
        parts(64, 64, 128, 8, 3, 4, ahead=256), parts(64, 64, 64, 8, 4, 4, ahead=128),
    ],
    (2560, 64): [
        parts(64, 64, 64, 8, 3, 4), parts(64, 64, 64, 8, 2, 4, ahead=128), parts(128, 64, 64, 8, 2, 8, ahead=128),
        parts(64, 64, 64, 4, 3, 4, ahead=256), parts(64, 64, 64, 4, 6, 4), parts(128, 64, 64, 8, 2, 4, ahead=128),
    ],
    (1024, 256): [parts(128, 64, 64, 4, 4, 8), parts(128, 64, 64, 4, 3, 8, ahead=128), parts(64, 128, 64, 4, 4, 8)],
    (2560, 256): [parts(64, 128, 64, 4, 4, 8), parts(64, 128, 64, 4, 3, 8), parts(64, 64, 64, 4, 3, 4), parts(64, 128, 64, 4, 2, 8, ahead=128)],
}  # fmt: skip
LONGS = [
    T(ANY, 128, 256, 64, 1, 3, 8, group=8),
    T(ANY, 256, 128, 64, 1, 3, 8, group=8),
    T(ANY, 128, 128, 64, 1, 6, 8),
    T(ANY, 128, 128, 64, 1, 4, 8, group=8),
    T(ANY, 128, 128, 64, 1, 4, 8, group=4),
]
RIGHT = T(ANY, 128, 128, 64, 1, 6, 8)


class Product:
    """A call of the product by this row, with the launch that adds parts."""

    def __init__(self, hidden, weight, config, into=None, room=None, alone=False):
        shape = hidden.shape[0], weight.shape[0]
        self.given = hidden, (weight,), config, True
        self.kv_score = torch.empty(shape, device="cuda", dtype=FP32) if into is None else into
        self.parts = None
        if config.parts > 1:
            self.parts = torch.empty((config.parts, *shape), device="cuda") if room is None else room[: config.parts]
        self.alone = alone

    def __call__(self):
        config, rounded = self.given[2], self.kv_score.dtype is BF16
        if self.parts is None:
            project(*self.given, self.kv_score, rounded=rounded)
        else:
            project(*self.given, parts=self.parts)
            if not self.alone:
                add(self.parts, self.kv_score, config.early, True, rounded)
        return self.kv_score


GLUON_PARTS = {
    (1024, 16): [(64, 16, 64, 11, 4), (64, 16, 64, 15, 4)],
    (2560, 16): [(64, 16, 64, 5, 4), (64, 16, 64, 7, 4)],
    (1024, 64): [(64, 64, 64, 6, 4), (64, 64, 64, 6, 4)],
    (2560, 64): [(128, 64, 64, 4, 8), (64, 64, 64, 3, 4)],
}


class GluonParts:
    """The prototype that has weights on their way before it waits; its parts are left alone."""

    def __init__(self, hidden, weight, room, how, pdl=True):
        from .gluon_long import part_kernel, unit_kernel

        self.programs, how = (how[5], how[:5]) if len(how) > 5 else (1 << 30, how)
        self.kernel = part_kernel if self.programs == 1 << 30 else unit_kernel
        self.hidden, self.weight, self.room, self.how, self.pdl = hidden, weight, room, how, pdl

    def __call__(self):
        (count, width), columns = self.hidden.shape, self.weight.shape[0]
        bm, bn, bk, stages, warps = self.how
        grid = (min(self.programs, 8 * columns // bm * -(-count // bn)),)
        more = {"K": width, "BM": bm, "BN": bn, "BK": bk, "S": stages, "WARPS": warps, "PDL": self.pdl}
        self.kernel[grid](
            self.weight,
            self.hidden,
            self.room,
            columns,
            count,
            self.room.stride(0),
            **more,
            num_warps=warps,
            enable_fp_fusion=False,
            launch_pdl=self.pdl,
        )
        return self.room


def check(columns: int, width: int) -> dict:
    generator = torch.Generator(device="cuda").manual_seed(columns + width)
    hidden = torch.randn(600, width, generator=generator, device="cuda").bfloat16()
    hidden[3] = 0
    weight = (torch.randn(columns, width, generator=generator, device="cuda") / width**0.5).bfloat16()
    right = Product(hidden, weight, RIGHT)().view(torch.int32)
    differ, compared = [], 0
    for tokens in (1, 4, 16, 64, 256, 600):
        rows = [r for found in PARTS.values() for r in found]
        for config in dict.fromkeys([*rows, *LONGS]):
            compared += 1
            at = 600 - tokens
            got = Product(hidden[at:], weight, config)().view(torch.int32)
            if not torch.equal(got, right[at:]):
                wrong = int((got != right[at:]).sum())
                differ.append([tokens, wrong, str(config)])
    exact = hidden.double() @ weight.double().T
    most = hidden.double().abs() @ weight.double().abs().T
    error = (right.view(FP32).double() - exact).abs()
    bound = float((error / (most * width * 2.0**-24 + 1e-300)).max())
    return {
        "what": "bits",
        "shape": (columns, width),
        "compared": compared,
        "differing": len(differ),
        "of": bound,
        "differ": differ[:12],
    }


def show(row: dict) -> dict:
    print(json.dumps(row).replace("max_tokens=2147483647, ", "").replace("max_columns=2147483647, ", ""), flush=True)
    return row


def figures(shape, tokens) -> Iterator[dict]:
    columns, width = shape
    hidden = torch.randn(tokens, width, device="cuda").bfloat16()
    weights = [(torch.randn(columns, width, device="cuda") / width**0.5).bfloat16() for _ in range(31)]
    same = {"what": "time", "shape": shape, "tokens": tokens}
    into = torch.empty(tokens, columns, dtype=BF16, device="cuda")
    room = torch.empty(8, tokens, columns, device="cuda")
    us = protocol.time_graph([lambda w=w: torch.mm(hidden, w.T, out=into) for w in weights], 8)
    yield same | {"how": "torch.mm", "us": round(us, 2)}
    for how in GLUON_PARTS.get((columns, tokens), ()):
        try:
            GluonParts(hidden, weights[0], room, how)()
            parted = Product(hidden, weights[0], PARTS[columns, tokens][0], into)
            parted()
            equal = torch.equal(parted.parts, room) if parted.parts.shape[0] == 8 else None
            us = protocol.time_graph([GluonParts(hidden, w, room, how) for w in weights], 8)
            yield same | {"how": f"gluon parts {how}", "alone": True, "equal": equal, "us": round(us, 2)}
        except Exception as error:
            yield same | {"how": f"gluon parts {how}", "us": None, "error": str(error)[:300]}
    for config in PARTS[columns, tokens]:
        for how, alone in ((config, False), (replace(config, early=True), False), (config, True)):
            try:
                us = protocol.time_graph([Product(hidden, w, how, into, room, alone) for w in weights], 8)
            except Exception as error:
                yield same | {"how": str(how), "us": None, "error": str(error)[:90]}
                continue
            yield same | {"how": str(how), "alone": alone, "us": round(us, 2)}


def long_figures(columns: int, width: int, tokens: int) -> Iterator[dict]:
    hidden = torch.randn(tokens, width, device="cuda").bfloat16()
    weight = (torch.randn(columns, width, device="cuda") / width**0.5).bfloat16()
    into = torch.empty(tokens, columns, dtype=BF16, device="cuda")
    same = {"what": "long", "shape": (columns, width), "tokens": tokens}
    for name, call in (
        ("torch.mm", lambda: torch.mm(hidden, weight.T, out=into)),
        *((str(c), Product(hidden, weight, c, into)) for c in LONGS),
    ):
        try:
            us = protocol.time_graph([call], 12, rounds=4)
        except Exception as error:
            yield same | {"how": name, "us": None, "error": str(error)[:90]}
            continue
        yield same | {"how": name, "us": round(us, 1), "tflops": round(2 * columns * width * tokens / us / 1e6)}


def sets() -> dict[int, list]:
    """TILINGS of whole steps, by tokens: every row beside the first of the other width."""
    found: dict[int, list] = {}
    for tokens in (4, 16, 64, 256):
        wide = max(tokens, 16)
        ones, others, made = PARTS[1024, wide], PARTS[2560, wide], []
        pairs = [(a, others[0]) for a in ones] + [(ones[0], b) for b in others[1:]] + [(ones[1], b) for b in others[1:3]]
        if tokens == 16:
            pairs = [(ones[0], others[0]), (ones[1], others[1]), (ones[1], others[2])]
        for a, b in pairs:
            for early in (False, True):
                made.append((f"{told(a)} | {told(b)} | early {early}", a, b, {"early": early}))
        found[tokens] = made
    return found


def told(c: Tiling) -> str:
    return f"{c.columns}x{c.tokens} d{c.depth} p{c.parts} s{c.stages} w{c.num_warps} a{c.ahead}"


def gluon_step(which: int):
    """Puts the prototype in the place of the product that leaves parts."""

    def instead(hidden, weights, config, pdl, kv_score=None, parts=None, done=None, rounded=False):
        key = parts.shape[2], max(16, hidden.shape[0])
        GluonParts(hidden, weights[0] if len(weights) == 1 else stacked(weights), parts, GLUON_PARTS[key][which], pdl)()

    return instead


def stacked(weights):
    """Main and indexer, which stand behind each other."""
    first = weights[0]
    return first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), first.stride())


def whole(model, batch: int, weights) -> Iterator[dict]:
    case = StepCase(model, batch, 4)
    step = WholeStep(case, weights)
    kept = [step.make_set() for _ in range(2)]
    given = [(name, a, b, how, None) for name, a, b, how in [("apart", None, None, None), *sets()[case.tokens]]]
    if case.tokens <= 64:
        wide = max(16, case.tokens)
        for which, early in ((0, False), (0, True), (1, False), (1, True)):
            a, b = (parts(64, wide, 64, 8, 3, 4) for _ in range(2))
            how = GLUON_PARTS[1024, wide][which], GLUON_PARTS[2560, wide][which]
            given.append((f"gluon {how} early {early}", a, b, {"early": early}, which))
    for name, a, b, how, which in given:
        row = {"what": "step", "case": case.name, "how": name}
        launch_product.project = project if which is None else gluon_step(which)
        try:
            if a is not None:
                table.TILINGS = (replace(a, max_columns=1024, **how), replace(b, **how))
            calls = [step.call("fused" if a else "apart", own) for own in kept]
            step.check(calls[0])
            us = protocol.time_graph(calls, rounds=2)
            step.check(calls[0])
            yield row | {"us": round(us, 1)}
        except Exception as error:
            traceback.print_exc()
            yield row | {"us": None, "error": str(error)[:200]}


def keys() -> list:
    rows = dict.fromkeys([*LONGS, *(r for found in PARTS.values() for r in found)])
    found = [
        ProjectKey(width, config, 1, None if config.parts > 1 else FP32) for width in (7168, 4096, 1024, 256) for config in rows
    ]
    found += [ProjectKey(width, config, 1, BF16, True) for width in (7168,) for config in LONGS]
    found += [
        AddKey(count, *kind, early) for count in (4, 8) for kind in ((FP32, False), (BF16, True)) for early in (False, True)
    ]
    return found


def step_keys() -> list:
    """Of whole steps, which need them in both ways."""
    found: list = []
    for of in sets().values():
        for _, a, b, how in of:
            for config, most in ((a, 1024), (b, ANY)):
                found += [ProjectKey(7168, replace(config, max_columns=most, **how), 1 if most == 1024 else 2, None)]
    main, indexer = FORMATS["fp8_ds_mla"], FORMATS["indexer_fp8_vllm"]
    for early in (False, True):
        types = (BF16, FP32, None, FP32, True, False, False, 0, False, early)
        found.append(step_key(kvfold.V4_HCA, main, "fold", 4, types))
        types = (BF16, BF16, None, FP32, True, False, False, 0, False, early)
        for bucket in BUCKETS:
            one, other = (
                step_key(spec, fmt, "rows", 4, types, bucket=bucket)
                for spec, fmt in ((kvfold.V4_CSA, main), (kvfold.V4_INDEXER, indexer))
            )
            found.append(PairKey(one, other))
    return list(dict.fromkeys(found))


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="compile, bits, time, long, step")
    args = parser.parse_args()
    begin = time.perf_counter()
    if args.only.startswith("gluon-parts"):
        columns, tokens = [*GLUON_PARTS][int(args.only[11:])]
        hidden, weight = (torch.zeros(n, 7168, dtype=BF16, device="cuda") for n in (tokens, columns))
        for how in GLUON_PARTS[columns, tokens]:
            for pdl in (True, False):
                GluonParts(hidden, weight, torch.empty(8, tokens, columns, device="cuda"), how, pdl)()
                if tokens == 16:  # a number that 16 divides is another kernel
                    GluonParts(hidden[:4], weight, torch.empty(8, 4, columns, device="cuda"), how, pdl)()
        torch.cuda.synchronize()
        return
    if "compile" in args.only:
        print(compile_all([*keys(), *step_keys()], "sm_90", (True,)), flush=True)
        print(compile_all(step_keys(), "sm_90", (False,)), flush=True)
        return
    found: list[dict] = []
    wanted = args.only.split(",") if args.only else ["bits", "step", "time", "long"]
    if "bits" in wanted:
        for columns, width in ((1024, 7168), (2560, 7168), (192, 256), (192, 1024), (1024, 4096)):
            try:
                found.append(show(check(columns, width)))
            except Exception:
                traceback.print_exc()
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if "step" in wanted:
        weights = model_calls.projections(PRO)
        for batch in (1, 4, 16, 64):
            for row in whole(PRO, batch, weights):
                found.append(show(row))
        del weights
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if "long" in wanted:
        for columns, width in ((1024, 7168), (2560, 7168)):
            found += [show(row) for row in long_figures(columns, width, 16384)]
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if "time" in wanted:
        for shape in SHAPES:
            for tokens in (16, 64, 256):
                found += [show(row) for row in figures(shape, tokens)]
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    protocol.append_rows(args.out, [protocol.environment(args.commit) | row for row in found])


if __name__ == "__main__":
    main()
