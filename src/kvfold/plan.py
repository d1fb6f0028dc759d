"""`StepPlan`: what depends on the step and not on the layer, computed once on the device."""

from __future__ import annotations

import torch

from . import ops
from .arguments.checks import traced
from .calls.run import run_update
from .storage.step import LIVE, PlanData


class StepPlan(PlanData):
    """Who adds which tokens in a step, and which windows that touches. Build it with `StepPlan.build`.

    Attributes:
        start_pos: int32 `[B]`, tokens that each sequence had before the step. The plan's own copy.
        cu_seqlens: int32 `[B + 1]`, offsets of each sequence's new tokens in `kv_score`. The plan's own copy.
        state_slots: int32 `[B]`, the caller's tensor; None with block tables, and where there is no state.
        block_tables: the caller's tensors, of value and of score pages; None with state slots.
        page_size: rows per page of the state; None with state slots.
        snapshot_table: int32 `[B, S]`, the caller's tensor, or None: where the snapshots of pages go.
        snapshot_page_size: positions per page of `snapshot_table`; None without one.
        entry_slots: int64 `[E]`, cache slot of each entry: the caller's tensor, or computed from `cache_block_table`; None if
            neither was given.
        cu_entries: int32 `[B + 1]`: entry `cu_entries[b] + i` is window `start_pos[b] // ratio + i` of sequence `b`.
        items: int32 `[I, 8]`, one row for each window touched (`ITEM_FIELDS`); the first `num_items[0]` rows count. Without
            state slots `slot` is the sequence index, the row of the tables.
        entry_items: int32 `[E]`, the index in `items` of each entry of the step, -1 behind the last one.
        errors: int32 `[1]`, sequences and entries refused since the caller last zeroed it (DESIGN.md, Plan).
        entry_capacity, item_capacity: E and I, known to the host.
    """

    @classmethod
    def build(
        cls,
        ratio: int,
        start_pos: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_new_tokens: int,
        *,
        state_slots: torch.Tensor | None = None,
        block_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        page_size: int | None = None,
        entry_slots: torch.Tensor | None = None,
        cache_block_table: torch.Tensor | None = None,
        rows_per_page: int | None = None,
        max_tokens: int | None = None,
        snapshot_table: torch.Tensor | None = None,
        snapshot_page_size: int | None = None,
    ) -> StepPlan:
        """Plans one step for all layers whose compressor has this ratio.

        `start_pos`, `cu_seqlens`, `state_slots`, `block_tables`, `entry_slots`, `cache_block_table` and `snapshot_table` must
        be written before this call or `update`, and all but the first two, which are copied, left alone until the last call of
        the step is done.

        Args:
            ratio: tokens per window.
            start_pos: int32 `[B]`, tokens that each sequence already has; drafts are rejected by making it smaller.
            cu_seqlens: int32 `[B + 1]`, from 0, not decreasing. Equal neighbours make a sequence absent from the step.
            max_new_tokens: host bound on any sequence's new tokens.
            state_slots: int32 `[B]`, the slot of each sequence in a `FoldState`; -1 makes it absent. No two of a step share a
                slot: nothing counts that, results are undefined, and `kvfold.check` names it.
            block_tables: for a `WindowState`, instead of `state_slots`: int32 `[B, P1]` of value pages and int32 `[B, P2]` of
                score pages. Position p of a sequence is row `p % page_size` of page `table[b, p // page_size]`; -1 where there
                is no page.
            page_size: with `block_tables`: positions per page.
            entry_slots: int64 `[E]`, the cache slot for each entry of the step, in the order of `cu_entries`; -1 drops it.
            cache_block_table: int32 `[B, Q]`, instead of `entry_slots`: entry w of a sequence is row `w % rows_per_page` of
                page `table[b, w // rows_per_page]`; a page of -1 drops the entry.
            rows_per_page: with `cache_block_table`: entries per page, the same as the cache's.
            max_tokens: host bound on the new tokens of all sequences together (default `B * max_new_tokens`); it sizes
                the plan, so give it when one prompt is long and the rest are short.
            snapshot_table: int32 `[B, S]`: page k of a sequence, which has positions `[k, k + 1) * snapshot_page_size`, leaves
                its snapshot in row `table[b, k]` of the `Snapshots` that a call gets; -1 or a page beyond S leaves none. No two
                pages of a step leave it in the same row.
            snapshot_page_size: with `snapshot_table`: positions per page.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        plan = cls()
        plan.ratio, plan.max_new_tokens, plan.max_tokens = ratio, max_new_tokens, max_tokens
        plan.state_slots, plan.block_tables, plan.page_size = state_slots, block_tables, page_size
        plan.entry_slots, plan.cache_block_table, plan.rows_per_page = entry_slots, cache_block_table, rows_per_page
        plan.snapshot_table, plan.snapshot_page_size = snapshot_table, snapshot_page_size
        plan._allocate(start_pos, cu_seqlens)
        plan.update(start_pos, cu_seqlens)
        if plan.item_capacity and not traced(plan.items):  # without items there is no address
            LIVE[plan.items.data_ptr()] = plan
        return plan

    def update(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Plans another step in place: same batch size and bounds, other lengths, slots and pages.

        Runs on the device without synchronizing, so it can be captured in a CUDA graph. What `build` was given is read again:
        write new contents into `state_slots` or `block_tables`, `entry_slots` or `cache_block_table`, and `snapshot_table`
        before the call, and leave them until the last call of the step is done. Data that makes no sense is counted in
        `errors`.

        Args:
            start_pos: int32 `[B]`; cu_seqlens: int32 `[B + 1]`, as for `build`. Copied, so free again after the call.
        """
        update = ops.update if traced(start_pos) else run_update
        update(self, start_pos, cu_seqlens)
