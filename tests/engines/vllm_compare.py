"""What two runs of vLLM left in memory, compared byte by byte."""

from __future__ import annotations

from benchmarks.lib.vllm_world import Memory


def check_same(found: Memory, wanted: Memory, *, to_the_bit: bool, of_bf16: bool = True) -> None:
    """The same bytes. If not `to_the_bit`: but for the last bit of rotated channels, in 1 byte and 1 more of each 10,000.

    of_bf16: these channels are bf16, in a record of 576 bytes, and where they are is checked.
    """
    written = int((wanted.bytes != wanted.before).sum())
    assert written > 0
    different = (found.bytes != wanted.bytes).nonzero()
    if to_the_bit:
        assert not len(different), f"{len(different)} of {written} bytes differ"
    assert len(different) <= 1 + written // 10_000, f"{len(different)} of {written} bytes differ"
    for page, at in different.tolist() if of_bf16 else ():
        assert at % 576 >= 448 and at % 2 == 0, f"byte {at} of block {page} is of no rotated channel's low half"
        assert abs(int(found.bytes[page, at]) - int(wanted.bytes[page, at])) == 1
