"""`dump` and `replay`: a call in a file, for bug reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..arguments.checks import check_int, check_switch
from ..calls.checks import choose_backend
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, Outputs
from ..storage.window_state import WindowState
from . import file as debug_file
from .call import Call, Places, check_history, check_outside
from .check import Report, compare


def dump(
    path: str | os.PathLike,
    kv_score: torch.Tensor | Sequence[Compressor | tuple],
    plan: StepPlan | EntryCache | None = None,
    state: FoldState | WindowState | EntryCache | None = None,
    cache: EntryCache | None = None,
    *,
    spec: CompressorSpec | None = None,
    ape: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    snapshots: Snapshots | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    also: Sequence[EntryCache] = (),
    errors: torch.Tensor | None = None,
    backend: str | None = None,
    pdl: bool | None = None,
    full_history: Sequence[torch.Tensor | None] | None = None,
    whole: bool = False,
) -> None:
    """Writes the inputs of a call to a safetensors file, from which `replay` makes the call elsewhere; before the call.

    Takes the arguments of `compress`, as named here, of `compress_many`, `dump(path, compressors, plan)`, or of `store`,
    `dump(path, rows, plan, cache, spec=..., norm_weight=..., rope=...)` and `dump(path, rows, cache, slots=..., ...)`. Nothing
    of the caller's is written. Synchronizes with the host, so it cannot be captured in a CUDA graph or traced.

    The file has the bits of every input, how it lies in memory, the plan as it is, options, versions and the device's name;
    nothing of the model but `ape`, `norm_weight` and `rope`. Of what is larger than a step it has what the call touches, under
    the numbers that it has in the caller's tensors: the state slots of the plan, the pages of a `WindowState` that have the
    step's positions or the rows that it reads, cache pages and snapshots that it writes to, and the rows of `rope` for the
    windows of the step. So its size is that of `kv_score` and the plan, `state.bytes_per_slot` for each sequence, and a page
    for each entry at most. For 4 tokens of 64 sequences of a ratio-4 layer of V4, with a bf16 state and pages of 37 KB,
    that is 10 MB.

    Args:
        path: of the file. It is replaced when the new one is whole.
        full_history: as for `check`, and kept for it.
        whole: keeps all slots, pages and rows: for a call that may read or write where it should not.
        The others are those of the call.

    Raises:
        TypeError, ValueError: as the call does, and naming `path`, `pdl`, `whole` or `full_history`; no file has been written.
        OSError: where no file can be written; none is left behind.
        RuntimeError: in a CUDA graph's capture, or traced.
        ImportError: without safetensors (`pip install "kvfold[debug]"`).
    """
    check_outside("dump", kv_score)
    check_switch("pdl", pdl)
    if not isinstance(whole, bool):
        raise TypeError(f"whole must be a bool, got {type(whole).__name__}")
    call = Call.of(
        Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots), plan, Outputs(rows, latent), backend,
        Places(slots, positions, also, errors),
    )  # fmt: skip
    call.pdl = pdl
    check_history(full_history, call)
    debug_file.write(path, call, full_history, whole)


class Replay:
    """A call that was made again from a file of `dump`; what `replay` returns.

    Attributes:
        name: `"compress"`, `"compress_many"` or `"store"`.
        plan: the call's, with `errors` as the call left it; None of a `store` without one.
        compressors: what the call was given, as `compress_many` takes it; state, cache and snapshots as the call left them.
            Of `store` it is one for each cache, without state, whose `kv_score` are the pooled rows.
        rows, latent: the pooled and the normed rows, where the call had these arguments.
        backend, device: of this call.
        errors: sequences and entries that it refused.
        about: what the file says of the call, its versions and its device.
    """

    def __init__(self, path: str | os.PathLike, call: Call, about: dict, max_bytes: int | None) -> None:
        self._path, self._call, self._max_bytes, self.about = path, call, max_bytes, about
        self.name, self.plan, self.compressors = call.name, call.plan, call.compressors
        self.rows, self.latent = call.rows, call.latent
        self.backend, self.device = call.backend, call.device
        if call.errors is None:  # refused rows are counted here all the same
            counted = torch.zeros(1, dtype=torch.int32, device=call.device)
            call = replace(call, places=call.places._replace(errors=counted))
        before = int(call.errors)
        call.run()
        self.errors = int(call.errors) - before

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the call, as it left them, by its name in the file: `"0.state.rows"` is that of compressor 0."""
        return debug_file.tensors_of(self._call)

    def check(self) -> Report:
        """`kvfold.check` of the call, on this device and backend; reads the file again, and takes four times the memory."""
        call, history, _ = debug_file.read(self._path, self.device, self._max_bytes)
        call.backend = self.backend
        return compare(call, history)

    def __str__(self) -> str:
        about = self.about
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        where = " ".join(filter(None, (about["device"]["type"], about["device"]["name"])))
        lines = [f"{self.name}, dumped on {where}, backend {about['backend']}: {versions}"]
        lines += [f"  {self._size()}"]
        for i, c in enumerate(self.compressors):
            lines += [f"  {c.spec}"]
            for name in ("kv_score", "scores", "state.rows", "state.kv", "cache.pages", "snapshots.rows"):
                tensor, layout = self.tensors.get(f"{i}.{name}"), about["tensors"].get(f"{i}.{name}")
                if tensor is not None:
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    lines += [f"    {name}: {dtype} {layout['shape']}, strides {layout['stride']}"]
            if c.cache is not None:
                lines += [f"    cache: {c.cache.format.name}, {c.cache.rows_per_page} rows per page"]
        lines += [f"made again on {self.device}, backend {self.backend}: {self.errors} refused"]
        return "\n".join(lines)

    def _size(self) -> str:
        """Of the step, or of the rows."""
        plan = self.plan
        if plan is None:
            slots = self._call.places.slots
            return f"{len(slots)} rows, {int((slots >= 0).sum())} of them with a slot, into {len(self.compressors)} caches"
        items = plan.items[: int(plan.num_items)]
        tokens = [end - start for _, start, end in items[:, [6, 1, 2]].unique(dim=0).tolist()]
        each = f"{min(tokens, default=0)} to {max(tokens, default=0)} each"
        entries = f"{len(items)} windows, {int((items[:, 5] >= 0).sum())} entries"
        return f"{len(tokens)} of {plan.batch} sequences, {sum(tokens)} tokens, {each}; {entries}"


