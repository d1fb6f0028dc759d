"""`StepPlan`: what depends on the step and not on the layer, computed once on the device."""

from __future__ import annotations

import torch

from . import ops
from .arguments.checks import traced
from .calls.run import run_update
from .storage.step import LIVE, Lengths, PlanData


class StepPlan(PlanData):
    """Who adds which tokens in a step, and which windows that touches. Build it with `StepPlan.build`.

    Attributes:
        start_pos: int32 `[B]`, tokens that each sequence had before the step. The plan's own copy; of numbers beyond int32 the
            nearest that is one.
        cu_seqlens: int32 `[B + 1]`, offsets of each sequence's new tokens in `kv_score`. The plan's own copy, likewise.
        state_slots: `[B]`, the caller's tensor; None with block tables, and where there is no state.
        block_tables: the caller's tensors, of value and of score pages; None with state slots.
        page_size: rows per page of the state; None with state slots.
        snapshot_table: int32 `[B, S]`, the caller's tensor, or None: where the snapshots of pages go.
        snapshot_page_size: positions per page of `snapshot_table`; None without one.
        entry_slots: int64 `[E]`, cache slot of each entry, -1 for none: the caller's tensor if that is contiguous int64, else
            the plan's own, filled by `update`; None if nothing says where entries go. Places that the step gives no entry say
            nothing with `cu_rows`, and are -1 without.
        cu_entries: int32 `[B + 1]`: sequence b ends `cu_entries[b + 1] - cu_entries[b]` windows, of which window
            `start_pos[b] // ratio + i` is entry `cu_entries[b] + i`, or `cu_rows[b] + i`.
        token_slots, cu_rows: the caller's tensors, or None.
        items: int32 `[I, 8]`, one row for each window touched (`ITEM_FIELDS`); the first `num_items[0]` rows count. Without
            state slots `slot` is the sequence index, the row of the tables.
        entry_items: int32 `[E]`, the index in `items` of each entry of the step in order, -1 behind the last one.
        errors: int32 `[1]`, sequences and entries refused since the caller last zeroed it (DESIGN.md, Plan); the caller's
            tensor if one was given.
        entry_capacity, item_capacity: E and I, known to the host.
    """

    @classmethod
    def build(
        cls,
        ratio: int,
        start_pos: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        max_new_tokens: int,
        *,
        seq_lens: torch.Tensor | None = None,
        state_slots: torch.Tensor | None = None,
        block_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        page_size: int | None = None,
        ring: bool = False,
        entry_slots: torch.Tensor | None = None,
        cache_block_table: torch.Tensor | None = None,
        rows_per_page: int | None = None,
        token_slots: torch.Tensor | None = None,
        no_slot: int = -1,
        null_page: int | None = None,
        null_slot: int | None = None,
        max_tokens: int | None = None,
        cu_rows: torch.Tensor | None = None,
        max_rows: int | None = None,
        snapshot_table: torch.Tensor | None = None,
        snapshot_page_size: int | None = None,
        errors: torch.Tensor | None = None,
    ) -> StepPlan:
        """Plans one step for all layers whose compressor has this ratio.

        Numbers are int32 or int64, in tensors of any stride below 2 GiB; rows of tables have theirs side by side.
        (`snapshot_table` is contiguous int32.) All tensors must be written before this call or `update`, and all but
        `start_pos`, `seq_lens` and `cu_seqlens`, which are copied, left alone until the last call of the step is done.

        Args:
            ratio: tokens per window.
            start_pos: `[B]`, tokens that each sequence already has; drafts are rejected by making it smaller.
            cu_seqlens: `[B + 1]`, not decreasing: sequence b brings rows `[cu_seqlens[b], cu_seqlens[b + 1])` of `kv_score`. It
                may begin above 0, as behind the prompts of a batch; rows before are not read. Equal neighbours make a sequence
                absent from the step.
            max_new_tokens: host bound on any sequence's new tokens.
            seq_lens: instead of `start_pos`, which is then None: `[B]`, tokens that each sequence has after the step.
            state_slots: `[B]`, the slot of each sequence in a `FoldState`; -1 makes it absent. No two of a step share a slot:
                nothing counts that, results are undefined, and `kvfold.check` names it.
            block_tables: for a `WindowState`, instead of `state_slots`: `[B, P1]` of value pages and `[B, P2]` of score pages.
                Position p of a sequence is row `p % page_size` of page `table[b, p // page_size]`; -1 where there is no page.
            page_size: with `block_tables`: positions per page.
            ring: with `block_tables`, both of width P: position p is on page `table[b, p // page_size % P]`, so that a sequence
                keeps its last `P * page_size` positions. A step of n tokens can be taken back to any position in it if those
                are at least n more than the rows of a window less 1; with as many rows as that, it goes on from its end alone.
            entry_slots: `[E]`, the cache slot for each entry of the step, in the order of `cu_entries`; -1 drops it.
            cache_block_table: `[B, Q]`, instead of `entry_slots`: entry w of a sequence is row `w % rows_per_page` of page
                `table[b, w // rows_per_page]`; a page of -1 drops the entry.
            rows_per_page: with `cache_block_table`: entries per page, the same as the cache's.
            token_slots: `[T]`, instead of `entry_slots`: a cache slot for each row of `kv_score`. An entry goes to that of its
                window's last token; it is dropped if that is `no_slot` or negative, and refused if there is none.
            no_slot: with `token_slots`: what means no slot, -1 or 0.
            null_page: a page of `block_tables` and `cache_block_table` that means the same as -1: no page.
            null_slot: a slot of `state_slots` that means the same as -1: an absent sequence.
            max_tokens: host bound on the new tokens of all sequences together (default `B * max_new_tokens`); it sizes
                the plan, so give it when one prompt is long and the rest are short.
            cu_rows: `[B + 1]`, places of entries that do not stand one behind the other: entry i of sequence b is number
                `cu_rows[b] + i` in `rows` and `entry_slots`. What is in places without an entry stays as it is. Entries of a
                sequence are refused where `cu_rows[b + 1]` leaves no room for all of them, or `cu_rows[b]` for those before,
                or goes back behind any before it.
            max_rows: with `cu_rows`: host bound on places (default `B * ceil(max_new_tokens / ratio)`). With `entry_slots` it
                is as many as those.
            snapshot_table: int32 `[B, S]`: page k of a sequence, which has positions `[k, k + 1) * snapshot_page_size`, leaves
                its snapshot in row `table[b, k]` of the `Snapshots` that a call gets; -1 or a page beyond S leaves none. No two
                pages of a step leave it in the same row.
            snapshot_page_size: with `snapshot_table`: positions per page.
            errors: int32 `[1]`, to count in, instead of a tensor of the plan's own; plans may share it. It is not zeroed.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        plan = cls()
        plan.ratio, plan.max_new_tokens, plan.max_tokens = ratio, max_new_tokens, max_tokens
        plan.state_slots, plan.block_tables, plan.page_size, plan.ring = state_slots, block_tables, page_size, ring
        plan.entry_slots, plan.cache_block_table, plan.rows_per_page = entry_slots, cache_block_table, rows_per_page
        plan.token_slots, plan.no_slot, plan.null_page, plan.null_slot = token_slots, no_slot, null_page, null_slot
        plan.cu_rows, plan.snapshot_table, plan.snapshot_page_size = cu_rows, snapshot_table, snapshot_page_size
        plan._allocate(Lengths.of(start_pos, cu_seqlens, seq_lens), max_rows, errors)
        plan.update(start_pos, cu_seqlens, seq_lens=seq_lens)
        if plan.item_capacity and not traced(plan.items):  # without items there is no address
            LIVE[plan.items.data_ptr()] = plan
        return plan

    def update(
        self,
        start_pos: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        seq_lens: torch.Tensor | None = None,
    ) -> None:
        """Plans another step in place: same batch size and bounds, other lengths, slots and pages.

        Runs on the device without synchronizing, so it can be captured in a CUDA graph. What `build` was given is read again:
        write new contents into slots, tables, `token_slots` and `cu_rows` before the call, and leave them until the last call
        of the step is done. Data that makes no sense, such as numbers beyond int32, is counted in `errors`.

        Args:
            start_pos: `[B]`, or instead seq_lens: `[B]`; cu_seqlens: `[B + 1]`, as for `build`. Copied, so free again after the
                call.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        lengths = Lengths.of(start_pos, cu_seqlens, seq_lens)
        update = ops.update if traced(lengths.given) else run_update
        update(self, lengths)
