"""A file of `dump` may be anybody's: whatever it says, a replay or one error that names it, in little time and room."""

from __future__ import annotations

import copy
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.replay_support import CASES, pair, rewrite

import kvfold
from kvfold.debug import file as debug_file

ROOM = 64 << 20  # for all tensors of a call
FILES = 60  # of each call
SECONDS = 20.0  # of this process; a good file takes a twentieth of one
NUMBERS = (
    -1, 0, 1, 2, 3, 5, 7, 8, 16, 17, 64, 4095, 4096, 4097, 1 << 20, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40,
    1 << 48, 1 << 62, 1 << 63, 1 << 64, 10**30, -(1 << 31), -(1 << 63), 0.5, -0.0, 1e-300, 1e308,
)  # fmt: skip
JUNK = (None, True, False, "", "x", "fp32", "\x1b[2J", "9" * 400, [], [1], [[]], {}, {"x": 1}, [0] * 300, float("nan"),
        float("inf"))  # fmt: skip
VALUES = (*range(-3, 12), 31, 63, 64, 4096, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, -(1 << 31))


LIES = tuple((old.encode(), new.encode()) for old, new in (
    ('"I32"', '"F8_E4M3"'), ('"F32"', '"F4"'), ('"F32"', '"I32"'), ('"data_offsets":[', '"data_offsets":[9'), ("{", "[" * 9999),
    ('"shape":[', '"shape":[9'), ('"shape":[', '"shape":[-1,'), ('"dtype"', '"Dtype"'), ('"__metadata__"', '"__meta__"'),
    ("plan.items", "plan.itemz"), ("0.kv_score", "0.rope.kept"), (r'\"ratio\"', r'\"ratio\": 4, \"ratio\"'),
))  # fmt: skip


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a tree of JSON."""
    found = [path] if path else []
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            found += places(tree[key], (*path, key))
    return found


def change_number(rng: random.Random, tensors: dict, about: dict) -> None:
    """One field of the metadata: another value, none, a new one, or a neighbour's."""
    path = rng.choice(places(about))
    for parent in path[:-1]:
        about = about[parent]
    key, kind = path[-1], rng.random()
    if kind < 0.5:
        about[key] = rng.choice(NUMBERS)
    elif kind < 0.7:
        about[key] = copy.deepcopy(rng.choice(JUNK))
    elif kind < 0.8:
        del about[key]
    elif kind < 0.9 and isinstance(about, dict):
        about[rng.choice(("new", "", "0.kv_score", "history.0", "history.1", "plan.kv_table"))] = copy.deepcopy(about[key])
    elif isinstance(about[key], (int, float)):
        about[key] += rng.choice((-1, 1, 2, 16))
    else:
        about[key] = [about[key]] if rng.random() < 0.5 else {"x": about[key]}


def change_tensor(rng: random.Random, tensors: dict, about: dict) -> None:
    """One tensor of the file: other values, shape, dtype or name; mostly with sum and shape in the metadata to match."""
    name = rng.choice(sorted(tensors))
    tensor, kind = tensors[name].clone(), rng.random()
    if kind < 0.6 and tensor.numel():
        flat = tensor.view(-1)
        for _ in range(rng.choice((1, 1, 3, 20))):
            value = rng.choice(VALUES)
            flat[rng.randrange(len(flat))] = value & 255 if tensor.dtype == torch.uint8 else value
    elif kind < 0.75:
        tensor = tensor[: rng.randint(0, len(tensor))].clone() if rng.random() < 0.5 else torch.cat((tensor, tensor))
    elif kind < 0.85:
        tensor = tensor.to(rng.choice((torch.float32, torch.int64, torch.int32, torch.uint8, torch.float16, torch.bool)))
    elif kind < 0.95:
        tensor = tensor.reshape(rng.choice(((-1,), (1, -1), (*tensor.shape, 1))))
    else:
        tensors[rng.choice(("new", f"{name}.kept", "history.0"))] = tensor.clone()
    tensors[name] = tensor
    if rng.random() < 0.9:
        about["crc32"] = {key: debug_file._sum(one) for key, one in tensors.items()}
    layout = about["tensors"].get(name) if isinstance(about.get("tensors"), dict) else None
    if isinstance(layout, dict) and rng.random() < 0.7 and f"{name}.kept" not in tensors:
        layout["shape"], layout["stride"] = [*tensor.shape], [*tensor.stride()]


