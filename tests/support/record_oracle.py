"""An independent packer of every record format: numpy and ml_dtypes, written from the layouts and not from the library.

`pack` takes entries as they are after RMSNorm, RoPE and Hadamard, in fp32 and before any rounding, and gives the bytes of one
page. It shares no code and no trick with the library: powers of two come from `frexp` and exact comparison in fp64 instead of
from bits, and elements are rounded by ml_dtypes. `threshold_cases` gives the entries where two packers would come to disagree.
NaN and infinity are treated elsewhere.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

F32 = np.float32
E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# The floors are fp32 constants in the engines, and 1e-4 is a little less as fp32 than as fp64.
FLOOR_1E4, FLOOR_1E8 = float(F32(1e-4)), float(F32(1e-8))
FLOOR_MX = 6.0 * 2.0**-126
# Below this amax 448/amax is no finite fp32 number, and a zero times it would be NaN: the block format says nothing about that.
BLOCK128_MIN = 448.0 / float(np.finfo(F32).max) * (1 + 1e-6)


def _format(head_dims: list[int], bits: int, **kw: Any) -> dict[str, Any]:
    """A row of the table. What it says, with the defaults:

    element     encoding of the quantized channels: bf16, fp32, e4m3, e2m1 (ties to even) or e2m1_toward_zero (and no -0)
    group       channels that share a scale, 0 where there is none
    scale       encoding of the scale: ue8m0 byte, ue8m0x4 (the byte four times), pow2 (a power of two as fp32), fp32, e4m3
    floor       lower bound of amax, or of the scale before it is rounded up where `floor_on` is "scale"
    nearest     whether a power of two is the nearest in the exponent, halves up, instead of the next one
    divide      whether values are divided by an fp32 scale instead of multiplied by its rounded inverse
    bf16_first  whether entries are rounded to bf16 before anything else
    fp4_first   what they are then quantized to and read back from: None, "nvfp4" or "mxfp4"
    no_minus    whether codes of zero lose their sign
    align       what the page is rounded up to
    pad         the bytes behind the scales: None, or how many and whether they are "zero" or "kept" as they are
    buffers     2 where data and scales are not in one page
    interleaved whether scales and pad stand in each row, behind its values
    """
    row: dict[str, Any] = {
        "head_dims": head_dims, "needs_rope": False, "group": 0, "scale": None, "floor": 0.0, "floor_on": "amax",
        "nearest": False, "divide": False, "bf16_first": False, "fp4_first": None, "no_minus": False, "align": 1, "pad": None,
        "buffers": 1, "interleaved": False, **kw,
    }  # fmt: skip
    scale_bytes = {None: 0, "ue8m0": 1, "ue8m0x4": 4, "pow2": 4, "fp32": 4, "e4m3": 1}[row["scale"]]
    row["planes"] = {}
    for hd in head_dims:
        quantized = 448 if row["needs_rope"] else hd
        data = quantized * bits // 8 + (2 * 64 if row["needs_rope"] else 0)
        scales = (quantized // row["group"] if row["group"] else 0) * scale_bytes + (row["pad"][0] if row["pad"] else 0)
        row["planes"][hd] = (data, scales)
    row["record_bytes"] = {hd: sum(planes) for hd, planes in row["planes"].items()}
    return row


_MLA = {"element": "e4m3", "group": 64, "scale": "ue8m0", "needs_rope": True, "bf16_first": True}
_MX4 = {"group": 32, "scale": "ue8m0"}
ZEROED, KEPT = (1, "zero"), (1, "kept")
BOTH, MAIN, INDEXER = [128, 512], [512], [128]
# V4.1: 512 values, then or in the page's end 16 codes; in fp4 256 bytes and 32 scales of e4m3.
_V41 = {"element": "e4m3", "group": 32, "scale": "ue8m0", "floor": FLOOR_1E4}
_ON_SCALE = {**_V41, "floor_on": "scale", "bf16_first": True}
_V41_FP4 = {"element": "e2m1", "group": 16, "scale": "e4m3"}
_KEY8 = {"element": "e4m3", "group": 128, "floor": FLOOR_1E4, "bf16_first": True}
_KEY4 = {"element": "e2m1", **_MX4, "bf16_first": True}
_FAKED = {"bf16_first": True, "fp4_first": "nvfp4"}

# name -> what `_format` says, and `planes` {head_dim: (data bytes, scale bytes)} and `record_bytes` {head_dim: their sum}.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": _format(BOTH, 16, element="bf16"),
    "bf16_trtllm": _format(BOTH, 16, element="bf16"),
    "bf16_v41": _format(BOTH, 16, element="bf16"),
    "fp32": _format(BOTH, 32, element="fp32"),
    "fp8_tensor": _format(BOTH, 8, element="e4m3", bf16_first=True),
    "fp8_tensor_trtllm": _format(BOTH, 8, element="e4m3"),  # load, norm, RoPE and Hadamard in fp32 registers, then the cast
    "fp8_tensor_v41": _format(BOTH, 8, element="e4m3", bf16_first=True),
    "fp8_tensor_v41_sglang": _format(MAIN, 8, element="e4m3", **_FAKED),
    "fp8_ds_mla": _format(MAIN, 8, **_MLA, floor=FLOOR_1E4, floor_on="scale", pad=ZEROED, align=576),
    "fp8_ds_mla_vllm_triton": _format(MAIN, 8, **_MLA, floor=FLOOR_1E4, pad=ZEROED, align=576),
    "fp8_ds_mla_sglang": _format(MAIN, 8, **_MLA, floor=FLOOR_1E4, pad=KEPT, align=576),
    "fp8_ds_mla_trtllm": _format(MAIN, 8, **_MLA, floor=FLOOR_1E8, pad=KEPT),
    "fp8_ds_mla_v41": _format(MAIN, 8, **_MLA, floor=FLOOR_1E4, pad=ZEROED, align=576),
    "fp8_ds_mla_v41_sglang": _format(MAIN, 8, **_MLA | _FAKED, floor=FLOOR_1E4, pad=KEPT, align=576),
    "fp8_block128": _format(BOTH, 8, element="e4m3", group=128, scale="fp32"),
    "mxfp4": _format(BOTH, 4, element="e2m1", **_MX4, floor=FLOOR_MX, buffers=2),
    "nvfp4_trtllm": _format(MAIN, 4, **_V41_FP4, buffers=2),
    "nvfp4_flashinfer": _format(MAIN, 4, **_V41_FP4, needs_rope=True, bf16_first=True, pad=(4, "zero")),
    "mxfp4_sm90_sglang": _format(
        MAIN, 4, element="e2m1", **_MX4, floor=FLOOR_MX, nearest=True, needs_rope=True, bf16_first=True, pad=(2, "kept"),
        interleaved=True,
    ),
    "indexer_fp8_vllm": _format(INDEXER, 8, **_KEY8, scale="pow2"),
    "indexer_fp8_vllm_sm100": _format(INDEXER, 8, **_KEY8, scale="ue8m0x4"),
    "indexer_fp8_v41": _format(INDEXER, 8, **_KEY8, scale="pow2"),
    "indexer_fp8_v41_sm100": _format(INDEXER, 8, **_KEY8, scale="ue8m0x4"),
    "indexer_fp8_sglang": _format(INDEXER, 8, element="e4m3", group=128, scale="fp32", floor=FLOOR_1E4),
    "indexer_mxfp4": _format(INDEXER, 4, **_KEY4, floor=FLOOR_MX),
    "indexer_mxfp4_v41": _format(INDEXER, 4, **_KEY4, floor=FLOOR_MX),
    "indexer_mxfp4_sglang": _format(INDEXER, 4, element="e2m1_toward_zero", **_MX4, floor=FLOOR_1E4),
    "indexer_mxfp4_v41_sglang": _format(
        INDEXER, 4, **_KEY4, floor=FLOOR_1E4, floor_on="scale", fp4_first="mxfp4", no_minus=True
    ),
    "v41_mxfp8": _format(MAIN, 8, **_ON_SCALE, align=512),
    "v41_mxfp8_sglang": _format(MAIN, 8, **_ON_SCALE, align=512),
    "v41_mxfp8_sglang_fp4": _format(MAIN, 8, **_ON_SCALE | _FAKED, align=512),
    "v41_mxfp8_interleaved_vllm": _format(MAIN, 8, **_V41, interleaved=True),
    "v41_mxfp8_interleaved_sglang": _format(MAIN, 8, **_ON_SCALE, interleaved=True),
    "v41_mxfp8_interleaved_sglang_fp4": _format(MAIN, 8, **_ON_SCALE | _FAKED, interleaved=True),
    "v41_nvfp4": _format(MAIN, 4, **_V41_FP4, bf16_first=True),
    "v41_nvfp4_sglang": _format(MAIN, 4, **_V41_FP4, bf16_first=True, align=256),
    "v41_nvfp4_interleaved_vllm": _format(MAIN, 4, **_V41_FP4, interleaved=True),
    "v41_nvfp4_interleaved_sglang": _format(MAIN, 4, **_V41_FP4, bf16_first=True, interleaved=True),
}  # fmt: skip


# ---- numbers -----------------------------------------------------------------------------------------------------------------


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 values rounded to bf16, ties to even, as fp32."""
    return x.astype(ml_dtypes.bfloat16).astype(F32)


