"""What the kernels of training are given, besides what those of `compress` are (backend_triton/args.py)."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from ..backend_triton.args import Floats, Int, Ints, Stride

Singles = Annotated[Any, "*fp32"]


class Pieces(NamedTuple):
    """Pieces of a `Packing`: `count` of them, of which the first `capacity` may be windows."""

    rows: Ints
    count: Int
    capacity: Int


class Kept(NamedTuple):
    """`Entries.kept`: largest scores, inverse sums of weights and pooled rows, `plane` numbers apart."""

    rows: Singles = None
    plane: Stride = None


class Incoming(NamedTuple):
    """Gradients of entries and of latents; and of pooled rows, where a kernel makes them for the next one."""

    entries: Floats = None
    latent: Floats = None
    pooled: Singles = None


class Parts(NamedTuple):
    """Sums of each group of windows, for ape `[groups, ratio * channels]` and for norm_weight `[groups, head_dim]`.

    each: consecutive windows of a group. runs: `[groups, 4]` instead, with the first window of each group, the one after its
    last, and the group whose sum it continues; `each` is then how many windows there are in all.
    """

    ape: Singles = None
    weight: Singles = None
    groups: Int = None
    each: Int = None
    runs: Ints = None


class Group(NamedTuple):
    """What a group takes: `own` windows from `first` on, and every `groups`-th piece from `behind` on. at: which sum is its
    own.
    """

    first: Any
    own: Any
    behind: Any
    at: Any


class Piece(NamedTuple):
    """A row of `Packing.pieces`, as kernels read it."""

    token: Any
    window: Any
    rest: Any
