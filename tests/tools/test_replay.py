"""`dump` and `replay`: every bit of a call comes back from its file, and a file that is not whole is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.debug_support import Call, wrong
from support.helpers import Backend, bits
from support.replay_support import CASES, FOLD, HEADLINES, Made, pair, rewrite, snapped
from torch import Tensor

import kvfold
from kvfold import EntryCache, FoldState
from kvfold.debug.replay import Replay
from kvfold.storage.formats import FORMATS


def same(got: Tensor, want: Tensor) -> bool:
    got, want = (bits(x) if x.is_floating_point() else x for x in (got, want))
    return torch.equal(got.cpu(), want.cpu())


def check_replayed(path: Path, made: Made, before: dict[str, Tensor], **options: Any) -> Replay:
    """A replay has every bit that the call left; where the file has not all of a tensor, the call left the rest alone."""
    again = kvfold.replay(path, **options)
    ours, theirs, stored = again.tensors, made.tensors(), load_file(path)
    assert ours.keys() == theirs.keys() == before.keys()
    for name, want in theirs.items():
        assert ours[name].shape == want.shape and ours[name].dtype == want.dtype, name
        kept = stored.get(f"{name}.kept")
        if kept is None:
            assert same(ours[name], want), name
            continue
        others = torch.ones(len(want), dtype=torch.bool)
        others[kept] = False
        assert same(ours[name].cpu()[kept], want.cpu()[kept]), name
        assert same(want.cpu()[others], before[name].cpu()[others]), f"{name}: the call wrote what the file does not have"
        assert not (ours[name].cpu()[others] != (-1 if name.endswith("positions") else 0)).any(), name
    return again


@pytest.mark.parametrize("name", CASES)
def test_a_replay_has_the_bits_of_the_call(backend: Backend, name: str, tmp_path: Path) -> None:
    made, path = CASES[name](backend.device), tmp_path / "call.safetensors"
    before = {key: tensor.clone() for key, tensor in made.tensors().items()}
    made.dump(path, backend.name)
    assert all(same(tensor, before[key]) for key, tensor in made.tensors().items()), "dump has written"
    refused = getattr(made.args[1], "errors", torch.zeros(1)).clone()
    made.call(backend.name)
    again = check_replayed(path, made, before, device=backend.device)
    assert (again.name, again.backend, again.device) == (made.function.__name__, backend.name, backend.device)
    assert again.errors == {"bare": 2}.get(name, int(name in HEADLINES))
    if name != "placed":  # which has nothing to count in
        assert again.errors == int(made.args[1].errors) - int(refused)
    assert f"{again.errors} refused" in str(again)
    written = [key for key, tensor in made.tensors().items() if not same(tensor, before[key])]
    assert any("rows" in key or "pages" in key or "kv" in key for key in written)
    for key, tensor in made.tensors().items():  # kernels are chosen by this
        ours = again.tensors[key]
        assert (ours.data_ptr() - tensor.data_ptr()) % 16 == 0 or tensor.numel() == 0
        pairs = zip(ours.shape, ours.stride(), tensor.stride(), strict=True)
        assert all((one - other) % 16 == 0 for size, one, other in pairs if size > 1), key


def test_snapshots_of_pages_that_keep_nothing(tmp_path: Path) -> None:
    made, path = snapped(FOLD, 16, torch.device("cpu")), tmp_path / "call.safetensors"
    before = {key: tensor.clone() for key, tensor in made.tensors().items()}
    made.dump(path, "torch")
    made.call("torch")
    again = check_replayed(path, made, before, device="cpu")
    assert again.compressors[0].snapshots.page_size == 16 and again.check().equal


@pytest.mark.parametrize("name", CASES)
def test_check_of_a_replay(name: str, tmp_path: Path) -> None:
    made, path = CASES[name](torch.device("cpu")), tmp_path / "call.safetensors"
    made.dump(path, "torch")
    direct = kvfold.check(*made.args, **made.options, backend="torch")
    report = kvfold.replay(path, device="cpu", backend="torch").check()
    assert report == direct
    assert report.headline == HEADLINES.get(name, "equal")
    assert report.entries or name == "bare"


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_every_format(fmt: str, tmp_path: Path) -> None:
    """Also scales in a buffer of their own; and all of the state and cache, if wanted."""
    call = Call("indexer" if FORMATS[fmt].head_dims == (128,) else "csa", fmt)
    made = Made(kvfold.compress, *call.args, **call.weights)
    path, whole = tmp_path / "call", tmp_path / "whole"
    before = {key: tensor.clone() for key, tensor in made.tensors().items()}
    made.dump(path, "torch", full_history=call.history)
    made.dump(whole, "torch", whole=True)
    made.call("torch")
    check_replayed(path, made, before, device="cpu")
    assert all(same(x, made.tensors()[key]) for key, x in kvfold.replay(whole, device="cpu").tensors.items())
    assert kvfold.replay(path, device="cpu").check().referenced == 3  # of the sequence with a history too
    assert kvfold.replay(whole, device="cpu").check().referenced == 1
    assert path.stat().st_size < whole.stat().st_size


def test_a_format_of_the_users_own(tmp_path: Path) -> None:
    from dataclasses import replace

    call = Call("indexer", "indexer_mxfp4")
    fmt = replace(FORMATS["indexer_mxfp4"], name="mine", page_align=512, head_dims=(128, 256))
    cache = EntryCache.allocate(fmt, 3, 8, call.spec)
    kvfold.dump(tmp_path / "x", *call.args[:3], cache, **call.weights)
    assert kvfold.replay(tmp_path / "x", device="cpu").compressors[0].cache.format == fmt


def test_a_file_is_small(tmp_path: Path) -> None:
    """What its size depends on is what the documentation says: slots and pages of the step, not of the pools."""
    sizes = []
    for pages in (8, 800):
        call = Call("csa", "fp8_ds_mla")
        state = FoldState.allocate(call.spec, pages, 4)
        state.rows[:3], state.positions[:3] = call.state.rows, call.state.positions
        cache = EntryCache.allocate("fp8_ds_mla", pages, 8, call.spec)
        kvfold.dump(tmp_path / "x", call.new, call.plan, state, cache, **call.weights)
        sizes.append((tmp_path / "x").stat().st_size)
    most = call.new.numel() * 4 + 2 * state.bytes_per_slot + 2 * cache.page_bytes + 16384 + call.weights["ape"].numel() * 4
    assert abs(sizes[0] - sizes[1]) < 64 and sizes[1] < most + call.weights["norm_weight"].numel() * 4


def test_what_was_wrong_is_wrong_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dumped call through a backend that is wrong, and one over a state that somebody has overwritten."""
    call, path = Call("csa", "fp8_ds_mla"), tmp_path / "call.safetensors"
    with monkeypatch.context() as patch:

        def spoil(state, cache, rows, snapshots) -> None:
            state.rows[2, int((state.held()[2] == 13).nonzero()[0]), 5] += 1
            cache.pages[1, 576 + 5] ^= 1

        wrong(patch, spoil)
        kvfold.dump(path, *call.args, **call.weights, backend="triton")
        report = call.check(backend="triton")
        again = kvfold.replay(path, device="cpu").check()
        assert again == report and [d.stage for d in again.differences] == ["record bytes", "state row"]
    row = int((call.state.held()[2] == 3).nonzero()[0])
    call.state.rows[2, row, 300] += 3.0
    kvfold.dump(path, *call.args, **call.weights, full_history=call.history)
    report, again = call.check(full_history=call.history), kvfold.replay(path, device="cpu")
    assert again.check() == report and report.first is not None
    assert (report.first.stage, report.first.window, report.first.channel) == ("pooled row", 1, 300)
    kvfold.compress(*call.args, **call.weights)
    assert torch.equal(again.compressors[0].cache.pages[1:], call.cache.pages[1:])


