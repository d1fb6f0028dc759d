"""kvfold in DeepSeek-V4 models of Hugging Face transformers: `patch(model)`; patch.py says what it does."""

from ...contract import UnsupportedError
from .patch import entries, patch, rewind, unpatch
from .weights import rope_table

__all__ = ["UnsupportedError", "entries", "patch", "rewind", "rope_table", "unpatch"]
