"""The oracle against bytes worked out by hand: what tests the packers is tested first."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from support import record_oracle as oracle
from support.record_oracle import FORMATS, pack, threshold_cases

NAMES = sorted(FORMATS)
MLA = [name for name in NAMES if name.startswith("fp8_ds_mla")]
FAKED = [name for name in NAMES if FORMATS[name]["fp4_first"]]
CASES = [(name, hd) for name in NAMES for hd in FORMATS[name]["head_dims"]]


def entry(hd: int, *values: float) -> np.ndarray:
    """One entry that starts with these values; the rest is 0."""
    x = np.zeros((1, hd), np.float32)
    x[0, : len(values)] = values
    return x


def page(name: str, x: np.ndarray, **kw: float) -> np.ndarray:
    """Every buffer of a page of one row, one after the other."""
    return np.concatenate([buffer for buffer, _ in pack(name, x, [0], 1, **kw)])


@pytest.mark.parametrize(
    ("name", "hd", "size"),
    [
        ("bf16", 512, 1024),
        ("bf16_trtllm", 512, 1024),
        ("fp8_tensor", 512, 512),
        ("fp8_tensor_trtllm", 512, 512),
        *((name, 512, 584) for name in MLA),
        ("fp8_block128", 512, 528),
        ("fp8_block128", 128, 132),
        ("mxfp4", 128, 68),
        ("mxfp4", 512, 272),
        ("nvfp4_trtllm", 512, 288),
        *((name, 512, 528) for name in NAMES if name.startswith("v41_mxfp8")),
        *((name, 512, 288) for name in NAMES if name.startswith("v41_nvfp4")),
        *((name, 128, 132) for name in NAMES if name.startswith("indexer_fp8")),
        *((name, 128, 68) for name in NAMES if name.startswith("indexer_mxfp4")),
        ("fp8_tensor_v41_sglang", 512, 512),
        ("nvfp4_flashinfer", 512, 384),
        ("mxfp4_sm90_sglang", 512, 368),
    ],
)
def test_record_sizes(name: str, hd: int, size: int) -> None:
    assert FORMATS[name]["record_bytes"][hd] == size


def test_page_sizes() -> None:
    assert oracle.page_bytes("fp8_ds_mla", 512, 64) == [37_440]  # 64 * 584 = 37,376, rounded up to 65 * 576
    assert oracle.page_bytes("fp8_ds_mla_vllm_triton", 512, 2) == [1728]
    assert oracle.page_bytes("fp8_ds_mla_sglang", 512, 2) == [1728]
    assert oracle.page_bytes("fp8_ds_mla_trtllm", 512, 64) == [37_376]
    assert oracle.page_bytes("v41_mxfp8", 512, 3) == [2048]  # 1,584 rounded up
    assert oracle.page_bytes("v41_nvfp4", 512, 3) == [864]
    assert oracle.page_bytes("v41_nvfp4_sglang", 512, 4) == [1280]  # 1,152 rounded up
    assert oracle.page_bytes("v41_mxfp8_interleaved_sglang", 512, 3) == [1584]
    assert oracle.page_bytes("v41_nvfp4_interleaved_vllm", 512, 3) == [864]
    assert oracle.page_bytes("nvfp4_flashinfer", 512, 64) == [24_576]
    assert oracle.page_bytes("mxfp4_sm90_sglang", 512, 64) == [23_552]
    assert oracle.page_bytes("nvfp4_trtllm", 512, 3) == [768, 96]
    assert oracle.page_bytes("mxfp4", 128, 3) == [192, 12]
    assert oracle.page_bytes("indexer_mxfp4", 128, 3) == [204]


@pytest.mark.parametrize(
    ("name", "hd", "at", "code"),
    [
        ("fp8_ds_mla", 512, 576, 114),
        ("fp8_ds_mla_vllm_triton", 512, 576, 105),
        ("fp8_ds_mla_sglang", 512, 576, 105),
        ("fp8_ds_mla_trtllm", 512, 576, 92),
        ("fp8_ds_mla_v41", 512, 576, 105),
        ("v41_mxfp8", 512, 512, 114),
        ("v41_mxfp8_sglang", 512, 512, 114),
        ("v41_mxfp8_interleaved_sglang", 512, 512, 114),
        ("v41_mxfp8_interleaved_vllm", 512, 512, 105),
        ("mxfp4", 128, 64, 1),
        ("indexer_mxfp4", 128, 64, 1),
        ("indexer_mxfp4_v41", 128, 64, 1),
        ("indexer_mxfp4_sglang", 128, 64, 112),
    ],
)
def test_smallest_scale_code(name: str, hd: int, at: int, code: int) -> None:
    """The code of an empty group; amax 448 or 6 gives 127, and what lies just above gives 128."""
    assert page(name, entry(hd))[at] == code
    top = 6.0 if "mxfp4" in name else 448.0
    for amax, expected in (
        (top, 127),
        (np.nextafter(np.float32(top), np.float32(1e9)), 127),
        (top * 1.0078125, 128),
        (top / 2, 126),
    ):
        # One fp32 step above the threshold reaches the scale only where the entry is not rounded to bf16 first.
        beyond = expected == 127 and amax > top and not FORMATS[name]["bf16_first"]
        assert page(name, entry(hd, 0.0, -amax))[at] == expected + beyond, amax
        assert page(name, entry(hd, 0.0, -amax))[at + 1] == code  # the next group has a scale of its own


def test_scale_floor_reaches_up_to_its_power_of_two() -> None:
    """A scale floored at 1e-4 is 2^-13 up to amax 448 * 2^-13; one floored through amax goes on downwards."""
    for amax, default, others in (
        (448 * 2.0**-14, 114, 113),
        (448 * 2.0**-13, 114, 114),
        (449 * 2.0**-13, 114, 114),
        (0.055, 115, 115),
    ):
        assert page("fp8_ds_mla", entry(512, amax))[576] == default
        assert page("fp8_ds_mla_sglang", entry(512, amax))[576] == others
    assert page("fp8_ds_mla", entry(512, 0.0546875 * 1.0078125))[576] == 115


def test_exponent_is_exact() -> None:
    """Against the definition in rational numbers: the smallest k with top * 2^k >= amax."""
    for top in (6.0, 448.0):
        for amax in oracle.around(np.ldexp(top, [-140, -126, -60, -13, -1, 0, 1, 60, 115])):
            k = int(oracle.ceil_log2_ratio(amax, top))
            assert Fraction(top) * Fraction(2) ** k >= Fraction(float(amax)) > Fraction(top) * Fraction(2) ** (k - 1)


def test_e4m3() -> None:
    """The values from the format's definition; ties go to the even code, their neighbours to the nearest; +-448 is the end."""
    values = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]
    assert oracle.E4M3_POSITIVE.tolist() == values
    ties = oracle.E4M3_TIES.astype(np.float32)
    low = np.arange(126)
    for sign, bit in ((1, 0), (-1, 128)):
        assert (oracle.e4m3_bytes(sign * ties) == low + low % 2 + bit).all()
        assert (oracle.e4m3_bytes(sign * np.nextafter(ties, np.float32(0))) == low + bit).all()
        assert (oracle.e4m3_bytes(sign * np.nextafter(ties, np.float32(1e9))) == low + 1 + bit).all()
        beyond = sign * np.array([448, 449, 464, 465, 480, 1e38], np.float32)
        assert (oracle.e4m3_bytes(beyond) == 126 + bit).all()
    assert oracle.e4m3_bytes(np.array([-0.0, 0.0, -1e-30], np.float32)).tolist() == [128, 0, 128]


