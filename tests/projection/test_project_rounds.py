"""Which row of the table a longer step takes, and where it is cut in two: by whole rounds of programs over the GPU."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend
from support.project_support import Projected

from kvfold import CompressorSpec
from kvfold.backend_triton import launch_product
from kvfold.backend_triton.keys import project_keys
from kvfold.backend_triton.table import TILINGS, tiling, tilings, whole_rounds
from kvfold.storage.step import Projection
from kvfold.testing.projected import make_hidden, make_scaled_weight, make_weight

SPEC = CompressorSpec(head_dim=64, ratio=128, rope_dim=8)  # of 128 columns
ROUNDS = [row for row in TILINGS if row.round]
COLUMNS = (32, 512, 1024, 2560, 4096)
TOKENS = (*range(65, 1300, 33), 1536, 1664, 2048, 2049, 2304, 4096, 8192, 10_000)


def soonest(tokens: int, columns: int, count: int) -> float:
    return min(row.time(tokens, columns, count) for row in ROUNDS)


@pytest.mark.parametrize("count", [16, 78, 132])
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_soonest_row(columns: int, count: int) -> None:
    for tokens in TOKENS:
        row = tiling(tokens, columns, count)
        assert row.time(tokens, columns, count) == soonest(tokens, columns, count)
        assert (row, False) in tilings(columns) and (row, False) in tilings(columns, True)


@pytest.mark.parametrize("count", [16, 78, 132])
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_cut_fills_rounds_and_is_sooner_done(columns: int, count: int) -> None:
    last, cuts = TILINGS[-1], 0
    for tokens in TOKENS:
        cut = whole_rounds(tokens, columns, count)
        cuts += cut > 0
        if cut:
            assert 0 < cut < tokens and cut % last.tokens == 0
            assert -(-last.tiles(cut, columns) // count) == last.tiles(tokens, columns) // count
            assert tiling(cut, columns, count) is last and whole_rounds(cut, columns, count) == 0
            both = last.time(cut, columns, count) + soonest(tokens - cut, columns, count)
            assert both < 0.95 * soonest(tokens, columns, count)
    assert cuts or (columns, count) not in ((1024, 132), (2560, 132))


def test_steps_of_v4_pro() -> None:
    """256 sequences with 4 new tokens each: 6 rows of tiles fill a round of an H200, and a short step is left."""
    assert whole_rounds(1024, 2560, 132) == 768 and tiling(256, 2560, 132).parts == 1
    assert whole_rounds(1024, 1024, 132) == whole_rounds(256, 2560, 132) == whole_rounds(64, 2560, 132) == 0
    assert [tiling(256, columns, 132).parts for columns in (1024, 2560)] == [4, 1]


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("columns", [128, 1024, 2560])
def test_steps_of_any_length_ask_for_kernels_that_warmup_makes(columns: int, scaled: bool) -> None:
    """Also for the few tokens that a cut leaves: with weights in FP8 these asked for rows of bf16 weights."""
    width, asked, cuts = 256, set(), set()
    made = make_scaled_weight(columns, width) if scaled else make_weight(columns, width)
    prepared = set(project_keys(columns, (width,), (False,), (1,), ("fp8" if scaled else "bf16",)))
    most = 2600
    hidden, kv_score = torch.empty(most, width, dtype=torch.bfloat16), torch.empty(most, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_product, "launcher_of", lambda key, device: asked.add(key) or (lambda *how: None))
        for gpu in (16, 132):
            patch.setattr(launch_product, "multiprocessors", lambda device, gpu=gpu: gpu)
            for count in (*range(0, 200), *range(200, most, 37), 769, 770, 832, 833, 2049, 2112, 2113):
                cut = whole_rounds(count, columns, gpu)
                cuts |= {0 < count - cut <= 64} if cut else set()
                step = Projection(hidden[:count], ((made,),), round_kv_score=False)
                launch_product.product_triton(step, (kv_score[:count],), pdl=False)
    assert cuts == {True, False}
    assert asked == prepared


def kv_score_of(
    count: int, width: int, multiprocessors: int, backend: Backend, scaled: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """By a GPU of so many; and the tokens of each product. scaled: by a weight in FP8."""
    weight = make_scaled_weight(128, width, device=backend.device) if scaled else None
    taken, kv_score = [], torch.full((count, 128), torch.nan, device=backend.device)
    project = launch_product.project
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_product, "multiprocessors", lambda device: multiprocessors)
        patch.setattr(launch_product, "project", lambda *how: taken.append(len(how[0])) or project(*how))
        Projected(SPEC, backend, width).step(make_hidden(count, width), [(0, 0, count)], weight, kv_score=kv_score)
    return kv_score.view(torch.int32), taken


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp8"])
def test_a_step_that_is_cut_has_the_same_bits(scaled: bool, backend: Backend) -> None:
    """Of 128 columns on a GPU of two multiprocessors: a round is two tiles of 128 tokens."""
    if backend.name == "torch":
        pytest.skip("it has no table")
    for count, cut in ((260, 256),) if backend.slow else ((260, 256), (300, 256), (513, 512), (600, 512)):
        right, whole = kv_score_of(count, 256, 132, backend, scaled)
        found, parts = kv_score_of(count, 256, 2, backend, scaled)
        assert (whole, parts) == ([count], [cut, count - cut])
        assert torch.equal(found, right) and not right.view(torch.float32).isnan().any()
