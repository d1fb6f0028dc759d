"""A file of `dump` may be anybody's: whatever it says, a replay or one error that names it, in little time and room."""

from __future__ import annotations

import copy
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_support import CASES, rewrite

import kvfold
from kvfold import debug_file

ROOM = 64 << 20  # for all tensors of a call
FILES = 60  # of each call
SECONDS = 20.0  # of this process; a good file takes a twentieth of one
NUMBERS = (
    -1, 0, 1, 2, 3, 5, 7, 8, 16, 17, 64, 4095, 4096, 4097, 1 << 20, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40,
    1 << 48, 1 << 62, 1 << 63, 1 << 64, 10**30, -(1 << 31), -(1 << 63), 0.5, -0.0, 1e-300, 1e308,
)  # fmt: skip
JUNK = (
    None,
    True,
    False,
    "",
    "x",
    "fp32",
    "\x1b[2J",
    "9" * 400,
    [],
    [1],
    [[]],
    {},
    {"x": 1},
    [0] * 300,
    float("nan"),
    float("inf"),
)
VALUES = (*range(-3, 12), 31, 63, 64, 4096, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, -(1 << 31))


LIES = tuple((old.encode(), new.encode()) for old, new in (
    ('"I32"', '"F8_E4M3"'), ('"F32"', '"F4"'), ('"F32"', '"I32"'), ('"data_offsets":[', '"data_offsets":[9'), ("{", "[" * 99_999),
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
    layout = about["tensors"].get(name)
    if layout is not None and rng.random() < 0.7 and f"{name}.kept" not in tensors:
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
