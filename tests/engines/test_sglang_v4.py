"""kvfold in SGLang's V4 compressors: its own pools, metadata and hook registry, on a CPU, against the mean in fp64."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import Any

import pytest
import torch

from benchmarks.lib import sglang_world
from benchmarks.lib.sglang_world import (
    PAGE,
    TEXT,
    Backend,
    World,
    config,
    linker_pool_assembler,
    make_compressor,
    plugged,
    rope_freqs,
    sgl_backend,
    sgl_plugins,
    sgl_pool,
)
from kvfold import UnsupportedError
from kvfold.integrations import sglang as plugin
from kvfold.integrations import switch

STATES = ("pools", "fold")
DRAFTS = 4
UNTOUCHED = -5.0  # in the rows of request 0 and of page 0, which are padding


@pytest.fixture(autouse=True)
def nothing_refused() -> Any:
    before = plugin.errors()
    yield
    assert plugin.errors() == before


def extend(world: World, *steps: tuple[int, int, int]) -> None:
    world.run(world.backend.extend(list(steps)), list(steps))


def decode(world: World, *steps: tuple[int, int]) -> None:
    made = [(request, start, 1) for request, start in steps]
    world.run(world.backend.decode(made), made)


def verify(world: World, *steps: tuple[int, int]) -> None:
    made = [(request, start, world.backend.speculative_num_draft_tokens) for request, start in steps]
    world.run(world.backend.verify(made), made)


def spoil(world: World) -> None:
    """Whatever a former owner left: NaN in every state."""
    pool = world.backend.token_to_kv_pool
    for state in (*pool.compress_state_pools, *pool.indexer_compress_state_pools):
        if state is not None and not hasattr(state, "fold"):
            state.kv_score_buffer.kv_score.fill_(torch.nan)
            state.kv_score_buffer.kv_score[: state.ring_size] = UNTOUCHED
        elif state is not None:
            state.fold.state.rows.fill_(torch.nan)


@pytest.mark.parametrize("state", STATES)
def test_chunks_then_decode(state: str) -> None:
    """Chunks of any length, mixed with decode, and padding that is all NaN; the same bits as one prefill."""
    with plugged(state), config():
        world, whole = World([4, 128, 4]), World([4, 128, 4])
        for one in (world, whole):
            spoil(one)
            one.backend.allocate(1, 530)
            one.backend.allocate(2, 140)
        extend(world, (1, 0, 256), (2, 0, 3))
        extend(world, (1, 256, 1), (2, 3, 2))
        extend(world, (1, 257, 5))
        extend(world, (1, 262, 250), (2, 5, 122))
        for i in range(9):
            decode(world, (1, 512 + i), (2, 127 + i), (0, 0), (0, 0))
        extend(whole, (1, 0, 521), (2, 0, 136))
        world.check({1: 521, 2: 136})
        assert padding_is_untouched(world)
        for mine, other in zip(world.texts, whole.texts, strict=True):
            assert mine.found.keys() == other.found.keys()
            assert all(torch.equal(mine.found[key], other.found[key]) for key in mine.found)
            page, rows = world.cache_of(mine)
            for request, end in ((1, 521), (2, 136)):
                at = world.slots(mine, request, end // mine.compressor.ratio)
                assert torch.equal(records(page, rows, at), records(*whole.cache_of(other), at))


def test_raw_rows_in_bf16() -> None:
    """New rows are rounded as old ones are, wherever they are stored: the same bits however a request is cut."""
    with plugged("pools"), config():
        world, whole = (World([4, 128], dtype=torch.bfloat16) for _ in range(2))
        for one in (world, whole):
            spoil(one)
            one.backend.allocate(1, 300)
        extend(world, (1, 0, 100))
        extend(world, (1, 100, 151))
        for i in range(251, 263):
            decode(world, (1, i))
        extend(whole, (1, 0, 263))
        for mine, other in zip(world.texts, whole.texts, strict=True):
            assert len(mine.found) == 263 // mine.compressor.ratio
            assert all(torch.equal(row, other.found[key]) for key, row in mine.found.items())


def padding_is_untouched(world: World) -> bool:
    """Request 0 and page 0 still hold what `spoil` left, and no tags."""
    pool = world.backend.token_to_kv_pool
    states = [s for s in (*pool.compress_state_pools, *pool.indexer_compress_state_pools) if s is not None]
    if hasattr(states[0], "fold"):
        return all(bool((s.fold.state.positions[0] == -1).all()) for s in states)
    return all(bool((s.kv_score_buffer.kv_score[: s.ring_size] == UNTOUCHED).all()) for s in states)


def records(pages: torch.Tensor, rows: int, slots: torch.Tensor) -> torch.Tensor:
    """The bytes of V4's records: 576 and 8 of a page of 584 a row, or 128 and 4."""
    body, tail = (128, 4) if pages.shape[1] == rows * 132 else (576, 8)
    flat = pages.view(torch.uint8)
    page, row = slots[:, None] // rows, slots[:, None] % rows
    parts = flat[page, row * body + torch.arange(body)], flat[page, rows * body + row * tail + torch.arange(tail)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("start", "drafts"), [(124, 4), (250, 4), (245, 10)])
