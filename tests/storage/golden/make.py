"""Writes the golden files of this folder: `python tests/storage/golden/make.py`. Everything in them comes from `record_oracle`.

SCHEMA.md says what a file holds. The container is written here, byte by byte, so that the same content is the same file
whatever library reads it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from support import record_oracle as oracle  # noqa: E402

SCHEMA_VERSION = 1
ROWS_PER_PAGE = 4
SLOTS = [2, 0, 3, 1]
SCALES = {"fp8_tensor": 0.37, "nvfp4_trtllm": 2.7}
_DTYPES = {"float32": "F32", "int64": "I64", "uint8": "U8"}


def content(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a format's file."""
    f = oracle.FORMATS[name]
    hd = 512 if 512 in f["head_dims"] and (f["group"] or 128 not in f["head_dims"]) else 128
    scale = SCALES.get(name, 1.0)
    entries = golden_entries(name, hd)
    packed = oracle.pack(name, entries, SLOTS, ROWS_PER_PAGE, static_scale=scale, global_scale=scale)
    tensors = {"entries": entries, "slots": np.array(SLOTS, np.int64)}
    for label, (data, written) in zip(("storage", "scales"), packed, strict=False):
        tensors[label] = data[None]
        tensors[f"{label}_written"] = written.astype(np.uint8)[None]
    metadata = {
        "format": name,
        "schema_version": str(SCHEMA_VERSION),
        "rows_per_page": str(ROWS_PER_PAGE),
        "scale": repr(scale),
        "spec.head_dim": str(hd),
        "spec.ratio": "4",
        "spec.overlap": "true",
        "spec.has_ape": "true",
        "spec.rope_dim": "64",
        "spec.norm_eps": "1e-06",
        "spec.hadamard": "true" if hd == 128 else "false",
    }
    return tensors, metadata


def golden_entries(name: str, hd: int) -> np.ndarray:
    """Two ordinary entries, and two of the threshold cases."""
    rng = np.random.default_rng(4)
    ordinary = rng.standard_normal((2, hd)) * [[1.0], [0.01]]
    cases = oracle.threshold_cases(name, hd)
    cases = cases[np.abs(cases).max(axis=1) < 1e30]  # what a reader makes of them is finite
    return np.concatenate([ordinary.astype(np.float32), cases[[0, len(cases) // 2]]])


def serialize(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """safetensors: the header's length in 8 bytes, the header in JSON padded with spaces to 8 bytes, the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    data = b""
    # Largest element first, so that every tensor is aligned.
    for label, x in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        raw = np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()
        header[label] = {
            "dtype": _DTYPES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def golden_file(name: str) -> bytes:
    return serialize(*content(name))


if __name__ == "__main__":
    for format_name in oracle.FORMATS:
        (HERE / f"{format_name}.safetensors").write_bytes(golden_file(format_name))
