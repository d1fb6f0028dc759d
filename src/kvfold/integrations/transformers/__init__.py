"""kvfold in DeepSeek-V4 models of Hugging Face transformers: `patch(model)` or `register()`; patching.py says what they do.

transformers is imported when the first of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...contract import UnsupportedError

if TYPE_CHECKING:
    from .patching import entries, patch, register, rewind, unpatch, unregister
    from .weights import rope_table

__all__ = ["UnsupportedError", "entries", "patch", "register", "rewind", "rope_table", "unpatch", "unregister"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import patching, weights

    return getattr(weights if name == "rope_table" else patching, name)
