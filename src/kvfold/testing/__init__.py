"""A miniature engine for tests without a model: sequences with slots and pages, cut into steps in any way."""

from .data import make_cache, make_pools, make_state, make_tokens, make_weights
from .engine import Engine, Part, Step, chunks, drafts, prefill, run_many
from .projected import ProjectedEngine
from .told import Told

__all__ = [
    "Engine",
    "Part",
    "ProjectedEngine",
    "Step",
    "Told",
    "chunks",
    "drafts",
    "make_cache",
    "make_pools",
    "make_state",
    "make_tokens",
    "make_weights",
    "prefill",
    "run_many",
]