def change_bytes(rng: random.Random, data: bytearray) -> None:
    """The file itself: bits, its length, and what its header says."""
    kind, head = rng.random(), 8 + struct.unpack("<Q", data[:8])[0]
    if kind < 0.3:
        for _ in range(rng.choice((1, 4, 40))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind < 0.5:
        del data[rng.randrange(len(data)) :]
    elif kind < 0.6:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, head - 9, head, len(data), 1 << 31, 1 << 40, (1 << 64) - 1)))
    elif kind < 0.7:
        at = rng.randrange(len(data))
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 1000))))
    else:
        text, (old, new) = bytes(data[8:head]), rng.choice(LIES)
        at = text.rfind(old) if rng.random() < 0.5 else text.find(old)
        if at >= 0:
            text = text[:at] + new + text[at + len(old) :]
        data[:head] = struct.pack("<Q", len(text)) + text


def write(path: Path, good: Path, rng: random.Random) -> None:
    """A file of `good` that is changed in one to three places."""
    if rng.random() < 0.2:
        data = bytearray(good.read_bytes())
        change_bytes(rng, data)
        path.write_bytes(data)
        return

    def change(tensors: dict, said: dict, about: dict) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice((change_number, change_number, change_tensor))(rng, tensors, about)

    path.write_bytes(good.read_bytes())
    rewrite(path, change)


