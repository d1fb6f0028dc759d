"""kvfold inside vLLM: DeepSeek-V4's and V4.1's compressors run on kvfold, over vLLM's own pages (docs/vllm.md).

`KVFOLD_ENGINES=vllm` switches it on in every process of vLLM, or `register()` in one. Importing this imports no vLLM.
"""

from ...contract import UnsupportedError
from .patch import refused, register, unregister

__all__ = ["UnsupportedError", "refused", "register", "unregister"]
