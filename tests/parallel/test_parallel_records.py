"""Records move as bytes, in every format, wherever a page has them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import kvfold
from kvfold import EntryCache
from kvfold.parallel.records import read_records, record_bytes, write_records
from kvfold.storage.formats import FORMATS
from kvfold.storage.pack import read_fields

SPEC = kvfold.CompressorSpec(head_dim=512, ratio=4, overlap=True)


def spec_of(fmt: str) -> kvfold.CompressorSpec:
    for head_dim in (512, 128):
        spec = kvfold.CompressorSpec(head_dim=head_dim, ratio=4, overlap=True)
        try:
            FORMATS[fmt].check(spec)
        except ValueError:
            continue
        return spec
    raise AssertionError(f"no spec for {fmt}")


def caches(fmt: str, values: Sequence[int]) -> list[EntryCache]:
    """Random bytes, and one byte over and over."""
    found, draw = [], torch.Generator().manual_seed(0)
    for value in values:
        cache = EntryCache.allocate(fmt, 3, 5, spec_of(fmt))
        for x in (cache.storage, cache.scales):
            if x is not None:
                x.fill_(value) if value else x.copy_(torch.randint(0, 256, x.shape, generator=draw, dtype=torch.uint8))
        found.append(cache)
    return found


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_records_arrive_and_nothing_else_changes(fmt: str) -> None:
    source, target = caches(fmt, (0, 0x5A))
    sent, at = torch.tensor([0, 14, 7, -1, 3]), torch.tensor([9, 0, 4, 5, -1])
    data = torch.zeros(5, record_bytes(source), dtype=torch.uint8)
    assert record_bytes(source) == FORMATS[fmt].record_bytes(spec_of(fmt))
    read_records(source, sent, data)
    buffers = [x for x in (target.storage, target.scales) if x is not None]
    before = [x.clone() for x in buffers]
    write_records(target, at, data)
    for here, there in ((0, 9), (14, 0), (7, 4)):
        for name, field in source.raw(here).items():
            assert torch.equal(field.view(torch.uint8), target.raw(there)[name].view(torch.uint8)), name
    others = torch.tensor([i for i in range(15) if i not in (9, 0, 4, 5)])
    (same,) = caches(fmt, (0x5A,))
    for name, field in read_fields(same, others).items():
        assert torch.equal(field.view(torch.uint8), read_fields(target, others)[name].view(torch.uint8)), name
    changed = sum(
        int((x != old).sum())
        for x, old in zip((y for y in (target.storage, target.scales) if y is not None), before, strict=True)
    )
    assert 0 < changed <= 4 * record_bytes(source), "no byte beside records"


def test_no_slot_at_all_writes_nothing() -> None:
    (target,) = caches("bf16", (0x5A,))
    write_records(target, torch.tensor([-1, 15]), torch.zeros(2, record_bytes(target), dtype=torch.uint8))
    assert (target.storage == 0x5A).all()
