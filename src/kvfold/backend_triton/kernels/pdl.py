"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

What a kernel reads before `wait_for_inputs` must have been written before the launch that it follows had begun
(DESIGN.md, Dependent launch). Needs sm_90 and a Triton whose kernels can call the intrinsics (3.5).
"""

import inspect

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    # Triton 3.4 has them too, and hands them an argument that they do not take.
    AVAILABLE = "_semantic" in inspect.signature(gdc_wait).parameters
except ImportError:
    gdc_launch_dependents = gdc_wait = None
    AVAILABLE = False


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns when all that was launched before has finished and can be seen; then lets the next launch begin to start."""
    if PDL:
        gdc_wait()
        # Not before the wait: the launch behind this one relies on all before this one being done.
        gdc_launch_dependents()


@triton.jit
def load_plan(pointer):
    """A number of the plan, past the L1 cache.

    The L1 of a multiprocessor may still hold the plan of the step before: nothing empties it for a kernel that starts early.
    """
    return tl.load(pointer, cache_modifier=".cg")
