"""Times a whole step of a model, from hidden states to stored records: every layer's projection and compressors.

python -m benchmarks.run.model_step --out benchmarks/results/step.jsonl [--only WORDS,WORDS] [--variants apart,fused]

V4-Flash and V4-Pro, 1 to 256 sequences, 1 and 4 new tokens each, at all phases. Each layer has its own weights, states and
caches; one CUDA graph holds whole steps, over sets of states and caches that are together four times the L2 cache (at most 8:
one sequence stays warm). Variants: `updates`, both plans; `compressors`, those and `kvfold.compress` in all layers;
`projections`, `torch.mm` in all layers, main and indexer of a layer in one; `apart`, all of that; `fused`, updates and
`kvfold.project_compress`; `fused-fp8`, the same with weights in FP8.
Cases `r128` and `r4`: a prompt of 64k tokens, by one layer. floor_us: `bytes` at what an H200 reads.
"""

from __future__ import annotations

import argparse
import gc
import textwrap
import traceback

import torch

from ..lib import model_calls, models, protocol, table
from ..lib.model_calls import PARTS, WholeStep
from ..lib.models import AnyCase, StepCase

MOST_SETS = 8
STEPS = 4  # at least so many are in a graph, beside which its own launch is nothing
PROMPT_PARTS = PARTS[1:]  # a plan is updated once for all layers of a model
HEADER = ("case", *PARTS, "floor", *(f"mm + {name}" for name in models.ENGINES.values()))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has one of these, separated by commas, in it")
    parser.add_argument("--variants", default=",".join(PARTS), help="separated by commas (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.variants = args.variants.split(",")
    if not set(args.variants) <= set(PARTS):
        parser.error(f"--variants must be of {', '.join(PARTS)}, got {','.join(args.variants)}")
    if all(name.startswith("fused") for name in args.variants) and model_calls.missing():
        parser.error(f"--variants {','.join(args.variants)} cannot be timed: {model_calls.missing()}")
    return args


def chosen(args: argparse.Namespace) -> list[AnyCase]:
    found = [*models.step_cases(), *models.prompt_cases()]
    return [case for case in found if any(words in case.name for words in args.only.split(","))]


def parts_of(case: AnyCase, variants: list[str]) -> list[str]:
    """What is timed of a case; without `fused` where there is none."""
    able = PARTS if isinstance(case, StepCase) else PROMPT_PARTS
    return [part for part in able if part in variants and not (part.startswith("fused") and model_calls.missing())]


def set_count(case: AnyCase) -> int:
    """Sets of states and caches. A prompt is so long that one is cold."""
    if not isinstance(case, StepCase):
        return 1
    return min(MOST_SETS, protocol.buffer_sets(models.compress_traffic(case).total))


def rows_of(case: AnyCase, step: WholeStep, parts: list[str]) -> list[dict]:
    """The result rows of a case, without where they were taken; and how often each part failed."""
    rows, sets = [], [step.make_set() for _ in range(set_count(case))]
    floors = protocol.device_name() == models.FLOOR_DEVICE
    for part in parts:
        try:
            calls = [step.call(part, buffers) for buffers in sets]
            step.check(calls[0])
            us = protocol.time_graph(calls, rounds=-(-STEPS // len(calls)))
            step.check(calls[0])
        except Exception:  # the other variants are worth having: device time is scarce
            traceback.print_exc()
            print(f"{case.name} {part}: failed", flush=True)
            continue
        row = {"bench": "step", "case": case.name, "variant": part, "us": round(us, 2)}
        if part != "updates":
            row |= {"bytes": models.floor_bytes(case, part)}
            row |= {"floor_us": round(models.floor_us(case, part), 2)} if floors else {}
        rows.append(row)
    return rows


def cells(case: AnyCase, rows: list[dict]) -> list[str]:
    """Of one case, under HEADER. A `+`: at least, as not all that makes it up was recorded."""
    us = {row["variant"]: row["us"] for row in rows}
    found = [case.name, *(f"{us[part]:.1f}" if part in us else "" for part in PARTS)]
    floors = [row["floor_us"] for row in rows if "floor_us" in row and row["variant"] != "fused-fp8"]
    found.append(f"{floors[-1]:.1f}" if floors else "")
    for peer in models.ENGINES:
        known = isinstance(case, StepCase) and "projections" in us and protocol.peers()
        other = models.engine_us(case, peer) if known else None
        found.append(f"{us['projections'] + other.us:.0f}{'' if other.whole else '+'}" if other else "")
    return found


def share_of(rows: list[dict]) -> str:
    """What the step's compressors would be of a decode step that another project traced, with all that is assumed."""
    us = {(row["case"], row["variant"]): row["us"] for row in rows}.get((models.REPORTED_CASE.name, "compressors"))
    return textwrap.fill(models.share_text(us), 100) if us is not None and protocol.peers() else ""


def run(args: argparse.Namespace, device: str = "cuda") -> tuple[list[dict], int]:
    """The rows, and how many variants of cases failed; each case's rows are written when they are there."""
    where, rows, failed, made = protocol.environment(args.commit), [], 0, (None, [])
    for case in chosen(args):
        parts = parts_of(case, args.variants)
        if made[0] != case.model:
            made = (None, [])
            gc.collect()
            made = (case.model, model_calls.projections(case.model, device))
        first = {ratio: case.model.ratios.index(ratio) for ratio in set(case.model.ratios)}
        weights = made[1] if isinstance(case, StepCase) else [made[1][first[case.ratio]]]
        found = rows_of(case, WholeStep(case, weights, device), parts)
        failed += len(parts) - len(found)
        print("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, cells(case, found), strict=True) if cell), flush=True)
        rows += found
        protocol.append_rows(args.out, [row | where for row in found])
        gc.collect()
        torch.cuda.empty_cache()
    return rows, failed


def main() -> int:
    args = parse()
    if "fused" in args.variants and model_calls.missing():
        print(f"fused is not timed: {model_calls.missing()}", flush=True)
    rows, failed = run(args)
    by_case = [(case, [row for row in rows if row["case"] == case.name]) for case in chosen(args)]
    table.show("A whole step, microseconds", HEADER, [cells(case, found) for case, found in by_case if found])
    print("Of engines: torch.mm here, and their recorded compressors, summed over the layers; +: at least.")
    print(share_of(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
