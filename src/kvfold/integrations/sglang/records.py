"""Which of kvfold's record formats SGLang's cache layouts are."""

from __future__ import annotations

from ...contract import UnsupportedError

# By SGLang's name of the layout (KVLayout) and whether the compressor is one of V4.1's, of ratio 1 or 2.
_MAIN = {
    ("v4", False): "fp8_ds_mla_sglang",
    ("v41", False): "v41_mxfp8_sglang",
    ("v41_new", False): "v41_mxfp8_interleaved_sglang",
    ("uniform_fp8", False): "fp8_tensor",
    ("v4", True): "fp8_ds_mla_v41_sglang",
    ("v41", True): "v41_mxfp8_sglang_fp4",
    ("v41_new", True): "v41_mxfp8_interleaved_sglang_fp4",
    ("v41_fp4", True): "v41_nvfp4_sglang",
    ("v41_fp4_new", True): "v41_nvfp4_interleaved_sglang",
    ("uniform_fp8", True): "fp8_tensor_v41_sglang",
}


def main_format(layout: str, ratio: int) -> str:
    """The format of main entries in a cache of this layout.

    Raises:
        UnsupportedError: for layouts of which kvfold has no row.
    """
    fmt = _MAIN.get((layout, ratio <= 2))
    if fmt is None:
        raise UnsupportedError(f"kv_layout must be one that kvfold stores for ratio {ratio}, got {layout!r}")
    return fmt


def index_format(fp4: bool, ratio: int) -> str:
    """The format of index keys."""
    if ratio <= 2:
        return "indexer_mxfp4_v41_sglang"
    return "indexer_mxfp4_sglang" if fp4 else "indexer_fp8_sglang"
