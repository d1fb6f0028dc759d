"""A call of `compress` made again over other tensors of the same kinds, in the host time of little more than its launch.

For a caller that makes states, caches and plans itself and drops them soon, as an adapter whose model makes a cache for each
prompt: objects would be checked once, and used once. One call goes through `compress`, which checks all; nothing is checked of
those that are made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.step import Compressor, PlanData
from .build import INTERPRETED
from .launch import argument_places, most_windows, scratch_of, update_on_gpu, use_pdl
from .launcher import multiprocessors
from .table import item_bucket

# What another call brings, in the order of the kernel's arguments.
_BROUGHT = (
    "plan_items", "plan_num_items", "plan_entry_slots", "plan_entry_capacity", "plan_errors", "tokens_kv_score",
    "tokens_stride", "tokens_count", "tokens_ape", "tokens_apart", "tokens_skew", "state_rows", "state_tags",
    "state_num_slots", "scratch_workspace", "scratch_arrivals", "output_norm_weight", "output_rope", "output_max_position",
    "output_pages", "output_num_slots",
)  # fmt: skip


class Scratch:
    """Memory by which programs of a launch communicate, shared by states whose calls follow each other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._workspaces: list = []
        self._recorded: list = []


class Again:
    """The last call of `compress` with this state and plan, values and scores in two tensors, without snapshots and outputs.

    It serves calls of the same spec, dtypes, `FoldState.max_new_tokens` and `StepPlan.max_new_tokens`, on the same device, with
    one slot or more in both, entries of the format fp32 or bf16 that are pages of one, and windows of the same bucket
    (`table.item_bucket`).
    """

    def __init__(self, c: Compressor, plan: PlanData) -> None:
        call = c.state._layer.plans[id(plan)].prepared
        self.places, _ = argument_places("step", _BROUGHT)
        self.values = [None if i in self.places else value for i, value in enumerate(call.values)]  # of this call nothing stays
        self.chosen, self.bits = call.chosen, call.bits
        self.head_dim, self.entry_bytes = c.spec.head_dim, c.cache.page_bytes

    def __call__(
        self,
        windows: int,
        plan: PlanData,
        value: torch.Tensor,
        score: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        state: Sequence[torch.Tensor],
        entries: torch.Tensor,
        scratch: Scratch,
        pdl: bool | None,
    ) -> None:
        """windows: how many the call may touch. value, score: `[T, channels]`, contiguous. weights: ape in fp32, norm weight,
        rope.

        state: rows and tags, mutated. entries: contiguous, mutated: one of them is a page.
        """
        chosen, (ape, norm_weight, rope) = self.chosen, weights
        workspace, arrivals = scratch_of(scratch, chosen.slices, chosen.draws[0], plan.entry_capacity, self.head_dim)
        first, stride = value.data_ptr(), value.stride(0)
        apart = (score.data_ptr() - first) // value.element_size()
        brought = (
            plan.items, plan.num_items, plan.entry_slots, plan.entry_capacity, plan.errors, value,
            stride, value.shape[0], ape, apart, 0, *state,
            state[0].shape[0], workspace, arrivals, norm_weight, rope, rope.shape[0],
            entries if not INTERPRETED else entries.view(torch.uint8), entries.nbytes // self.entry_bytes,
        )  # fmt: skip
        values, bits = self.values.copy(), self.bits | stride | apart
        for place, given in zip(self.places, brought):  # noqa: B905 (every call comes here)
            if given is not None and given.__class__ is not int and not INTERPRETED:
                given = given.data_ptr()
                bits |= given
            values[place] = given
        chosen.launcher(min(windows * chosen.slices, chosen.programs), values, bits, use_pdl(pdl, plan, scratch.device))


def count(plan: PlanData, tokens: int) -> tuple[int, float]:
    """The most windows that a call with so many tokens can touch, and their bucket."""
    windows = most_windows(plan, tokens)
    return windows, item_bucket(windows, multiprocessors(plan.items.device))


def update(plan: PlanData, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """`StepPlan.update` of a plan on a GPU, with lengths of the kinds it was built from, in memory that it does not write."""
    plan.fresh = True
    update_on_gpu(plan, start_pos, cu_seqlens)
