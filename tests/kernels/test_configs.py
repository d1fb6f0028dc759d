"""The table of configurations: every row can be chosen and compiles, nothing else can be, and the rest is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.helpers import Backend, Engine, make_tokens, norm_error
from support.window_support import WindowEngine, run

from kvfold import CompressorSpec, reference
from kvfold.backend_triton import table as configs
from kvfold.backend_triton.keys import Types, WindowKey
from kvfold.backend_triton.table import ANY, BUCKETS, CONFIGS, Config, UnsupportedError, choose
from kvfold.backend_triton.variants import draws_items, variant_of
from kvfold.contract import pooled_bound
from kvfold.storage.fold_state import state_kind

RATIOS = (1, 2, 3, 4, 5, 8, 9, 16, 48, 64, 100, 128, 129, 256, 1024, 4095, 4096)
SPECS = [
    CompressorSpec(1 << log, ratio, overlap, rope_dim=0) for log, ratio, overlap in product(range(4, 13), RATIOS, (False, True))
]
STEPS = (1, 2, 3, 4, 5, 8, 9, 16, 100, 4096, ANY)
ITEMS = (1, *(items for bound in BUCKETS[:-1] for items in (bound, bound + 1)), ANY)


def kinds_of(spec: CompressorSpec) -> list[str]:
    """Of the table's rows that serve calls of a spec."""
    return [state_kind(spec), *["mean"] * (state_kind(spec) == "fold"), "window", "store"]


CALLS = [(kind, spec, n) for spec, n in product(SPECS, STEPS) for kind in kinds_of(spec)]


def is_served(kind: str, spec: CompressorSpec) -> bool:
    """What the documentation promises: everything, but paged raw rows of a ratio that is no power of two."""
    return kind != "window" or spec.ratio & (spec.ratio - 1) == 0


def test_a_row_of_the_table_is_chosen_and_the_first_that_serves() -> None:
    for kind, spec, n in CALLS:
        if not is_served(kind, spec):
            continue
        for items in ITEMS:
            chosen = choose(kind, spec, n, items)
            index = CONFIGS.index(chosen)
            assert chosen.kind == kind and chosen.serves(kind, spec.head_dim, spec.window_rows, n, items)
            assert not any(c.serves(kind, spec.head_dim, spec.window_rows, n, items) for c in CONFIGS[:index])
            # What a kernel takes for granted of its row.
            assert chosen.num_warps in (1, 2, 4, 8) and chosen.ahead >= 1
            if not chosen.programs and kind in ("fold", "mean"):
                assert n <= chosen.ahead
            if not chosen.programs and kind == "rows":
                assert spec.window_rows <= chosen.ahead
            assert chosen.together == 1 or (kind in ("fold", "rows") and chosen.programs)
            # A ticket is drawn by one of two warps (backend_triton/kernels/items.py).
            assert not draws_items(spec, chosen) or chosen.num_warps <= 2
            assert chosen.pair_programs == 0 or (kind == "rows" and chosen.pair_programs <= chosen.programs)
            # Launches tell these numbers of windows apart and no others.
            assert chosen.bucket in BUCKETS
            # Slices cut a row evenly; over fold rows only programs that take items in turn, one window each, can share one.
            assert chosen.slice == 0 or spec.head_dim % min(chosen.slice, spec.head_dim) == 0
            shared = kind == "fold" and chosen.programs and chosen.together == 1
            assert chosen.slice == 0 or kind == "window" or shared


def test_every_row_can_be_chosen() -> None:
    assert len(set(CONFIGS)) == len(CONFIGS)
    chosen = {choose(kind, spec, n, items) for kind, spec, n in CALLS if is_served(kind, spec) for items in ITEMS}
    assert chosen == set(CONFIGS)


def test_window_sums_do_not_follow_the_row() -> None:
    """Rows for short and for long steps sum in the same order, or a sequence would have other bits when it is cut otherwise."""
    for spec in SPECS:
        if is_served("window", spec):
            rows = {choose("window", spec, n, items) for n in STEPS for items in ITEMS}
            types = Types(*[torch.float32] * 3, None, True)
            built = [dict(variant_of(WindowKey(spec, None, row, types, True), True, False).constants) for row in rows]
            assert len({(constants["LANES"], constants["HOW"].TOGETHER) for constants in built}) == 1
            assert {row.prompt for row in rows} == {False, True}


def test_what_is_not_supported_says_what_is() -> None:
    refused = [(kind, spec) for kind, spec, n in CALLS if n == 1 and not is_served(kind, spec)]
    assert {spec.ratio for _, spec in refused} == {3, 5, 9, 48, 100, 129, 4095}
    for kind, spec in refused:
        with pytest.raises(UnsupportedError, match=r"\bspec\b") as caught:
            choose(kind, spec, 4)
        message = str(caught.value)
        for config in CONFIGS:  # every row of the kind, and of no other
            row = f"{config.kind}: head_dim {config.head_dims[0]} to {config.head_dims[1]}"
            assert (row in message) == (config.kind == kind)
        assert f"ratio={spec.ratio}" in message and "power of two" in message
    with pytest.raises(UnsupportedError) as caught:
        choose("ring", SPECS[0], 1)
    assert all(f"{kind}: " in str(caught.value) for kind in ("fold", "rows", "window", "store"))
    assert issubclass(UnsupportedError, ValueError)


