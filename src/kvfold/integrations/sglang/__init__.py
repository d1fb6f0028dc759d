"""kvfold in SGLang 0.5.23: `register()`, or `KVFOLD_ENGINES=sglang`; docs/sglang.md says what it replaces."""

from .plugin import load, register
from .pools import FoldStatePool
from .source import errors

__all__ = ["FoldStatePool", "errors", "load", "register"]