def test_e2m1() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    assert oracle.e2m1_codes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]  # 0, 1, 1, 2, 2, 4, 4
    assert oracle.e2m1_codes(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert oracle.e2m1_codes(ties, toward_zero=True).tolist() == [0, 1, 2, 3, 4, 5, 6]  # 0, .5, 1, 1.5, 2, 3, 4
    assert oracle.e2m1_codes(-ties, toward_zero=True).tolist() == [0, 9, 10, 11, 12, 13, 14]
    exact = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 7, 1e38], np.float32)
    for toward_zero in (False, True):
        assert oracle.e2m1_codes(exact, toward_zero).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
        assert oracle.e2m1_codes(np.nextafter(ties, np.float32(9)), toward_zero).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert oracle.e2m1_codes(np.nextafter(ties, np.float32(0)), toward_zero).tolist() == [0, 1, 2, 3, 4, 5, 6]
    zeros = np.array([-0.0, -1e-38, -0.1], np.float32)
    assert oracle.e2m1_codes(zeros).tolist() == [8, 8, 8]
    assert oracle.e2m1_codes(zeros, toward_zero=True).tolist() == [0, 0, 0]


def test_bf16_ties_to_even() -> None:
    """1 + 2^-8 lies between 1 and 1 + 2^-7, and 1 + 3 * 2^-8 between that and 1 + 2^-6."""
    x = entry(128, 1 + 2.0**-8, -(1 + 3 * 2.0**-8), -0.0, 1 + 2.0**-8 + 2.0**-23)
    assert page("bf16", x)[:8].tolist() == [0x80, 0x3F, 0x82, 0xBF, 0x00, 0x80, 0x81, 0x3F]
    assert page("fp32", x)[:16].tolist() == [0, 0x80, 0x80, 0x3F, 0, 0x80, 0x81, 0xBF, 0, 0, 0, 0x80, 1, 0x80, 0x80, 0x3F]


