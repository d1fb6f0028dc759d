"""kvfold inside TensorRT-LLM: its operators `trtllm::compressor_*`, and all that its compressor does in one launch.

`register()` and `load()` are in operators.py, `compress_records` in records.py; docs/tensorrt_llm.md says how to use them.
"""

from .kept import errors, forget, step
from .operators import load, register, unregister
from .pooling import Pools
from .records import compress_records

__all__ = ["Pools", "compress_records", "errors", "forget", "load", "register", "step", "unregister"]
