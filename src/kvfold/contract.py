"""Numbers on which all backends, tests and tools agree."""

from __future__ import annotations

MOST_POSITIONS = 1 << 30  # of a sequence: what kernels add to a position then stays an int32


def pooled_bound(window_rows: int) -> float:
    """How far a pooled row, or a fold row, may be from the exact one: the norm of the difference over the norm of the row.

    It is for rows that do not cancel, whose norm is not small beside that of the weighted mean of |values|, and of which the
    rounding errors do not go one way in all channels; `pooled_worst` asks for neither.

    Args:
        window_rows: tokens that the row is made of, `CompressorSpec.window_rows`.

    Source: docs/numerics.md, Accuracy.
    """
    return 2e-6 * max(1.0, window_rows / 128)


def pooled_worst(window_rows: int) -> float:
    """How far a channel of a pooled row can be from the exact one, over the weighted mean of |values| in its window.

    That mean is the pooled row of `|K|` with the same scores. The bound is of roundings alone, whatever values and scores are.

    Args:
        window_rows: tokens that the row is made of, `CompressorSpec.window_rows`.

    Source: docs/numerics.md, Accuracy.
    """
    return (12 * window_rows + 16) * 2.0**-24