def test_fp8_tensor() -> None:
    x = entry(512, 1.0, -448.0, 500.0, -0.0, 1.0625 + 2.0**-9)
    # The last one is 1.0625, the tie between 1 and 1.125, plus a quarter of a bf16 step: rounding to bf16 makes it the tie.
    assert page("fp8_tensor", x)[:5].tolist() == [0x38, 0xFE, 0x7E, 0x80, 0x38]
    assert page("fp8_tensor", x, static_scale=2.0)[:4].tolist() == [0x30, 0xF6, 0x78, 0x80]  # .5, -224, 256 (250), -0
    # Where it is cast from fp32 it stays above the tie.
    assert page("fp8_tensor_trtllm", x)[:5].tolist() == [0x38, 0xFE, 0x7E, 0x80, 0x39]


@pytest.mark.parametrize("name", [name for name in MLA if name not in FAKED])
def test_fp8_ds_mla_layout(name: str) -> None:
    """Three rows in a page of four: values, RoPE channels and scales in their places; pad bytes as the writer leaves them."""
    n, rows = 4, [2, 0, 3]
    x = np.zeros((3, 512), np.float32)
    x[:, 64 * 3 : 64 * 4] = np.array([1.0, 2.0, 4.0])[:, None] * 448  # codes 127, 128, 129 of group 3
    x[:, 448:] = np.arange(64) - 32
    ((data, written),) = pack(name, x, rows, n)
    for i, row in enumerate(rows):
        assert (data[576 * row + 192 : 576 * row + 256] == 0x7E).all()
        assert (data[576 * row : 576 * row + 192] == 0).all() and (data[576 * row + 256 : 576 * row + 448] == 0).all()
        assert data[576 * row + 448 : 576 * row + 450].tolist() == [0x00, 0xC2]  # -32 is 0xC200
        assert data[576 * row + 574 : 576 * row + 576].tolist() == [0xF8, 0x41]  # 31 is 0x41F8
        assert data[576 * n + 8 * row + 3] == 127 + i
        assert written[576 * row : 576 * row + 576].all() and written[576 * n + 8 * row : 576 * n + 8 * row + 7].all()
        assert written[576 * n + 8 * row + 7] == ("sglang" not in name and "trtllm" not in name)
    assert written.sum() == 3 * (583 + ("sglang" not in name and "trtllm" not in name))
    assert not data[~written].any()


def test_fp8_block128() -> None:
    """amax 1 gives scale fl(1/448) behind the rows and values times 448; amax 0 gives scale 0 and keeps the zero's sign."""
    x = entry(512, 1.0, -0.5, 0.25)
    x[0, 128] = -0.0
    data = page("fp8_block128", x)
    assert data[:3].tolist() == [0x7E, 0xF6, 0x6E]  # 448, -224, 112
    assert data[128] == 0x80
    assert data[512:].view("<f4").tolist() == [np.float32(1) / np.float32(448), 0, 0, 0]
    # Not rounded to bf16, which would make this amax 1.
    assert page("fp8_block128", entry(128, 1 + 2.0**-20))[128:].view("<f4")[0] > np.float32(1) / np.float32(448)