def e4m3_bytes(v: np.ndarray) -> np.ndarray:
    """fp32 values saturated at +-448 and rounded to e4m3, ties to even; the sign of a zero is kept."""
    return np.clip(v, -E4M3_MAX, E4M3_MAX).astype(F32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)


def e2m1_codes(v: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """fp32 values saturated at +-6 and rounded to e2m1: ties to even keeping -0, or ties toward zero and no -0."""
    if toward_zero:
        magnitude = np.searchsorted(E2M1_TIES, np.abs(v), side="left").astype(np.uint8)  # how many ties lie strictly below
        return magnitude | np.where((v < 0) & (magnitude != 0), 8, 0).astype(np.uint8)
    return np.clip(v, -E2M1_MAX, E2M1_MAX).astype(F32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """The even channel in the low nibble."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def ceil_log2_ratio(amax: np.ndarray, top: float) -> np.ndarray:
    """The smallest integer k with top * 2^k >= amax, exactly; a huge negative number for amax 0."""
    m, e = np.frexp(np.asarray(amax, np.float64))  # amax = m * 2^e with m in [1/2, 1): fp64 holds fp32 subnormals as normals
    top_m, top_e = np.frexp(np.float64(top))
    return np.where(m == 0, -100_000, e - top_e + (m > top_m)).astype(np.int64)


def through_fp4(x: np.ndarray, kind: str) -> np.ndarray:
    """fp32 channels [n, channels], which are bf16 numbers, quantized to fp4 and read back, in groups of 16 or of 32.

    nvfp4: scales of e4m3 from amax times the fp32 nearest to 1/6, from 2^-9 to 448, and a quotient. mxfp4: the next power of
    two. Zeros are +0; what is small and negative becomes -0.
    """
    grouped = x.reshape(len(x), -1, {"nvfp4": 16, "mxfp4": 32}[kind])
    amax = np.abs(grouped).max(axis=-1, keepdims=True)
    if kind == "nvfp4":
        scale = e4m3_values(e4m3_bytes(np.clip(amax * (F32(1) / F32(6)), F32(2.0**-9), F32(E4M3_MAX))))
        quotient = grouped / scale
    else:
        k = ceil_log2_ratio(np.maximum(amax, F32(FLOOR_MX)), E2M1_MAX)
        scale = np.ldexp(F32(1), k.astype(np.int32)).astype(F32)
        quotient = np.ldexp(grouped.astype(np.float64), -k).astype(F32)
    codes = e2m1_codes(quotient + F32(0))
    with np.errstate(over="ignore"):
        return (codes.view(ml_dtypes.float4_e2m1fn).astype(F32) * scale).reshape(x.shape)


def nearest_log2_sixth(amax: np.ndarray) -> np.ndarray:
    """log2(amax / 6) rounded to the nearest integer, exactly: from k - 1/2 on it is k, and 36 * 2^(2k-1) is no square."""
    m, e = np.frexp(np.asarray(amax, np.float64))  # 2 m in [1, 2); 6 / sqrt(2) = 1.06066 * 2^2
    return (e - 1 - 2 - ((2 * m) ** 2 * 8 < 9)).astype(np.int64)


def _quantize(
    name: str, x: np.ndarray, group: int, static_scale: float, global_scale: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Element codes [n, channels], not yet paired into bytes, and scale bytes [n, groups * bytes] of fp32 channels."""
    f = FORMATS[name]
    n, channels = x.shape
    top = E4M3_MAX if f["element"] == "e4m3" else E2M1_MAX
    if not group:
        with np.errstate(over="ignore"):
            return e4m3_bytes(x * (F32(1) / F32(static_scale))), None
    x = x.reshape(n, channels // group, group)
    amax = np.abs(x).max(axis=-1)
    floored = np.maximum(amax, F32(f["floor"])) if f["floor_on"] == "amax" else amax
    if f["scale"] in ("ue8m0", "ue8m0x4", "pow2"):
        k = nearest_log2_sixth(floored) if f["nearest"] else ceil_log2_ratio(floored, top)
        if f["floor_on"] == "scale":
            k = np.maximum(k, ceil_log2_ratio(np.float64(f["floor"]), 1.0))
        v = np.ldexp(x.astype(np.float64), -k[..., None]).astype(F32)  # inexact only far below what any code but 0 stands for
        if f["scale"] == "pow2":
            scales = np.ldexp(1.0, k).astype("<f4").view(np.uint8)
        else:
            scales = np.repeat((k + 127).astype(np.uint8), 4 if f["scale"] == "ue8m0x4" else 1, axis=-1)
    elif name == "fp8_block128":
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            factor = np.where(amax > 0, F32(E4M3_MAX) / amax, F32(1))
            v = x * factor[..., None]
        scales = (amax / F32(E4M3_MAX)).astype("<f4").view(np.uint8)
    elif name == "indexer_fp8_sglang":
        scale = floored / F32(E4M3_MAX)
        # The layout gives the scale only. The engine's source multiplies by the rounded inverse; dividing would differ.
        v = x / scale[..., None] if f["divide"] else x * (F32(1) / scale)[..., None]
        scales = scale.astype("<f4").view(np.uint8)
    elif name == "nvfp4_trtllm":
        with np.errstate(over="ignore"):
            s = e4m3_bytes(np.minimum(amax * F32(global_scale) / F32(E2M1_MAX), F32(E4M3_MAX)))
            v = x * (F32(global_scale) / np.maximum(e4m3_values(s), F32(1e-12)))[..., None]
        scales = s
    elif name == "nvfp4_flashinfer":  # no floor, and where the scale is 0 so is the factor: x * 0 has the sign of x
        s = e4m3_bytes(amax / F32(E2M1_MAX))
        with np.errstate(divide="ignore"):
            factor = np.where(s > 0, F32(1) / e4m3_values(s), F32(0))
        v, scales = x * factor[..., None], s
    else:  # v41_nvfp4
        s = e4m3_bytes(np.clip(amax / F32(E2M1_MAX), F32(2.0**-9), F32(E4M3_MAX)))
        v, scales = x / e4m3_values(s)[..., None], s
    assert v.dtype == F32
    codes = e4m3_bytes(v) if f["element"] == "e4m3" else e2m1_codes(v, f["element"] == "e2m1_toward_zero")
    if f["no_minus"]:
        codes = np.where(codes == 8, 0, codes).astype(np.uint8)
    return codes.reshape(n, channels), np.ascontiguousarray(scales).reshape(n, -1)


# ---- pages -------------------------------------------------------------------------------------------------------------------


def places(name: str, hd: int, rows_per_page: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the bytes of each row are: [rows, width] of its data in the first buffer, and of its scales and pad in the last."""
    f, rows = FORMATS[name], np.arange(rows_per_page)[:, None]
    data, scales = f["planes"][hd]
    if f["interleaved"]:
        start, values = rows * (data + scales), data - (2 * 64 if f["needs_rope"] else 0)
        behind = np.arange(values, data) + scales
        return start + np.concatenate([np.arange(values), behind]).astype(np.int64), start + values + np.arange(scales)
    footer = 0 if f["buffers"] == 2 else rows_per_page * data
    return rows * data + np.arange(data), footer + rows * scales + np.arange(scales)


def page_bytes(name: str, hd: int, rows_per_page: int) -> list[int]:
    """The size of each buffer of one page."""
    f = FORMATS[name]
    data, scales = (rows_per_page * width for width in f["planes"][hd])
    if f["buffers"] == 2:
        return [data, scales]
    return [-(-(data + scales) // f["align"]) * f["align"]]


def pack(
    name: str,
    entries: np.ndarray,
    rows: list[int],
    rows_per_page: int,
    *,
    rope_dim: int = 64,
    static_scale: float = 1.0,
    global_scale: float = 1.0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One page with entry i in row rows[i]: for each of its buffers the bytes, and a mask of those that the writer writes.

    Bytes that are not written are 0 here and mean nothing.
    """
    f = FORMATS[name]
    x = np.asarray(entries, F32)
    n, hd = x.shape
    if hd not in f["head_dims"] or len(rows) != n or len(set(rows)) != n or not all(0 <= r < rows_per_page for r in rows):
        raise ValueError(f"{name}: entries {x.shape}, rows {rows} of {rows_per_page}")
    if f["needs_rope"] and rope_dim != 64:
        raise ValueError(f"{name} has 64 RoPE channels, not {rope_dim}")
    if f["bf16_first"]:
        x = to_bf16(x)
    if f["fp4_first"]:
        x = through_fp4(x, f["fp4_first"])

    scales = None
    if f["element"] == "bf16":
        data = x.astype(ml_dtypes.bfloat16).view(np.uint8)
    elif f["element"] == "fp32":
        data = x.astype("<f4").view(np.uint8)
    else:
        nope = x[:, : hd - rope_dim] if f["needs_rope"] else x
        data, scales = _quantize(name, np.ascontiguousarray(nope), f["group"], static_scale, global_scale)
        if f["element"].startswith("e2m1"):
            data = pack_nibbles(data)
        if f["needs_rope"]:
            rope = np.ascontiguousarray(x[:, hd - rope_dim :]).astype(ml_dtypes.bfloat16).view(np.uint8)
            data = np.concatenate([data, rope], axis=1)
        if f["pad"] and f["pad"][1] == "zero":
            scales = np.concatenate([scales, np.zeros((n, f["pad"][0]), np.uint8)], axis=1)

    buffers = [(np.zeros(size, np.uint8), np.zeros(size, bool)) for size in page_bytes(name, hd, rows_per_page)]
    for plane, (page, written), where in zip(
        (data, scales), (buffers[0], buffers[-1]), places(name, hd, rows_per_page), strict=True
    ):
        if plane is not None:
            page[where[rows, : plane.shape[1]]] = plane
            written[where[rows, : plane.shape[1]]] = True
    return buffers


# ---- adversarial entries -----------------------------------------------------------------------------------------------------

E4M3_POSITIVE = e4m3_values(np.arange(0x7F)).astype(np.float64)  # 0 .. 448
E4M3_TIES = (E4M3_POSITIVE[1:] + E4M3_POSITIVE[:-1]) / 2  # at most five significant bits, so exact in bf16


def around(values: Any) -> np.ndarray:
    """Positive values as fp32, those one fp32 and one bf16 step away, and those on and beside the bf16 ties in between."""
    bits = np.atleast_1d(np.asarray(values, np.float64)).astype(F32).view(np.int32).astype(np.int64)
    steps = np.array([0, -1, 1, -0x10000, 0x10000, -0x8000, 0x8000, -0x8001, 0x8001, -0x7FFF, 0x7FFF])
    out = (bits[:, None] + steps).ravel()
    return out[(out > 0) & (out < 0x7F00_0000)].astype(np.int32).view(F32)  # below 1.7e38: nothing rounds to infinity


def _groups_with_amax(amaxes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A group for each amax, which stands at a random place with a random sign among smaller values and a -0."""
    n = len(amaxes)
    with np.errstate(under="ignore"):
        g = amaxes[:, None].astype(np.float64) * rng.uniform(-1, 1, (n, size)) * 2.0 ** -rng.integers(0, 12, (n, size))
        ties = amaxes[:, None] / 6.0 * rng.choice(E2M1_TIES, (n, size)) * rng.choice([-1, 1], (n, size))
        g = np.where(rng.random((n, size)) < 0.25, ties, g).astype(F32)
    g[np.arange(n), rng.integers(0, size, n)] = -0.0
    g[np.arange(n), rng.integers(0, size, n)] = amaxes * rng.choice(np.array([-1, 1], F32), n)
    return g


def _groups_of_ties(ties: np.ndarray, top: float, scales: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Ties of both signs and their neighbours, for each scale in groups whose amax is top * scale, which gives that scale."""
    out = []
    for scale in scales:
        values = around(ties * float(scale))
        values = values[values <= top * float(scale)]
        values = np.concatenate([values, -values])
        values = np.concatenate([values, np.zeros(-len(values) % (size - 1), F32)])
        body = rng.permutation(values).reshape(-1, size - 1)
        out.append(np.concatenate([np.full((len(body), 1), top * float(scale), F32), body], axis=1))
    return np.concatenate(out)


def _bf16_tie_groups(size: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Values on and beside bf16 ties, above an odd and an even bf16, of every magnitude and both signs; -0; subnormals."""
    exponent = np.where(rng.random((n, size)) < 0.7, rng.integers(110, 140, (n, size)), rng.integers(0, 253, (n, size)))
    low = rng.choice(np.array([0x8000, 0x18000, 0x18000, 0x7FFF, 0x8001, 0x17FFF, 0x18001, 0xFFFF, 0x1FFFF]), (n, size))
    bits = exponent << 23 | rng.integers(0, 64, (n, size)) << 17 | low | rng.integers(0, 2, (n, size)) << 31
    g = bits.astype(np.uint32).view(F32)
    g[:, 0], g[:, 1] = -0.0, 0.0
    return g


def threshold_cases(name: str, hd: int) -> np.ndarray:
    """Entries [n, hd] on, and one step beside, every place where the format's bytes change. Always the same ones."""
    f = FORMATS[name]
    rng = np.random.default_rng(584)
    size = f["group"] or 64
    fp4 = f["element"].startswith("e2m1")
    top, ties = (E2M1_MAX, np.array(E2M1_TIES)) if fp4 else (E4M3_MAX, E4M3_TIES)

    powers = np.ldexp(top, np.arange(-158, 125))  # from below the subnormals
    powers = powers[powers < 1.7e38]
    floors = [1e-4, 1e-8, 448e-4, 448e-8, 6e-4, FLOOR_MX, 448 * 2.0**-14, 448 * 2.0**-13, 448 * 2.0**-22, 448 * 2.0**-126]
    saturation = [448, 449, 456, 464, 465, 480, 512, 6, 6.5, 7, 8, 448 * 6, 464 * 6, 65504, 1e30]
    amaxes = [around(powers), around(floors), around(saturation), around(10.0 ** np.arange(-45, 39) * 0.99)]
    if f["scale"] == "e4m3":  # where the scale itself is a tie, or a value, or below the smallest
        amaxes.append(around(6.0 * np.concatenate([E4M3_POSITIVE[1:], E4M3_TIES])))
        scales = E4M3_POSITIVE[[1, 2, 3, 7, 8, 9, 13, 40, 56, 57, 61, 63, 100, 126]]
    elif f["group"]:
        scales = 2.0 ** np.array([-118, -60, -35, -22, -14, -13, -12, -3, 0, 1, 9, 60, 117])
    else:
        scales = np.array([1.0])
    if f["scale"] == "fp32":  # not powers of two: a quotient and a product with the inverse fall on different sides of a tie
        scales = np.concatenate([scales, 2.0 ** rng.uniform(-12, 3, 24)])
    if f["nearest"]:
        amaxes.append(around(np.ldexp(6 / np.sqrt(2), np.arange(-120, 120))))
    pool = [_groups_with_amax(np.concatenate(amaxes), size, rng), _groups_of_ties(ties, top, scales, size, rng)]
    if f["fp4_first"]:
        small = {"nvfp4": 16, "mxfp4": 32}[f["fp4_first"]]
        at = E4M3_POSITIVE[[1, 2, 3, 7, 9, 40, 56, 57, 63, 100]] if small == 16 else 2.0 ** np.array([-60, -20, -15, -13, 0, 9])
        tops = around(
            6.0 * np.concatenate([E4M3_POSITIVE[1:], E4M3_TIES]) if small == 16 else np.ldexp(3.0, np.arange(-30, 30))
        )
        fine = np.concatenate(
            [_groups_of_ties(np.array(E2M1_TIES), 6.0, at, small, rng), _groups_with_amax(tops, small, rng)]
        ).ravel()
        pool.append(np.resize(fine, (-(-fine.size // size), size)))

    zeros = np.zeros((4, size), F32)
    zeros[1], zeros[2, ::3] = -0.0, -0.0
    zeros[3, size // 2] = -1.0  # one value among zeros
    sweep = np.repeat((10.0 ** np.linspace(-45, 38, 167)).astype(F32)[:, None], size, axis=1)  # no zeros: see BLOCK128_MIN
    sweep = np.maximum(sweep, np.finfo(F32).smallest_subnormal) * rng.choice(np.array([-1, 1], F32), sweep.shape)
    mixed = 10.0 ** rng.uniform(-38, 38, (24, size)) * rng.choice([-1, 1], (24, size))
    near = rng.standard_normal((64, size)) * 10.0 ** rng.integers(-6, 3, (64, 1))
    beyond = np.concatenate([around(saturation), -around(saturation)])  # for the formats whose scale does not follow amax
    beyond = np.resize(beyond, (-(-len(beyond) // size), size))
    bf16_ties = _bf16_tie_groups(size, 64, rng)
    pool += [zeros, sweep, mixed.astype(F32), near.astype(F32), beyond, bf16_ties]
    groups = np.concatenate(pool)
    if name == "fp8_block128":
        amax = np.abs(groups).max(axis=1)
        groups = groups[~((amax > 0) & (amax < BLOCK128_MIN) & (groups == 0).any(axis=1))]

    # Neighbouring groups of an entry come from far apart, so that a scale that leaks into its neighbour shows.
    groups = groups[rng.permutation(len(groups))]
    per_entry = (448 if f["needs_rope"] else hd) // size
    groups = np.concatenate([groups, groups[: -len(groups) % per_entry]])
    entries = groups.reshape(-1, per_entry * size)
    if f["needs_rope"]:
        entries = np.concatenate([entries, _bf16_tie_groups(64, len(entries), rng)], axis=1)
    return np.ascontiguousarray(entries, F32)
