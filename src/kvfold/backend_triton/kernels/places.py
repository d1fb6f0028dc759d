"""Where the input rows of a window live: the rules of DESIGN.md (State), for kernels.

A slot has places of lo rows (with overlap), then places of hi or whole rows, and a tag for each: the last position of the
window whose rows, from its first one on, are there. There are two times `half` places of each kind: a window has a home and,
`half` further, one other place. What a step reads is its history: lo rows of the window before its first, and lo and hi rows of
that window itself. Programs of one launch call these at the same time and find the same: the only tag of the history that a
launch changes is that of a window that continues, and both its old and its new tag say that the history is there.
"""

import triton
import triton.language as tl

from ..args import Kept, Tags
from .vectors import scalar


@triton.jit
def lo_half(seq):
    """How far apart the two places of a window are, for lo rows; for hi or whole rows it is `seq.ring`."""
    return tl.maximum(seq.ring, 2)


@triton.jit
def lo_places(seq, SPEC: tl.constexpr):
    """How many places there are before those of hi or whole rows."""
    return 2 * lo_half(seq) * SPEC.OVERLAP


@triton.jit
def home_of(seq, window, SPEC: tl.constexpr):
    """The home of a window's lo rows, from which that of its others follows without a division."""
    return window % (2 * (lo_half(seq) if SPEC.OVERLAP else seq.ring))


@triton.jit
def hi_home(seq, home):
    """The home of a window's hi or whole rows, counted from the first place of these. home: of `home_of`."""
    return tl.where(home < 2 * seq.ring, home, home - 2 * seq.ring)  # there are as many places of both, or 4 and 2


@triton.jit
def home_before(seq, home):
    """The home of the lo rows of the window before."""
    return tl.where(home == 0, 2 * lo_half(seq), home) - 1


@triton.jit
def home_back(seq, home, windows, SPEC: tl.constexpr):
    """The home of the window that lies `windows`, a small number, before."""
    home -= windows
    while home < 0:
        home += 2 * (lo_half(seq) if SPEC.OVERLAP else seq.ring)
    return home


@triton.jit
def other_place(place, half):
    """The other place of the windows that can be in `place`."""
    return tl.where(place < half, place + half, place - half)


@triton.jit
def lo_row(place, SPEC: tl.constexpr):
    """The first row, in its slot, of a place of lo rows."""
    return place * SPEC.RATIO


@triton.jit
def hi_row(seq, place, SPEC: tl.constexpr):
    """The same for hi or whole rows. The last one of a window is not kept: no step reads it."""
    KEPT: tl.constexpr = SPEC.RATIO - 1 if SPEC.RATIO > 1 else 1
    return lo_places(seq, SPEC) * SPEC.RATIO + place * KEPT


@triton.jit
def load_tags(seq, home, SPEC: tl.constexpr):
    """What the tags say of both places of the history. home: of the window that the step starts in."""
    tags = seq.tags + lo_places(seq, SPEC)
    hi = hi_home(seq, home)
    at_home = tl.load(tags + hi)
    at_other = tl.load(tags + other_place(hi, seq.ring))
    if SPEC.OVERLAP:
        before = home_before(seq, home)
        before_home = tl.load(seq.tags + before)
        before_other = tl.load(seq.tags + other_place(before, lo_half(seq)))
        lo_home = tl.load(seq.tags + home)
        lo_other = tl.load(seq.tags + other_place(home, lo_half(seq)))
    else:
        before_home = scalar(-1)
        before_other = scalar(-1)
        lo_home = scalar(-1)
        lo_other = scalar(-1)
    return Tags(before_home, before_other, lo_home, lo_other, at_home, at_other)


@triton.jit
def found_place(home, half, at_home, at_other, wanted, least, most):
    """The place that holds a window with a tag from `least` to `most`: -1 if it is not `wanted`, -2 if there is none."""
    found = tl.where((at_other >= least) & (at_other <= most), other_place(home, half), -2)
    found = tl.where((at_home >= least) & (at_home <= most), home, found)
    return tl.where(wanted, found, -1)