def test_mxfp4_buffers_joined_are_the_one_block_layout() -> None:
    """One block has codes in rows of hd/2 bytes, then scales at N*hd/2 + row*hd/32: the two buffers are its two parts."""
    x = oracle.to_bf16(threshold_cases("mxfp4", 128)[:40])
    rows = list(range(40))[::-1]
    (data, _), (scales, _) = pack("mxfp4", x, rows, 41)
    ((block, written),) = pack("indexer_mxfp4", x, rows, 41)
    assert (np.concatenate([data, scales]) == block).all()
    assert not written[40 * 64 : 41 * 64].any() and not written[-4:].any() and written.sum() == 40 * 68


@pytest.mark.parametrize("name", ["mxfp4", "indexer_mxfp4"])
def test_mxfp4_nibbles(name: str) -> None:
    data = page(name, entry(128, 6.0, -0.5, 1.0, 0.25, -0.25, -6.0))
    assert data[:3].tolist() == [0x97, 0x02, 0xF8]  # even channel low
    assert data[64:].tolist() == [127, 1, 1, 1]


def test_indexer_mxfp4_sglang_nibbles() -> None:
    data = page("indexer_mxfp4_sglang", entry(128, 6.0, -0.75, 1.75, 3.5, -0.25, -6.0))
    assert data[:3].tolist() == [0x97, 0x53, 0xF0]
    assert data[64:].tolist() == [127, 112, 112, 112]


def test_indexer_fp8_scales() -> None:
    """vLLM's scale is the next power of two, SGLang's is amax/448 itself; both are fp32 behind the rows of the page."""
    x = entry(128, 3.0, -1.5)
    vllm, sglang = page("indexer_fp8_vllm", x), page("indexer_fp8_sglang", x)
    assert vllm[128:].view("<f4")[0] == 2.0**-7  # 3/448 = 0.0067 lies below 2^-7 = 0.0078
    assert vllm[:2].tolist() == [0x7C, 0xF4]  # 384, -192
    assert sglang[128:].view("<f4")[0] == np.float32(3) / np.float32(448)
    assert sglang[:2].tolist() == [0x7E, 0xF6]
    assert page("indexer_fp8_vllm", entry(128))[128:].view("<f4")[0] == 2.0**-22
    assert page("indexer_fp8_sglang", entry(128))[128:].view("<f4")[0] == np.float32(1e-4) / np.float32(448)


def test_nvfp4() -> None:
    """Group 0 has amax 6, scale 1; group 1 amax 9, scale 1.5; group 2 is zero; group 3 wants a scale below the smallest."""
    x = entry(512, 6.0, -1.0)
    x[0, 16:18] = 9.0, -2.25
    x[0, 48] = 6 * 2.0**-11
    trt, v41 = page("nvfp4_trtllm", x), page("v41_nvfp4", x)
    assert trt[[0, 8, 24]].tolist() == [0xA7, 0xB7, 0x07]  # a scale of 0 counts as 1e-12, so the last one saturates
    assert v41[[0, 8, 24]].tolist() == [0xA7, 0xB7, 0x03]  # at least 2^-9 here, and 1.5 is code 3
    assert trt[256:260].tolist() == [0x38, 0x3C, 0x00, 0x00]
    assert v41[256:260].tolist() == [0x38, 0x3C, 0x01, 0x01]
    doubled = page("nvfp4_trtllm", x, global_scale=2.0)
    assert doubled[256:258].tolist() == [0x40, 0x44] and (doubled[:16] == trt[:16]).all()
    assert page("nvfp4_trtllm", entry(512, 1e30))[[0, 256]].tolist() == [0x07, 0x7E]


@pytest.mark.parametrize("name", ["v41_mxfp8_interleaved_vllm", "v41_mxfp8_interleaved_sglang"])
def test_interleaved_mxfp8(name: str) -> None:
    """Row j at 528 j: 512 values, then their 16 codes."""
    x = np.zeros((2, 512), np.float32)
    x[:, 511], x[:, 0] = (448.0, 896.0), -2.0
    ((data, written),) = pack(name, x, [2, 0], 3)
    assert data.size == 1584 and written.sum() == 1056 and not written[528:1056].any()
    least = 105 if "vllm" in name else 114
    for row, code in ((2, 127), (0, 128)):
        record = data[528 * row :][:528]
        assert record[511] == 0x7E and record[512:].tolist() == [120, *[least] * 14, code]
        assert record[0] == 0xF8  # -2 at a scale of 2^-7, -256


