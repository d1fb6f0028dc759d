"""Result rows that count, and the Markdown tables that the documents show of them.

Of each bench, case, variant and device, and engine if it was in one, the last row of its file counts. Tables never have rows of
two devices, and the figures of other projects stand only beside those of the device that they were taken on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from . import table
from .protocol import Case

PEERS_DEVICE = "NVIDIA H200"  # of peers_h200.jsonl
BATCHES = (16, 64, 256)
# What the summaries have of decode: the layer and the step in words, (head_dim, ratio, new, mode), variant, raw fp32 peers.
DECODE = (
    ("ratio 128, 1 token, all end a window", (512, 128, 1, "hit"), "fold:fp8_ds_mla", False),
    ("ratio 128, 4 tokens, all end a window", (512, 128, 4, "hit"), "fold:fp8_ds_mla", False),
    ("ratio 128, 1 token, at all phases", (512, 128, 1, "spread"), "fold:fp8_ds_mla", False),
    ("ratio 128, 4 tokens, at all phases", (512, 128, 4, "spread"), "fold:fp8_ds_mla", False),
    ("ratio 4, 1 token, main and indexer", (512, 4, 1, "hit"), "many:fp8_ds_mla+indexer_fp8_vllm", False),
    ("ratio 4, 4 tokens, main and indexer", (512, 4, 4, "hit"), "many:fp8_ds_mla+indexer_fp8_vllm", False),
    ("ratio 128, 1 token, raw fp32 rows", (512, 128, 1, "hit"), "window:fp8_ds_mla", True),
    ("ratio 128, 4 tokens, raw fp32 rows", (512, 128, 4, "hit"), "window:fp8_ds_mla", True),
)
PREFILL = ((1, 8192), (1, 65536), (8, 8192), (8, 65536))  # sequences, tokens of each: the cases that other projects have
LAYERS = (
    ("ratio 128", 128, "fold:fp8_ds_mla", False),
    ("ratio 4, main alone", 4, "fold:fp8_ds_mla", False),
    ("ratio 4, main and indexer", 4, "many:fp8_ds_mla+indexer_fp8_vllm", False),
    ("ratio 128, raw fp32 rows", 128, "window:fp8_ds_mla", True),
)
SHORT = (  # lines that README has room for
    "ratio 128, 4 tokens, all end a window",
    "ratio 128, 1 token, at all phases",
    "ratio 4, 1 token, main and indexer",
    "ratio 4, 4 tokens, main and indexer",
    "ratio 128, 4 tokens, raw fp32 rows",
    "ratio 128",
    "ratio 4, main alone",
    "ratio 128, raw fp32 rows",
)
Rows = list[dict]


def newest(source: Path) -> Rows:
    """The rows that count, of a folder or of one file; those with dependent launch forced on or off do not."""
    found: dict[tuple, dict] = {}
    for path in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
        for line in path.read_text().splitlines():
            row = json.loads(line) if line.strip() else {}
            if "case" in row and "pdl" not in row:
                found[row["bench"], row.get("engine"), row["case"], row["variant"], row["device"]] = row
    return list(found.values())


def devices(rows: Rows, *benches: str) -> list[str]:
    """Those that any of the benches ran on; the peers' first."""
    return sorted({row["device"] for row in rows if row["bench"] in benches}, key=lambda name: (name != PEERS_DEVICE, name))


def of(rows: Rows, bench: str, device: str) -> dict[tuple[str, str], dict]:
    """By case and variant."""
    return {(row["case"], row["variant"]): row for row in rows if (row["bench"], row["device"]) == (bench, device)}


def slug(device: str) -> str:
    """For file names: h200 of NVIDIA H200, h100 of NVIDIA H100 80GB HBM3."""
    return device.removeprefix("NVIDIA ").split()[0].lower()


