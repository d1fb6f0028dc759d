"""What the documents show of whole steps (`step.jsonl`); left out, its words too, where there are no rows."""

from __future__ import annotations

import textwrap

from . import measured, models, protocol
from .measured import Rows
from .models import Model, PromptCase, StepCase

# The lines of a step's table: in words, and whose rows.
OURS = (
    ("plan updates", "updates"),
    ("plans and compressors", "compressors"),
    ("`torch.mm`", "projections"),
    ("`torch.mm`, then kvfold", "apart"),
    ("`project_compress`", "fused"),
    ("`project_compress`, FP8 weights", "fused-fp8"),
)
SHORT = ("`project_compress`", "fused"), ("`torch.mm`, then `compress`", "apart")
PRO = models.MODELS[1]
WIDTH = 128  # of the documents
Found = dict[str, dict]


def of_case(rows: Rows, device: str, case: str) -> Found:
    """By variant."""
    return {name: row for (of, name), row in measured.of(rows, "step", device).items() if of == case}


def cases_of(model: Model, new: int) -> list[StepCase]:
    return [case for case in models.step_cases() if (case.model, case.new) == (model, new)]


def header(first: str, cases: list[StepCase]) -> tuple[str, ...]:
    return first, *(f"{case.batch} sequence{'s' * (case.batch > 1)}" for case in cases)


def least_us(found: Found) -> float | None:
    """Of the floor of a whole step."""
    floors = [found[name]["floor_us"] for name in ("fused", "apart") if "floor_us" in found.get(name, {})]
    return floors[0] if floors else None


def engine_cells(cases: list[StepCase], found: list[Found], peer: str) -> list[str]:
    """`torch.mm` and an engine's compressors; of the fastest of all where `peer` is empty."""
    cells = []
    for case, ours in zip(cases, found, strict=True):
        if "projections" not in ours:
            cells.append("")
            continue
        fastest = min(models.engine_us(case, one) for one in ([peer] if peer else models.ENGINES))
        cells.append(f"{ours['projections']['us'] + fastest.us:,.0f}{'' if fastest.whole else '+'}")
    return cells


def our_cells(found: list[Found], variant: str) -> list[str]:
    """Bold where `project_compress` is slower than `torch.mm` and a call of `compress`."""
    cells = []
    for ours in found:
        row, apart = ours.get(variant), ours.get("apart")
        slower = row and variant.startswith("fused") and apart and row["us"] > apart["us"]
        cells.append((f"**{row['us']:,.0f}**" if slower else f"{row['us']:,.0f}") if row else "")
    return cells


def step_table(cases: list[StepCase], found: list[Found], ours: tuple[tuple[str, str], ...], peers: dict[str, str]) -> str:
    lines = [(words, *our_cells(found, variant)) for words, variant in ours]
    lines += [(words, *engine_cells(cases, found, peer)) for peer, words in peers.items()]
    least = [least_us(one) for one in found]
    lines.append(("weights, states and caches moved once", *(f"{us:,.0f}" if us else "" for us in least)))
    return measured.markdown(header("microseconds of a step", cases), [line for line in lines if any(line[1:])])


def short(rows: Rows, folder: str) -> str:
    """What README shows: V4-Pro with 4 new tokens. folder: of the pictures, as seen from the page."""
    device, cases = measured.PEERS_DEVICE, cases_of(PRO, 4)
    found = [of_case(rows, device, case.name) for case in cases]
    used = [row for one in found for row in one.values()]
    if not used:
        return ""
    said = (
        "A whole step of V4-Pro: projections and compressors of its 61 layers, 4 new tokens for each sequence. Of engines:\n"
        "`torch.mm` and their recorded kernels ([how](docs/performance.md)); `+`: at least."
    ) + (" **Bold**: slower than the row below.\n" if any("fused" in one for one in found) else "\n")
    table = step_table(cases, found, SHORT, {"": "`torch.mm`, then the fastest engine's kernels"})
    return f"{said}{measured.taken(used)}\n\n{table}\n![A whole step]({folder}/step-{measured.slug(device)}.svg)\n"