@pytest.mark.parametrize("name", ["v41_nvfp4_interleaved_vllm", "v41_nvfp4_interleaved_sglang"])
def test_interleaved_nvfp4(name: str) -> None:
    x = np.zeros((2, 512), np.float32)
    x[:, 1], x[1, 511] = 6.0, -9.0
    ((data, written),) = pack(name, x, [1, 0], 2)
    assert data.size == 576 and written.all()
    assert data[0] == data[288] == 0x70 and data[255] == 0xF0
    assert data[256:288].tolist() == [0x38, *[1] * 30, 0x3C] and data[544:].tolist() == [0x38, *[1] * 31]


def test_nvfp4_flashinfer() -> None:
    """352 bytes of a row, 224 of codes and 64 bf16; then the page's 32-byte scales, of which 4 bytes are zeroed."""
    x = np.zeros((1, 512), np.float32)
    x[0, 0], x[0, 16], x[0, 32], x[0, 48], x[0, 448:] = 6.0, 9.0, 6 * 2.0**-11, -6 * 2.0**-10, np.arange(64)
    ((data, written),) = pack("nvfp4_flashinfer", x, [1], 2)
    assert data.size == 768 and written[352:704].all() and written[736:].all() and written.sum() == 384
    assert data[352:384:8].tolist() == [0x07, 0x07, 0x00, 0x08]  # amax / 6 of 2^-11, and the tie 2^-10, have scale 0
    assert data[352 + 224 + 2 * 31 :][:2].tolist() == [0xF8, 0x41]
    assert data[736:768].tolist() == [0x38, 0x3C, *[0] * 30]


def test_mxfp4_sm90_sglang() -> None:
    """368 bytes of a row: 224 of codes, 14 scales, 2 that are left alone, 64 bf16. The scale is the nearest power of two."""
    x = np.zeros((1, 512), np.float32)
    x[0, 0], x[0, 32], x[0, 64], x[0, 448:] = 6.0, 4.25, -4.21875, np.arange(64)
    ((data, written),) = pack("mxfp4_sm90_sglang", x, [1], 2)
    record = data[368:]
    assert record[[0, 16, 32]].tolist() == [0x07, 0x06, 0x0F]  # 6, 4.25 to 4, and 8.4375 saturates
    assert record[224:240].tolist() == [127, 127, 126, *[1] * 11, 0, 0] and not written[368 + 238 : 368 + 240].any()
    assert record[240 + 62 :][:2].tolist() == [0xF8, 0x41]


@pytest.mark.parametrize("name", ["indexer_fp8_vllm_sm100", "indexer_fp8_v41_sm100"])
def test_four_equal_codes(name: str) -> None:
    data = page(name, entry(128, 3.0, -1.5))
    assert data[:2].tolist() == [0x7C, 0xF4] and data[128:].tolist() == [120] * 4
    assert page(name, entry(128))[128:].tolist() == [105] * 4


def test_through_nvfp4() -> None:
    """Scale 1 from amax 6; ties to even; -0 becomes +0, a small negative -0; the smallest scale is 2^-9."""
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = 6.0, 0.25, -0.25, 0.75, -0.0, 5.0, -2.5, 1.125
    x[0, 16:19] = 2.0**-9, -(2.0**-10), 2.0**-12
    got = oracle.through_fp4(x, "nvfp4")
    assert got[0, :8].tolist() == [6.0, 0.0, 0.0, 1.0, 0.0, 4.0, -2.0, 1.0]
    assert np.signbit(got[0, :8]).tolist() == [False, False, True, False, False, False, True, False]
    assert got[0, 16:19].tolist() == [2.0**-9, -(2.0**-10), 0.0]
    assert oracle.through_fp4(np.full((1, 16), 9.0, np.float32), "nvfp4")[0, 0] == 9.0  # 6 * 1.5


