"""The golden files: their schema, that our writers and reader reproduce them, and that the oracle still makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import make
from safetensors import safe_open
from support.helpers import Backend
from support.record_support import dequantized, write
from torch import Tensor

from kvfold import CompressorSpec
from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.safetensors"))
SPEC_FIELDS = ("head_dim", "ratio", "overlap", "has_ape", "rope_dim", "norm_eps", "hadamard")


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def spec_of(metadata: dict[str, str]) -> CompressorSpec:
    fields: dict[str, Any] = {field: json.loads(metadata[f"spec.{field}"]) for field in SPEC_FIELDS}
    return CompressorSpec(**fields)


def cache_of(metadata: dict[str, str], device: torch.device) -> EntryCache:
    return EntryCache.allocate(
        metadata["format"],
        1,
        int(metadata["rows_per_page"]),
        spec_of(metadata),
        device=device,
        scale=float(metadata["scale"]),
    )


def buffers(cache: EntryCache) -> dict[str, Tensor]:
    return {"storage": cache.storage} | ({} if cache.scales is None else {"scales": cache.scales})


def test_every_format_has_a_file() -> None:
    assert [path.stem for path in FILES] == sorted(FORMATS)
    assert all(path.stat().st_size < 32_768 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_schema(path: Path) -> None:
    tensors, metadata = load(path)
    keys = {"format", "schema_version", "rows_per_page", "scale", *(f"spec.{field}" for field in SPEC_FIELDS)}
    assert set(metadata) == keys and metadata["format"] == path.stem and metadata["schema_version"] == "1"
    cache = cache_of(metadata, torch.device("cpu"))
    shapes = {"entries": (4, cache.spec.head_dim), "slots": (4,)}
    for label, buffer in buffers(cache).items():
        shapes[label] = shapes[f"{label}_written"] = tuple(buffer.shape)
    assert {key: tuple(x.shape) for key, x in tensors.items()} == shapes
    dtypes = {"entries": torch.float32, "slots": torch.int64}
    assert all(x.dtype == dtypes.get(key, torch.uint8) for key, x in tensors.items())
    assert tensors["entries"].isfinite().all() and sorted(tensors["slots"].tolist()) == [0, 1, 2, 3]
    for label in buffers(cache):
        written = tensors[f"{label}_written"]
        assert set(written.unique().tolist()) <= {0, 1} and not tensors[label][written == 0].any()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_written_and_read(backend: Backend, path: Path) -> None:
    """Our writer makes the file's bytes from its entries, and our reader reads the file's bytes as the oracle means them."""
    tensors, metadata = load(path)
    slots = tensors["slots"].tolist()
    cache = cache_of(metadata, backend.device)
    for fill in (0x00, 0xFF):
        for buffer in buffers(cache).values():
            buffer.fill_(fill)
        write(backend, cache, slots, tensors["entries"].numpy())
        for label, buffer in buffers(cache).items():
            want = torch.where(tensors[f"{label}_written"].bool(), tensors[label], fill)
            assert torch.equal(buffer.cpu(), want), label
    for label, buffer in buffers(cache).items():
        buffer.copy_(tensors[label])
    got = cache.read(tensors["slots"].to(backend.device)).cpu().numpy()
    want = dequantized(path.stem, tensors["entries"].numpy(), float(metadata["scale"]))
    if path.stem == "nvfp4_trtllm":  # a global factor that is no power of two: rounded twice
        assert (np.abs(got - want) <= 2.0**-23 * np.abs(want)).all()
    else:
        assert (got.view(np.int32) == want.astype(np.float32).view(np.int32)).all()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_regenerated(path: Path) -> None:
    assert make.golden_file(path.stem) == path.read_bytes()
