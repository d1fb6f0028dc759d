"""What `aot` compiles of calls that are described as for `warmup`: the sets of engines, and projections."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_aot import python

import kvfold
from kvfold import V4_CSA, V4_HCA, V41_MAIN_R2, CompressorSpec
from kvfold.backend_triton.keys import DequantizeKey, ProjectKey, RestoreKey, StoreKey, WindowKey, pages_of
from kvfold.precompile.asked import asked_of
from kvfold.precompile.calls import CallKernel, kernels_of
from kvfold.precompile.choices import fits
from kvfold.precompile.combinations import combinations
from kvfold.precompile.sets import SETS
from kvfold.storage.formats import FORMATS


def kernels(name: str) -> list[CallKernel]:
    return kernels_of(asked_of(SETS[name]))


@pytest.mark.parametrize("name", SETS)
def test_every_kernel_of_a_set_has_a_name_of_its_own(name: str) -> None:
    """And none that a kernel of the table has."""
    found = kernels(name)
    names = {one.name for one in found}
    assert len(names) == len(found) == len({one.variant(True) for one in found}) > 5
    assert not names & {one.name for one in combinations()}
    assert all(len(name) < 200 and set(name) <= set(" +-._") | {c for c in name if c.isalnum()} for name in names)


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_the_kernels_of_its_calls(name: str) -> None:
    wanted = {(key, may(key)) for keys, may in asked_of(SETS[name]) for key in keys}
    found = kernels(name)
    assert {(one.key, one.dependent) for one in found} <= wanted
    variants = {CallKernel(*one).variant(True) for one in wanted}
    assert {one.variant(True) for one in found} == variants
    kinds = {"v4-project": ProjectKey, "vllm": WindowKey, "vllm-v41": StoreKey, "sglang": WindowKey, "sglang-fold": RestoreKey}
    kinds["v4-project-fp8"] = DequantizeKey
    if name in kinds:
        assert any(isinstance(one.key, kinds[name]) for one in found)
    if name.startswith("vllm"):
        assert not any(one.dependent for one in found)
    for one in (one for one in found if isinstance(one.key, ProjectKey)):
        assert one.spills == one.key.config.spills and (one.spills > 0) == (one.key.config.parts == 1)
    for one in (one for one in found if isinstance(one.key, WindowKey)):
        assert one.spills == (one.key.config.spills if one.key.tables == "plain" else one.key.config.engine_spills)


SPECS = {"hca": V4_HCA, "csa": V4_CSA, "v41-r2": V41_MAIN_R2, "overlap": CompressorSpec(256, 128, overlap=True)}


@pytest.mark.parametrize("fmt", ["bf16", None])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_has_every_kernel_over_a_window_state(spec: CompressorSpec, fmt: str | None) -> None:
    """That calls over pages of any size, with any plan, get by their keys: with entry slots, and of fp32 what may be fp32."""
    call = {"specs": (spec,), "formats": (fmt,), "max_new_tokens": (1, 4, 8, 9, 8192), "states": ("window",)}
    call |= {"plans": ("plain", "engine", "ring"), "apart": (False, True)}
    outs = [{"rows": (torch.float32 if fmt is None else None,)}] + [{"latents": (True,)}] * (not spec.has_ape)
    wanted = {key for keys, _ in asked_of([call | out for out in outs]) for key in keys if isinstance(key, WindowKey)}
    found = {one.key() for one in combinations((spec,), (FORMATS.get(fmt),)) if one.kind == "window"}
    assert found == {key for key in wanted if key.types.entry_slots}
    lanes = spec.ratio == 128 and not spec.overlap
    assert {key.pages for key in found} == {"one", "any", *["lanes"] * lanes}


def test_every_format_is_compiled_for_every_kind_of_pages() -> None:
    """Also where pooled rows without a cache stand for all formats in the other ways of a call."""
    found = [one.key() for one in combinations((V4_HCA, V4_CSA)) if one.kind == "window"]
    for spec in (V4_HCA, V4_CSA):
        formats = {fmt for fmt in (None, *FORMATS.values()) if fits(spec, fmt)}
        wanted = set(product(formats, {pages_of(spec, size) for size in (1, 8, 128)}))
        assert {(key.fmt, key.pages) for key in found if key.spec == spec and key.tables == "plain"} == wanted


FEW = """
import sys
from pathlib import Path
import kvfold.precompile.sets as sets
from kvfold.precompile.asked import asked_of
from kvfold.precompile.calls import kernels_of
from kvfold.precompile.combinations import build
from kvfold_cli.app import app

folder = Path(sys.argv[1])
keep = {"specs": (sets.V41_MAIN_R1,), "formats": ("fp8_ds_mla_v41",), "max_new_tokens": (), "states": (), "plans": ()}
store = {"rows": (sets.BF16,), "norm_weight_dtypes": (None,), "slot_dtypes": (sets.INT64,)}
sets.SETS["vllm"] = (keep | store | {"pdl": False},)
app(["aot", "sm_90", str(folder / "made"), "--set", "vllm", "--workers", "1"], standalone_mode=False)
project = next(one for one in kernels_of(asked_of(sets.SETS["v4-project"])) if one.name.startswith("project h4096"))
made = build(project, "sm_90", folder, 0)
print(made.name, made.entry, made.bytes)
"""


def test_a_few_compile(tmp_path: Path) -> None:
    """By the command, which then compiles nothing else; and a projection."""
    said = python(tmp_path, FEW, tmp_path).splitlines()[-1].split()
    assert said[:2] == ["project", "h4096"] and said[-2] == "project_kernel" and int(said[-1]) > 1000
    report = json.loads((tmp_path / "made" / "kernels.json").read_text())
    (one,) = report["kernels"]
    assert (
        one["name"] == "store hd512 R1 no_ape eps1e-20 fp8_ds_mla_v41 rows_bf16 norm_none slots_int64 positions_int64 ordinary"
    )
    assert (tmp_path / "made" / one["file"]).stat().st_size == one["bytes"] > 1000


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ((), "specs must have one at least"),
        (({"specs": ()},), r"calls\[0\] must have arguments of warmup"),
        (({"specs": (), "formats": (), "device": 0},), r"calls\[0\] must say what calls will be"),
        (SETS["v4"][:1] + (SETS["v4"][0] | {"training": (512,), "max_new_tokens": ()},), "calls must not have training"),
    ],
)
def test_wrong_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple, words: str) -> None:
    monkeypatch.setattr("kvfold.backend_triton.build.INTERPRETED", False)
    with pytest.raises((TypeError, ValueError), match=words):
        kvfold.aot("sm_90", tmp_path, (), calls=calls)
    assert not list(tmp_path.iterdir()) and "kvfold.precompile.aot" in sys.modules
