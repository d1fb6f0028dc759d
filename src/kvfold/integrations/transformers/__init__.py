"""kvfold in DeepSeek-V4 models of Hugging Face transformers: `patch(model)`; patch.py says what it does."""

from .patch import UnsupportedError, entries, patch, rewind, rope_table, unpatch

__all__ = ["UnsupportedError", "entries", "patch", "rewind", "rope_table", "unpatch"]
