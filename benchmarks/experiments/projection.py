"""Experiment of one turn on the GPU: forms of the product of `project_compress`. python -m benchmarks.experiments.projection"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace

import torch

import kvfold
from kvfold.backend_triton import table
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


def side(columns, tokens, depth, stages, warps, **more):
    return T(ANY, columns, tokens, depth, 1, stages, warps, side=8, **more)


def parts(columns, tokens, depth, count, stages, warps, **more):
    return T(ANY, columns, tokens, depth, count, stages, warps, **more)


# By width of kv_score and tokens.
SIDES = {
    (1024, 4): [
        side(8, 8, 64, 8, 4),
        side(8, 8, 128, 4, 4),
        side(8, 8, 64, 6, 4),
        side(16, 8, 64, 8, 8),
        side(8, 16, 64, 6, 4),
    ],
    (1024, 16): [
        side(8, 16, 64, 6, 8),
        side(8, 16, 64, 6, 4),
        side(8, 16, 64, 4, 8),
        side(16, 16, 64, 6, 8),
        side(8, 16, 128, 4, 8),
    ],
    (2560, 4): [
        side(16, 8, 64, 4, 8),
        side(16, 8, 64, 4, 4),
        side(8, 8, 64, 4, 4),
        side(16, 8, 64, 3, 8),
        side(16, 8, 128, 2, 8),
    ],
    (2560, 16): [side(16, 16, 64, 3, 8), side(16, 16, 64, 4, 8), side(16, 16, 64, 6, 8), side(8, 16, 64, 3, 8)],
}
PARTS = {
    (1024, 4): [parts(64, 16, 128, 8, 5, 4), parts(64, 8, 128, 8, 5, 4)],
    (1024, 16): [parts(64, 16, 128, 8, 5, 4)],
    (1024, 64): [parts(64, 64, 128, 8, 4, 4), parts(64, 64, 64, 8, 6, 4), parts(128, 64, 64, 8, 8, 8)],
    (1024, 256): [parts(64, 128, 64, 4, 9, 8), parts(128, 64, 64, 4, 4, 8), parts(64, 128, 64, 8, 4, 8), parts(128, 128, 64, 8, 6, 8),
                  parts(128, 128, 128, 8, 3, 8), parts(64, 256, 64, 8, 4, 8)],
    (2560, 4): [parts(64, 16, 128, 8, 2, 4), parts(128, 16, 64, 4, 6, 4)],
    (2560, 16): [parts(64, 16, 128, 8, 2, 4), parts(128, 16, 64, 4, 6, 4)],
    (2560, 64): [parts(64, 64, 64, 8, 3, 4), parts(64, 64, 64, 4, 6, 8), parts(64, 64, 64, 4, 6, 4), parts(128, 64, 64, 8, 4, 8),
                 parts(128, 64, 64, 8, 4, 4), parts(128, 64, 128, 8, 2, 8)],
    (2560, 256): [parts(128, 64, 64, 4, 4, 8), parts(64, 128, 64, 4, 4, 8), parts(128, 128, 64, 4, 3, 8), parts(128, 128, 64, 8, 3, 8),
                  parts(128, 256, 64, 8, 4, 8), parts(128, 256, 64, 4, 4, 8), parts(128, 128, 128, 4, 3, 8)],
}  # fmt: skip
LONGS = [
    T(ANY, 128, 128, 64, 1, 6, 8),
    T(ANY, 128, 128, 64, 1, 4, 8, group=8),
    T(ANY, 128, 128, 64, 1, 6, 8, group=16),
    T(ANY, 128, 128, 64, 1, 6, 8, flat=1, group=8),
    T(ANY, 128, 128, 64, 1, 4, 8, flat=1, group=16),
    T(ANY, 128, 128, 128, 1, 3, 8, flat=1, group=8),
    T(ANY, 128, 128, 64, 1, 6, 8, flat=2, group=8),
    T(ANY, 128, 128, 128, 1, 3, 8, flat=2, group=16),
    T(ANY, 64, 256, 64, 1, 5, 8, flat=1, group=8),
    T(ANY, 128, 128, 128, 1, 3, 8, group=16),
]
RIGHT = LONGS[0]


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


class Gluon:
    """The prototype."""

    def __init__(self, hidden, weight, stages, group, persistent, into=None):
        from .gluon_long import long_kernel

        self.kernel, self.hidden, self.weight = long_kernel, hidden, weight
        self.out = torch.empty(hidden.shape[0], weight.shape[0], device="cuda") if into is None else into
        tiles = weight.shape[0] // 128 * -(-hidden.shape[0] // 128)
        self.grid, self.stages, self.group = (min(tiles, 132) if persistent else tiles,), stages, group
        self.name = f"gluon stages {stages} group {group} persistent {persistent}"

    def __call__(self):
        (count, width), columns = self.hidden.shape, self.weight.shape[0]
        more = {"K": width, "BM": 128, "BN": 128, "BK": 64, "S": self.stages, "GROUP": self.group, "WARPS": 8}
        self.kernel[self.grid](self.weight, self.hidden, self.out, columns, count, **more, num_warps=8, enable_fp_fusion=False)
        return self.out


GLUON_PARTS = {
    (1024, 4): [(64, 16, 64, 8, 4), (64, 16, 64, 11, 4)],
    (1024, 16): [(64, 16, 64, 8, 4), (64, 16, 64, 11, 4)],
    (1024, 64): [(64, 64, 64, 6, 4), (64, 64, 64, 13, 4)],
    (2560, 4): [(64, 16, 64, 5, 4), (64, 16, 64, 8, 4)],
    (2560, 16): [(64, 16, 64, 5, 4), (64, 16, 64, 8, 4)],
    (2560, 64): [(64, 64, 64, 3, 4), (128, 64, 64, 4, 8)],
    # With a fourth number: programs, each of which takes chunks of tiles in turn.
    (1024, 256): [(64, 128, 64, 4, 4, 264), (128, 128, 64, 6, 8, 132)],
    (2560, 256): [(64, 128, 64, 4, 4, 264), (128, 128, 64, 6, 8, 132), (128, 64, 64, 4, 8, 264)],
}


class GluonParts:
    """The prototype that has weights on their way before it waits; its parts are left alone."""

    def __init__(self, hidden, weight, room, how):
        from .gluon_long import part_kernel, unit_kernel

        self.programs, how = (how[5], how[:5]) if len(how) > 5 else (1 << 30, how)
        self.kernel = part_kernel if self.programs == 1 << 30 else unit_kernel
        self.hidden, self.weight, self.room, self.how = hidden, weight, room, how

    def __call__(self):
        (count, width), columns = self.hidden.shape, self.weight.shape[0]
        bm, bn, bk, stages, warps = self.how
        grid = (min(self.programs, 8 * columns // bm * -(-count // bn)),)
        more = {"K": width, "BM": bm, "BN": bn, "BK": bk, "S": stages, "WARPS": warps, "PDL": True}
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
            launch_pdl=True,
        )
        return self.room


def gluons(hidden, weight, into=None):
    for stages, group, persistent in ((6, 8, True), (4, 16, True), (6, 8, False)):
        yield Gluon(hidden, weight, stages, group, persistent, into)


def check(columns: int, width: int) -> dict:
    generator = torch.Generator(device="cuda").manual_seed(columns + width)
    hidden = torch.randn(600, width, generator=generator, device="cuda").bfloat16()
    hidden[3] = 0
    weight = (torch.randn(columns, width, generator=generator, device="cuda") / width**0.5).bfloat16()
    right = Product(hidden, weight, RIGHT)().view(torch.int32)
    differ, compared = [], 0
    for tokens in (1, 4, 16, 64, 256, 600):
        rows = [r for of in (SIDES, PARTS) for (_, most), found in of.items() for r in found if most >= tokens or of is PARTS]
        for config in dict.fromkeys([*rows, *LONGS]):
            compared += 1
            at = 600 - tokens
            got = Product(hidden[at:], weight, config)().view(torch.int32)
            if not torch.equal(got, right[at:]):
                wrong = int((got != right[at:]).sum())
                differ.append([tokens, wrong, str(config)])
        if columns % 128 == 0 and width > 1024 and tokens in (64, 256):
            try:
                for call in gluons(hidden[at:].contiguous(), weight):
                    compared += 1
                    wrong = int((call().view(torch.int32) != right[at:]).sum())
                    if wrong:
                        differ.append([tokens, wrong, call.name])
            except Exception as error:
                differ.append([tokens, "gluon", str(error)[:300]])
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
    for config in (*SIDES.get((columns, tokens), ()), *PARTS[columns, tokens]):
        ways = [(config, False), (replace(config, ahead=8), False), (replace(config, ahead=8, early=True), False)]
        for how, alone in [*ways, *([(config, True)] if config.parts > 1 else [])]:
            if config.side > 1 and how.early:
                continue
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
        *((c.name, c) for c in gluons(hidden, weight, into)),
    ):
        try:
            us = protocol.time_graph([call], 12, rounds=4)
        except Exception as error:
            yield same | {"how": name, "us": None, "error": str(error)[:90]}
            continue
        yield same | {"how": name, "us": round(us, 1), "tflops": round(2 * columns * width * tokens / us / 1e6)}


def sets() -> dict[str, dict[int, list[tuple[Tiling, ...]]]]:
    """TILINGS of whole steps, by tokens."""
    found: dict = {}
    for tokens, (a, b) in {
        4: (SIDES[1024, 4][2], SIDES[2560, 4][0]),  # both have room on a multiprocessor
        16: (SIDES[1024, 16][2], SIDES[2560, 16][0]),
    }.items():
        for ahead, early in ((0, False), (8, False), (8, True), (4, True), (0, True)):
            found.setdefault(tokens, []).append((f"side ahead {ahead} early {early}", a, b, {"ahead": ahead, "early": early}))
    for tokens, (a, b) in {
        4: (PARTS[1024, 4][0], PARTS[2560, 4][0]),
        16: (PARTS[1024, 16][0], PARTS[2560, 16][0]),
        64: (PARTS[1024, 64][0], PARTS[2560, 64][0]),
        256: (PARTS[1024, 256][1], PARTS[2560, 256][0]),
    }.items():
        for adds in ("launch", "reader"):
            for ahead, early in ((0, False), (8, False), (8, True), (4, True)) if adds == "launch" else ((0, False), (8, True)):
                name = f"parts {adds} ahead {ahead} early {early}"
                found.setdefault(tokens, []).append((name, a, b, {"ahead": ahead, "early": early, "adds": adds}))
    for i, (a, b) in enumerate(((PARTS[1024, 64][0], PARTS[2560, 64][1]), (PARTS[1024, 64][1], PARTS[2560, 64][3]))):
        for ahead, early in ((0, False), (8, True)):
            found[64].append((f"parts launch other {i} ahead {ahead} early {early}", a, b, {"ahead": ahead, "early": early}))
    return found


def whole(model, batch: int, weights) -> Iterator[dict]:
    case = StepCase(model, batch, 4)
    step = WholeStep(case, weights)
    kept = [step.make_set() for _ in range(2)]
    for name, a, b, how in [("apart", None, None, None), *sets()[case.tokens]]:
        row = {"what": "step", "case": case.name, "how": name}
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
    rows = dict.fromkeys([*LONGS, *(r for of in (SIDES, PARTS) for found in of.values() for r in found)])
    found: list = []
    for width in (7168, 1024, 256):
        for config in rows:
            sums = (None,) if config.parts > 1 else (FP32,)
            found += [ProjectKey(width, config, 1, kind) for kind in sums]
    for config in rows:
        if config.parts == 1:
            found.append(ProjectKey(7168, config, 1, BF16, True))
        if config not in LONGS:
            for ahead in (8,):
                found.append(
                    ProjectKey(7168, replace(config, ahead=ahead), 1, BF16 if config.parts == 1 else None, config.parts == 1)
                )
    for of in sets().values():
        for _, a, b, how in of:
            for config in (replace(a, max_columns=1024, **how), replace(b, **how)):
                found.append(ProjectKey(7168, config, 1, BF16 if config.parts == 1 else None, config.parts == 1))
    for count in (4, 8):
        for early in (False, True):
            found += [AddKey(count, FP32, False, early), AddKey(count, BF16, True, early)]
    main, indexer = FORMATS["fp8_ds_mla"], FORMATS["indexer_fp8_vllm"]
    for early in (False, True):
        for kind, count in ((BF16, 0), (FP32, 8), (FP32, 4)):
            types = (kind, FP32, None, FP32, True, False, False, count, count > 0, early)
            found.append(step_key(kvfold.V4_HCA, main, "fold", 4, types))
        types = (BF16, BF16, None, FP32, True, False, False, 0, False, early)
        for bucket in BUCKETS:
            found.append(
                PairKey(
                    step_key(kvfold.V4_CSA, main, "rows", 4, types, bucket=bucket),
                    step_key(kvfold.V4_INDEXER, indexer, "rows", 4, types, bucket=bucket),
                )
            )
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
            GluonParts(hidden, weight, torch.empty(8, tokens, columns, device="cuda"), how)()
        torch.cuda.synchronize()
        return
    if args.only.startswith("gluon"):  # one of them, into the cache
        i, (width, kind) = int(args.only[5:]) % 3, ((7168, FP32), (7168, BF16), (4096, BF16))[int(args.only[5:]) // 3]
        hidden, weight = (torch.zeros(n, width, dtype=BF16, device="cuda") for n in (256, 1024))
        [*gluons(hidden, weight, torch.zeros(256, 1024, dtype=kind, device="cuda"))][i]()
        torch.cuda.synchronize()
        return
    if "compile" in args.only:
        found = keys()
        print(compile_all(found, "sm_90", (True,)), flush=True)
        plain = [
            ProjectKey(7168, replace(c, max_columns=m, **how), 1, BF16 if c.parts == 1 else None, c.parts == 1)
            for of in sets().values()
            for _, a, b, how in of
            for c, m in ((a, 1024), (b, ANY))
        ]
        plain += [key for key in found if not isinstance(key, ProjectKey)]
        print(compile_all(list(dict.fromkeys(plain)), "sm_90", (False,)), flush=True)
        return
    found: list[dict] = []
    wanted = args.only.split(",") if args.only else ["bits", "step", "time", "long"]
    if "bits" in wanted:
        for columns, width in ((1024, 7168), (2560, 7168), (192, 256), (192, 1024)):
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
        for columns, width in ((1024, 7168), (1024, 4096), (2560, 7168)):
            found += [show(row) for row in long_figures(columns, width, 16384)]
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if "time" in wanted:
        for shape in SHAPES:
            for tokens in (4, 16, 64, 256):
                found += [show(row) for row in figures(shape, tokens)]
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    protocol.append_rows(args.out, [protocol.environment(args.commit) | row for row in found])


if __name__ == "__main__":
    main()
