"""Record formats, the kernels' table and the size of states as the documents show them, from the library alone."""

from __future__ import annotations

import torch

from kvfold import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec, FoldState, Snapshots
from kvfold.backend_triton.table import COLUMNS, TILING_COLUMNS, Tiling, in_words, tilings_in_words
from kvfold.storage.fold_state import state_kind
from kvfold.storage.formats import FORMATS, RecordFormat

from ..lib.measured import markdown

PAGE = 64  # rows of the page that is drawn
BITS = {"bf16": 16, "fp32": 32, "e4m3": 8, "e2m1": 4}


def spec_of(fmt: RecordFormat) -> CompressorSpec:
    """The compressor of V4 that a format is shown for: the main one, if it is defined for that."""
    return V4_HCA if not fmt.head_dims or V4_HCA.head_dim in fmt.head_dims else V4_INDEXER


def formats_table() -> str:
    """Every format: its bytes, encodings, and what is done before and while it is rounded."""
    lines = []
    for fmt in FORMATS.values():
        spec = spec_of(fmt)
        lines.append(
            (
                f"`{fmt.name}`", fmt.source, " or ".join(map(str, fmt.head_dims)) or "any", str(fmt.record_bytes(spec)),
                fmt.element + (", rotated bf16" if fmt.rotated_bf16 else ""), _scales(fmt), _floor(fmt), _first(fmt),
                _pad(fmt), _ties(fmt),
            )
        )  # fmt: skip
    header = (
        "format", "whose bytes", "head_dim", "bytes", "channels", "scales", "floor", "rounded to bf16 first", "pad byte",
        "ties",
    )  # fmt: skip
    return markdown(header, lines)


def _scales(fmt: RecordFormat) -> str:
    found = {"none": "-", "static": "one per cache"}.get(fmt.scale, f"{fmt.scale} per {fmt.group}")
    return found + (", own buffer" if fmt.separate else ", in the record" if fmt.interleaved else "")


def _floor(fmt: RecordFormat) -> str:
    return f"{fmt.floor:.3g} on {fmt.floor_on}" if fmt.floor else "-"


def _first(fmt: RecordFormat) -> str:
    known = (("pooled row", fmt.round_rows), ("normed row", fmt.round_normed), ("values", fmt.round_values))
    found = [words for words, on in known if on] + [f"then {fmt.fp4_first} and back"] * bool(fmt.fp4_first)
    return ", ".join(found) or "-"


def _pad(fmt: RecordFormat) -> str:
    return "-" if not fmt.pad else "zeroed" if fmt.pad_written else "left alone"


def _ties(fmt: RecordFormat) -> str:
    even = "to even, no -0" if fmt.unsigned_zero else "to even"
    return "to zero, no -0" if fmt.ties_to_zero else even if fmt.element in ("e4m3", "e2m1", "bf16") else "-"


def pages() -> str:
    """A page of every layout, to the byte; formats with the same one together."""
    drawn: dict[str, list[str]] = {}
    for fmt in FORMATS.values():
        drawn.setdefault(page(fmt), []).append(fmt.name)
    return "\n".join(f"**{', '.join(f'`{name}`' for name in names)}**\n\n```\n{text}```\n" for text, names in drawn.items())


