"""Triton's interpreter without what it does for nothing or again, two thirds of its time. Same operations, same order.

What is replaced belongs to Triton and may change: a version that lacks one of the names is left as it is, and only slower.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
OPERATORS = {
    "__add__": np.add, "__sub__": np.subtract, "__mul__": np.multiply, "__lt__": np.less, "__le__": np.less_equal,
    "__gt__": np.greater, "__ge__": np.greater_equal, "__eq__": np.equal, "__ne__": np.not_equal,
    "__and__": np.bitwise_and, "__or__": np.bitwise_or,
}  # fmt: skip
BOOL = ("int1",)
SWAPPED = {"__radd__": np.add, "__rsub__": np.subtract, "__rmul__": np.multiply}
PLAIN = ("fp32", "int32", "int64")  # two operands of one of these stay what they are
DTYPES: dict[str, np.dtype] = {}
COMMON: dict[tuple[str, bool, str, bool, bool], tl.dtype] = {}
BLOCKS: dict[tuple[str, tuple[int, ...]], tuple[tl.tuple, int, str]] = {}


def install() -> None:
    """Replaces what is slow, in this process, once."""
    if None in ORIGINAL.values() or not hasattr(interpreter, "_LangPatchScope"):
        return
    for owner, name, ours in REPLACED:
        setattr(owner, name, ours)
    for names, swapped in ((OPERATORS, False), (SWAPPED, True)):
        for name, function in names.items():
            setattr(tl.tensor, name, operator(name, function, swapped=swapped))
    for name, value in LAZY.items():
        setattr(tl.tensor, name, value)
        value.__set_name__(tl.tensor, name)


def patch_lang(fn):
    """Triton looks through its language for what to replace at each call of a device function, also where all is replaced."""
    if all(not tl.core.is_builtin(module.load) for module in languages(fn)):
        return interpreter._LangPatchScope()
    return ORIGINAL["patch_lang"](fn)


@functools.cache
def languages(fn) -> tuple[ModuleType, ...]:
    """By what names a function knows the language: a kernel by `tl`, Triton's own library by `core`."""
    return tuple(module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values()))


def get_np_dtype(kind: tl.dtype) -> np.dtype:
    """Triton makes its table anew at each call."""
    name = kind.scalar.name
    if name not in DTYPES:
        DTYPES[name] = ORIGINAL["get_np_dtype"](kind)
    return DTYPES[name]


def generic_reduce(self, given):
    """Along an axis, the combining function takes slices; in Triton's own, one element after the other, in the same order."""
    if self.axis is None or given[0].handle.data.ndim < 2:
        return ORIGINAL["generic_reduce"](self, given)
    parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in given]
    total = tuple(self.to_tensor(part[0], x.dtype) for part, x in zip(parts, given, strict=True))
    for i in range(1, len(parts[0])):
        total = self.combine_fn.fn(*total, *(self.to_tensor(part[i], x.dtype) for part, x in zip(parts, given, strict=True)))
        total = total if isinstance(total, tuple) else (total,)
    done = [x.handle.data for x in total]
    done = [np.expand_dims(x, self.axis) for x in done] if self.keep_dims else done
    return [self.to_tensor(x, y.dtype) for x, y in zip(done, given, strict=True)]


def check_overflow(self, lhs: tl.tensor, rhs: tl.tensor, operation: Any) -> None:
    """Without debug mode Triton's own computes in 64 bits whether an int overflows, and then says nothing."""
    if self.builder.options.debug:
        ORIGINAL["check_overflow"](self, lhs, rhs, operation)


def check_types(self, lhs: Any, rhs: Any, *given: Any, **more: Any) -> tuple[tl.tensor, tl.tensor]:
    """Of two tensors of one plain dtype nothing is converted."""
    if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.dtype.name == rhs.dtype.name in PLAIN:
        return self.broadcast_impl_value(lhs, rhs)
    return ORIGINAL["check_types"](self, lhs, rhs, *given, **more)


def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A builtin that is called with the interpreter's semantic: by one function, where Triton has three around it."""
    inner, semantic = getattr(member, "__wrapped__", None), interpreter.interpreter_semantic
    if inner is None:
        ORIGINAL["patch_attr"](owner, name, member, builder, scope)
        return

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return inner(*args, _semantic=semantic, **kwargs)

    scope.set_attr(owner, name, call)


