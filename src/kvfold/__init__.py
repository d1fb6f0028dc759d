"""kvfold: GPU kernels for the KV-cache compressor of DeepSeek-V4."""

from . import ops, reference
from .aot import aot
from .aot_report import AotReport
from .compress import compress, compress_many
from .debug import check
from .plan import StepPlan
from .replay import dump, replay
from .restore import restore
from .spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from .storage.fold_state import FoldState
from .storage.formats import EntryCache
from .storage.snapshots import Snapshots
from .storage.window_state import WindowState
from .store import store
from .warmup import warmup

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
