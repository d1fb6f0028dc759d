"""How each kernel of training is launched: the one table of it.

Only `groups` changes a bit, and `rows` of `"sum"`, of the gradients of ape and norm_weight alone: they are sums over windows,
which each group makes of its own. It follows the spec and the number of entries that a packing has room for, never the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..backend_triton.table import ANY
from ..spec import CompressorSpec


@dataclass(frozen=True)
class Config:
    """A row of the table. It serves a kernel for what is inside its bounds; of several rows, the first one.

    Attributes:
        kernel: `"forward"`; `"entries"`, of windows that several programs of the forward share; `"read"`, of records, for fake
            quantization; `"again"`, the whole backward of windows that are folded again; `"finish"`, `"spread"`, the backward
            of windows whose fold was kept, in two launches; `"sum"`, of the groups' sums; `"fold"`, of those of some windows;
            `"tail"`, the fold of tokens whose window ends on another GPU; `"folded"`, the forward of windows that begin there.
        head_dims: narrowest and widest entry.
        window_rows: fewest and most tokens per entry.
        entries: most rows of entries.
        num_warps: per program. registers: bound on registers per thread, 0 for none.
        ahead: `"forward"`, `"tail"`, `"folded"`: tokens in flight at once. slice: `"forward"`: channels of a program, where a
            window is folded token by token; 0 for all.
        rows, columns: of a tile of `"spread"` and, for ape, of `"sum"`, where rows are blocks of groups.
        groups: most groups of up to `MOST_EACH` windows, each summed by itself.
        fetch: `"again"`, `"spread"`: whether tokens of the next window are fetched into the L2 cache while one is worked on.
        spills: bytes that a thread may spill on sm_90, by Triton 3.6; of `"again"` where kv_score is fp32.
    """

    kernel: str
    head_dims: tuple[int, int]
    window_rows: tuple[int, int]
    entries: float
    num_warps: int
    registers: int = 0
    ahead: int = 0
    slice: int = 0
    rows: int = 0
    columns: int = 0
    groups: int = 0
    fetch: bool = False
    spills: int = 0

    def serves(self, kernel: str, spec: CompressorSpec, entries: int) -> bool:
        return (
            kernel == self.kernel
            and self.head_dims[0] <= spec.head_dim <= self.head_dims[1]
            and self.window_rows[0] <= spec.window_rows <= self.window_rows[1]
            and entries <= self.entries
        )


_NARROW, _MIDDLE, _WIDE, _WIDEST = (16, 128), (256, 256), (512, 1024), (2048, 4096)
_SHORT, _LONG, _ALL = (1, 8), (9, 8192), (1, 8192)

# Of V4's compressors each row is what was fastest of about a hundred on an H200 (benchmarks/run/training.py --sweep).
CONFIGS: tuple[Config, ...] = (
    Config("forward", _NARROW, _SHORT, ANY, 1, ahead=8),
    Config("forward", _MIDDLE, _SHORT, ANY, 2, ahead=8),
    Config("forward", _WIDE, _SHORT, ANY, 4, ahead=8),
    Config("forward", _WIDEST, _SHORT, ANY, 16, ahead=8),
    Config("forward", _NARROW, _LONG, ANY, 1, ahead=8),
    Config("forward", _MIDDLE, _LONG, ANY, 2, ahead=8, spills=20),
    # As long steps over fold rows (backend_triton/table.py): few windows are chains of tokens, so many loads ahead, and shared
    # where that fills 132 multiprocessors better; many are as fast as their instructions.
    Config("forward", _WIDE, _LONG, 66, 2, ahead=16, slice=64),
    Config("forward", _WIDE, _LONG, 132, 8, ahead=16),
    Config("forward", _WIDE, _LONG, 198, 4, ahead=16, slice=256),
    Config("forward", _WIDE, _LONG, ANY, 8, ahead=8),
    Config("forward", _WIDEST, _LONG, ANY, 16, ahead=4),
    Config("entries", (16, 4096), _LONG, ANY, 4),
    *(Config("read", width, _ALL, ANY, warps) for width, warps in ((_NARROW, 1), (_MIDDLE, 2), (_WIDE, 4), (_WIDEST, 8))),
    Config("again", _NARROW, _SHORT, 4096, 1, groups=512, fetch=True),
    Config("again", _NARROW, _SHORT, ANY, 1, groups=1024, fetch=True),
    Config("again", _MIDDLE, _SHORT, ANY, 2, groups=512),
    # Of many entries groups are powers of two, so that GPUs which share a sequence evenly have whole ones.
    Config("again", (512, 512), _SHORT, 4096, 4, groups=384, fetch=True),
    Config("again", (512, 512), _SHORT, ANY, 2, groups=512, fetch=True, spills=140),
    Config("again", (1024, 1024), _SHORT, ANY, 8, groups=256),
    Config("again", _WIDEST, _SHORT, ANY, 16, groups=128),
    Config("finish", _NARROW, _LONG, ANY, 1, groups=256),
    Config("finish", _MIDDLE, _LONG, ANY, 2, groups=256),
    Config("finish", _WIDE, _LONG, ANY, 4, groups=256),
    Config("finish", _WIDEST, _LONG, ANY, 8, groups=128),
    Config("spread", (256, 4096), _LONG, 256, 2, rows=4, columns=256, groups=16, fetch=True),
    Config("spread", (16, 4096), _LONG, ANY, 4, rows=4, columns=512, groups=16),
    Config("sum", (16, 4096), _SHORT, ANY, 4, rows=128, columns=8),
    Config("sum", (16, 4096), _LONG, ANY, 4, rows=8, columns=32),
    Config("fold", (16, 4096), _ALL, ANY, 4, columns=512),
    # One window of each segment: a chain of tokens.
    *(
        Config(kernel, width, _LONG, ANY, warps, ahead=ahead)
        for kernel in ("tail", "folded")
        for width, warps, ahead in ((_NARROW, 1, 8), (_MIDDLE, 2, 8), (_WIDE, 8, 16), (_WIDEST, 16, 4))
    ),
)


def choose(kernel: str, spec: CompressorSpec, entries: int) -> Config:
    """The first row of the table that serves a call; there is one for every spec."""
    return next(config for config in CONFIGS if config.serves(kernel, spec, entries))


MOST_EACH = 64  # windows of a group: of long sequences there are more groups, which several GPUs can share
_BLOCKS = 128  # of the sums for norm_weight


class Groups(NamedTuple):
    """Whose windows are summed by themselves: how many groups, windows of each, and blocks of groups (kernels/sums.py)."""

    count: int
    each: int
    blocks: int

    @property
    def of_a_block(self) -> int:
        return -(-self.count // self.blocks)


def backward_kernels(keeps: bool) -> tuple[str, str]:
    """Which sum the gradients of ape, and of norm_weight. keeps: `How.keeps`."""
    return ("spread", "finish") if keeps else ("again", "again")


def groups_for(keeps: bool, spec: CompressorSpec, entries: int) -> tuple[Groups, Groups]:
    """For ape and for norm_weight, of a call with room for so many entries."""
    found = []
    for kernel, most in zip(backward_kernels(keeps), (choose("sum", spec, entries).rows, _BLOCKS), strict=True):
        groups = groups_of(choose(kernel, spec, entries), entries)
        found.append(Groups(groups, each_of(groups, entries), blocks_of(groups, most)))
    return found[0], found[1]


def blocks_of(groups: int, most: int = _BLOCKS) -> int:
    return min(most, 1 << (groups - 1).bit_length())


def each_of(groups: int, entries: int) -> int:
    """Windows of a group: the last ones may have fewer, or none."""
    return max(-(-entries // groups), 1)


def groups_of(config: Config, entries: int) -> int:
    """Groups of a call with room for so many entries: powers of two less where there are fewer, or more where many."""
    groups = config.groups
    while groups and groups * MOST_EACH < entries:
        groups *= 2
    while groups > 1 and groups >= 2 * entries:
        groups //= 2
    return groups