def judge(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replays and checks the file; the error, or "" for none. Fails for one without a name, and for too much time or room."""
    room, real = [0], debug_file.laid_out

    def laid_out(shape, stride, address, dtype, device) -> torch.Tensor:
        made = real(shape, stride, address, dtype, device)
        room[0] += made.untyped_storage().nbytes()
        assert room[0] <= ROOM, f"{room[0]} bytes"
        return made

    monkeypatch.setattr(debug_file, "laid_out", laid_out)
    begin, error = time.process_time(), ""
    try:
        again = kvfold.replay(path, device="cpu", backend="torch", max_bytes=ROOM)
        room[0] = 0
        report = again.check()
        assert str(again).replace("\n", "").isprintable() and str(report).replace("\n", "").isprintable()
    except (ValueError, TypeError, OSError) as wrong:
        error = str(wrong)
        named = error.startswith(("path must name", "max_bytes must be at least")) and str(path) in error
        assert named and len(error) < 2000, repr(wrong)
    assert time.process_time() - begin < SECONDS
    return error


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in CASES.items():
        made = make(torch.device("cpu"))
        history = {"full_history": [torch.zeros(0, 64), None, None, None]} if name == "bare" else {}
        made.dump(folder / name, "torch", **history)
    return {name: folder / name for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_file_is_replayed_or_refused_by_name(
    good: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    for seed in range(FILES):
        path = tmp_path / str(seed)
        write(path, good[name], random.Random(f"{name} {seed}"))
        error = judge(path, monkeypatch)
        seen["refused" if error else "replayed"] = seen.get("refused" if error else "replayed", 0) + 1
        path.unlink()
    assert seen["refused"] > seen["replayed"] > 0, seen


def changed(path: Path, good: Path, change: Callable[[dict, dict], None]) -> Path:
    path.write_bytes(good.read_bytes())

    def both(tensors: dict, said: dict, about: dict) -> None:
        change(tensors, about)
        about["crc32"] = {key: debug_file._sum(x) for key, x in tensors.items()}

    rewrite(path, both)
    return path


def far_pages(tensors: dict, about: dict) -> None:
    about["tensors"]["0.cache.pages"]["shape"][0] = 1 << 34


def wide_rows(tensors: dict, about: dict) -> None:
    about["tensors"]["0.kv_score"]["stride"] = [1 << 40, 1]
    about["tensors"]["1.kv_score"]["stride"] = [1 << 20, 1 << 18]


def many_windows(tensors: dict, about: dict) -> None:
    """Each of these items is one that an update could make, of one sequence again and again."""
    count = 100_000
    items = tensors["plan.items"][:1].repeat(count, 1)
    tensors["plan.items"], tensors["plan.num_items"] = items, torch.tensor([count], dtype=torch.int32)
    about["plan"]["item_capacity"] = count
    about["tensors"]["plan.items"] |= {"shape": [count, 8], "stride": [8, 1]}


TOO_MUCH = {
    far_pages: rf"max_bytes must be at least \d{{13}} for .*, got {ROOM}: tensors.0.cache.pages of shape \[17179869184, \d+\]",
    wide_rows: r"max_bytes must be at least \d+ for .*: tensors.1.kv_score of shape .* and strides \[1048576, 262144\], takes",
    many_windows: r"max_bytes must be at least \d+ for .*: plan.items for compressors\[1\], takes",
}


@pytest.mark.parametrize("change", TOO_MUCH, ids=lambda change: change.__name__)
def test_memory_is_asked_for_by_the_name_of_what_takes_it(good: dict[str, Path], change: Callable, tmp_path: Path) -> None:
    path, begin = changed(tmp_path / "x", good["pair"], change), time.process_time()
    with pytest.raises(ValueError, match=rf"^{TOO_MUCH[change]}"):
        kvfold.replay(path, device="cpu", max_bytes=ROOM)
    assert time.process_time() - begin < 2.0
    if change is far_pages:  # the default is bounded by the size of the file
        size = path.stat().st_size
        with pytest.raises(ValueError, match=r"^max_bytes must be at least \d{13} for") as raised:
            kvfold.replay(path, device="cpu")
        assert int(str(raised.value).split("got ")[1].split(":")[0]) <= (2 << 30) + 1024 * size


def set_item(field: int, value: int) -> Callable[[dict, dict], None]:
    def change(tensors: dict, about: dict) -> None:
        tensors["plan.items"] = tensors["plan.items"].clone()
        tensors["plan.items"][1, field] = value

    return change


def put(*path: Any) -> Callable[[dict, dict], None]:
    """`put(*keys, value)`."""

    def change(tensors: dict, about: dict) -> None:
        tree: Any = about
        for key in path[:-2]:
            tree = tree[key]
        tree |= {path[-2]: path[-1]} if not isinstance(path[-1], dict) else {path[-2]: tree[path[-2]] | path[-1]}

    return change


FIELDS = {
    "window": (set_item(0, 900), r"plan.items\[1\] must be what an update of the plan can make, got window 900"),
    "start": (set_item(1, -5), r"plan.items\[1\] .* got start -5"),
    "token": (set_item(3, 1 << 30), r"plan.items\[1\] .* got token 1073741824"),
    "slot": (set_item(4, -3), r"plan.items\[1\] .* got slot -3"),
    "entry": (set_item(5, -2), r"plan.items\[1\] .* got entry -2"),
    "sequence": (set_item(6, 2), r"plan.items\[1\] .* got sequence 2"),
    "capacity": (
        put("plan", {"max_tokens": 1 << 30, "max_new_tokens": 1 << 30}),
        r"plan.item_capacity must be at least \d+ by the plan's other numbers",
    ),
    "batch": (put("plan", "batch", 1), r"tensors.plan.\w+.shape must be \[[12](, None)?\] by the plan's numbers"),
    "negative": (put("plan", "max_new_tokens", -1), r"plan.max_new_tokens must be an int from 1 to 2147483647, got -1"),
    "bool": (put("plan", "ratio", True), r"plan.ratio must be of type int, got True"),
    "missing": (lambda tensors, about: about.pop("plan"), "plan is missing"),
    "unknown": (put("compressors", 0, "extra", 1), r"compressors\[0\].'extra' is unknown"),
    "address": (put("tensors", "0.kv_score", "address", 1 << 40), r"tensors.0.kv_score.address must be an int from 0 to 15"),
    "unaligned": (put("tensors", "0.kv_score", "address", 3), r"tensors.0.kv_score.address must be a multiple of 4, got 3"),
    "stride": (put("tensors", "0.ape", "stride", [-16, 1]), r"tensors.0.ape.stride\[0\] must be an int from 0 to"),
    "overlap": (put("tensors", "0.ape", "stride", [1, 1]), r"tensors.0.ape.stride must keep its elements apart, got \[1, 1\]"),
    "format": (put("compressors", 0, "cache", "format", "element", "e5m2"), r"compressors\[0\].cache"),
    "scale": (put("compressors", 0, "cache", "scale", -1.0), r"compressors\[0\].cache: scale must be from"),
    "state": (put("compressors", 1, "state", "most", 1 << 30), r"compressors\[1\].state: max_new_tokens must be from"),
    "snapshots": (put("compressors", 1, "snapshots", None), "1.snapshots"),
    "terminal": (put("device", "name", "\x1b]0;x\x07"), r"device.name must be printable"),
    "call": (put("call", "rm"), "call must be compress, compress_many or store"),
    "kind": (put("compressors", 0, "state", "kind", "Engine"), r"compressors\[0\].state.kind must be FoldState or WindowState"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_wrong_field_is_named(good: dict[str, Path], what: str, tmp_path: Path) -> None:
    change, message = FIELDS[what]
    path = changed(tmp_path / "x", good["pair"], change)
    with pytest.raises(ValueError, match=rf"^path must name a whole file of kvfold.dump, {path} is damaged: .*{message}"):
        kvfold.replay(path, device="cpu")


TEXTS = {
    "twice": (lambda text: text.replace('{"call"', '{"call": 1, "call"'), "'call' is there twice"),
    "nan": (lambda text: text.replace('"scale": 1.0', '"scale": NaN'), "a number must be finite, got NaN"),
    "deep": (lambda text: "[" * 200_000 + "]" * 200_000, "its numbers are nested too deeply|must be an object"),
    "no object": (lambda text: "[1, 2]", r"must be an object, got \[1, 2\]"),
    "long": (lambda text: text.replace('"ratio": 4', f'"ratio": {"9" * 5000}', 1), "."),
}


@pytest.mark.parametrize("what", TEXTS)
def test_json_that_is_not_what_it_seems(good: dict[str, Path], what: str, tmp_path: Path) -> None:
    change, message = TEXTS[what]
    with safe_open(good["pair"], framework="pt") as file:
        said = dict(file.metadata())
    said["about"] = change(said["about"])
    said["crc32"] = str(zlib.crc32(said["about"].encode()))
    save_file(load_file(good["pair"]), tmp_path / "x", metadata=said)
    with pytest.raises(ValueError, match=rf"^path must name a whole file of kvfold.dump, .* is damaged: .*({message})"):
        kvfold.replay(tmp_path / "x", device="cpu")


def test_a_path_that_is_no_file(tmp_path: Path, good: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"^path must name a file, {tmp_path} is a folder"):
        kvfold.replay(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^path must name a file, .*pipe is a pipe or a device"):
        kvfold.replay(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^path must name a file, got 'a\\x00b'"):
        kvfold.replay("a\0b")
    for wrong in (1, None, b"x", [], torch.zeros(1)):
        with pytest.raises(TypeError, match=r"^path must be a str or an os.PathLike"):
            kvfold.replay(wrong)
        with pytest.raises(TypeError, match=r"^path must be a str or an os.PathLike"):
            kvfold.dump(wrong, *pair(torch.device("cpu")).args)
    with pytest.raises(TypeError, match=r"^device must be a str"):
        kvfold.replay(good["pair"], device=3)
    with pytest.raises(ValueError, match=r"^device must be a GPU or the CPU"):
        kvfold.replay(good["pair"], device="toaster")
    with pytest.raises(TypeError, match=r"^max_bytes must be an int"):
        kvfold.replay(good["pair"], max_bytes=1e9)


def test_dump_puts_no_file_in_the_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    made, pipe = pair(torch.device("cpu")), tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=rf"^path must name a file, {pipe} is a pipe or a device"):
        made.dump(pipe, "torch")
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]
    with pytest.raises(ValueError, match=r"^path must name a file, got .*null byte"):
        made.dump(tmp_path / "x\0y", "torch")


def test_a_dump_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    made = pair(torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"^path must name a file, {tmp_path} is a folder"):
        made.dump(tmp_path, "torch")
    with pytest.raises(OSError, match=r"^path cannot be written, .*absent/x: "):
        made.dump(tmp_path / "absent" / "x", "torch")
    for name, value in (("whole", 1), ("pdl", "yes")):
        with pytest.raises(TypeError, match=rf"^{name} must be a bool"):
            made.dump(tmp_path / "x", "torch", **{name: value})
    real = safetensors.torch.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        real(tensors, path, metadata=metadata)
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"^path cannot be written, .*: Error while serializing: No space"):
        made.dump(tmp_path / "x", "torch")
    assert not list(tmp_path.iterdir())


def test_rows_of_kv_score_that_share_bytes(tmp_path: Path) -> None:
    """One row for all tokens, and rows that begin within one another, as a call may be given."""
    made = CASES["bare"](torch.device("cpu"))
    width = made.args[0].shape[1]
    for rows in (made.args[0][:1].expand(12, -1), torch.arange(200.0).bfloat16().as_strided((12, width), (3, 1))):
        made.args = (rows, *made.args[1:])
        made.dump(tmp_path / "x", "torch")
        again = kvfold.replay(tmp_path / "x", device="cpu", backend="torch")
        assert torch.equal(again.tensors["0.kv_score"], rows) and again.tensors["0.kv_score"].stride() == rows.stride()
        assert again.check() == kvfold.check(*made.args, **made.options, backend="torch")