@triton.jit
def find_history(tags, seq, home, SPEC: tl.constexpr):
    """Whether all that the step reads is there, and the place of each part of it, -1 for what it does not read.

    home: as in `load_tags`.
    """
    inside = seq.start % SPEC.RATIO
    x0 = seq.start - inside
    last = seq.start - 1
    most = x0 + SPEC.RATIO - 1
    own = inside > 0
    hi = found_place(hi_home(seq, home), seq.ring, tags.hi_home, tags.hi_other, own, last, most)
    held = hi != -2
    before = scalar(-1)
    lo = scalar(-1)
    if SPEC.OVERLAP:
        half = lo_half(seq)
        before = found_place(home_before(seq, home), half, tags.before_home, tags.before_other, x0 > 0, x0 - 1, x0 - 1)
        lo = found_place(home, half, tags.lo_home, tags.lo_other, own, last, most)
        held = held & (before != -2) & (lo != -2)
    return held, Kept(before, lo, hi)


@triton.jit
def look_up(seq, SPEC: tl.constexpr):
    """`find_history` from the beginning, for long steps: most find everything at home, and skip the rest."""
    home = home_of(seq, seq.start // SPEC.RATIO, SPEC)
    x0 = seq.start - seq.start % SPEC.RATIO
    own = x0 < seq.start
    hi = hi_home(seq, home)
    least = seq.start - 1
    most = x0 + SPEC.RATIO - 1
    tag = tl.load(seq.tags + lo_places(seq, SPEC) + hi)
    away = own & ((tag < least) | (tag > most))
    kept = Kept(scalar(-1), scalar(-1), tl.where(own, hi, -1))
    if SPEC.OVERLAP:
        before = home_before(seq, home)
        tag = tl.load(seq.tags + home)
        away = away | (own & ((tag < least) | (tag > most))) | ((x0 > 0) & (tl.load(seq.tags + before) != x0 - 1))
        kept = Kept(tl.where(x0 > 0, before, -1), tl.where(own, home, -1), tl.where(own, hi, -1))
    held = away == 0
    if away:
        held, kept = find_history(load_tags(seq, home, SPEC), seq, home, SPEC)
    return held, kept


@triton.jit
def new_place(home, half, one, other):
    """Where a window goes that begins in the step, and a place to empty, or -1. one, other: places of the history.

    It goes to its home, unless the history is there. Anything else in its other place is stale or of another timeline.
    """
    away = other_place(home, half)
    taken = (home == one) | (home == other)
    spared = taken | (away == one) | (away == other)
    return tl.where(taken, away, home), tl.where(spared, -1, away)


@triton.jit
def is_kept(seq, window, SPEC: tl.constexpr):
    """Whether the step keeps anything of one of its windows: the one that continues the history, and the last ones."""
    most = lo_half(seq) if SPEC.OVERLAP else seq.ring
    own = (window == seq.start // SPEC.RATIO) & (seq.start % SPEC.RATIO > 0)
    return own | ((seq.end - 1) // SPEC.RATIO - window < most)


@triton.jit
def places_to_keep(seq, window, home, kept, SPEC: tl.constexpr):
    """Where the step keeps lo and hi (or whole) rows of one of its windows, -1 if not, and two places to empty, or -1.

    home: that of the window. kept: what `find_history` gave. A window that continues the history stays in its places; of the
    others the last ones are kept, as many as there are pairs of places.
    """
    own = (window == seq.start // SPEC.RATIO) & (seq.start % SPEC.RATIO > 0)
    behind = (seq.end - 1) // SPEC.RATIO - window  # windows of the step behind this one
    hi_place, hi_empty = new_place(hi_home(seq, home), seq.ring, kept.hi, kept.hi)
    new = (own == 0) & (behind < seq.ring)
    hi_place = tl.where(own, kept.hi, tl.where(new, hi_place, -1))
    hi_empty = tl.where(new, hi_empty, -1)
    lo_place = scalar(-1)
    lo_empty = scalar(-1)
    if SPEC.OVERLAP:
        lo_place, lo_empty = new_place(home, lo_half(seq), kept.before, kept.lo)
        new = (own == 0) & (behind < lo_half(seq))
        lo_place = tl.where(own, kept.lo, tl.where(new, lo_place, -1))
        lo_empty = tl.where(new, lo_empty, -1)
    return lo_place, hi_place, lo_empty, hi_empty


@triton.jit
def keep_tags(seq, lo_place, hi_place, lo_empty, hi_empty, last, SPEC: tl.constexpr):
    """Tags a window's places with position `last`, up to which its rows are there, and empties others."""
    tags = seq.tags + lo_places(seq, SPEC)
    tl.store(tags + hi_place, last, mask=hi_place >= 0)
    tl.store(tags + hi_empty, -1, mask=hi_empty >= 0)
    if SPEC.OVERLAP:
        tl.store(seq.tags + lo_place, last, mask=lo_place >= 0)
        tl.store(seq.tags + lo_empty, -1, mask=lo_empty >= 0)
