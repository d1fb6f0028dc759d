"""Pooled rows whose channels are shared by several programs, one of which finishes the entry.

Each slice is written as 64-bit words with a ready bit. A program draws a ticket before its last slice of an entry. The one with
the last ticket polls the words of all and finishes the entry: no fence, no atomic after the work. It waits only for programs
that are already running (docs/notes/0022).
"""

import triton
import triton.language as tl

from .fold import spread
from .vectors import scalar


@triton.jit
def draw_ticket(arrivals, entry, drawn, THREADS: tl.constexpr = 256):
    """A ticket for one part of an entry; `is_last` reads it, after the work that hides its latency."""
    # A vector, as all threads would wait here for a scalar; at least as long as the program has threads, so that each element
    # has one owner.
    first = (tl.arange(0, THREADS) == 0) & spread(drawn, THREADS)
    ticket = tl.atomic_add(arrivals + entry + tl.zeros((THREADS,), tl.int32), 1, mask=first, sem="relaxed")
    return tl.where(first, ticket, 0)


@triton.jit
def is_last(ticket, parts):
    return tl.sum(ticket, axis=0) == parts - 1


@triton.jit
def leave_slice(workspace, y, entry, c0, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, COHERENT_STORES: tl.constexpr):
    """Writes channels `[c0, c0 + SLICE)` of a pooled row to the workspace, with the ready bit above the 32 bits of each."""
    at = workspace + entry.to(tl.int64) * HEAD_DIM + c0 + tl.arange(0, SLICE)
    word = (y.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (1 << 32)
    if COHERENT_STORES:
        tl.store(at, word)
    else:
        # Other chiplets need not see a plain store before the launch is done. A sum, as the word is zero before, and Triton 3.6
        # knows no 64-bit exchange for AMD.
        tl.atomic_add(at, word, sem="relaxed")


@triton.jit
def take_slices(workspace, arrivals, entry, HEAD_DIM: tl.constexpr):
    """The whole row, for the program that drew the last ticket; the next call finds words and tickets at zero."""
    at = workspace + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    words = tl.load(at, volatile=True)
    while tl.min((words >> 32).to(tl.int32), axis=0) == 0:
        words = tl.load(at, volatile=True)
    tl.store(at, tl.zeros((HEAD_DIM,), tl.int64))
    tl.store(arrivals + entry, 0)
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def share_entries(num_entries, programs, SLICES: tl.constexpr):
    """How many parts an entry has, and slices a part: as many parts as leave one to each program, since each part looks up
    rows.
    """
    parts = scalar(SLICES)
    span = scalar(1)
    while (parts > 1) & (num_entries * parts > programs):
        parts = parts // 2
        span = span * 2
    return parts, span


@triton.jit
def first_work(pid, programs, num_entries, parts, SLICES: tl.constexpr):
    """The first part of an entry and the first work item of a program.

    Programs start in order, so those at the front get the longer work, which is pooling where it has slices.
    """
    task = programs - 1 - pid
    front = pid
    if SLICES > 1:
        task = pid
        behind = pid - tl.minimum(num_entries * parts, programs)
        front = tl.where(behind < 0, behind + programs, behind)
    return task, front
