"""Loads and stores of several blocks, for code that is unrolled over rows, in a form that is compiled quickly.

For every access, Triton's coalescing pass follows what its address is made of, what else is made of that, and so on: work that
grows with accesses times operations squared, and was most of the time to compile a large kernel. It stops where an address is
carried around a loop. So accesses stand in a loop of one turn, whose bounds LLVM knows and Triton does not: the machine code
has no loop (docs/notes/0074).

Not for fp32 beside bf16 where a thread has 8 channels: left to itself, the pass gives a thread 4 of them there, and then
converts.
"""

import triton
import triton.language as tl


@triton.jit
def unseen_zero():
    """0, by its lowest bit, which Triton does not follow. Used as a bound of loops, and times 64 as a step of addresses, which
    Triton then knows to stay aligned.
    """
    return tl.program_id(0) * 2 & 1


@triton.jit
def blank_blocks(ats):
    """Blocks that loads from these addresses replace."""
    blocks = ()
    for i in tl.static_range(len(ats)):
        blocks = blocks + (tl.zeros(ats[i].shape, ats[i].dtype.element_ty),)
    return blocks


@triton.jit
def move_blocks(ats, by):
    moved = ()
    for i in tl.static_range(len(ats)):
        moved = moved + (ats[i] + by,)
    return moved


@triton.jit
def load_blocks(ats, theres, others, PAST_L1: tl.constexpr = False):
    """The blocks at addresses `ats`. theres, others: the mask of each, and the value where it is false; None: no masks."""
    CACHE: tl.constexpr = ".cg" if PAST_L1 else ""
    zero = unseen_zero()
    blocks = blank_blocks(ats)
    for _ in tl.range(zero, zero + 1, num_stages=1):
        found = ()
        for i in tl.static_range(len(ats)):
            if theres is None:
                found = found + (tl.load(ats[i], cache_modifier=CACHE),)
            else:
                found = found + (tl.load(ats[i], theres[i], others[i], cache_modifier=CACHE),)
        blocks = found
        ats = move_blocks(ats, zero * 64)
    return blocks


@triton.jit
def in_turn(blocks):
    """Blocks 0, 2, 4 and so on, and the others: values and scores that were loaded in turn."""
    evens = ()
    odds = ()
    for i in tl.static_range(0, len(blocks), 2):
        evens = evens + (blocks[i],)
        odds = odds + (blocks[i + 1],)
    return evens, odds


@triton.jit
def store_blocks(ats, blocks, there):
    """Stores blocks to addresses `ats` where the mask `there` is true, or everywhere."""
    zero = unseen_zero()
    for _ in tl.range(zero, zero + 1, num_stages=1):
        for i in tl.static_range(len(ats)):
            tl.store(ats[i], blocks[i], there)
        ats = move_blocks(ats, zero * 64)