def operator(name: str, function: np.ufunc, *, swapped: bool = False) -> Any:
    """An operator of tensors: of two of one plain dtype, or of one and a number, what numpy makes of their data at once."""
    original, compares = OPERATED[name], function in COMPARISONS
    plain = BOOL if function in (np.bitwise_and, np.bitwise_or) else PLAIN

    def run(self: tl.tensor, other: Any, _semantic: Any = None) -> Any:
        value = other.value if other.__class__ is tl.constexpr else other
        kind, given = self.type, operand(self, value) if self.dtype.name in plain else None
        if given is None:
            return original(self, other, _semantic=interpreter.interpreter_semantic)
        data, theirs = given
        if theirs is not None:
            kind = theirs
        mine = self.handle.data
        out = function(data, mine) if swapped else function(mine, data)
        return tl.tensor(interpreter.TensorHandle(out, self.dtype), bool_like(kind) if compares else kind)

    return run


def operand(self: tl.tensor, value: Any) -> tuple[Any, tl.dtype | None] | None:
    """The data of what a tensor is combined with, and its type if that is the result's; None for what is to be converted."""
    name, cls = self.dtype.name, value.__class__
    if cls is tl.tensor:
        if value.dtype.name != name or (name == "int1" and not self.handle.data.dtype == value.handle.data.dtype == np.bool_):
            return None
        left, right = self.type, value.type
        if left is right or not right.is_block():
            return value.handle.data, None
        if not left.is_block():
            return value.handle.data, right
        return (value.handle.data, None) if left.shape.values == right.shape.values else None
    if name == "fp32":
        return (np.float32(value), None) if cls is float or (cls is int and abs(value) < 1 << 24) else None
    if cls is int and name != "int1" and abs(value) < 1 << 31:
        return (np.int32 if name == "int32" else np.int64)(value), None
    return None


def bool_like(kind: tl.dtype) -> tl.dtype:
    """What a comparison of such values has."""
    found = kind.__dict__.get("bool_like")
    if found is None:
        found = kind.bool_like = kind.with_element_ty(tl.int1)
    return found


def common_type(self, left: tl.dtype, left_scalar: bool, right: tl.dtype, right_scalar: bool, divides: bool) -> tl.dtype:
    """Works out once what two dtypes become."""
    key = left.name, left_scalar, right.name, right_scalar, divides
    if key not in COMMON:
        COMMON[key] = ORIGINAL["common_type"](self, left, left_scalar, right, right_scalar, divides)
    return COMMON[key]


def broadcast(self, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Two of one shape stay as they are."""
    left, right = (x.type.shape.values if x.type.is_block() else None for x in (lhs, rhs))
    return (lhs, rhs) if left == right else ORIGINAL["broadcast"](self, lhs, rhs)


def make_tensor(self, handle: Any, kind: tl.dtype) -> None:
    """Shape and size are made when somebody asks; see LAZY."""
    self.handle, self.type, self.dtype = handle, kind, kind.scalar


def make_block_type(self, element_ty: tl.dtype, shape: Any) -> None:
    """Checks, counts and names a shape once."""
    key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
    if key not in BLOCKS:
        ORIGINAL["make_block_type"](self, element_ty, shape)
        BLOCKS[key] = self.shape, self.numel, self.name
    self.element_ty, (self.shape, self.numel, self.name) = element_ty, BLOCKS[key]


def equal(self, other: Any) -> bool:
    """A dtype is itself."""
    return self is other or ORIGINAL["equal"](self, other)


LAZY = {
    "shape": functools.cached_property(lambda self: tl.tuple([tl.constexpr(n) for n in sizes(self.type)])),
    "numel": functools.cached_property(lambda self: tl.constexpr(int(np.prod(sizes(self.type))))),
}


def sizes(kind: tl.dtype) -> tuple[int, ...]:
    return tuple(kind.shape) if kind.is_block() else ()


# Whose, what, and by what.
REPLACED = (
    (interpreter, "_patch_lang", patch_lang),
    (interpreter, "_patch_attr", patch_attr),
    (interpreter, "_get_np_dtype", get_np_dtype),
    (interpreter.ReduceOps, "generic_reduce", generic_reduce),
    (TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow),
    (TritonSemantic, "binary_op_type_checking_impl", check_types),
    (TritonSemantic, "computation_type_impl", common_type),
    (TritonSemantic, "broadcast_impl_value", broadcast),
    (tl.tensor, "__init__", make_tensor),
    (tl.block_type, "__init__", make_block_type),
    (tl.dtype, "__eq__", equal),
)
OPERATED = {name: getattr(tl.tensor, name) for name in (*OPERATORS, *SWAPPED)}
ORIGINAL = {ours.__name__: getattr(owner, name, None) for owner, name, ours in REPLACED}