@pytest.mark.parametrize("ratio, overlap", [(3, False), (3, True), (12, False)])
def test_an_odd_ratio_over_paged_rows(backend: Backend, ratio: int, overlap: bool) -> None:
    """No kernel is configured for it, which is said before anything is written; the torch backend does it."""
    spec = CompressorSpec(head_dim=64, ratio=ratio, overlap=overlap)
    tokens = make_tokens(spec, 3 * ratio + 1, seed=5)
    engine = WindowEngine(spec, backend, num_sequences=1, length=len(tokens), page_size=5)
    if backend.name == "torch":
        pooled = run(engine, 0, tokens, [ratio + 1, 1, len(tokens) - ratio - 2])
        want = reference.pooled(tokens, spec, engine.weights.ape)
        for window, row in pooled.items():
            assert norm_error(row[None], want[window][None]) <= pooled_bound(spec.window_rows)
        assert set(pooled) == {0, 1, 2}
        return
    before = engine.snapshot()
    with pytest.raises(UnsupportedError, match=rf"\bspec\b.*ratio={ratio}\b.*power of two"):
        engine.step([(0, 0, tokens)])
    for was, now in zip(before, engine.snapshot(), strict=True):
        assert torch.equal(was, now)


COMPILE = """
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from kvfold.precompile import combinations as aot
from test_configs import same_code

if __name__ == "__main__":
    one_each = {}
    for c in aot.combinations():
        if c.config is not None and c.other is None:
            one_each.setdefault(c.config, c)
    rows = sorted(one_each.values(), key=lambda c: c.config.head_dims)
    chosen = {*{same_code(c.config): c for c in rows}.values(), *(c for c in rows if not c.config.registers)}
    build = partial(aot.build, target="sm_90", folder=Path(sys.argv[1]), allowed=None)
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        for c, kernel in zip(chosen, pool.map(build, chosen)):
            print(aot.table.CONFIGS.index(c.config), kernel.bytes, kernel.resources.spilled)
"""


def same_code(config: Config) -> tuple:
    """What a kernel's code is chosen by: rows that have this in common differ in widths, warps and how many share the work."""
    return (
        config.kind, config.programs > 0, config.ahead, config.slice > 0, config.tile, config.together, config.prompt,
        config.registers > 0,
    )  # fmt: skip


def test_every_row_compiles(tmp_path: Path) -> None:
    """For Hopper, where no GPU is needed, with the first spec and format that it serves. Rows without a bound on registers, all
    of them, do not spill. Of those with a bound that have the same code, the one for the widest entries; `make aot` compiles
    the others, which takes longer, and what they spill depends on Triton (test_aot.py)."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {CONFIGS[i]: (size, spilled) for i, size, spilled in (map(int, line.split()) for line in done.stdout.splitlines())}
    assert {same_code(config) for config in found} == {same_code(config) for config in CONFIGS}
    assert min(size for size, _ in found.values()) > 1000
    unbound = {config for config in CONFIGS if not config.registers}
    assert unbound < found.keys() and not any(found[config][1] for config in unbound)


@pytest.mark.parametrize("rewindable", [20, 3, 2])
def test_programs_that_share_a_window_give_its_bits(backend: Backend, monkeypatch: pytest.MonkeyPatch, rewindable: int) -> None:
    """Prefills that begin and end inside a window or with it: the same records and state rows in slices as whole.

    With stretches of 4 tokens, all rows of a window are kept where 20 tokens can be rewound; where 3 or 2 can, only rows of its
    last stretch, which programs that share it store when they have left their slices (`fold_last`).
    """
    if backend.name == "torch":
        pytest.skip("the torch backend has no table")
    spec = CompressorSpec(head_dim=32, ratio=16, rope_dim=16)
    tokens = make_tokens(spec, 36, seed=3)
    row = choose("fold", spec, 16)
    found = []
    for config in (row, replace(row, ahead=4, slice=8, programs=12 / configs.MULTIPROCESSORS)):
        monkeypatch.setattr(configs, "CONFIGS", tuple(config if c == row else c for c in CONFIGS))
        engine = Engine(spec, backend, num_slots=3, max_new_tokens=rewindable)
        engine.step([(1, 0, tokens[:5]), (0, 0, tokens[:1])])
        for _ in range(2):  # a repeated call finds the workspace as the first did
            engine.step([(1, 5, tokens[5:]), (0, 1, tokens[1:16]), (2, 0, tokens[:32])])
        found.append((engine.records(1, 2), engine.records(0, 1), engine.records(2, 2), *engine.snapshot()))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_row_serves_inside_its_bounds() -> None:
    row = Config("rows", (64, 256), (2, 8), 5, ahead=8, num_warps=2)
    assert row.serves("rows", 64, 2, 5, ANY) and row.serves("rows", 256, 8, 1, 1)
    for call in [("fold", 64, 2, 5), ("rows", 32, 2, 5), ("rows", 512, 2, 5), ("rows", 64, 1, 5), ("rows", 64, 9, 5)]:
        assert not row.serves(*call, 1)
    assert not row.serves("rows", 64, 2, 6, 1)