def markdown(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table; columns of numbers stand right."""
    numbers = [bool(lines) and all(_is_number(line[i]) for line in lines) for i in range(len(header))]
    made = [header, tuple("---:" if number else "---" for number in numbers), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in made) + "\n"


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("*")[0].isdigit()


def taken(rows: Rows) -> str:
    """Where rows were taken, of which versions and commits."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    versions = sorted({f"torch {row['torch']}, triton {row['triton']}" for row in rows})
    return f"{rows[0]['device']}; {'; '.join(versions)}; commit {commits}."


def sections(rows: Rows, benches: tuple[str, ...], body: Callable[[str], tuple[str, Rows]]) -> str:
    """A part for each device, with where its rows were taken; empty where there are none."""
    parts = []
    for device in devices(rows, *benches):
        text, used = body(device)
        if used:
            parts.append(f"{taken(used)}\n\n{text}")
    return "\n".join(parts)


def decode_summary(rows: Rows) -> str:
    return sections(rows, ("decode",), lambda device: _decode(rows, device))


def speed(rows: Rows) -> str:
    """What README shows of calls: some lines of both summaries, losses among them."""

    def body(device: str) -> tuple[str, Rows]:
        decode, used = _decode(rows, device, SHORT)
        prompts, more = _prefill(rows, device, SHORT)
        return "\n".join(filter(None, (decode, prompts))), used + more

    return sections(rows, ("decode", "prefill"), body)


def _decode(rows: Rows, device: str, only: tuple[str, ...] = ()) -> tuple[str, Rows]:
    wanted = [
        (words, [Case("decode", head_dim, ratio, batch, new, mode) for batch in BATCHES], variant, raw)
        for words, (head_dim, ratio, new, mode), variant, raw in DECODE
        if not only or words in only
    ]
    return _summary(rows, "decode", device, ("step", *(f"{batch} sequences" for batch in BATCHES)), wanted)


def _prefill(rows: Rows, device: str, only: tuple[str, ...] = ()) -> tuple[str, Rows]:
    wanted = [
        (words, [Case("prefill", 512, ratio, batch, new) for batch, new in PREFILL], variant, raw)
        for words, ratio, variant, raw in LAYERS
        if not only or words in only
    ]
    return _summary(rows, "prefill", device, ("layer", *(f"{batch} x {new >> 10}k tokens" for batch, new in PREFILL)), wanted)


def _summary(
    rows: Rows, bench: str, device: str, header: tuple[str, ...], wanted: list[tuple[str, list[Case], str, bool]]
) -> tuple[str, Rows]:
    """Microseconds, bold where slower than what stands behind them: those of the best pipeline of another project.

    A line for each of `wanted` with rows; nothing where none has any.
    """
    ours, lines, used = of(rows, bench, device), [], []
    for words, cases, variant, raw in wanted:
        found = [ours.get((case.name, variant)) for case in cases]
        if any(found):
            lines.append((words, *(_beside(case, row, device, raw) for case, row in zip(cases, found, strict=True))))
            used += [row for row in found if row]
    return markdown(header, lines) if lines else "", used


def _beside(case: Case, row: dict | None, device: str, raw: bool) -> str:
    if row is None:
        return ""
    peer = table.peer_of(case, row["variant"], raw) if device == PEERS_DEVICE else None
    if peer is None:
        return f"{row['us']:.1f}"
    return (f"**{row['us']:.1f}**" if row["us"] > peer[0] else f"{row['us']:.1f}") + f" ({peer[0]:.1f})"


def prefill_summary(rows: Rows) -> str:
    return sections(rows, ("prefill",), lambda device: _prefill(rows, device))


def mixed_summary(rows: Rows) -> str:
    """A prompt among sequences that decode, and each of the two alone."""

    def body(device: str) -> tuple[str, Rows]:
        used = [row for row in of(rows, "prefill", device).values() if "prompt_us" in row]
        names = ("us", "prompt_us", "decode_us")
        lines = [(row["case"], row["variant"], *(f"{row[name]:.1f}" for name in names)) for row in used]
        return markdown(("batch", "variant", "together", "prompt alone", "decode alone"), lines), used

    return sections(rows, ("prefill",), body)


def full(rows: Rows, bench: str, title: str) -> str:
    """Every row of decode or prefill, as the script prints it."""

    def body(device: str) -> tuple[str, Rows]:
        order = list(table.CASES)
        used = [row for row in of(rows, bench, device).values() if "prompt_us" not in row]
        used.sort(key=lambda r: (order.index(r["case"]) if r["case"] in order else len(order), r["case"], r["variant"]))
        width = len(table.HEADER) if device == PEERS_DEVICE else 5
        lines = [(*table.cells(row)[:width], row["commit"]) for row in used]
        return markdown((*table.HEADER[:width], "commit"), lines), used

    return f"# {title}, microseconds per call\n\nMade by benchmarks/publish/documents.py.\n\n" + sections(rows, (bench,), body)


def page_reads(rows: Rows) -> str:
    """Pages of raw rows read by programs that do nothing else, by the width of the pieces; beside them the step over them."""

    def step(case: str) -> tuple[str, str]:
        return f"dec hd512 r128 b{case.split()[0]} n1 hit", "window:fp8_ds_mla"

    return _with_whole(rows, "pages", "read", "decode", step, "pooled and stored")


def prompt_parts(rows: Rows) -> str:
    """Parts of what a prompt of ratio 4 costs, by programs that do nothing else; beside them the whole call."""

    def call(case: str) -> tuple[str, str]:
        tokens = int(case.split()[0])
        batch = max(1, tokens // 65536)
        return f"pre hd512 r4 b{batch} s{tokens // batch}", "fold:fp8_ds_mla"

    return _with_whole(rows, "parts", "prompt", "prefill", call, "the whole call")


def _with_whole(rows: Rows, bench: str, first: str, other: str, whole: Callable[[str], tuple[str, str]], last: str) -> str:
    """A line for each case of a bench, a column for each variant, and in the `last` one the row that `whole` names for it."""

    def body(device: str) -> tuple[str, Rows]:
        ours, wholes = of(rows, bench, device), of(rows, other, device)
        variants, lines, used = list(dict.fromkeys(variant for _, variant in ours)), [], list(ours.values())
        for case in dict.fromkeys(case for case, _ in ours):
            found = [ours.get((case, variant)) for variant in variants] + [wholes.get(whole(case))]
            used += [found[-1]] if found[-1] else []
            lines.append((case, *(f"{row['us']:.1f}" if row else "" for row in found)))
        return markdown((first, *variants, last), lines), used

    return sections(rows, (bench,), body)


def launches(rows: Rows) -> str:
    """A step by two launches and by one."""

    def body(device: str) -> tuple[str, Rows]:
        ours = of(rows, "launches", device)
        names = ("two launches", "one launch")
        cases = [case for case in dict.fromkeys(case for case, _ in ours) if all((case, name) in ours for name in names)]
        used = [ours[case, name] for case in cases for name in names]
        lines = [(case, *(f"{ours[case, name]['us']:.2f}" for name in names)) for case in cases]
        return markdown(("case", *names), lines), used

    return sections(rows, ("launches",), body)


def plan_summary(rows: Rows) -> str:
    """`StepPlan.update` on the device, by the number of sequences."""

    def body(device: str) -> tuple[str, Rows]:
        used = [row for row in rows if (row["bench"], row["device"]) == ("plan", device)]
        lines = [(row["case"].removeprefix("plan "), f"{row['us']:.2f}") for row in used]
        return markdown(("plan", "us"), lines), used

    return sections(rows, ("plan",), body)


def host_summary(rows: Rows) -> str:
    """The host's part of a call: eager, through its operator, compiled."""

    def body(device: str) -> tuple[str, Rows]:
        ours = of(rows, "host", device)
        plain = [key for key in ours if not key[1].endswith((" op", " compiled"))]
        cells = [[ours.get((case, variant + way)) for way in ("", " op", " compiled")] for case, variant in plain]
        lines = [
            (case, variant, *(f"{row['us']:.1f}" if row else "" for row in found))
            for (case, variant), found in zip(plain, cells, strict=True)
        ]
        return markdown(("case", "call", "eager", "operator", "compiled"), lines), list(ours.values())

    return sections(rows, ("host",), body)


def store_summary(rows: Rows) -> str:
    """`kvfold.store` alone: of each format, by the number of rows and their dtype."""

    def body(device: str) -> tuple[str, Rows]:
        ours = of(rows, "store", device)
        counts, dtypes = (16, 64, 256), ("bfloat16", "float32")
        lines = []
        for width, variant in dict.fromkeys((case.split()[1], variant) for case, variant in ours):
            found = [ours.get((f"store {width} {count} rows {dtype}", variant)) for dtype in dtypes for count in counts]
            cells = (f"{row['us']:.2f}" if row else "" for row in found)
            lines.append((variant.removeprefix("store:"), width.removeprefix("hd"), *cells))
        header = ("format", "head_dim", *(f"{count} rows {dtype}" for dtype in ("bf16", "fp32") for count in counts))
        return markdown(header, lines), list(ours.values())

    return sections(rows, ("store",), body)


TRAINED = {"hd512 r128": "ratio 128", "hd512 r4": "ratio 4, main", "hd128 r4": "ratio 4, indexer"}
# Microseconds of forward and backward together that were asked for, by the case: of an H200.
TRAINING_TARGETS = {
    "hd512 r128": {(1, 8192): 26, (3, 8192): 55, (1, 65536): 115, (1, 131072): 215},
    "hd512 r4": {(1, 8192): 42, (3, 8192): 95, (1, 65536): 230},
    "hd128 r4": {(1, 8192): 17, (3, 8192): 30, (1, 65536): 66},
}


def training_summary(rows: Rows) -> str:
    """Steps of training: microseconds on the device, their floors in brackets; on the host; and memory."""

    def body(device: str) -> tuple[str, Rows]:
        ours, lines = of(rows, "training", device), []
        for layer, words in TRAINED.items():
            for (batch, tokens), target in TRAINING_TARGETS[layer].items():
                found = {name: ours.get((f"train {layer} b{batch} s{tokens}", name), {}) for name in TRAINING_COLUMNS}
                if found["both"]:
                    cells = {name: f"{row['us']:.1f}" if "us" in row else "" for name, row in found.items()}
                    for name in ("fwd", "bwd"):
                        cells[name] += f" ({found[name]['floor_us']:.1f})" if "floor_us" in found[name] else ""
                    cells["host"] = f"{found['host']['us']:.0f}" if found["host"] else ""
                    cells["memory"] = f"{found['memory']['mb']:.1f}" if found["memory"] else ""
                    asked = str(target) if device == PEERS_DEVICE else ""
                    lines.append((words, f"{batch} x {tokens}", *(cells[name] for name in TRAINING_COLUMNS), asked))
        header = ("layer", "tokens", "forward", "backward", "both", "forward, fake quantized", "host", "MB", "asked: both")
        return markdown(header, lines), list(ours.values())

    return sections(rows, ("training",), body)


TRAINING_COLUMNS = ("fwd", "bwd", "both", "quant", "host", "memory")


def window_reduction(rows: Rows) -> str:

    def body(device: str) -> tuple[str, Rows]:
        ours, lines = of(rows, "window_reduction", device), []
        for case in dict.fromkeys(case for case, _ in ours):
            naive, shipped = (ours.get((case, name)) for name in ("one_warp", "shipped"))
            if naive and shipped:
                times = (naive["us"], shipped["us"], shipped["floor_us"])
                lines.append((case, *(f"{us:.2f}" for us in times), f"{naive['us'] / shipped['us']:.1f}x"))
        return markdown(("case", "one warp", "shipped", "floor", "speed-up"), lines), list(ours.values())

    return sections(rows, ("window_reduction",), body)


def representations(rows: Rows) -> str:

    def body(device: str) -> tuple[str, Rows]:
        ours, lines = of(rows, "representations", device), []
        for case, variant in ours:
            if variant.startswith("rows:"):
                pair = [ours.get((case, f"{name}:{variant.partition(':')[2]}")) for name in ("rows", "fold-rows")]
                if all(pair):
                    cells = [f"{row[key]:{form}}" for key, form in (("us", ".2f"), ("bytes", ",")) for row in pair if row]
                    lines.append((case, *cells))
        return markdown(("case", "rows us", "fold rows us", "rows bytes", "fold rows bytes"), lines), list(ours.values())

    return sections(rows, ("representations",), body)


def v41_summary(rows: Rows) -> str:
    """Steps of V4.1's source layers, in brackets times the floor; a layer of V4 of the same step behind them."""
    steps = (("1 token, all end a window of 2", 1, "hit"), ("1 token, half of them", 1, "spread"), ("4 tokens", 4, "hit"))
    states = (("fold", "FoldState"), ("ring", "ring of raw fp32 rows"))
    layer = {1: "ratio 4, 1 token, main and indexer", 4: "ratio 4, 4 tokens, main and indexer"}
    v4 = {words: (shape, variant) for words, shape, variant, _ in DECODE}

    def body(device: str) -> tuple[str, Rows]:
        ours, decode, lines, used = of(rows, "v41", device), of(rows, "decode", device), [], []

        def add(what: str, words: str, found: Rows) -> None:
            if any(found):
                cells = (f"{row['us']:.1f} ({row['us'] / row['floor_us']:.2f})" if row else "" for row in found)
                lines.append((what, words, *cells))
                used.extend(row for row in found if row)

        for state, name in states:
            for words, new, mode in steps:
                add(f"4 layers, {name}", words, [ours.get((f"v41 4 layers b{b} n{new} {mode}", state)) for b in BATCHES])
        for new, words in layer.items() if used else ():
            (head_dim, ratio, _, mode), variant = v4[words]
            names = [Case("decode", head_dim, ratio, batch, new, mode).name for batch in BATCHES]
            add("one layer of V4", words, [decode.get((name, variant)) for name in names])
        return markdown(("what", "step", *(f"{batch} sequences" for batch in BATCHES)), lines), used

    return sections(rows, ("v41",), body)


def places_summary(rows: Rows) -> str:
    """`store` of many rows, by a plan and without one."""

    def body(device: str) -> tuple[str, Rows]:
        ours = of(rows, "store_places", device)
        lines = [
            (case.removeprefix("store "), variant.removeprefix("store:"), f"{row['us']:.1f}")
            for (case, variant), row in ours.items()
        ]
        return markdown(("rows", "format", "us"), lines), list(ours.values())

    return sections(rows, ("store_places",), body)


def metadata_summary(rows: Rows) -> str:
    """Updates of plans and calls, with and without what an engine's metadata has."""

    def body(device: str) -> tuple[str, Rows]:
        found = [row for row in rows if row["device"] == device and row["bench"] in ("plan_metadata", "reserved")]
        lines = [(row["case"], row["variant"], f"{row['us']:.2f}", f"{row['more_us']:+.2f}") for row in found]
        return markdown(("step", "way", "us", "more"), lines), found

    return sections(rows, ("plan_metadata", "reserved"), body)