def page(fmt: RecordFormat) -> str:
    """A page of `PAGE` rows: a box for what follows what, and where each byte of record r and of its tail is."""
    spec, n = spec_of(fmt), PAGE
    row, tail, size = fmt.row_bytes(spec), fmt.tail_bytes(spec), fmt.page_bytes(spec, n)
    quantized, at = fmt.quantized(spec), "scales" if fmt.separate else "page"
    record = [(quantized * BITS[fmt.element] // 8, f"{quantized} {fmt.element}", f"channels 0..{quantized - 1}")]
    scales = fmt.groups(spec)
    footer = [(scales * fmt.scale_bytes, f"{scales} {_scale(fmt)}", f"of {fmt.group} channels each")] if tail else []
    footer += [(fmt.pad, f"{fmt.pad} pad", "zeroed" if fmt.pad_written else "left alone")] if fmt.pad else []
    if fmt.interleaved:
        record, footer, tail = record + footer, [], 0
    if fmt.rotated_bf16:
        words = f"{spec.rope_dim} bf16", f"channels {quantized}..{spec.head_dim - 1}, rotated"
        record.append((fmt.rotated_bytes(spec), *words))
    main = [(n * row, f"{n} records of {row}")] + ([(n * tail, f"{n} tails of {tail}")] if tail and not fmt.separate else [])
    main += [(size - sum(s for s, _ in main), "padding")] if size > sum(s for s, _ in main) else []
    text = f"head_dim {spec.head_dim}, page of {n} rows: {size} bytes\n" + _box(main)
    if fmt.separate:
        text += f"scales of a page: {n * tail} bytes\n" + _box([(n * tail, f"{n} tails of {tail}")])
    text += _bytes(f"record r, at {row}*r", record)
    base = 0 if fmt.separate else n * row
    return text + (_bytes(f"tail r, in the {at} at {f'{base} + ' if base else ''}{tail}*r", footer) if tail else "")


def _scale(fmt: RecordFormat) -> str:
    return {"pow2": "fp32 (powers of two)", "ue8m0x4": "four ue8m0, equal,"}.get(fmt.scale, fmt.scale)


def _box(parts: list[tuple[int, str]]) -> str:
    """Parts in their order, with the offset of each below its left end."""
    edge, text, below, offset = "+", "|", "", 0
    for size, words in parts:
        width = max(len(words) + 2, 10)
        edge += "-" * width + "+"
        text += f" {words:<{width - 1}}|"
        below += f"{offset:<{width + 1}}"
        offset += size
    return f"{edge}\n{text}\n{edge}\n{below}{offset}\n"


def _bytes(title: str, fields: list[tuple[int, str, str]]) -> str:
    text, offset = f"{title}\n", 0
    for size, words, meaning in fields:
        span = f"{offset}..{offset + size - 1}" if size > 1 else str(offset)
        text += f"  {span:<10} {words:<24} {meaning}\n"
        offset += size
    return text


def configs_table() -> str:
    """The rows of `backend_triton/table.py`, in order."""
    return markdown(COLUMNS, in_words())


def tilings_table(rows: tuple[Tiling, ...]) -> str:
    """Rows for projections, in order."""
    return markdown(TILING_COLUMNS, tilings_in_words(rows))


def states_table() -> str:
    """Bytes that a sequence costs between steps, in each kind of state, and a page of a prefix cache."""
    presets = (("ratio 128", V4_HCA), ("ratio 4, main", V4_CSA), ("ratio 4, indexer", V4_INDEXER))
    lines = []
    for words, spec in presets:
        for dtype in (torch.float32, torch.bfloat16):
            name, item = ("fp32", 4) if dtype == torch.float32 else ("bf16", 2)
            how = {"device": "meta", "dtype": dtype}
            fold, kept = ["-"] * 4, ["-"] * 2
            if dtype == torch.float32 or state_kind(spec) == "rows":  # fold rows are fp32
                fold = [f"{FoldState.allocate(spec, 1, most, **how).bytes_per_slot:,}" for most in (1, 2, 4, 8)]
                kept = [f"{Snapshots.allocate(spec, 0, size, **how).bytes_per_page:,}" for size in (64, 256)]
            lines.append((words, name, *fold, f"{2 * spec.channels * item:,}", *kept))
    header = (
        "compressor", "rows in", *(f"FoldState, {most} new" for most in (1, 2, 4, 8)), "WindowState, per position",
        "snapshot, pages of 64", "pages of 256",
    )  # fmt: skip
    return markdown(header, lines)
