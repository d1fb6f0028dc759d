"""What benchmarks/publish/documents.py makes: which rows count, no two devices in a table, and files that are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import kvfold
from benchmarks.lib import measured, measured_step, models, protocol
from benchmarks.lib.protocol import Case
from benchmarks.publish import documents, layouts, plot
from kvfold.storage.formats import FORMATS

ROOT = Path(__file__).parents[2]
HIT, CSA_HIT = (Case("decode", 512, ratio, 16, 4, "hit") for ratio in (128, 4))
PROMPT = Case("prefill", 512, 128, 1, 8192)
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


def row(bench: str, case: str, variant: str, us: float, device: str = H200, **more: object) -> dict:
    where = {"device": device, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}
    return {"bench": bench, "case": case, "variant": variant, "us": us, **more, **where}


def step_rows(fused: bool = True) -> list[dict]:
    """Every case of model_step: figures by variant, a little more for each further sequence."""
    us = {"updates": 8.0, "compressors": 150.0, "projections": 800.0, "apart": 1000.0} | ({"fused": 700.0} if fused else {})
    steps = [
        row("step", case.name, variant, time + case.batch / 2, floor_us=346.0)
        for case in models.step_cases()
        for variant, time in us.items()
    ]
    prompts = {"compressors": 50.0, "projections": 1500.0, "apart": 1600.0} | ({"fused": 1650.0} if fused else {})
    return steps + [row("step", case.name, name, time) for case in models.prompt_cases() for name, time in prompts.items()]


def sample(folder: Path) -> Path:
    """Results of every bench, some of them on two devices."""
    folder.mkdir()
    many = "many:fp8_ds_mla+indexer_fp8_vllm"
    files = {
        "decode": [
            row("decode", HIT.name, "fold:fp8_ds_mla", 99.0, floor_us=1.5),
            row("decode", HIT.name, "fold:fp8_ds_mla", 2.5, floor_us=1.25),
            row("decode", HIT.name, "fold:fp8_ds_mla", 77.0, floor_us=1.5, pdl="off"),
            row("decode", HIT.name, "window:fp8_ds_mla", 5.5, floor_us=5.0),
            row("decode", CSA_HIT.name, many, 3.25, floor_us=2.0),
            row("decode", HIT.name, "fold:fp8_ds_mla", 4.125, H100, floor_us=2.0),
        ],
        "prefill": [
            row("prefill", PROMPT.name, "fold:fp8_ds_mla", 15.625, floor_us=10.0, ns_per_token=1.9),
            row("prefill", "pre hd512 r128 b1 s1024", "fold:fp8_ds_mla", 9.5, floor_us=3.0, ns_per_token=9.3),
            row("prefill", "mix hd512 r128 s8192 + b64 n4", "fold:fp8_ds_mla", 17.5, prompt_us=15.5, decode_us=2.75),
        ],
        "overhead": [
            row("plan", "plan r4 b16 n4", "update", 2.875),
            row("host", HIT.name, "fold:fp8_ds_mla", 20.5),
            row("host", HIT.name, "fold:fp8_ds_mla op", 60.25),
            row("host", HIT.name, "fold:fp8_ds_mla compiled", 70.75),
        ],
        "store": [row("store", "store hd512 16 rows bfloat16", "store:bf16", 1.75)],
        "launches": [
            row("launches", HIT.name, "two launches", 3.875),
            row("launches", HIT.name, "one launch", 2.125),
            row("launches", CSA_HIT.name, "two launches", 9.875),
        ],
        "window_reduction": [
            row("window_reduction", HIT.name, "one_warp", 30.0, floor_us=3.0),
            row("window_reduction", HIT.name, "shipped", 6.0, floor_us=3.0),
        ],
        "pages": [
            row("pages", "16 windows of 128 rows, fp32", f"pieces of {piece} channels", us)
            for piece, us in ((32, 3.9), (64, 4.0))
        ],
        "parts": [
            row("parts", "65536 tokens, ratio 4, head_dim 512", variant, us)
            for variant, us in (("read", 62.9), ("read, write", 68.1))
        ],
        "representations": [
            row("representations", CSA_HIT.name, "rows:fp8_ds_mla", 3.5, bytes=23456),
            row("representations", CSA_HIT.name, "fold-rows:fp8_ds_mla", 4.5, bytes=34567),
        ],
        "v41": [row("v41", "v41 4 layers b64 n1 hit", "fold", 15.0, floor_us=12.0)],
        "store_places": [row("store_places", "store hd512 131072 rows of a plan", "store:fp8_ds_mla", 165.0)],
        "training": [
            row("training", "train hd512 r4 b1 s8192", "fwd", 12.5, floor_us=10.0),
            row("training", "train hd512 r4 b1 s8192", "both", 41.5),
        ],
        "metadata": [
            row("plan_metadata", "plan r4 b256 n1", "token slots", 3.5, more_us=0.5),
            row("reserved", CSA_HIT.name, "fold:rows, reserved places", 4.5, more_us=-0.125),
        ],
        "trtllm": [
            row("trtllm", "dec hd512 r4 b64 n4 hit", f"{name}:bf16_trtllm", us, ratio=ratio)
            for name, us, ratio in (("update + compress", 8.5, 1.0), ("pool + finish", 12.75, 1.5))
        ],
        "step": step_rows(),
        "adapters": [
            *(
                row("adapters", "HCA b16 n4 hit", way, us, engine=engine, launches=launches, host_us=37.6)
                for engine, way, us, launches in (
                    ("vllm", "own", 11.5, 2.0),
                    ("vllm", "window", 5.25, 1.0),
                    ("vllm", "fold", 12.5, 1.0),
                    ("sglang", "pools", 6.25, 1.0),
                    ("trtllm", "operators", 7.75, 2.0),
                )
            ),
        ],
        "parallel": [
            row("parallel", f"r128{inside} s1048576", f"2 {how}", 0.0, one_us=512.0, cut_us=264.0, share=0.5156, **more)
            for inside, how, more in (
                ("", "contiguous", {"exchange_us": 60.0, "bytes": 0, "handover_us": 34.5, "gather_us": 942.4}),
                (" inside", "zigzag graph", {"exchange_us": 14.34, "bytes": 6160, "handover_us": 31.8, "gather_us": 166.3}),
            )
        ]
        + [row("parallel", "train r4 s262144", "2 contiguous graph", 0.0, one_us=1000.0, cut_us=600.0, share=0.6, bytes=16384)]
        + [row("parallel_alone", "train r4 s262144", "4 zigzag", 0.0, one_us=1000.0, part_us=260.0, messages=2, gathered=1500)],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_what_is_committed_is_up_to_date() -> None:
    assert documents.stale(ROOT, ROOT / "benchmarks" / "results", write=False) == []


def test_every_mark_is_filled() -> None:
    marks = [name for page in documents.PAGES for name in documents.MARKS.findall((ROOT / page).read_text())]
    assert {name for _, name, _ in marks} == set(documents.parts([]))
    for page in documents.PAGES:
        text = (ROOT / page).read_text()
        assert text.count("<!-- made: ") == text.count("<!-- end -->") == len(documents.MARKS.findall(text))
    with pytest.raises(ValueError, match="must have marks of"):
        documents.fill("<!-- made: nothing -->\n<!-- end -->\n", documents.parts([]), "page")


def test_the_rows_that_count(tmp_path: Path) -> None:
    rows = measured.newest(sample(tmp_path / "results"))
    text = documents.tables(rows)["decode.md"]
    assert "| 2.50 | 1.25 | 2.00 | 6.91 | 2.76x | sglang compress+normrope@s16 |  |  |  | abc1234 |" in text
    assert (
        "| 5.50 | 5.00 | 1.10 | 6.91 | 1.26x | sglang compress+normrope@s16 | 8.01 | 1.46x | sglang compress+normrope |" in text
    )
    both = protocol.best_peer(CSA_HIT), protocol.best_peer(Case("decode", 128, 4, 16, 4, "hit"))
    assert both[0] and both[1] and f"| {both[0][0] + both[1][0]:.2f} |" in text
    everything = json.dumps(documents.parts(rows)) + json.dumps(documents.tables(rows)) + str(documents.pictures(rows))
    assert not any(number in everything for number in ("99.0", "77.0"))


def test_devices_never_share_a_table(tmp_path: Path) -> None:
    rows = measured.newest(sample(tmp_path / "results"))
    for text in (documents.tables(rows)["decode.md"], measured.decode_summary(rows)):
        ours, other = text.split("NVIDIA H100")
        assert "2.5" in ours and "4.1" not in ours
        assert "4.1" in other and "2.5" not in other and "6.9" not in other and "sglang" not in other
    assert "H100" in documents.parts(rows)["decode"] and "H100" not in documents.parts(rows)["speed"]
    drawn = documents.pictures(rows)
    assert set(drawn) == {"decode-h200.svg", "decode-h100.svg", "prefill-h200.svg", "why-h200.svg", "step-h200.svg"}
    labels = {name: {s.label for panel in panels for s in panel.series} for name, panels in drawn.items()}
    assert any("other projects" in label for label in labels["decode-h200.svg"])
    assert not any("other projects" in label for label in labels["decode-h100.svg"])


def test_every_bench_has_its_part(tmp_path: Path) -> None:
    made = documents.parts(measured.newest(sample(tmp_path / "results")))
    assert not [name for name, text in made.items() if text == documents.MISSING]
    for name, cells in {
        "speed": "| ratio 128, 4 tokens, raw fp32 rows | 5.5 (8.0) |  |  |\n\n| layer |",
        "prefill": "| ratio 128 | **15.6** (9.7) |  |  |  |",
        "mixed": "| 17.5 | 15.5 | 2.8 |",
        "plan": "| r4 b16 n4 | 2.88 |",
        "host": "| fold:fp8_ds_mla | 20.5 | 60.2 | 70.8 |",
        "training": "| ratio 4, main | 1 x 8192 | 12.5 (10.0) |  | 41.5 |  |  |  | 42 |",
        "store": "| bf16 | 512 | 1.75 |  |  |  |  |  |",
        "launches": f"| {HIT.name} | 3.88 | 2.12 |",
        "page_reads": "| 16 windows of 128 rows, fp32 | 3.9 | 4.0 |",
        "prompt_parts": "| 65536 tokens, ratio 4, head_dim 512 | 62.9 | 68.1 |  |",
        "window_reduction": "| 30.00 | 6.00 | 3.00 | 5.0x |",
        "representations": "| 3.50 | 4.50 | 23,456 | 34,567 |",
        "v41": "| 4 layers, FoldState | 1 token, all end a window of 2 |  | 15.0 (1.25) |  |",
        "store_places": "| hd512 131072 rows of a plan | fp8_ds_mla | 165.0 |",
        "metadata": "| plan r4 b256 n1 | token slots | 3.50 | +0.50 |",
        "step": "| `project_compress` | 700 | 708 | 732 | 828 |",
        "whole_step": "| `torch.mm`, then kvfold | 1,000 | 1,008 | 1,032 | 1,128 |",
        "trtllm": "| ratio 4, main, 64 requests | 8.5 | - | 12.8 (1.50) | - | - | - |",
        "adapters": "| HCA b16 n4 hit | 11.5 (2; 38) | 5.2 (1; 38) | **12.5** (1; 38) |\n\n| SGLang | kvfold, in its pools |",
        "parallel": "| zigzag | 512 | 264 | 0.52 | 14.3 | 6,160 | 31.8 | 166.3 | 136 (0.27) | 72 (0.14) |\n"
        "| training, ratio 4, main | 262,144 | contiguous | 1000 | 600 | 0.60 | - | 16,384 | - | - | 350 (0.35) | 225 (0.23) |"
        "\n"
        "| ratio 128 | 1,048,576 | contiguous, no graph | 512 | 264 | 0.52 | 60.0 | 0 | 34.5 | 942.4 | - | - |\n",
        "parallel_parts": "| training, ratio 4, main | 262,144 | 4 | zigzag | 1000 | 260 | 0.26 | 2 | 289 | 0.29 | 2 |",
    }.items():
        assert cells in made[name], made[name]
    assert documents.parts([])["speed"] == documents.MISSING


def test_steps_and_engines_are_left_out_until_they_are_measured() -> None:
    made = documents.parts([])
    assert made["step"] == made["whole_step"] == made["adapters"] == ""
    assert "step-h200.svg" not in documents.pictures([])
    other = [dict(one, device=H100) for one in step_rows()]
    assert documents.parts(other)["step"] == ""  # README is of one device
    whole = documents.parts(other)["whole_step"]
    assert "NVIDIA H100" in whole and "then vLLM" not in whole and "14124" not in whole


def test_a_step_stands_beside_what_engines_do() -> None:
    rows = step_rows()
    made = documents.parts(rows)
    sums = [models.engine_us(case, "sglang").us + 800 + case.batch / 2 for case in models.step_cases()[-4:]]
    marks = ("+", "", "+", "")
    wanted = " | ".join(f"{us:,.0f}{mark}" for us, mark in zip(sums, marks, strict=True))
    assert f"| `torch.mm`, then SGLang | {wanted} |" in made["whole_step"]
    assert f"| `torch.mm`, then the fastest engine's kernels | {wanted} |" in made["step"]  # here SGLang's
    assert "| weights, states and caches moved once | 346 | 346 | 346 | 346 |" in made["step"]
    assert "| V4-Pro, ratio 4 with indexer | 1,500 | 50 | 1,600 | 1,650 | 1.03 |" in made["whole_step"]
    assert f"would be {models.share(158.0):.2f} %" in " ".join(made["whole_step"].split())
    slow = [dict(one, us=1100.0) if one["variant"] == "fused" else one for one in rows]
    assert "| `project_compress` | **1,100** | **1,100** | **1,100** | 1,100 |" in documents.parts(slow)["step"]
    apart = documents.parts(step_rows(fused=False))
    assert not any("in one call" in text or "**Bold**" in text for text in (apart["step"], apart["whole_step"]))
    assert "| `torch.mm`, then `compress` | 1,000 |" in apart["step"]
    in_fp8 = [*rows, *(dict(one, variant="fused-fp8", us=500.0, floor_us=200.0) for one in rows if one["variant"] == "fused")]
    whole = documents.parts(in_fp8)["whole_step"]
    assert "| `project_compress`, FP8 weights | 500 | 500 | 500 | 500 |" in whole and "kvfold.ScaledWeight" in whole
    assert "| weights, states and caches moved once | 346 |" in whole and "FP8" not in made["whole_step"]
    panels = plot.step_panels(rows, H200, True)
    assert [panel.title.partition(":")[0] for panel in panels] == ["V4-Pro", "V4-Flash"]
    assert {len(one.points) for panel in panels for one in panel.series} == {4, 2}  # of engines, what was recorded whole


def test_pages_hold_what_will_be_measured() -> None:
    """README stays short and no line is long once there are rows, and their words lead somewhere."""
    rows = measured.newest(ROOT / "benchmarks" / "results")
    made = documents.parts([*(one for one in rows if one["bench"] not in ("step", "adapters")), *step_rows()])
    page = documents.fill((ROOT / "README.md").read_text(), made, "README.md")
    assert len(page.splitlines()) < 120 and "](docs/plots/step-h200.svg)" in page
    for name in ("step", "whole_step", "adapters"):
        lines = made[name].splitlines()
        assert not [line for line in lines if len(line) > 128 and not line.startswith("|")], name
    performance = documents.fill((ROOT / "docs/performance.md").read_text(), made, "performance.md")
    headings = re.findall(r"^## (.+)", performance, re.MULTILINE)
    assert headings[0] == "A whole step" and "Other projects" in headings
    assert measured_step.INTRODUCTION.count("](#other-projects)") == 1


def test_written_once_and_then_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # of the demo's extra
    results, root = sample(tmp_path / "results"), tmp_path / "checkout"
    (root / "docs" / "plots").mkdir(parents=True)
    (root / "docs" / "plots" / "old.svg").write_text("of a device that has no rows")
    (root / "README.md").write_text("before\n<!-- made: speed -->\nold\n<!-- end -->\nbehind\n")
    arguments = ["--root", str(root), "--results", str(results)]
    assert documents.main([*arguments, "--check"]) == 1 and "old" in (root / "README.md").read_text()
    assert documents.main(arguments) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "(6.9)" in text and "old" not in text
    assert not (root / "docs" / "plots" / "old.svg").exists()
    assert b"</svg>" in (root / "docs" / "plots" / "prefill-h200.svg").read_bytes()
    assert documents.main([*arguments, "--check"]) == 0
    path = results / "decode.jsonl"
    path.write_text(path.read_text() + json.dumps(row("decode", HIT.name, "fold:fp8_ds_mla", 2.25)) + "\n")
    changed = documents.stale(root, results, write=False)
    assert changed == ["docs/tables/decode.md", "README.md", "docs/plots/decode-h200.svg", "docs/plots/why-h200.svg"]


def test_fingerprints_follow_the_points() -> None:
    one, other = (plot.decode_panels([row("decode", HIT.name, "fold:fp8_ds_mla", us)], H200, True) for us in (2.5, 2.51))
    assert plot.fingerprint(one) != plot.fingerprint(other)


def test_each_format_has_its_engine() -> None:
    """One row of the table of engines, versions and switches."""
    text = (ROOT / "docs/records.md").read_text()
    table = text.split("## Who has which")[1].split("\n## ")[0]
    named = [name for row in table.splitlines() if row.startswith("| `") for name in re.findall("`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_page_is_drawn_where_its_bytes_are(name: str) -> None:
    """Written rows, first and last of a page, change no byte outside the fields that the drawing has for them."""
    fmt = FORMATS[name]
    spec, drawn = layouts.spec_of(fmt), layouts.page(fmt)
    fields: dict[str, list[tuple[int, int]]] = {"record": [], "tail": []}
    stride, base, where = {}, {}, ""
    for line in drawn.splitlines():
        words = line.split()
        if line.startswith(("record r", "tail r")):
            where = words[0]
            stride[where] = int(words[-1].removesuffix("*r"))
            base[where] = int(words[-3]) if words[-2] == "+" else 0
        elif line.startswith("  ") and words[0][0].isdigit() and where:
            low, _, high = words[0].partition("..")
            fields[where].append((int(low), int(high or low)))
    cache = kvfold.EntryCache.allocate(fmt, 1, layouts.PAGE, spec)
    assert f"{cache.page_bytes} bytes" in drawn
    for record in (0, layouts.PAGE - 1):
        allowed = {"page": set(), "scales": set()}
        for where, spans in fields.items():
            buffer = "scales" if where == "tail" and fmt.separate else "page"
            for low, high in spans:
                at = base[where] + stride[where] * record
                allowed[buffer] |= set(range(at + low, at + high + 1))
        changed = {"page": set(), "scales": set()}
        for fill in (0, 255):  # a byte that is written shows over one of the two
            buffers = {"page": cache.pages} | ({"scales": cache.scale_pages} if fmt.separate else {})
            for buffer in buffers.values():
                buffer.fill_(fill)
            kvfold.storage.pack.pack_records(cache, torch.tensor([record]), torch.linspace(-2, 2, spec.head_dim)[None])
            for what, buffer in buffers.items():
                changed[what] |= set((buffer[0] != fill).nonzero().flatten().tolist())
        pad = set()
        if fmt.pad and not fmt.pad_written:
            tail = kvfold.storage.pack.tail_address(cache, torch.tensor([record]))[2].item()
            pad = set(range(tail + fmt.tail_bytes(spec) - fmt.pad, tail + fmt.tail_bytes(spec)))
        assert changed["page"] == allowed["page"] - pad and changed["scales"] == allowed["scales"]
