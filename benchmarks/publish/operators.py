"""TensorRT-LLM's operators, as docs/tensorrt_llm.md shows them: one call and two, beside `compress` into the same records."""

from __future__ import annotations

from ..lib import measured
from ..lib.measured import Rows

WAYS = {  # of a column: the variant, and whether the plan is there already
    "`update`, `compress`": "update + compress",
    "`compress_records`": "compress_records",
    "decode and postprocess": "pool + finish",
    "`compress`": "compress",
    "`compress_records`, plan there": "compress_records, plan there",
    "decode and postprocess, plan there": "pool + finish, plan there",
}
FORMAT = "bf16_trtllm"
CASES = {"hd512 r128": "ratio 128", "hd512 r4": "ratio 4, main", "hd128 r4": "ratio 4, indexer"}


def operators(rows: Rows) -> str:
    """A line for each layer and batch, all in one format. In brackets: times what the first column of its half takes."""

    def body(device: str) -> tuple[str, Rows]:
        found = {tuple(key): row for key, row in measured.of(rows, "trtllm", device).items()}
        by_case: dict[str, dict[str, dict]] = {}
        for row in found.values():
            variant, _, fmt = row["variant"].rpartition(":")
            if fmt == FORMAT:
                by_case.setdefault(row["case"], {})[variant] = row
        lines, used = [], []
        for case, ways in by_case.items():
            _, head_dim, ratio, batch, *_ = case.split()
            cells = [_cell(ways.get(variant)) for variant in WAYS.values()]
            lines.append((f"{CASES[f'{head_dim} {ratio}']}, {batch.removeprefix('b')} requests", *cells))
            used += ways.values()
        return measured.markdown(("microseconds, 4 new tokens", *WAYS), lines), used

    return measured.sections(rows, ("trtllm",), body)


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['us']:.1f}" + (f" ({row['ratio']:.2f})" if row["ratio"] != 1 else "")
