"""What a debugger shows of states, caches, snapshots and plans: one line, of whatever tensors, that reads no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kvfold
from kvfold import V4_CSA, V4_HCA, V4_INDEXER, EntryCache, FoldState, MeanState, Snapshots, StepPlan, WindowState


def plan(device: str = "cpu", **given: object) -> StepPlan:
    numbers = torch.arange(3, dtype=torch.int32, device=device)
    return StepPlan.build(4, numbers[:2], numbers, 4, **given)


def made(device: str) -> dict[str, object]:
    """One of each, by the line that it should have, device left out."""
    slots = torch.arange(2, device=device)
    table = slots[:, None].int()
    pages = torch.zeros(3, FoldState.page_bytes(V4_CSA, 4, torch.bfloat16), dtype=torch.uint8, device=device)
    mean = torch.zeros(3, 5, 3 * 512, device=device)
    return {
        "FoldState(kind=fold, ratio=128, head_dim=512, num_slots=16, bytes_per_slot=36888, dtype=float32, device=?, "
        "max_new_tokens=4)": FoldState.allocate(V4_HCA, 16, 4, device=device),
        "FoldState(kind=rows, ratio=4, head_dim=512, num_slots=3, bytes_per_slot=45080, dtype=bfloat16, device=?, "
        f"max_new_tokens=4, round_inputs=True, pages=[3, {pages.shape[1]}] bytes)": FoldState.over(
            pages, V4_CSA, 4, dtype=torch.bfloat16, round_inputs=True
        ),
        "WindowState(num_pages=8, num_score_pages=8, page_size=64, channels=1024, bytes_per_position=4096, dtype=bfloat16, "
        "device=?)": WindowState.allocate(V4_CSA, 8, 64, dtype=torch.bfloat16, device=device),
        "MeanState(ratio=128, head_dim=512, num_slots=5, banks=2, bytes_per_slot=18432, dtype=float32, device=?)": MeanState(
            V4_HCA, mean
        ),
        "Snapshots(ratio=4, head_dim=512, num_pages=7, page_size=64, rows_per_page=4, bytes_per_page=16400, dtype=float32, "
        "device=?)": Snapshots.allocate(V4_CSA, 7, 64, device=device),
        "EntryCache(format=fp8_ds_mla, head_dim=512, num_pages=2, rows_per_page=64, num_slots=128, record_bytes=584, "
        "page_bytes=37440, dtype=uint8, device=?)": EntryCache.allocate("fp8_ds_mla", 2, 64, V4_CSA, device=device),
        "EntryCache(format=fp8_tensor, head_dim=512, num_pages=2, rows_per_page=64, num_slots=128, record_bytes=512, "
        "page_bytes=32768, dtype=uint8, device=?, scale=a tensor)": EntryCache.allocate(
            "fp8_tensor", 2, 64, V4_CSA, device=device, scale=torch.ones(1, device=device)
        ),
        "StepPlan(ratio=4, batch=2, max_new_tokens=4, max_tokens=8, entry_capacity=2, item_capacity=4, device=?, "
        "rows_per_page=64, given=state_slots+cache_block_table)": plan(
            device, state_slots=slots, cache_block_table=table, rows_per_page=64
        ),
        "StepPlan(ratio=4, batch=2, max_new_tokens=4, max_tokens=8, entry_capacity=2, item_capacity=4, device=?, "
        "page_size=4, ring=True, null_page=0, given=block_tables+entry_slots)": plan(
            device, block_tables=(table, table), page_size=4, ring=True, null_page=0, entry_slots=slots
        ),
    }


class Seen(TorchDispatchMode):
    """Refuses every operation, so every one that could wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_says_in_one_line_what_it_is(device: str) -> None:
    objects = made(device)
    with Seen():
        said = [repr(one) for one in objects.values()]
    where = torch.zeros(1, device=device).device
    assert said == [line.replace("device=?", f"device={where}") for line in objects]


def without_memory() -> Iterator[tuple[str, object]]:
    """The same of meta and of fake tensors."""
    for line, one in made("cpu").items():
        tensors = ("rows", "positions", "kv", "score", "pages", "storage", "items", "scale")
        for convert in (lambda x: x.to("meta"), FakeTensorMode(allow_non_fake_inputs=True).from_tensor):
            other = object.__new__(type(one))
            vars(other).update(vars(one))
            for name in tensors:
                if isinstance(vars(one).get(name), torch.Tensor):
                    vars(other)[name] = convert(vars(one)[name])
            yield line, other


def test_of_tensors_without_memory() -> None:
    for line, one in without_memory():
        assert repr(one) in {line.replace("device=?", f"device={device}") for device in ("meta", "cpu")}


@pytest.mark.filterwarnings("error")  # torch warns of a fake tensor's address
def test_fake_objects_as_they_are_made() -> None:
    with FakeTensorMode():
        assert "num_slots=2" in repr(FoldState.allocate(V4_INDEXER, 2, 1))
        assert "format=indexer_mxfp4" in repr(EntryCache.allocate("indexer_mxfp4", 2, 8, V4_INDEXER))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("which", ["cache", "blocks", "state"])
def test_fake_pages_of_an_engine(which: str) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns of a fake tensor's address, by default once for a process
    try:
        with FakeTensorMode():
            pages = torch.zeros(2, FoldState.page_bytes(V4_HCA, 8), dtype=torch.uint8)
            blocks = torch.zeros(2, 64, 584, dtype=torch.uint8)
            made = {
                "cache": lambda: EntryCache(blocks, "fp8_ds_mla", 64, V4_HCA),
                "blocks": lambda: EntryCache.from_blocks(blocks, "fp8_ds_mla", V4_HCA),
                "state": lambda: FoldState.over(pages, V4_HCA, 8, fresh=True),
            }
            assert made[which]().device.type == "cpu"
    finally:
        torch.set_warn_always(before)


def test_inside_of_what_torch_compiles() -> None:
    """A backend of torch.compile sees fake tensors; a state over them is printed, with sizes that are symbols too."""
    said = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        rows = next(x for x in values if isinstance(x, torch.Tensor))
        state = object.__new__(MeanState)
        vars(state).update(spec=V4_HCA, rows=rows, banks=0)
        said.append((type(rows).__name__, repr(state)))
        return graph

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True, fullgraph=True)(torch.zeros(5, 3 * 512))
    ((kind, line),) = said
    assert kind == "FakeTensor" and "banks=0" in line and "device=cpu" in line and "whole" not in line, line


@pytest.mark.parametrize("kind", [FoldState, WindowState, MeanState, Snapshots, EntryCache, StepPlan])
def test_of_what_is_half_built(kind: type) -> None:
    empty = object.__new__(kind)
    assert repr(empty).startswith(f"{kind.__name__}(and it is not whole: ") and "\n" not in repr(empty)
    state = FoldState.allocate(V4_HCA, 2, 4)
    state.rows = None
    assert repr(state).startswith("FoldState(kind=fold, ratio=128, head_dim=512, and it is not whole: 'NoneType'")


def test_a_plan_of_lengths_alone() -> None:
    numbers = torch.arange(3, dtype=torch.int32)
    said = repr(StepPlan.build(1, numbers[:2], numbers, 4, token_slots=torch.arange(8)))
    assert said.endswith("given=token_slots)"), said
    assert repr(StepPlan.build(1, numbers[:2], numbers, 4)).endswith("given=lengths alone)")


def test_a_spec_says_its_values() -> None:
    assert eval(repr(kvfold.V41_MAIN_R2), {"CompressorSpec": kvfold.CompressorSpec}) == kvfold.V41_MAIN_R2
