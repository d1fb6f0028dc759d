"""What README.md and docs/ say of speed is in docs/claims.md, and its numbers are those of the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.lib import measured, protocol
from benchmarks.lib.protocol import Case
from kvfold import V4_CSA, V4_HCA, FoldState

ROOT = Path(__file__).parents[2]
LIST = ROOT / "docs" / "claims.md"
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path != LIST)]
MADE, CODE = re.compile(r"<!-- made: .*?<!-- end -->", re.DOTALL), re.compile(r"```.*?```", re.DOTALL)
CLAIM = re.compile(r"\d\s?(us|ms|ns)\b|\b(faster|slower|fastest)\b")
# What a table's cells, brackets or letters mean, how a figure is taken, and headings: nothing is claimed.
DEFINES = re.compile(
    r"^(the fastest (of|whole)|kvfold is slower|their fastest|for \"main and|\*?floor|\*?peers|#|the host's time|\[)",
    re.IGNORECASE,
)
REFERENCE = re.compile(r"(\w+|raw peer): ((?:dec|pre) [^,;]+)(?:, ([\w:+-]+))?")


def plain(text: str) -> str:
    return " ".join(re.sub(r"\*\*", "", text).split())


def claims() -> list[list[str]]:
    lines = [line for line in LIST.read_text().splitlines() if line.startswith("| ") and not line.startswith("| claim")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def sentences(page: Path) -> list[str]:
    """Of the prose of a page; its tables, code and generated parts have others to look after them."""
    text = CODE.sub("", MADE.sub("", page.read_text()))
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    blocks = re.split(r"\n\s*\n|\n(?=- |#|\d+\. )", "\n".join(lines))
    return [part for block in blocks for part in re.split(r"(?<=[.:;])\s+", plain(block)) if part]


def value(bench: str, case: str, variant: str | None) -> float:
    rows = measured.of(ROWS, "decode" if bench == "floor" else bench, measured.PEERS_DEVICE)
    if bench in ("peer", "raw peer"):
        known = next(c for c in ALL if c.name == case)
        best = protocol.best_peer(known, protocol.RAW_FP32 if bench == "raw peer" else None)
        assert best, case
        return best[0]
    return rows[case, variant]["floor_us" if bench == "floor" else "us"]


ROWS = measured.newest(ROOT / "benchmarks" / "results")
ALL = [*protocol.cases(), *(Case("prefill", 512, ratio, b, n) for ratio in (4, 128) for b in (1, 8) for n in (8192, 65536))]


def test_every_claim_is_listed() -> None:
    listed = " ".join(plain(claim) for claim, _, _ in claims())
    missing = [
        f"{page.name}: {sentence}"
        for page in PAGES
        for sentence in sentences(page)
        if CLAIM.search(sentence)
        and not DEFINES.match(sentence)
        and re.sub(r" \(?\[.*", "", sentence).rstrip(".") not in listed
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("claim, page, ground", claims(), ids=lambda text: text[:40])
def test_a_claim_is_made_and_holds(claim: str, page: str, ground: str) -> None:
    where = ROOT / page if page == "README.md" else ROOT / "docs" / page
    assert plain(claim) in plain(where.read_text()), "nobody says so"
    for number in re.findall(r"note (\d{4})", ground):
        assert list((ROOT / "docs" / "notes").glob(f"{number}-*.md")), number
    for path, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", ground):
        assert f"def {name}" in (ROOT / path).read_text()
    for bench, case, variant in REFERENCE.findall(ground):
        us = value(bench, case.strip(), variant or None)
        said = [text.replace(",", "") for text in re.findall(r"\d[\d,]*(?:\.\d+)?", claim)]
        assert any(f"{us:.{len(text.partition('.')[2])}f}" == text for text in said), f"{bench} {case}: {us}, said {said}"


def test_raw_rows_are_faster_than_others_over_raw_rows() -> None:
    ours = {
        case: row["us"]
        for (case, variant), row in measured.of(ROWS, "decode", measured.PEERS_DEVICE).items()
        if "window" in variant
    }
    beside = [(ours[c.name], peer[0]) for c in ALL if c.name in ours and (peer := protocol.best_peer(c, protocol.RAW_FP32))]
    assert len(beside) > 20 and all(us < other for us, other in beside)


def test_bytes_in_the_readme() -> None:
    """Of a state that can go back by 4 tokens, and of the raw rows that a step needs, values and scores in fp32."""
    own = [FoldState.allocate(spec, 1, 4, device="meta").bytes_per_slot for spec in (V4_CSA, V4_HCA)]
    raw = [spec.window_rows * spec.channels * 2 * 4 for spec in (V4_CSA, V4_HCA)]
    said = [own[0], raw[0], own[1], raw[1]]
    text = plain((ROOT / "README.md").read_text())
    assert f"{said[0]:,} bytes, not {said[1]:,}, in fp32. At ratio 128 it is {said[2]:,}, not {said[3]:,}." in text