def test_verify_with_every_accepted_length(state: str, start: int, drafts: int) -> None:
    """Drafts that are rejected in part, over ends of windows and of a page; 10 is the most that SGLang's rings allow."""
    with plugged(state), config(drafts):
        world = World([4, 128], drafts=drafts)
        spoil(world)
        world.backend.allocate(1, 320)
        world.backend.allocate(2, 64)
        extend(world, (1, 0, start), (2, 0, 5))
        at, other = start, 5
        for accepted in (1, 2, 3, 4, 3, 2, 1, 1) if drafts == 4 else (3, 1, 10, 6, 5, 2, 9, 4, 7, 8):
            right = [text.rows[1, at + accepted : at + drafts].clone() for text in world.texts]
            for text in world.texts:
                text.rows[1, at + accepted : at + drafts] = 7.0  # what was drafted and rejected
            verify(world, (1, at), (2, other), (0, 0))
            for text, rows in zip(world.texts, right, strict=True):
                text.rows[1, at + accepted : at + drafts] = rows
            at, other = at + accepted, other + 1
        verify(world, (1, at), (2, other))
        world.check({1: at + drafts, 2: other + drafts})


@pytest.mark.parametrize("drafts", [0, 4, 10])
def test_a_launch_writes_no_row_of_a_page_that_it_reads(drafts: int) -> None:
    """Nor two positions one row: a GPU's programs run in any order, which no result on a CPU shows."""
    with plugged("pools"), config(drafts):
        backend = Backend([4], drafts=drafts)
        backend.allocate(1, TEXT)
        lengths = {drafts, 1} if drafts else {1, 2, 3, 9, 300}
        for start in (*range(17), *range(249, 273)):
            for new in lengths:
                steps = [(1, start, new)]
                build = backend.verify if drafts and new == drafts else backend.decode if new == 1 else backend.extend
                step = build(steps).c4_compress_metadata
                width = step.table.shape[1]
                row_of = {p: int(step.table[0, p // 4 % width]) * 4 + p % 4 for p in range(start + new)}
                old = [row_of[p] for p in range(max(start // 4 * 4 - 4, 0), start)]
                written = [row for p, row in row_of.items() if p >= start and row >= 0]
                assert all(row >= 0 for row in old)
                assert len({*old, *written}) == len(old) + len(written), (start, new)
                if step.kept:
                    behind = [row for row in step.kept[2].tolist() if row != step.source.rows - 1]
                    assert len(set(behind)) == len(behind)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("hit", "new"), [(256, 50), (512, 50), (512, 1)])
def test_radix_resume(state: str, hit: int, new: int) -> None:
    """A request that goes on behind pages of another one, in a slot that a third one left."""
    with plugged(state), config():
        world = World([4, 128])
        spoil(world)
        backend = world.backend
        backend.allocate(1, 600)
        backend.allocate(3, 100)
        for text in world.texts:
            text.rows[3, :hit] = text.rows[1, :hit]
        extend(world, (1, 0, 300), (3, 0, 90))  # 3 leaves its slot behind this
        extend(world, (1, 300, 300))
        backend.allocate(3, hit + 60, shared=backend.pages_of(1, hit // PAGE))
        extend(world, (3, hit, new))
        for i in range(4):
            decode(world, (3, hit + new + i), (1, 600 + i))
        for text in world.texts:  # windows of the shared pages are of request 1
            ratio = text.compressor.ratio
            text.found.update({(3, w): text.found[1, w] for w in range(hit // ratio)})
        world.check({1: 604, 3: hit + new + 4})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("length", [1, 256, 259, 301, 384])
def test_transfer_to_another_engine(state: str, length: int) -> None:
    """What prefill sends to decode by SGLang's own lists of buffers and indices is enough, in another slot and other pages."""
    with plugged(state), config():
        source, target = World([4, 128]), World([4, 128])
        spoil(target)
        source.backend.allocate(2, length)
        target.backend.allocate(1, TEXT)  # so that pages differ
        target.backend.allocate(4, length + 140)
        for text in (*source.texts, *target.texts):
            text.rows[4] = text.rows[2]
        extend(source, (2, 0, length))
        send(source.backend, 2, target.backend, 4, length)
        for i in range(6):
            decode(target, (4, length + i))
        extend(target, (4, length + 6, 129))
        for mine, other in zip(target.texts, source.texts, strict=True):
            mine.found.update({(4, w): row for (_, w), row in other.found.items()})
        target.check({4: length + 135})


def send(source: Backend, request: int, target: Backend, other: int, length: int) -> None:
    """As the transfer engine does: items of buffers, by page for state of pages, by SGLang's indices for that of requests."""
    of_pages = [swa_pages(b, r, length) for b, r in ((source, request), (target, other))]
    of_request = [b.token_to_kv_pool.request_state_transfer_indices(r, length) for b, r in ((source, request), (target, other))]
    for infos, (mine, its) in (("get_state_buf_infos", of_pages), ("get_request_state_buf_infos", of_request)):
        here, there = (getattr(b.token_to_kv_pool, infos)() for b in (source, target))
        for a, b, size in zip(here[0], there[0], here[2], strict=True):
            for i, j in zip(mine, its, strict=True):
                ctypes.memmove(b + int(j) * size, a + int(i) * size, size)


def swa_pages(backend: Backend, request: int, length: int) -> list[int]:
    """The pages of the sliding-window pool of a request's first tokens."""
    first = backend.req_to_token[request, :length:PAGE].long()
    return (backend.full_to_swa[first] // PAGE).tolist()


@pytest.mark.parametrize("state", STATES)
def test_pages_that_hicache_brings_back(state: str) -> None:
    """The rows of state pages that SGLang's host cache copies, as it views them, are what a hit in other pages needs."""
    with plugged(state), config():
        source, target = World([4, 128]), World([4, 128])
        spoil(target)
        source.backend.allocate(2, 600)
        target.backend.allocate(1, TEXT)
        target.backend.allocate(4, 600)
        for text in (*source.texts, *target.texts):
            text.rows[4] = text.rows[2]
        extend(source, (2, 0, 530))
        pools = [w.backend.token_to_kv_pool for w in (source, target)]
        for name in ("compress_state_pools", "indexer_compress_state_pools"):
            here, there = (linker_pool_assembler._deepseek_v4_state_views(getattr(p, name), [0])[0] for p in pools)
            there[swa_pages(target.backend, 4, 512)] = here[swa_pages(source.backend, 2, 512)]
        extend(target, (4, 512, 70))
        for mine, other in zip(target.texts, source.texts, strict=True):
            for (_, window), row in other.found.items():
                mine.found.setdefault((4, window), row)
        target.check({4: 582})


@pytest.mark.parametrize("state", STATES)
def test_on_triton_kernels(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: that kernels take what the adapter gives them, over the end of a window of 128."""
    monkeypatch.setattr(sglang_world, "compress", functools.partial(sglang_world.compress, backend="triton"))
    with plugged(state), config(DRAFTS):
        world = World([4, 128], drafts=DRAFTS)
        spoil(world)
        world.backend.allocate(1, 140)
        world.backend.allocate(2, 20)
        extend(world, (1, 0, 126), (2, 0, 5))
        verify(world, (1, 126), (2, 5), (0, 0))
        decode(world, (1, 129), (2, 6), (0, 0))
        extend(world, (1, 130, 3))
        world.check({1: 133, 2: 7})


@pytest.mark.parametrize("state", STATES)
def test_metadata_copied_into_that_of_a_graph(state: str) -> None:
    """What a graph was recorded with takes another step in place: every address that a kernel reads stays."""
    with plugged(state), config(DRAFTS):
        world = World([4, 128], drafts=DRAFTS)
        backend = world.backend
        backend.allocate(1, 300)
        backend.allocate(2, 300)
        extend(world, (1, 0, 250), (2, 0, 130))
        recorded = backend.verify([(0, 0, DRAFTS), (0, 0, DRAFTS), (0, 0, DRAFTS)])
        before = addresses(recorded)
        steps = [(1, 250, DRAFTS), (2, 130, DRAFTS), (0, 0, DRAFTS)]
        recorded.copy_(backend.verify(steps))
        world.run(recorded, steps)
        steps = [(2, 133, DRAFTS), (1, 254, DRAFTS), (0, 0, DRAFTS)]
        recorded.copy_(backend.verify(steps))
        world.run(recorded, steps)
        assert addresses(recorded) == before
        world.check({1: 258, 2: 137})


def addresses(metadata: Any) -> list[int]:
    found = []
    for step in (metadata.c4_compress_metadata, metadata.c128_compress_metadata):
        tensors = [step.slots, step.seq_lens, step.cu_seqlens, step.out_loc, step.plan.items, step.plan.entry_slots]
        tensors += [step.table] if step.table is not None else []
        found += [t.data_ptr() for t in (*tensors, *step.hits, *step.kept)]
    return found


@pytest.mark.parametrize("state", STATES)
def test_prefill_graph(state: str) -> None:
    """SGLang's graph of prefill plans on the device, for a number of tokens alone, and refreshes what it recorded."""
    with plugged(state), config():
        world = World([4, 128])
        backend = world.backend
        backend.allocate(1, 400)
        backend.allocate(2, 400)
        extend(world, (1, 0, 30), (2, 0, 256))
        recorded = backend.extend([(1, 30, 40), (2, 256, 20)], graph=2000)
        before = addresses(recorded)
        world.run(recorded, [(1, 30, 40), (2, 256, 20)])
        steps = [(1, 70, 10), (2, 276, 50)]
        recorded.refresh_for_breakable_cuda_graph_replay_(backend.extend(steps, graph=2000))
        world.run(recorded, steps)
        assert addresses(recorded) == before
        extend(world, (1, 80, 200))
        decode(world, (2, 326), (1, 280))
        world.check({1: 281, 2: 327})


def test_steps_that_do_not_fit_are_refused() -> None:
    with plugged("pools"), config():
        backend = Backend([4])
        backend.allocate(1, 300)
        one, other = (backend.extend([(1, 0, n)]).c4_compress_metadata for n in (8, 9))
        with pytest.raises(ValueError, match="other must be a step of the same shape"):
            one.copy_(other)
        with pytest.raises(ValueError, match="other must be planned on the device"):
            one.copy_(one)


def test_new_weights_reach_the_copy_of_ape() -> None:
    with plugged("pools"), config():
        world = World([4])
        world.backend.allocate(1, 64)
        extend(world, (1, 0, 9))
        for text in world.texts:
            text.compressor.plain_ape = torch.randn_like(text.compressor.plain_ape)
            text.compressor.load_ape_weight(text.compressor.ape, text.compressor.plain_ape)
        extend(world, (1, 0, 41))
        world.check({1: 41})


def test_sglang_loads_it_as_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("kvfold", "kvfold.integrations.sglang.plugin:load", "sglang.srt.plugins")
    monkeypatch.setattr(sgl_plugins, "entry_points", lambda group: [point] if group == point.group else [])
    for asked in ("vllm", "vllm,sglang:fold"):
        monkeypatch.setenv("KVFOLD_ENGINES", asked)
        monkeypatch.setattr(sgl_plugins, "_plugins_loaded", False)
        with plugged(start=sgl_plugins.load_plugins):
            assert ('state="fold"' in switch.ON.get("sglang", "")) == ("sglang" in asked)
            assert hasattr(sgl_pool.DeepSeekV4TokenToKVPool._make_compress_state_pool, "__wrapped__") == ("sglang" in asked)


def test_what_is_on_is_said_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("make_forward_metadata_from_raw_verify", "_low_ratio_compress")
    before = [getattr(sgl_backend.DeepseekV4AttnBackend, name) for name in names]
    assert "sglang" not in switch.ON
    with plugged("pools"):
        assert 'state="pools"' in switch.ON["sglang"]
        assert all(getattr(sgl_backend.DeepseekV4AttnBackend, n) is not b for n, b in zip(names, before, strict=True))
        with pytest.raises(ValueError, match="once"):
            plugin.register("pools")
        monkeypatch.setenv("KVFOLD_ENGINES", "sglang")
        plugin.load()  # as the entry point of a process that has it on
    assert [getattr(sgl_backend.DeepseekV4AttnBackend, name) for name in names] == before


@pytest.mark.parametrize("state", STATES)
def test_caches_of_other_platforms_are_refused(state: str) -> None:
    with plugged(state), config():
        backend = Backend([4])
        backend.token_to_kv_pool._unified_kv = True
        with pytest.raises(UnsupportedError, match="unified_kv"):
            backend.extend([(1, 0, 8)])
        backend = Backend([4])
        backend.allocate(1, 64)
        metadata = backend.forward_metadata = backend.extend([(1, 0, 8)])
        compressor = make_compressor(0, 4, 512, rope_freqs(), 0)
        pool = backend.token_to_kv_pool
        with pytest.raises(UnsupportedError, match="bf16_store must be unset"):
            backend._forward_compress_all_in_one(
                kv_score_buffer=pool.get_attention_compress_states(0).kv_score_buffer.kv_score,
                kv_score_input=torch.zeros(8, 2048),
                ape=compressor.ape,
                head_dim=512,
                norm=compressor.norm,
                freqs_cis_cache=compressor.freqs_cis,
                kv_cache=pool.get_extra_key_buffer(0),
                is_indexer=False,
                rotate=False,
                compress_ratio=4,
                page_size=64,
                out_loc=metadata.core_metadata.c4_out_loc,
                bf16_store=True,
            )
