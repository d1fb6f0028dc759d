"""Compressors inside of engines, as docs/performance.md shows them; left out, the words too, where there are no rows."""

from __future__ import annotations

from ..lib import measured, models
from ..lib.measured import Rows

# Of each engine: the variants of its rows, and what they are in words.
WAYS = {
    "vllm": {"own": "its Triton kernels", "window": "kvfold, in its pages", "fold": "kvfold, fold rows at ratio 128"},
    "sglang": {"pools": "kvfold, in its pools", "fold": "kvfold's state"},
    "trtllm": {"operators": "its operators, by kvfold", "records": "one call for main compressors"},
}
WORDS = """\
The engine's own classes, metadata and pages, in a CUDA graph: its kernels, and kvfold's adapter in their place. Microseconds,
and in brackets launches and the host's microseconds without a graph; of one layer, or of `step`: V4-Pro's 31 layers of ratio
128 and 30 of ratio 4 with indexers. `hit`: every sequence ends a window of 128, `spread`: one of them does. In vLLM and SGLang
kvfold's launches are ordinary ones, and plans are updated before; TensorRT-LLM's have that in them, once for a ratio and width.
A wait for the GPU or an allocation in kvfold's would have been an error. **Bold**: kvfold is slower
(`benchmarks/run/adapters.py`).
"""


def inside(rows: Rows) -> str:
    """A table for each engine."""
    if not measured.devices(rows, "adapters"):
        return ""

    def body(device: str) -> tuple[str, Rows]:
        used = [row for row in rows if (row["bench"], row["device"]) == ("adapters", device) and "us" in row]
        tables = []
        for engine, ways in WAYS.items():
            found = {(row["case"], row["variant"]): row for row in used if row["engine"] == engine}
            lines = []
            for case in sorted({case for case, _ in found}, key=_order):
                own = found.get((case, "own"))
                lines.append((case, *(_cell(found.get((case, name)), own) for name in ways)))
            if lines:
                tables.append(measured.markdown((models.ENGINES[engine], *ways.values()), lines))
        return "\n".join(tables), used

    return f"## Inside of an engine\n\n{WORDS}\n{measured.sections(rows, ('adapters',), body)}\n"


def _order(case: str) -> tuple:
    shape, batch, *rest = case.split()
    return ("HCA", "CSA", "step").index(shape), int(batch.removeprefix("b")), rest


def _cell(row: dict | None, own: dict | None) -> str:
    if row is None:
        return ""
    slower = own is not None and row["us"] > own["us"]
    us = f"**{row['us']:,.1f}**" if slower else f"{row['us']:,.1f}"
    launches = f"{row['launches']:.3g}" if "launches" in row else "?"
    return f"{us} ({launches}; {row['host_us']:,.0f})"
