"""Numbers on which all backends, tests and tools agree, and the error for what no kernel serves."""

from __future__ import annotations

INT32_MAX = (1 << 31) - 1
MOST_ITEMS = (1 << 28) - 1  # kernels find an item by an int32 of its numbers
MOST_POSITIONS = 1 << 30  # of a sequence: what kernels add to a position then stays an int32
ITEM_FIELDS = ("window", "start", "end", "token", "slot", "entry", "sequence", "unused")  # of a row of `StepPlan.items`

# The order of the sums of a WindowState's entries, which their bits follow. Row j of a window belongs to lane j % LANES; a lane
# takes ROWS_OF_A_LANE rows against one maximum; lanes are summed last.
LANES, ROWS_OF_A_LANE = 8, 8
# The same of a FoldState's windows of input rows: row j is of group j // 4, and a group is folded against one maximum. Two
# groups are a window of ratio 4 with overlap. A group of 8 would hold all its scores in registers at once.
ROWS_AT_ONCE = 4

# The order of the sums of a projection. hidden_dim is cut into CHUNKS_OF_HIDDEN chunks of a multiple of HIDDEN_STEP, the last
# of which may be shorter or empty. Each is summed by itself, in fp32; then chunks 2i and 2i + 1; then these pairs in order.
CHUNKS_OF_HIDDEN, HIDDEN_STEP, LEAST_HIDDEN = 8, 64, 256
SCALE_BLOCK = 128  # rows, and numbers of hidden_dim, that share a scale of a weight in FP8


class UnsupportedError(ValueError, NotImplementedError):
    """What was asked for is valid, but kvfold has no kernel or no hook for it; the message says what there is."""


def chunk_of_hidden(hidden_dim: int) -> int:
    """Numbers of a hidden state in each chunk of a projection's sums."""
    return -(-hidden_dim // (CHUNKS_OF_HIDDEN * HIDDEN_STEP)) * HIDDEN_STEP


def check_hidden_dim(name: str, width: int) -> None:
    """Raises ValueError where no projection is defined for hidden states so wide."""
    if width % HIDDEN_STEP or width < LEAST_HIDDEN:
        raise ValueError(f"{name} must be a multiple of {HIDDEN_STEP} and at least {LEAST_HIDDEN} numbers wide, got {width}")


def pooled_bound(window_rows: int) -> float:
    """How far a pooled row, or a fold row, may be from the exact one: the norm of the difference over the norm of the row.

    It assumes two things: the row does not cancel (its norm is not small beside that of the weighted mean of |values|), and
    rounding errors do not all have one sign. `pooled_worst` assumes neither.

    Args:
        window_rows: tokens that the row is made of, `CompressorSpec.window_rows`.

    Source: docs/numerics.md, Accuracy.
    """
    return 2e-6 * max(1.0, window_rows / 128)


def pooled_worst(window_rows: int) -> float:
    """How far a channel of a pooled row can be from the exact one, over the weighted mean of |values| in its window.

    That mean is the pooled row of `|K|` with the same scores. The bound holds for any values and scores.

    Args:
        window_rows: tokens that the row is made of, `CompressorSpec.window_rows`.

    Source: docs/numerics.md, Accuracy.
    """
    return (12 * window_rows + 16) * 2.0**-24


def projected_worst(hidden_dim: int) -> float:
    """How far a number of kv_score can be from the exact one, over the sum of the magnitudes of its products.

    Args:
        hidden_dim: numbers of a hidden state.

    Source: docs/numerics.md, Projections.
    """
    # A matrix instruction adds 16 products and the sum before, each of which it may cut off at 2**-23 of the largest.
    return (chunk_of_hidden(hidden_dim) * 17 / 16 + 5) * 2.0**-23


def resumed_bound(steps: int) -> float:
    """What to add to `pooled_bound` or `pooled_worst` for a pooled row over a `MeanState`.

    Args:
        steps: how many steps started inside the row's window, and so read a row that another step wrote.

    Source: docs/numerics.md, Accuracy.
    """
    return 2 * steps * 2.0**-24