def replay(
    path: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
    max_bytes: int | None = None,
) -> Replay:
    """Makes the call of a file of `dump` again, on tensors with the same contents, sizes, strides and alignment.

    Gaps between pages are closed. What the file does not have, as the call does not touch it, is zero, without tags.

    The file may be anybody's: whatever it says is checked before anything is made of it, work items too, and it runs no code.
    Reading takes time and memory in proportion to its size; the call takes up to `max_bytes`, and time in proportion to that.

    Args:
        path: of the file.
        device: a GPU or the CPU; default: a GPU where there is one. It needs the memory of the whole state and cache.
        backend: as for `compress`; default: that of the dumped call on the same type of device, else that of the device.
        max_bytes: most memory for the call's tensors, whose pools are of the size that they were dumped from, and for what the
            torch backend makes of its windows. Default: 2 GiB and 1024 times the file's size, but no more than half of the
            memory that the device has (of a GPU: that is free). A call that takes more is refused, with what it takes.

    Raises:
        TypeError, ValueError: naming `path`, for a file that is damaged, of another format version or not of `dump`, and the
            field in it that is wrong; naming `max_bytes`, with what is too large; naming `backend` or `device`.
        OSError: for no file, or one that may not be read.
        ImportError: without safetensors (`pip install "kvfold[debug]"`).
    """
    if max_bytes is not None:
        check_int("max_bytes", max_bytes, 0, 1 << 62)
    place = _device(device)
    choose_backend(backend, "device", torch.empty(0, device=place))
    call, _, about = debug_file.read(path, place, max_bytes)
    if backend is None and about["device"]["type"] == place.type:
        backend = call.backend
    call.backend = choose_backend(backend, "device", call.compressors[0].value)
    return Replay(path, call, about, max_bytes)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a str or a torch.device, got {type(device).__name__}")
    try:
        place = torch.device(device)
        return torch.empty(0, device=place).device
    except (AssertionError, RuntimeError) as error:  # of torch, for a GPU that is not there
        raise ValueError(f"device must be a GPU or the CPU of this machine, got {str(device)!r}: {error}") from None
