"""kvfold: GPU kernels for the KV-cache compressor of DeepSeek-V4."""

from . import ops, reference, training
from ._version import __version__
from .compress import compress, compress_many, project_compress, project_compress_many
from .contract import UnsupportedError
from .debug.check import check
from .debug.replay import dump, replay
from .plan import StepPlan
from .precompile.aot import aot
from .precompile.prebuild import prebuild, use_prebuilt
from .precompile.report import AotReport
from .precompile.warmup import warmup
from .restore import restore
from .spec import V4_CSA, V4_HCA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState, carry_bytes
from .storage.mean_state import MeanState
from .storage.snapshots import Snapshots
from .storage.step import Compressor
from .storage.weights import ScaledWeight
from .storage.window_state import WindowState
from .store import store

__all__ = [
    "V4_CSA",
    "V4_HCA",
    "V4_INDEXER",
    "V41_INDEX_K",
    "V41_MAIN_R1",
    "V41_MAIN_R2",
    "AotReport",
    "Compressor",
    "CompressorSpec",
    "EntryCache",
    "FoldState",
    "MeanState",
    "ScaledWeight",
    "Snapshots",
    "StepPlan",
    "UnsupportedError",
    "WindowState",
    "__version__",
    "aot",
    "carry_bytes",
    "check",
    "compress",
    "compress_many",
    "dump",
    "ops",
    "prebuild",
    "project_compress",
    "project_compress_many",
    "reference",
    "replay",
    "restore",
    "store",
    "training",
    "use_prebuilt",
    "warmup",
]
