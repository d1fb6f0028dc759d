"""`StepPlan`: all that depends on the step and not on the layer, computed once on the device."""

from __future__ import annotations

import torch

from . import ops
from .arguments.checks import traced
from .calls.run import run_update
from .storage.step import LIVE, Lengths, PlanData


class StepPlan(PlanData):
    """Which sequences add which tokens in a step, and which windows that touches. Build it with `StepPlan.build`.

    Attributes:
        start_pos: int32 `[B]`, tokens that each sequence had before the step. The plan's own copy, clamped to int32.
        cu_seqlens: int32 `[B + 1]`, offsets of each sequence's new tokens in `kv_score`. The plan's own copy, clamped too.
        state_slots: `[B]`, the caller's tensor; None with block tables, and where there is no state.
        block_tables: the caller's tensors, of value pages and of score pages; None with state slots.
        page_size: rows per page of the state; None with state slots.
        snapshot_table: int32 `[B, S]`, the caller's tensor, or None: where the snapshots of pages go.
        snapshot_page_size: positions per page of `snapshot_table`; None without one.
        entry_slots: int64 `[E]`, the cache slot of each entry, -1 for none. It is the caller's tensor if that is contiguous
            int64, else the plan's own, which `update` fills. None if nothing says where entries go. A place without an entry
            is -1; with `cu_rows` it has no meaning.
        cu_entries: int32 `[B + 1]`: sequence b ends `cu_entries[b + 1] - cu_entries[b]` windows, of which window
            `start_pos[b] // ratio + i` is entry `cu_entries[b] + i`, or `cu_rows[b] + i`.
        token_slots, cu_rows: the caller's tensors, or None.
        items: int32 `[I, 8]`, the work items: a row for each window touched (`ITEM_FIELDS`). The first `num_items[0]` rows
            count. Without state slots the field `slot` is the sequence index, which is the row of the tables.
        entry_items: int32 `[E]`, the index in `items` of each entry of the step in order; -1 after the last one.
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

        Tensors are int32 or int64, of any stride below 2 GiB; each row of a table is contiguous. (`snapshot_table` is
        contiguous int32.) All must be written before this call or `update`. `start_pos`, `seq_lens` and `cu_seqlens` are
        copied; all others must stay unchanged until the last call of the step is done.

        Args:
            ratio: tokens per window.
            start_pos: `[B]`, tokens that each sequence already has. To reject drafts, make it smaller.
            cu_seqlens: `[B + 1]`, not decreasing: sequence b brings rows `[cu_seqlens[b], cu_seqlens[b + 1])` of `kv_score`. It
                may start above 0; rows before are not read. A sequence without rows is absent from the step.
            max_new_tokens: host bound on any sequence's new tokens.
            seq_lens: instead of `start_pos`, which is then None: `[B]`, tokens that each sequence has after the step.
            state_slots: `[B]`, the slot of each sequence in a `FoldState` or a `MeanState`; -1 makes it absent. Two sequences
                of a step must not share a slot: that is not counted as an error, and results are undefined. `kvfold.check`
                finds it.
            block_tables: for a `WindowState`, instead of `state_slots`: `[B, P1]` of value pages and `[B, P2]` of score pages.
                Position p of a sequence is row `p % page_size` of page `table[b, p // page_size]`; -1 where there is no page.
            page_size: with `block_tables`: positions per page.
            ring: with `block_tables`, both of width P: position p is on page `table[b, p // page_size % P]`, so a sequence
                keeps its last `P * page_size` positions. They must be at least `window_rows - 1`; then a sequence can go on
                from its end. With n more, a step of n tokens can also be taken back to any position in it.
            entry_slots: `[E]`, the cache slot for each entry of the step, in the order of `cu_entries`; -1 drops it.
            cache_block_table: `[B, Q]`, instead of `entry_slots`: entry w of a sequence is row `w % rows_per_page` of page
                `table[b, w // rows_per_page]`; a page of -1 drops the entry.
            rows_per_page: with `cache_block_table`: entries per page, the same as the cache's.
            token_slots: `[T]`, instead of `entry_slots`: a cache slot for each row of `kv_score`, an engine's slot mapping. An
                entry goes to the slot of its window's last token. It is dropped if that is `no_slot` or negative, and refused
                if the tensor has no such row.
            no_slot: with `token_slots`: the number that means no slot, -1 or 0.
            null_page: a page of `block_tables` and `cache_block_table` that means the same as -1: no page.
            null_slot: a slot of `state_slots` that means the same as -1: an absent sequence.
            max_tokens: host bound on the new tokens of all sequences together (default `B * max_new_tokens`). It sizes
                the plan, so give it when one prompt is long and the rest are short.
            cu_rows: `[B + 1]`, for entries that are not packed: entry i of sequence b has place `cu_rows[b] + i` in `rows` and
                `entry_slots`. Places without an entry are not written. A sequence's entries are refused if they do not fit
                before `cu_rows[b + 1]`, if `cu_rows[b]` is less than the number of entries before them, or if it is less than
                any earlier `cu_rows`.
            max_rows: with `cu_rows`: host bound on places (default `B * ceil(max_new_tokens / ratio)`). With `entry_slots` it
                is their number.
            snapshot_table: int32 `[B, S]`: page k of a sequence, positions `[k, k + 1) * snapshot_page_size`, leaves its
                snapshot in row `table[b, k]` of the `Snapshots` that a call gets. -1, or a page beyond S, leaves none. Two
                pages of a step must not use the same row.
            snapshot_page_size: with `snapshot_table`: positions per page.
            errors: int32 `[1]`, to count in, instead of a tensor of the plan's own. Plans may share it. It is not zeroed.

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

        Runs on the device without synchronizing, so a CUDA graph can capture it. The tensors that `build` was given are read
        again: write new contents into slots, tables, `token_slots` and `cu_rows` before the call, and do not change them until
        the last call of the step is done. Invalid data, such as numbers beyond int32, is counted in `errors`.

        Args:
            start_pos: `[B]`, or instead seq_lens: `[B]`; cu_seqlens: `[B + 1]`, as for `build`. They are copied.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        lengths = Lengths.of(start_pos, cu_seqlens, seq_lens)
        update = ops.update if traced(lengths.given) else run_update
        update(self, lengths)
