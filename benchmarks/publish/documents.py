"""Writes what the documents show of measurements, record formats and configurations, or checks that it is up to date.

python -m benchmarks.publish.documents             docs/tables, docs/plots, and in pages what stands between their marks
python -m benchmarks.publish.documents --check     writes nothing; names what differs, and fails then

From benchmarks/results/*.jsonl (whatever files there are), `FORMATS` and `backend_triton/table.py`. A page has a part that is
made here between `<!-- made: NAME -->` and `<!-- end -->`. Pictures are compared by their fingerprint (plot.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from kvfold.backend_triton.table import SCALED, TILINGS

from ..lib import measured, measured_step, protocol
from ..lib.measured import Rows
from . import architecture, inside, layouts, operators, plot, scaling
from .plot import Panel

PAGES = (
    "README.md", "docs/configs.md", "docs/engine.md", "docs/parallel.md", "docs/performance.md", "docs/records.md",
    "docs/tensorrt_llm.md", "docs/training.md",
)  # fmt: skip
MARKS = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
MISSING = "Not measured yet.\n"
TABLES = {"decode": "Decode", "prefill": "Prefill"}  # benches with more rows than a page should show


def pictures(rows: Rows) -> dict[str, list[Panel]]:
    """The panels of each file of docs/plots, by its name: one for each bench and device."""
    found = {}
    for bench, panels in (("decode", plot.decode_panels), ("prefill", plot.prefill_panels), ("step", plot.step_panels)):
        for device in measured.devices(rows, bench):
            found[f"{bench}-{measured.slug(device)}.svg"] = panels(rows, device, device == measured.PEERS_DEVICE)
    for device in measured.devices(rows, "window_reduction"):
        found[f"why-{measured.slug(device)}.svg"] = plot.why_panels(rows, device)
    return found


def tables(rows: Rows) -> dict[str, str]:
    """The text of each file of docs/tables, by its name."""
    there = {row["bench"] for row in rows}
    return {f"{bench}.md": measured.full(rows, bench, title) for bench, title in TABLES.items() if bench in there}


def parts(rows: Rows) -> dict[str, str]:
    """What stands between the marks of a name, in any page."""
    short = [row for row in rows if row["device"] == measured.PEERS_DEVICE]  # as README is
    made = {
        "formats": layouts.formats_table(),
        "pages": layouts.pages(),
        "configs": layouts.configs_table(),
        "tilings": layouts.tilings_table(TILINGS),
        "scaled": layouts.tilings_table(SCALED),
        "states": layouts.states_table(),
        "speed": measured.speed(short),
        "decode": measured.decode_summary(rows) + _links(rows, "decode"),
        "prefill": measured.prefill_summary(rows) + _links(rows, "prefill"),
        "mixed": measured.mixed_summary(rows),
        "page_reads": measured.page_reads(rows),
        "prompt_parts": measured.prompt_parts(rows),
        "plan": measured.plan_summary(rows),
        "host": measured.host_summary(rows),
        "store": measured.store_summary(rows),
        "launches": measured.launches(rows),
        "window_reduction": measured.window_reduction(rows),
        "representations": measured.representations(rows),
        "v41": measured.v41_summary(rows),
        "store_places": measured.places_summary(rows),
        "training": measured.training_summary(rows),
        "metadata": measured.metadata_summary(rows),
        "parallel": scaling.scaling(rows),
        "parallel_parts": scaling.parts(rows),
        "trtllm": operators.operators(rows),
    }
    whole = {"step": measured_step.short(rows, "docs/plots"), "whole_step": measured_step.whole(rows)}
    # These bring their own headings and words, and are left out where there are no rows.
    return {name: text or MISSING for name, text in made.items()} | whole | {"adapters": inside.inside(rows)}


def _links(rows: Rows, bench: str) -> str:
    found = measured.devices(rows, bench)
    images = [f"![{TABLES[bench]} on {device}](plots/{bench}-{measured.slug(device)}.svg)" for device in found]
    return "\n".join(["", f"Every row: [tables/{bench}.md](tables/{bench}.md).", "", *images, ""]) if found else ""


def fill(text: str, made: dict[str, str], page: str) -> str:
    """A page with its marked parts made anew.

    Raises:
        ValueError: a mark has a name that nothing is made for.
    """

    def part(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ValueError(f"{page} must have marks of {sorted(made)}, got {match[2]!r}")
        return f"{match[1]}{made[match[2]]}{match[3]}"

    return MARKS.sub(part, text)


def stale(root: Path, results: Path, write: bool) -> list[str]:
    """The files under `root` that differ from what is made now; writes them if `write`."""
    rows, found = measured.newest(results), []
    made = parts(rows)
    texts = {f"docs/tables/{name}": text for name, text in tables(rows).items()}
    texts |= {page: fill((root / page).read_text(), made, page) for page in PAGES if (root / page).is_file()}
    for name, text in texts.items():
        path = root / name
        if not path.is_file() or path.read_text() != text:
            found.append(name)
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    drawn = {f"docs/plots/{name}": panels for name, panels in pictures(rows).items()}
    for name, panels in drawn.items():
        path = root / name
        if not path.is_file() or plot.fingerprint(panels) not in path.read_text():
            found.append(name)
            if write:
                plot.draw(panels, path)
    for path in sorted((*(root / "docs/tables").glob("*.md"), *(root / "docs/plots").glob("*.svg"))):
        name = path.relative_to(root).as_posix()
        if name not in texts and name not in drawn and path.name != architecture.FILE.name:
            found.append(name)
            if write:
                path.unlink()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=protocol.HERE.parent, help="the checkout whose documents are written")
    parser.add_argument("--results", type=Path, default=protocol.HERE / "results")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    found = stale(args.root, args.results, write=not args.check)
    for name in found:
        print(f"{'differs' if args.check else 'written'}: {name}")
    return 1 if args.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
