"""Context parallelism: a sequence cut over several processes, entries and state with the bits of one."""

from .carry import Carry, put_carry, take_carry
from .context import ContextParallel
from .errors import RankError
from .halo import CutPacking
from .plan import ParallelPlan
from .shards import Segment, Shards

__all__ = [
    "Carry",
    "ContextParallel",
    "CutPacking",
    "ParallelPlan",
    "RankError",
    "Segment",
    "Shards",
    "put_carry",
    "take_carry",
]
