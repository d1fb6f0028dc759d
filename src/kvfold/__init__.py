"""kvfold: GPU kernels for the KV-cache compressor of DeepSeek-V4."""

from . import ops, reference
from .compress import compress, compress_many
from .debug.check import check
from .debug.replay import dump, replay
from .plan import StepPlan
from .precompile.aot import aot
from .precompile.report import AotReport
from .precompile.warmup import warmup
from .restore import restore
from .spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from .storage.fold_state import FoldState
from .storage.formats import EntryCache
from .storage.snapshots import Snapshots
from .storage.window_state import WindowState
from .store import store

__version__ = "0.1.0"

__all__ = [
    "V4_CSA",
    "V4_HCA",
    "V4_INDEXER",
    "AotReport",
    "CompressorSpec",
    "EntryCache",
    "FoldState",
    "Snapshots",
    "StepPlan",
    "WindowState",
    "aot",
    "check",
    "compress",
    "compress_many",
    "dump",
    "ops",
    "reference",
    "replay",
    "restore",
    "store",
    "warmup",
]
