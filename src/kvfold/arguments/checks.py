"""Argument checks: every failure names the argument, what came and what is accepted."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin


def traced(tensor: object) -> bool:
    """Whether a call is being traced, by torch.compile or over fake tensors: then it must be an operator (ops.py)."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def makes_fakes() -> bool:
    """Whether operations make `FakeTensor`s now, of real tensors too: what is made then must not be kept for later."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor begins; 0 for a `FakeTensor`, which is nowhere: torch warns of asking it."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def name_of(kind: type) -> str:
    """The name that users know a class by."""
    return getattr(kind, "_called", kind.__name__)


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {name_of(kind)}, got {type(value).__name__}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def check_switch(name: str, value: object) -> None:
    """True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool or None, got {type(value).__name__}")


def check_dtype(name: str, tensor: torch.Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype) for dtype in accepted)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def check_float(name: str, dtype: object) -> None:
    """The dtype of kept rows."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be torch.float32 or torch.bfloat16, got {type(dtype).__name__}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be torch.float32 or torch.bfloat16, got {dtype}")


def usable_device(name: str, device: object) -> torch.device | None:
    """The device of new tensors; None: torch's default."""
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int, type(None))):
        raise TypeError(f"{name} must be a torch.device, a str or None, got {type(device).__name__}")
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's ways to say: no such name, none here, built without
        raise ValueError(f"{name} must be one that torch has here, got {device!r}: {error}") from None


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def check_dense(name: str, tensor: torch.Tensor, what: str) -> None:
    """Of slots or pages (`what`): each is contiguous, in any distance from the next that keeps the two apart."""
    size = 1
    for n, stride in reversed([*zip(tensor.shape[1:], tensor.stride()[1:], strict=True)]):
        if n > 1 and stride != size and tensor.numel():
            raise ValueError(f"{name} must be contiguous within a {what}, got strides {tuple(tensor.stride())}")
        size *= n
    if tensor.shape[0] > 1 and tensor.stride(0) < size:
        raise ValueError(f"{name} must have {what}s that do not overlap, got strides {tuple(tensor.stride())}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """`None` in `shape` accepts any size there."""
    have = tensor.shape
    fits = len(have) == len(shape)
    if fits:
        for i, want in enumerate(shape):  # every eager call comes here five times: no generators
            if want is not None and have[i] != want:
                fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(have)}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


# Kinds of tensor whose elements are not what stands in their memory, by a word in the dispatch keys that torch gives them.
_HIDDEN = {
    "Negative": "a negated view, whose sign is not in its memory; pass x.resolve_neg()",
    "Conjugate": "a conjugated view, whose sign is not in its memory; pass x.resolve_conj()",
    "ZeroTensor": "zeros without memory; pass x.clone()",
    "Functionalize": "one inside torch.func.functionalize",
    "FuncTorch": "one inside a transform of torch.func, such as vmap or grad",
    "Named": "one with names of dimensions; pass x.rename(None)",
    "Nested": "a nested tensor; pass x.values()",
    "Quantized": "a quantized tensor",
    "Sparse": "a sparse tensor",
    "Mkldnn": "an mkldnn tensor; pass x.to_dense()",
    "Python": "a subclass that keeps its elements elsewhere; pass the plain tensor in it",
}
_KEYS = torch._C._dispatch_keys  # one call tells all of them apart
_plain: set[int] = set()  # the keys of plain tensors


def check_memory(name: str, tensor: object, *, fake: bool = False) -> None:
    """A tensor whose elements are what stands in its memory, all of which is there.

    Reading any other by its address gives other numbers, or ends the process.

    Args:
        fake: whether a `FakeTensor` will do, for an object that a traced call takes.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not torch.compiler.is_compiling() and not (fake and isinstance(tensor, FakeTensor)):
        check_real_memory(name, tensor)


def check_real_memory(name: str, tensor: torch.Tensor) -> None:
    """`check_memory` of a tensor that is not traced; every call comes here with its `kv_score`."""
    if tensor.__class__ is not torch.Tensor or _KEYS(tensor).raw_repr() not in _plain:
        _check_plain(name, tensor)
    have, need = tensor.untyped_storage().nbytes(), tensor.nbytes
    if need and tensor.is_contiguous():
        need += tensor.storage_offset() * tensor.element_size()
    elif need:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        need = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if have < need:
        raise ValueError(f"{name} must have its memory: it reaches to byte {need} of a storage of {have} (freed or resized?)")


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    keys = _KEYS(tensor)
    found = str(keys)
    for word, what in _HIDDEN.items():
        if word in found:
            raise TypeError(f"{name} must be a plain dense tensor, got {what} ({type(tensor).__name__}, {tensor.layout})")
    if isinstance(tensor, UninitializedTensorMixin):
        raise TypeError(f"{name} must have a shape, got {type(tensor).__name__}: load or run its module first")
    _plain.add(keys.raw_repr())


def check_eager(name: str) -> None:
    """That operations of torch write to plain tensors here: neither inside of a transform nor under a mode for fake ones."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(f"{name} must be given outside of transforms of torch.func, got a call inside of one")
    if makes_fakes():
        raise ValueError(f"{name} must be given outside of FakeTensorMode, as it is a real tensor; got a call inside of it")


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | None, ...],
    accepted: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    fake: bool = False,
) -> None:
    """A plain, contiguous tensor of this shape, dtype and device. fake: see `check_memory`."""
    check_memory(name, tensor, fake=fake)
    check_dtype(name, tensor, accepted)
    check_shape(name, tensor, shape)
    check_device(name, tensor, device)
    check_contiguous(name, tensor)


def check_numbers(
    name: str, tensor: object, shape: tuple[int | None, ...], device: torch.device, *, fake: bool = False
) -> None:
    """int32 or int64 numbers of an engine, less than 2 GiB apart; in rows of a table side by side. fake: see `check_memory`."""
    check_memory(name, tensor, fake=fake)
    check_dtype(name, tensor, (torch.int32, torch.int64))
    check_shape(name, tensor, shape)
    check_device(name, tensor, device)
    if tensor.dim() == 2 and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(tensor.stride())}")
    if tensor.shape[0] > 1 and tensor.stride(0) * tensor.element_size() >= 2**31:  # a kernel has the distance in 32 bits
        raise ValueError(f"{name} must have numbers less than 2 GiB apart, got strides {tuple(tensor.stride())}")


def side_by_side(tensor: torch.Tensor | None, dtype: torch.dtype = torch.int32) -> bool:
    """Whether numbers are as kernels read them without asking: of this dtype, one behind the other. So are none."""
    return tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
