"""What the table chooses for V4's calls, by value, and how it counts per multiprocessor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvfold import V4_CSA, V4_HCA, V4_INDEXER, V41_MAIN_R2, CompressorSpec
from kvfold.backend_triton.table import ANY, BUCKETS, COLUMNS, CONFIGS, ROWS, choose, in_words, item_bucket, pair_buckets

MIDDLE = CompressorSpec(256, 4, overlap=True)
# spec, kind, new tokens, windows of the call: warps, ahead, slice, tile, registers, programs, together, pair_programs,
# prompt, spills, pair_spills.
CHOSEN = [
    (V4_HCA, "fold", 1, 64, (4, 1, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 3, 64, (4, 4, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 8, 4096, (4, 8, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 9, 66, (8, 16, 256, 128, 0, 264, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 128, 67, (8, 16, 0, 128, 0, 264, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 128, 132, (8, 16, 0, 128, 0, 264, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 128, 133, (4, 16, 256, 128, 0, 264, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 128, 198, (4, 16, 256, 128, 0, 264, 1, 0, False, 0, 0)),
    (V4_HCA, "fold", 128, 199, (8, 8, 0, 128, 128, 264, 1, 0, False, 4, 0)),
    (V4_HCA, "fold", 128, 264, (8, 8, 0, 128, 128, 264, 1, 0, False, 4, 0)),
    (V4_HCA, "fold", 128, 265, (4, 4, 0, 128, 128, 528, 2, 0, False, 160, 0)),
    (replace(V4_HCA, head_dim=128), "fold", 4, 1, (1, 4, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (replace(V4_HCA, head_dim=128), "fold", 128, 1, (1, 8, 0, 128, 0, 2112, 1, 0, False, 0, 0)),
    (replace(V4_HCA, head_dim=256), "fold", 1, 1, (2, 1, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (replace(V4_HCA, head_dim=256), "fold", 128, 1, (2, 8, 0, 128, 0, 1056, 1, 0, False, 0, 0)),
    (V4_CSA, "rows", 8, 4096, (4, 8, 0, 128, 128, 0, 1, 0, False, 0, 4)),
    (V4_CSA, "rows", 9, 2376, (2, 4, 0, 128, 128, 1188, 1, 792, False, 64, 84)),
    (V4_CSA, "rows", 9, 2377, (2, 8, 0, 128, 128, 1056, 1, 792, False, 236, 328)),
    (V4_INDEXER, "rows", 4, 1, (2, 8, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V4_INDEXER, "rows", 9, 1, (1, 8, 0, 128, 128, 2112, 2, 0, False, 168, 0)),
    (MIDDLE, "rows", 8, 1, (4, 8, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (MIDDLE, "rows", 9, 1, (1, 8, 0, 128, 0, 1584, 1, 0, False, 0, 0)),
    (V4_HCA, "window", 8, 1, (4, 4, 32, 128, 128, 528, 1, 0, False, 340, 0)),
    (V4_HCA, "window", 9, 1, (4, 4, 64, 64, 128, 1056, 1, 0, True, 264, 0)),
    (replace(V4_HCA, head_dim=128), "window", 8, 1, (4, 4, 32, 128, 128, 528, 1, 0, False, 348, 0)),
    (V4_CSA, "window", 8, 1, (4, 4, 0, 128, 128, 528, 1, 0, False, 0, 0)),
    (V4_CSA, "window", 9, 1, (4, 4, 0, 128, 128, 528, 1, 0, True, 8, 0)),
    (MIDDLE, "window", 8, 1, (2, 4, 0, 128, 128, 1056, 1, 0, False, 20, 0)),
    (MIDDLE, "window", 9, 1, (2, 4, 0, 128, 128, 1056, 1, 0, True, 16, 0)),
    (V4_INDEXER, "window", 9, 1, (1, 4, 0, 128, 128, 2112, 1, 0, True, 4, 0)),
    (V41_MAIN_R2, "rows", 8, 4096, (2, 2, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V41_MAIN_R2, "rows", 9, 1, (2, 4, 0, 128, 128, 1188, 1, 792, False, 64, 84)),
    (V4_HCA, "store", 1, 1, (2, 1, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (MIDDLE, "store", 1, 1, (2, 1, 0, 128, 0, 0, 1, 0, False, 0, 0)),
    (V4_INDEXER, "store", 1, 1, (1, 1, 0, 128, 0, 0, 1, 0, False, 0, 0)),
]


@pytest.mark.parametrize("spec, kind, new, windows, want", CHOSEN)
def test_what_a_call_gets_on_132_multiprocessors(spec: CompressorSpec, kind: str, new: int, windows: int, want: tuple) -> None:
    c = choose(kind, spec, new, item_bucket(windows, 132))
    have = c.num_warps, c.ahead, c.slice, c.tile, c.registers, c.programs_on(132), c.together, c.pair_programs_on(132)
    assert (*have, c.prompt, c.spills, c.pair_spills) == want


def test_windows_and_programs_follow_the_device() -> None:
    assert [item_bucket(windows, 80) for windows in (1, 40, 41, 80, 120, 121, 160, 1440, 1441)] == [
        0.5, 0.5, 1, 1, 1.5, 2, 2, 18, ANY,
    ]  # fmt: skip
    assert item_bucket(33, 65) == 1 and item_bucket(32, 65) == 0.5  # half a multiprocessor has no window
    assert item_bucket(ANY, 1) == ANY
    long = choose("rows", V4_CSA, 9, 18)
    assert (long.programs_on(80), long.pair_programs_on(80)) == (720, 480)
    assert choose("fold", V4_HCA, 1).programs_on(80) == 0


def test_two_compressors_have_buckets_where_both_keep_input_rows() -> None:
    assert pair_buckets({"rows"}) == BUCKETS
    assert pair_buckets({"rows", "fold"}) == pair_buckets({"fold"}) == (ANY,)


def test_the_table_is_printed_by_what_is_written() -> None:
    words = in_words()
    assert len(words) == len(ROWS) < len(CONFIGS) and all(len(row) == len(COLUMNS) for row in words)
    for row, said in zip(ROWS, words, strict=True):
        named = dict(zip(COLUMNS, said, strict=True))
        assert named["kind"] == row[0].kind and set(named["warps"].split(", ")) == {str(c.num_warps) for c in row}
        # What is said once for all widths is the same for all.
        same = {
            (c.kind, c.window_rows, c.max_new_tokens, c.ahead, c.slice, c.tile, c.registers, c.together, c.bucket) for c in row
        }
        assert len(same) == 1
