"""SGLang's online pool of ratio 128, used in place: one row of maximum, sum and mean a request, and banks for drafts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.lib.sglang_world import World, config, envs, plugged, sgl_pool
from kvfold import UnsupportedError
from kvfold.integrations import sglang as plugin

DRAFTS = 4
RESUMED = 2 * 130 * 2.0**-24  # contract.resumed_bound of as many steps as the tests make in a window


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What SGLang reads of the environment when it is imported."""
    before = plugin.errors()
    monkeypatch.setattr(sgl_pool, "ONLINE_C128", True)
    with envs.SGLANG_OPT_USE_ONLINE_COMPRESS.override(True), envs.SGLANG_EXPERIMENTAL_ONLINE_C128_MTP.override(True):
        yield
    assert plugin.errors() == before


def test_chunks_and_decode() -> None:
    with plugged("pools"), config():
        world = World([128])
        backend = world.backend
        rows = backend.token_to_kv_pool.compress_state_pools[0].kv_score_buffer.kv_score
        rows.fill_(torch.nan)  # offset 0 of a window does not read the row
        backend.allocate(1, 300)
        backend.allocate(2, 300)
        for steps in ([(1, 0, 100), (2, 0, 130)], [(1, 100, 60)], [(2, 130, 120)]):
            world.run(backend.extend(steps), steps)
        for i in range(8):
            steps = [(1, 160 + i, 1), (2, 250 + i, 1), (0, 0, 1), (0, 0, 1)]
            world.run(backend.decode(steps), steps)
        world.check({1: 168, 2: 258}, more=RESUMED)
        assert state_of(rows[1], world, 1, 168) and state_of(rows[2], world, 2, 258)


def state_of(row: torch.Tensor, world: World, request: int, length: int) -> bool:
    """Whether a row is SGLang's of the open window: maximum, sum relative to it, and weighted mean, within rounding."""
    text = world.texts[0]
    first = length // 128 * 128
    value, score = text.rows[request, first:length].double().chunk(2, dim=1)
    score = score + text.compressor.plain_ape[: length - first].double()
    largest = score.max(0).values
    weights = (score - largest).exp()
    exact = torch.cat([largest, weights.sum(0), (weights * value).sum(0) / weights.sum(0)])
    return bool(torch.allclose(row.double(), exact, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("start", [100, 122])
def test_verify_with_every_accepted_length(start: int) -> None:
    """kvfold fills the banks; the test commits them as SGLang's kernel does, before the next step."""
    with plugged("pools"), config(DRAFTS):
        world = World([128], drafts=DRAFTS, online_mtp_max_draft_tokens=DRAFTS)
        backend = world.backend
        state = backend.token_to_kv_pool.compress_state_pools[0]
        rows, apart = state.kv_score_buffer.kv_score, state.online_mtp_state_slot_offset
        rows.fill_(torch.nan)
        backend.allocate(1, 300)
        steps = [(1, 0, start)]
        world.run(backend.extend(steps), steps)
        at, text = start, world.texts[0]
        for accepted in (1, 2, 3, 4, 3, 1, 2, 4):
            right = text.rows[1].clone()
            text.rows[1, at + accepted : at + DRAFTS] = 7.0
            steps = [(1, at, DRAFTS), (0, 0, DRAFTS)]
            before = rows[1].clone()
            world.run(backend.verify(steps), steps)
            assert torch.equal(rows[1].nan_to_num(), before.nan_to_num()), "a verify step leaves the row as it is"
            text.rows[1] = right
            at += accepted
            if at % 128:
                rows[1] = rows[1 + accepted * apart]
        world.check({1: at}, more=RESUMED)
        assert at % 128 == 0 or state_of(rows[1], world, 1, at)


def test_the_fold_pool_is_not_needed_beside_it() -> None:
    with plugged("fold"), config(), pytest.raises(UnsupportedError, match="SGLANG_OPT_USE_ONLINE_COMPRESS must be off"):
        World([128])


def test_rows_in_bf16_are_refused() -> None:
    with plugged("pools"), config():
        world: Any = World([128])
        buffer = world.backend.token_to_kv_pool.compress_state_pools[0].kv_score_buffer
        buffer.kv_score = buffer.kv_score.bfloat16()
        world.backend.allocate(1, 8)
        with pytest.raises(UnsupportedError, match=r"rows must be torch\.float32"):
            world.run(world.backend.extend([(1, 0, 8)]), [(1, 0, 8)])
