"""Triton's interpreter without work that it repeats, which was half of the suite's time. The same operations in the same order.

What is replaced belongs to Triton and may change: a version that lacks one of the names is left as it is, and only slower.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NAMES = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "ReduceOps")
ORIGINAL = {name: getattr(interpreter, name, None) for name in NAMES}
DTYPES: dict[str, np.dtype] = {}


def install() -> None:
    """Replaces what is slow, in this process, once."""
    if None in ORIGINAL.values() or not hasattr(interpreter.ReduceOps, "generic_reduce"):
        return
    ORIGINAL["generic_reduce"] = interpreter.ReduceOps.generic_reduce
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = get_np_dtype
    interpreter.ReduceOps.generic_reduce = generic_reduce


def patch_lang(fn):
    """Triton looks through its language for what to replace at each call of a device function, also where all is replaced."""
    if all(not tl.core.is_builtin(module.load) for module in languages(fn)):
        return interpreter._LangPatchScope()
    return ORIGINAL["_patch_lang"](fn)


@functools.cache
def languages(fn) -> tuple[ModuleType, ...]:
    """By what names a function knows the language: a kernel by `tl`, Triton's own library by `core`."""
    return tuple(module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values()))


def get_np_dtype(kind: tl.dtype) -> np.dtype:
    """Triton makes its table anew at each call."""
    name = kind.scalar.name
    if name not in DTYPES:
        DTYPES[name] = ORIGINAL["_get_np_dtype"](kind)
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
