"""Compressors with gradients, for training: packed sequences in, entries out, the bits of `kvfold.compress`."""

from .calls import compress, compress_backward, compress_forward
from .packing import Packing
from .problem import Entries, Gradients

__all__ = ["Entries", "Gradients", "Packing", "compress", "compress_backward", "compress_forward"]