def test_a_plan_written_after_its_update(tmp_path: Path) -> None:
    """The plan is kept as it is, with what it was built from: what does not go together is found."""
    call, path = Call("csa", "fp8_ds_mla"), tmp_path / "call.safetensors"
    call.plan.state_slots[0] = 1
    kvfold.dump(path, *call.args, **call.weights)
    report = kvfold.replay(path, device="cpu").check()
    assert report == call.check() and report.first is not None and report.first.stage == "plan"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "call.safetensors"
    pair(torch.device("cpu")).dump(path, "torch")
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "none or is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "none or is damaged"),
    "text": (lambda path: path.write_text("a bug report " * 9), "none or is damaged"),
    "a bit": (lambda path: flip(path, -5), r"damaged: tensor \S+ is missing, new or changed"),
    "a bit of a number": (
        lambda path: flip(path, path.read_bytes().index(b'entry_capacity\\": ') + 18),
        "damaged: its numbers have changed",
    ),
    "foreign": (lambda path: save_file({"x": torch.zeros(3)}, path), "another safetensors file"),
    "no header": (lambda path: save_file({}, path, metadata={"kvfold.dump": "1"}), "damaged: 'crc32'"),
    "version": (
        lambda path: rewrite(path, lambda tensors, said, about: said.update({"kvfold.dump": "7"})),
        "format version 1, .* has version 7, of kvfold 0",
    ),
    "tensor missing": (
        lambda path: rewrite(path, lambda tensors, said, about: tensors.pop("0.kv_score")),
        "damaged: tensor 0.kv_score is missing",
    ),
    "which rows is missing": (
        lambda path: rewrite(path, lambda tensors, said, about: [x.pop("0.rope.kept") for x in (tensors, about["crc32"])]),
        r"damaged: tensor 0.rope must have shape \[4096, 8\]",
    ),
    "number missing": (
        lambda path: rewrite(path, lambda tensors, said, about: about["plan"].pop("ratio")),
        "damaged: plan.ratio is missing",
    ),
    "spec": (
        lambda path: rewrite(path, lambda tensors, said, about: about["compressors"][0]["spec"].update(head_dim=48)),
        r"damaged: compressors\[0\].spec: head_dim must be a power of two",
    ),
    "shape": (
        lambda path: rewrite(path, lambda tensors, said, about: about["tensors"]["0.state.rows"].update(shape=[1, 2, 3])),
        r"damaged: tensor 0.state.rows.kept must be torch.int64 \[1\] at most, got torch.int64 \[2\]",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_files_that_are_not_whole(good: Path, what: str, tmp_path: Path) -> None:
    path = tmp_path / "call.safetensors"
    shutil.copy(good, path)
    kvfold.replay(path, device="cpu")
    spoil, message = DAMAGES[what]
    spoil(path)
    with pytest.raises(ValueError, match=rf"^path must name a (whole )?file of .*{message}"):
        kvfold.replay(path, device="cpu")


def test_mistakes(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, path = Call("csa", "fp8_ds_mla"), tmp_path / "call.safetensors"
    with pytest.raises(ValueError, match=r"^ape must have shape"):
        kvfold.dump(path, *call.args, **call.weights | {"ape": torch.zeros(3, 1024)})
    with pytest.raises(ValueError, match=r"^full_history must have"):
        kvfold.dump(path, *call.args, **call.weights, full_history=[None])
    with pytest.raises(RuntimeError, match=r"^dump must be called outside of torch.compile"):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        kvfold.dump(path, *call.args, **call.weights)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        kvfold.replay(path)
    with pytest.raises(ValueError, match=r"^backend must be"):
        kvfold.replay(good, device="cpu", backend="cuda")
    with pytest.raises(ValueError, match=r"^device must be on a CPU or a GPU"):
        kvfold.replay(good, device="meta")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for run in (lambda: kvfold.dump(path, *call.args, **call.weights), lambda: kvfold.replay(good)):
        with pytest.raises(ImportError, match=r"kvfold\[debug\]"):
            run()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_call_of_a_gpu_on_a_cpu(name: str, tmp_path: Path) -> None:
    """A maintainer without the user's GPU: the torch backend there, and what does not depend on rounding has the same bits."""
    made, path = CASES[name](torch.device("cuda", 0)), tmp_path / "call.safetensors"
    made.dump(path, "triton")
    again, there = kvfold.replay(path, device="cpu"), kvfold.replay(path)
    assert (again.backend, there.backend, there.device.type) == ("torch", "triton", "cuda")
    assert again.about["device"]["name"] == torch.cuda.get_device_name(0)
    for key in made.tensors():
        if key.endswith(".positions") or key == "plan.errors":
            assert same(again.tensors[key], there.tensors[key]), key
    assert again.check().headline == there.check().headline == HEADLINES.get(name, "equal")


@pytest.mark.gpu
def test_a_capture_is_no_place_for_a_dump(tmp_path: Path) -> None:
    made = pair(torch.device("cuda", 0))
    made.call("triton")  # compiled before the capture
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"^dump must be called outside of a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        made.dump(tmp_path / "x", "triton")
    assert not list(tmp_path.iterdir())
