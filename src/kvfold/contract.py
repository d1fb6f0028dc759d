"""Numbers on which all backends, tests and tools agree."""

from __future__ import annotations


def pooled_bound(window_rows: int) -> float:
    """How far a pooled row, or a fold row, may be from the exact one: the norm of the difference over the norm of the row.

    Args:
        window_rows: tokens that the row is made of, `CompressorSpec.window_rows`.

    Source: docs/numerics.md, Accuracy.
    """
    return 2e-6
