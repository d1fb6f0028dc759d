"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

What a kernel reads before `wait_for_inputs` must have been written before the launch that it follows had begun
(DESIGN.md, Dependent launch). Needs sm_90.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns when all that was launched before has finished and can be seen; then lets the next launch begin to start."""
    if PDL:
        gdc_wait()
        # Not before the wait: the launch behind this one relies on all before this one being done.
        gdc_launch_dependents()


@triton.jit
def load_plan(pointer):
    """Loads a number of the plan, past the L1 cache.

    The L1 of a multiprocessor may still hold the plan of the step before: nothing empties it for a kernel that starts early.
    """
    return tl.load(pointer, cache_modifier=".cg")
