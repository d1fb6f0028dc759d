"""What `aot` compiles for training: kernels that `warmup` would prepare too. One is compiled for each target, on sm_90 all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.aot_support import fake
from test_aot import python

import kvfold
from kvfold import V4_CSA, V4_HCA, V4_INDEXER, V41_MAIN_R2, CompressorSpec
from kvfold.precompile.combinations import SPECS, TARGETS, dependent, of_training
from kvfold.storage.formats import FORMATS
from kvfold.training.keys import Calls, training_keys
from kvfold.training.table import CONFIGS

BOTH = (torch.bfloat16, torch.float32)
KERNELS = ["forward", "entries", "read", "again", "finish", "spread", "sum"]


def test_every_kernel_has_a_name_of_its_own() -> None:
    every = list(of_training(SPECS, (None, *FORMATS.values()), BOTH, (8192, 65536)))
    assert len({one.name for one in every}) == len({one.variant() for one in every}) == len(every)
    assert {one.config.kernel for one in every} == set(KERNELS)
    forward = {(one.key.spec, one.fmt) for one in every if one.config.kernel == "forward"}
    for fmt in FORMATS.values():
        for spec in SPECS:
            fits = not fmt.head_dims or spec.head_dim in fmt.head_dims
            assert not ((spec, fmt) in forward and not fits)
            assert (spec, None) in forward
    assert all(any((spec, fmt) in forward for spec in SPECS) for fmt in FORMATS.values())


def test_warmup_would_prepare_all_of_it() -> None:
    every = list(of_training((V4_HCA, V41_MAIN_R2), (None, FORMATS["mxfp4"]), BOTH, (8192,)))
    calls = Calls((8192,), BOTH, apart=(False, True), latents=(False, True))
    keys = {
        key for spec in (V4_HCA, V41_MAIN_R2) for fmt in (None, FORMATS["mxfp4"]) for key in training_keys(spec, fmt, calls)
    }
    assert {one.key for one in every} <= keys
    assert {one.key.latent for one in every if one.key.spec == V41_MAIN_R2} == {False, True}


def test_every_row_of_the_table_serves_a_call() -> None:
    """So that none is there in vain."""
    specs = [CompressorSpec(n, ratio, rope_dim=16) for n in (16, 128, 256, 512, 1024, 4096) for ratio in (4, 128)]
    calls = Calls((512, 8192, 128 * 100, 128 * 150, 65536), BOTH[:1])
    served = {key.config for spec in specs for fmt in (None, FORMATS["bf16"]) for key in training_keys(spec, fmt, calls)}
    of_cut = {config for config in CONFIGS if config.kernel in ("fold", "tail", "folded")}  # sequences, in tests/parallel
    assert served == {*CONFIGS} - of_cut and len(of_cut) == 9


def test_aot_has_them_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {})
    for training in ((), (8192,)):
        report = kvfold.aot("sm_90", tmp_path, [V4_INDEXER], ["mxfp4"], training=training, workers=1)
        names = [kernel.name.split()[0] for kernel in report.kernels if kernel.name.startswith("train_")]
        assert names == ["train_forward", "train_read", "train_again", "train_sum"] * bool(training)
    for wrong in (8192, (-1,), ("8k",)):
        with pytest.raises((TypeError, ValueError), match=r"^training\b"):
            kvfold.aot("sm_90", tmp_path, [V4_CSA], ["mxfp4"], training=wrong, workers=1)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvfold_cli.app import app

    fake(monkeypatch, {})
    arguments = ["aot", "sm_90", str(tmp_path), "--spec", "hca", "--format", "rows", "--train", "8192", "--workers", "1"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    assert done.exit_code == 0 and "train_forward hd512 R128 plain" in done.output, done.output


FEW = """
import json, sys
from pathlib import Path
import torch
from kvfold import CompressorSpec
from kvfold.precompile import combinations as kernels
from kvfold.storage.formats import FORMATS
from kvfold.training import table

table.CONFIGS = (table.Config("forward", (16, 4096), (9, 8192), table.ANY, 4, ahead=4, slice=64), *table.CONFIGS)
bf16 = (torch.bfloat16,)
long, short = CompressorSpec(128, 16), CompressorSpec(64, 2, overlap=True, hadamard=True)
odd = CompressorSpec(64, 5, overlap=True, has_ape=False)  # whose fold is kept, though its rows are folded in groups
every = [
    *kernels.of_training((long,), (FORMATS["mxfp4"],), bf16, (160,)),
    *(one for one in kernels.of_training((short,), (None,), bf16, (160,)) if one.key.apart),
    *kernels.of_training((short,), (FORMATS["fp8_tensor"],), bf16, (160,)),
    *(one for one in kernels.of_training((odd,), (None,), bf16, (160,)) if one.key.apart and one.key.latent),
]
def first(kernel, **wanted):
    fitting = [one for one in every if one.config.kernel == kernel]
    return next(one for one in fitting if all(getattr(one.key, name) == value for name, value in wanted.items()))
targets = dict(zip(kernels.TARGETS, (
    [first("read", spec=short)], [first("forward", spec=short)], every, [first("spread")], [first("sum")], [first("finish")],
    [first("forward", spec=long)], [first("read", spec=long)],
), strict=True))
made = {}
for target, chosen in targets.items():
    for one in chosen:
        found = kernels.build(one, target, Path(sys.argv[1]), 0)
        waits = "griddepcontrol.wait" in kernels.compile_one(one, target).asm.get("ptx", "")
        made[f"{target} {found.name}"] = (found.bytes, found.resources.spilled, waits)
print(json.dumps(made))
"""


def test_a_few_compile(tmp_path: Path) -> None:
    """Every kernel for sm_90, where none spills, also of two tensors and with latents; and one for each other target."""
    made = json.loads(python(tmp_path, FEW, tmp_path))
    assert {name.split()[0] for name in made} == set(TARGETS)
    assert {name.split()[1] for name in made if name.startswith("sm_90 ")} == {f"train_{kernel}" for kernel in KERNELS}
    for name, (size, spilled, waits) in made.items():
        target = name.split()[0]
        assert size > 1000 and (not spilled or target != "sm_90"), name
        assert waits == dependent(target), name  # all are launched as dependents where there are such launches
