"""The plan: what its lists say, and that the GPU's one kernel fills them as the plain torch definition does."""

from __future__ import annotations

import os

import pytest
import torch

import kvfold
from kvfold.backend_torch.plan import update_torch
from kvfold.backend_triton.kernels.plan_items import SEQUENCES
from kvfold.backend_triton.keys import windows_per_program
from kvfold.backend_triton.launch import update_on_gpu
from kvfold.contract import MOST_POSITIONS
from kvfold.storage.step import LIVE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(ratio: int, starts: list[int], lengths: list[int], most: int, slots: list[int], **kwargs) -> kvfold.StepPlan:
    ints = {"dtype": torch.int32, "device": DEVICE}
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], **ints)
    plan = kvfold.StepPlan.build(
        ratio, torch.tensor(starts, **ints), cu_seqlens, most, state_slots=torch.tensor(slots, **ints), **kwargs
    )
    return plan


def contents(plan: kvfold.StepPlan) -> dict[str, torch.Tensor]:
    """All that a plan says; items and entry slots beyond the used ones say nothing."""
    used, made = int(plan.num_items), int(plan.cu_entries[-1])
    found = {
        "start_pos": plan.start_pos,
        "cu_seqlens": plan.cu_seqlens,
        "cu_entries": plan.cu_entries,
        "num_items": plan.num_items,
        "errors": plan.errors,
        "items": plan.items[:used, :7],
    }
    if plan.entry_slots is not None:
        found["entry_slots"] = plan.entry_slots
        assert (plan.entry_slots[made:] == -1).all() or plan.cache_block_table is None
    return {name: tensor.clone() for name, tensor in found.items()}


def test_a_small_plan_by_hand() -> None:
    # Ratio 4. Sequence 0 adds tokens 2..8: ends windows 0 and 1, touches 2. Sequence 1 is absent. Sequence 2 adds 7..7.
    table = torch.tensor([[5, 6], [7, 8], [9, -1]], dtype=torch.int32, device=DEVICE)
    plan = build(4, [2, 0, 7], [7, 0, 1], 8, [3, 1, 0], cache_block_table=table, rows_per_page=1)
    assert plan.cu_entries.tolist() == [0, 2, 2, 3]
    assert plan.items[:4, :7].tolist() == [
        [0, 2, 9, 0, 3, 0, 0],
        [1, 2, 9, 0, 3, 1, 0],
        [2, 2, 9, 0, 3, -1, 0],
        [1, 7, 8, 7, 0, 2, 2],
    ]
    assert int(plan.num_items) == 4
    assert plan.entry_slots is not None
    assert plan.entry_slots[:3].tolist() == [5, 6, -1]
    assert int(plan.errors) == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_says_what_the_definition_says(seed: int) -> None:
    """Random batches, more sequences than one chunk and more items than one block, with everything that is refused."""
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("conftest switches the interpreter on where there is no GPU")
    draw = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=draw).tolist()

    ratio, batch, most = [(4, 150, 9), (128, 140, 400), (1, 3, 200), (8, 1, 5)][seed % 4]
    lengths = [0 if skip == 0 else n for skip, n in zip(ints(0, 4, batch), ints(1, most + 1, batch), strict=True)]
    starts, slots = ints(0, 5 * ratio, batch), ints(-1, 9, batch)
    table = torch.randint(-1, 50, (batch, 7), generator=draw, dtype=torch.int32).to(DEVICE)
    if seed >= 4:  # what cannot be: each is refused and counted, and the others are planned as ever
        for wrong in (starts, slots):
            wrong[ints(0, batch, 1)[0]] = -7
        lengths[ints(0, batch, 1)[0]] = most + 1
        table[0, 0] = -2
        starts[ints(0, batch, 1)[0]] = MOST_POSITIONS - 3
    plan = build(ratio, starts, lengths, most, slots, cache_block_table=table, rows_per_page=2, max_tokens=sum(lengths))
    if seed >= 8:
        plan.max_tokens -= 1  # the last sequence no longer fits
    per_program = windows_per_program(plan.windows_per_sequence)
    assert seed % 4 > 1 or max(plan.batch / SEQUENCES, plan.windows_per_sequence / per_program) > 1
    seen = []
    for update in (lambda *args: update_torch(plan, *args), lambda *args: update_on_gpu(plan, *args)):
        plan.errors.zero_()
        for tensor in (plan.items, plan.num_items, plan.cu_entries[1:], plan.entry_items, plan.entry_slots):
            assert tensor is not None
            tensor.fill_(-99)
        update(plan.start_pos.clone(), plan.cu_seqlens.clone())
        seen.append(contents(plan))
    for name, want in seen[0].items():
        assert torch.equal(want, seen[1][name]), name
    if seed >= 8 and lengths[-1] and slots[-1] != -1:
        assert int(plan.errors) > 0


def test_update_reads_slots_and_pages_again() -> None:
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    plan = build(4, [0, 0], [4, 4], 4, [0, 1], cache_block_table=table, rows_per_page=2)
    table += torch.tensor([[3], [5]], dtype=torch.int32, device=DEVICE)
    plan.state_slots.copy_(torch.tensor([1, -1]))
    plan.update(torch.tensor([4, 0], dtype=torch.int32, device=DEVICE), plan.cu_seqlens)
    assert plan.entry_slots is not None
    assert plan.entry_slots.tolist() == [7, -1]
    assert plan.items[0, :7].tolist() == [1, 4, 8, 0, 1, 0, 0]
    assert int(plan.num_items) == 1


def test_every_entry_with_a_place_has_an_item() -> None:
    """Offsets that go back give several sequences the same tokens, and so more windows than `max_tokens` has.

    What does not fit into the plan is left out; but a kernel that takes an entry must find its item.
    """
    ints = {"dtype": torch.int32, "device": DEVICE}
    starts, offsets = torch.zeros(4, **ints), torch.tensor([0, 64, 0, 64, 0], **ints)
    for entries in (5, 20, 32, 100):
        plan = kvfold.StepPlan.build(
            4, starts, offsets, 64, max_tokens=64, state_slots=torch.arange(4, **ints),
            entry_slots=torch.arange(entries, device=DEVICE),
        )  # fmt: skip
        made = min(int(plan.cu_entries[-1]), entries)
        items = plan.entry_items[:made].long()
        assert made == min(32, entries) and int(items.min()) >= 0
        assert torch.equal(plan.items[items, 5].cpu(), torch.arange(made).int())
        assert int(plan.errors) == 2


def test_plans_without_items_are_not_looked_up() -> None:
    """Their tensors have no address by which an operator could find them."""
    zero = torch.zeros(1, dtype=torch.int32)
    plan = kvfold.StepPlan.build(4, zero, torch.zeros(2, dtype=torch.int32), 4, max_tokens=0, state_slots=zero)
    assert plan.item_capacity == 0 and plan not in LIVE.values()
