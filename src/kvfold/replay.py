"""`dump` and `replay`: a call in a file, for bug reports."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from . import debug_file
from .checks import traced
from .compress import Compressor, choose_backend
from .debug import Report, compare
from .debug_call import Call, check_history
from .plan import StepPlan
from .records import EntryCache
from .snapshots import Snapshots
from .spec import CompressorSpec
from .state import FoldState
from .window_state import WindowState


def dump(
    path: str | os.PathLike,
    kv_score: torch.Tensor | Sequence[Compressor | tuple],
    plan: StepPlan,
    state: FoldState | WindowState | EntryCache | None = None,
    cache: EntryCache | None = None,
    *,
    spec: CompressorSpec | None = None,
    ape: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    snapshots: Snapshots | None = None,
    backend: str | None = None,
    pdl: bool | None = None,
    full_history: Sequence[torch.Tensor | None] | None = None,
    whole: bool = False,
) -> None:
    """Writes the inputs of a call to a safetensors file, from which `replay` makes the call elsewhere; before the call.

    Takes the arguments of `compress`, as named here, of `compress_many`, `dump(path, compressors, plan)`, or of `store`,
    `dump(path, rows, plan, cache, spec=..., norm_weight=..., rope=...)`. Nothing of the caller's is written. Synchronizes with
    the host, so it cannot be captured in a CUDA graph or traced.

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
        TypeError, ValueError: as the call does, and naming `full_history`; no file has been written then.
        RuntimeError: in a CUDA graph's capture, or traced.
        ImportError: without safetensors (`pip install "kvfold[debug]"`).
    """
    if traced(kv_score):
        raise RuntimeError("dump must be called outside of torch.compile")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("dump must be called outside of a CUDA graph's capture: dump before a replay, with its contents")
    weights = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope}
    call = Call.of(kv_score, plan, state, cache, **weights, rows=rows, snapshots=snapshots, backend=backend)
    call.pdl = pdl
    check_history(full_history, call)
    debug_file.write(path, call, full_history, whole)


class Replay:
    """A call that was made again from a file of `dump`; what `replay` returns.

    Attributes:
        name: `"compress"`, `"compress_many"` or `"store"`.
        plan: the call's, with `errors` as the call left it.
        compressors: what the call was given, as `compress_many` takes it; state, cache and snapshots as the call left them.
            Of `store` it is one, without state, whose `kv_score` are the pooled rows.
        rows: the pooled rows, where the call had that argument.
        backend, device: of this call.
        errors: sequences and entries that it refused.
        about: what the file says of the call, its versions and its device.
    """

    def __init__(self, path: str | os.PathLike, call: Call, about: dict) -> None:
        self._path, self._call, self.about = path, call, about
        self.name, self.plan, self.compressors, self.rows = call.name, call.plan, call.compressors, call.rows
        self.backend, self.device = call.backend, call.plan.items.device
        before = int(call.plan.errors)
        call.run()
        self.errors = int(call.plan.errors) - before

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the call, as it left them, by its name in the file: `"0.state.rows"` is that of compressor 0."""
        return debug_file.tensors_of(self._call)

    def check(self) -> Report:
        """`kvfold.check` of the call, on this device and backend; reads the file again."""
        call, history, _ = debug_file.read(self._path, self.device)
        call.backend = self.backend
        return compare(call, history)

    def __str__(self) -> str:
        about, plan = self.about, self.plan
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        where = " ".join(filter(None, (about["device"]["type"], about["device"]["name"])))
        lines = [f"{self.name}, dumped on {where}, backend {about['backend']}: {versions}"]
        items = plan.items[: int(plan.num_items)]
        tokens = [end - start for _, start, end in items[:, [6, 1, 2]].unique(dim=0).tolist()]
        lines += [f"  {len(tokens)} of {plan.batch} sequences, {sum(tokens)} tokens, {min(tokens, default=0)} to "
                  f"{max(tokens, default=0)} each; {len(items)} windows, {int((items[:, 5] >= 0).sum())} entries"]  # fmt: skip
        for i, c in enumerate(self.compressors):
            lines += [f"  {c.spec}"]
            for name in ("kv_score", "state.rows", "state.kv", "cache.pages", "snapshots.rows"):
                lines += [f"    {line}" for line in self._line(f"{i}.{name}")]
            if c.cache is not None:
                lines += [f"    cache: {c.cache.format.name}, {c.cache.rows_per_page} rows per page"]
        lines += [f"made again on {self.device}, backend {self.backend}: {self.errors} refused"]
        return "\n".join(lines)

    def _line(self, name: str) -> list[str]:
        tensor, layout = self.tensors.get(name), self.about["tensors"].get(name)
        if tensor is None:
            return []
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [f"{name.partition('.')[2]}: {dtype} {layout['shape']}, strides {layout['stride']}"]


def replay(path: str | os.PathLike, *, device: torch.device | str | None = None, backend: str | None = None) -> Replay:
    """Makes the call of a file of `dump` again, on tensors with the same contents, sizes, strides and alignment.

    Gaps between pages are closed. What the file does not have, as the call does not touch it, is zero, without tags.

    Args:
        path: of the file.
        device: a GPU or the CPU; default: a GPU where there is one. It needs the memory of the whole state and cache.
        backend: as for `compress`; default: that of the dumped call on the same type of device, else that of the device.

    Raises:
        ValueError: naming `path`, for a file that is damaged, of another format version or not of `dump`; naming `backend`.
        FileNotFoundError: for no file.
        ImportError: without safetensors (`pip install "kvfold[debug]"`).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    call, _, about = debug_file.read(path, device)
    if backend is None and about["device"]["type"] == device.type:
        backend = call.backend
    call.backend = choose_backend(backend, "device", call.plan.items)
    return Replay(path, call, about)