def test_two_stages_are_not_one() -> None:
    """SGLang's V4.1 key: where amax is rounded from over 3 scales to 3, the second scale is half of it, and codes double."""
    x = entry(128, 3.25, 1.0, -0.25)
    x[0, 32:34] = 3.75, -0.0
    one, two = page("indexer_mxfp4_v41", x), page("indexer_mxfp4_v41_sglang", x)
    assert one[64:66].tolist() == [127, 127] and two[64:66].tolist() == [126, 127]
    assert one[:2].tolist() == [0x25, 0x08] and two[:2].tolist() == [0x47, 0x00]
    assert one[16] == 0x86 and two[16] == 0x06
    # Below the floor of the second stage values are rounded a second time.
    tiny = entry(128, 3 * 2.0**-16, 2.0**-16)
    assert page("indexer_mxfp4_v41_sglang", tiny)[[0, 64]].tolist() == [0x01, 114]


def test_v41_mxfp8() -> None:
    x = entry(512, 448.0, -0.0)
    x[0, 511] = 896.0
    ((data, written),) = pack("v41_mxfp8", np.concatenate([x, -x]), [1, 0], 2)
    assert data.size == 1536 and written.sum() == 1056 and not written[1056:].any()
    assert data[[512, 513, 1023, 0, 1, 511]].tolist() == [0x7E, 0x80, 0x7E, 0xFE, 0, 0xFE]
    assert data[1024 + 16 : 1024 + 32].tolist() == [127, *[114] * 14, 128]


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_cases_are_finite_and_reach_the_extremes(name: str, hd: int) -> None:
    x = threshold_cases(name, hd)
    assert x.dtype == np.float32 and x.shape[1] == hd and np.isfinite(oracle.to_bf16(x)).all()
    assert (x == threshold_cases(name, hd)).all()
    assert (np.signbit(x) & (x == 0)).any() and np.abs(x).max() > 9e37
    magnitude = np.abs(x[x != 0])
    assert magnitude.min() < 2.0**-126  # subnormals
    buffers = pack(name, x, list(range(len(x))), len(x) + 1)
    if FORMATS[name]["element"] == "e4m3":
        data = buffers[0][0][oracle.places(name, hd, len(x) + 1)[0][:-1]]
        nope = data[:, :448] if FORMATS[name]["needs_rope"] else data
        assert not (nope & 0x7F == 0x7F).any()  # no NaN
        assert len(np.unique(nope)) == 254 or name in FAKED


MUTATIONS = {
    "bf16_first": [(name, hd) for name, hd in CASES if FORMATS[name]["element"] not in ("bf16", "fp32")],
    "floor": [(name, hd) for name, hd in CASES if FORMATS[name]["floor"]],
    "ties": [(name, hd) for name, hd in CASES if FORMATS[name]["element"].startswith("e2m1")],
    "divide": [("indexer_fp8_sglang", 128)],
    "fp4_first": [(name, hd) for name, hd in CASES if name in FAKED],
    "no_minus": [("indexer_mxfp4_v41_sglang", 128)],
    "nearest": [("mxfp4_sm90_sglang", 512)],
}


@pytest.mark.parametrize(("what", "name", "hd"), [(what, *case) for what, cases in MUTATIONS.items() for case in cases])
def test_cases_tell_packers_apart(what: str, name: str, hd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packer that rounds once more or less, or has another floor, other ties or a quotient for a product, is found out."""
    f = FORMATS[name]
    x = threshold_cases(name, hd)
    expected = [buffer for buffer, _ in pack(name, x, list(range(len(x))), len(x))]
    changed = {
        "bf16_first": not f["bf16_first"],
        "floor": f["floor"] * 2.5,
        "ties": "e2m1" if f["element"] != "e2m1" else "e2m1_toward_zero",
        "divide": not f["divide"],
        "fp4_first": None,
        "no_minus": not f["no_minus"],
        "nearest": not f["nearest"],
    }
    monkeypatch.setitem(f, "element" if what == "ties" else what, changed[what])
    got = [buffer for buffer, _ in pack(name, x, list(range(len(x))), len(x))]
    assert any((a != b).any() for a, b in zip(expected, got, strict=True))


def test_refusals() -> None:
    for x, rows in ((entry(64), [0]), (entry(512), [1]), (entry(512), [-1]), (np.zeros((2, 512), np.float32), [0, 0])):
        with pytest.raises(ValueError):
            pack("fp8_ds_mla", x, rows, 1)