def whole(rows: Rows) -> str:
    """What docs/performance.md shows of steps: each model, prompts, and the share of a step that others reported."""
    if not measured.devices(rows, "step"):
        return ""

    def body(device: str) -> tuple[str, Rows]:
        peers = {peer: f"`torch.mm`, then {name}" for peer, name in models.ENGINES.items()}
        peers = peers if device == measured.PEERS_DEVICE and protocol.peers() else {}
        parts, used = [], []
        for model in reversed(models.MODELS):
            for new in reversed(models.NEW):
                cases = cases_of(model, new)
                found = [of_case(rows, device, case.name) for case in cases]
                if any(found):
                    tokens = f"{new} new token{'s' * (new > 1)}"
                    parts.append(f"{model.title}, {tokens} for each sequence:\n\n" + step_table(cases, found, OURS, peers))
                    used += [row for one in found for row in one.values()]
        name = measured.slug(device)
        parts.append(f"![A whole step on {device}](plots/step-{name}.svg)\n")
        prompt, prompt_rows = prompts(rows, device)
        told = share(rows, device) if peers else ""
        return "\n".join(filter(None, (*parts, prompt, told))), used + prompt_rows

    variants = {row["variant"] for row in rows if row["bench"] == "step"}
    said = (FUSED if "fused" in variants else "") + (FP8 if "fused-fp8" in variants else "")
    return f"## A whole step\n\n{INTRODUCTION}\n{said}{measured.sections(rows, ('step',), body)}\n"


INTRODUCTION = """\
Projections and compressors of all layers of a model, from hidden states to stored records, with both updates of plans: V4-Pro
has 31 layers of ratio 128 and 30 of ratio 4 with their indexers, V4-Flash 20 and 21. Sequences are at all phases. Each layer
has its own bf16 weights, states and caches, and one CUDA graph holds whole steps (`benchmarks/run/model_step.py`; `kvfold bench
step`).

The last line is what a step has to move, at the 4.5 TB/s that an H200 reads: weights once, states and caches. Hidden states are
not in it, as the layer before has just written them. With many tokens the arithmetic of the product takes longer than that.

Engines: `torch.mm` as measured here, and their compressors from their recorded figures ([how](#other-projects)): for each
compressor the fastest pipeline that the engine has in any variant, times its layers, and nothing for what it builds once for a
step. A batch that was not recorded counts as the next smaller one that was, or as nothing; with one token a quarter of the
sequences end a window of 4, which counts as none. Such sums are marked `+`: the step takes at least that.
"""


FUSED = """\
`project_compress`: projection and compressor of a layer in one call. **Bold**: it is slower than `torch.mm` and `compress`.

"""


FP8 = """\
FP8 weights: codes and scales of the same layers (`kvfold.ScaledWeight`), half as many bytes of weights; the last line and
`torch.mm` are of weights in bf16.

"""


def prompts(rows: Rows, device: str) -> tuple[str, Rows]:
    """A prompt by one layer of each ratio, beside `torch.mm` and `compress` one after the other."""
    lines, used = [], []
    for case in models.prompt_cases():
        found = of_case(rows, device, case.name)
        if found:
            us = [found[name]["us"] if name in found else None for name in ("projections", "compressors", "apart", "fused")]
            times = f"{us[3] / us[2]:.2f}" if us[2] and us[3] else ""
            lines.append((_prompt_words(case), *(f"{one:,.0f}" if one else "" for one in us), times))
            used += list(found.values())
    if not lines:
        return "", []
    words = ("one layer, 64k tokens", "`torch.mm`", "`compress`", "both", "`project_compress`", "times both")
    return f"A prompt of one sequence:\n\n{measured.markdown(words, lines)}", used


def _prompt_words(case: PromptCase) -> str:
    return f"{case.model.title}, ratio {case.ratio}{' with indexer' * (case.ratio == 4)}"


def share(rows: Rows, device: str) -> str:
    """What kvfold's compressors would be of the step in which the change that kvfold began from was reported."""
    ours = of_case(rows, device, models.REPORTED_CASE.name).get("compressors")
    if ours is None:
        return ""
    return textwrap.fill(models.share_text(ours["us"]), WIDTH) + "\n"
