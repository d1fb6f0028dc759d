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
    """Writes the inputs of a call to a safetensors file, from which `replay` makes the call elsewhere. Use it before the call.

    Takes the arguments of `compress`, as named here, of `compress_many`, `dump(path, compressors, plan)`, or of `store`,
    `dump(path, rows, plan, cache, spec=..., norm_weight=..., rope=...)` and `dump(path, rows, cache, slots=..., ...)`. The
    caller's tensors are not written. Synchronizes with the host, so a CUDA graph cannot capture it and it cannot be traced.

    The file has the bits and the memory layout of every input, the plan as it is, options, versions and the device's name. Of
    the model it has only `ape`, `norm_weight` and `rope`. Of tensors that are larger than a step it has only what the call
    touches, with its original indices: the state slots of the plan, the pages of a `WindowState` that the step reads or
    writes, the cache pages and snapshots that it writes, and the rows of `rope` for its windows. So the file's size is that of
    `kv_score` and the plan, plus `state.bytes_per_slot` for each sequence, plus at most a page for each entry. For 4 tokens of
    64 sequences of a ratio-4 layer of V4, with a bf16 state and pages of 37 KB, that is 10 MB.

    Args:
        path: of the file. An existing file is replaced once the new one is complete.
        full_history: as for `check`; it is kept in the file.
        whole: keep all slots, pages and rows: for a call that may read or write where it should not.
        All others are those of the call.

    Raises:
        TypeError, ValueError: as the call does, and naming `path`, `pdl`, `whole` or `full_history`; no file has been written.
        OSError: the file cannot be written; no partial file is left.
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
        plan: the call's plan, with `errors` as the call left it; None for a `store` without one.
        compressors: the arguments of the call, as `compress_many` takes them; state, cache and snapshots as the call left them.
            For `store` there is one for each cache, without a state, whose `kv_score` is the pooled rows.
        rows, latent: the pooled and the normed rows, if the call had these arguments.
        backend, device: those of this call.
        errors: sequences and entries that it refused.
        about: what the file says about the original call, its versions and its device.
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

    Gaps between pages are closed. What the call does not touch is not in the file; here it is zero, without tags.

    The file need not be trusted: everything in it is checked before use, work items too, and it runs no code. Reading takes
    time and memory in proportion to its size. The call takes up to `max_bytes`, and time in proportion to that.

    Args:
        path: of the file.
        device: a GPU or the CPU; default: a GPU where there is one. It needs the memory of the whole state and cache.
        backend: as for `compress`; default: that of the dumped call on the same type of device, else that of the device.
        max_bytes: most memory for the call's tensors (pools have their original size) and for what the torch backend makes of
            its windows. Default: 2 GiB plus 1024 times the file's size, but at most half of the device's memory (on a GPU: of
            its free memory). A call that needs more is refused, with the number of bytes that it needs.

    Raises:
        TypeError, ValueError: naming `path`, for a file that is damaged, of another format version or not of `dump`, and the
            field in it that is wrong; naming `max_bytes`, with what is too large; naming `backend` or `device`.
        OSError: there is no such file, or it may not be read.
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
