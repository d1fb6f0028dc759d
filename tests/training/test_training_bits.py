"""Training and serving agree to the bit, and so do packings, repeats and whole optimizations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import SMALL_ROWS, Backend, Weights
from support.training_support import REAL, SPECS, Problem, run, same
from torch import Tensor

import kvfold
from kvfold import CompressorSpec
from kvfold.storage.formats import FORMATS
from kvfold.storage.pack import pack_records, unpack_records
from kvfold.training import Packing, compress, compress_forward, table

FP32, BF16 = torch.float32, torch.bfloat16
CUDA = Backend("triton", torch.device("cuda", 0))


def served(problem: Problem, backend: Backend, fmt: str, steps: int, scale: float = 1.0) -> Tensor:
    """What `kvfold.compress` leaves in a cache, entry by entry, of each sequence in steps of up to so many tokens."""
    spec, device, given = problem.spec, backend.device, problem.given(backend)
    windows, batch = problem.windows, len(problem.lengths)
    cache = kvfold.EntryCache.allocate(fmt, max(windows, 1), 1, spec, device=device, scale=scale)
    state = kvfold.FoldState.allocate(spec, batch, steps, device=device) if spec.gate else None
    first = torch.tensor([0, *(n // spec.ratio for n in problem.lengths)]).cumsum(0)
    for start in range(0, max(problem.lengths), steps):
        new = [max(min(n - start, steps), 0) for n in problem.lengths]
        at = [c + min(start, n) for c, n in zip(problem.cu_seqlens.tolist(), problem.lengths, strict=False)]
        rows = torch.cat([problem.kv_score[a : a + n] for a, n in zip(at, new, strict=True)])
        slots = [
            int(first[b]) + w
            for b, n in enumerate(new)
            for w in range(min(start, problem.lengths[b]) // spec.ratio, (min(start, problem.lengths[b]) + n) // spec.ratio)
        ]
        plan = kvfold.StepPlan.build(
            spec.ratio,
            torch.tensor([min(start, n) for n in problem.lengths], dtype=torch.int32, device=device),
            torch.tensor([0, *new]).cumsum(0).int().to(device),
            steps,
            state_slots=torch.arange(batch, dtype=torch.int32, device=device) if spec.gate else None,
            entry_slots=torch.tensor(slots, dtype=torch.int64, device=device),
        )
        kvfold.compress(rows.to(device), plan, state, cache, **given)
        assert int(plan.errors) == 0
    return cache.read(torch.arange(windows, device=device)).cpu()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("fmt, dtype", [("fp32", FP32), ("bf16_trtllm", BF16)], ids=["fp32", "rounded"])
def test_entries_are_those_that_are_served(backend: Backend, name: str, fmt: str, dtype: torch.dtype) -> None:
    """From a prefill, and from steps that cut windows."""
    problem = Problem.make(SPECS[name], dtype)
    given = problem.given(backend) | {"round_rows": dtype == BF16}
    found = compress_forward(problem.tokens(backend.device), problem.packing(backend.device), **given)
    entries = found.entries[: problem.windows].float().cpu()
    spec = problem.spec
    assert torch.equal(entries, served(problem, backend, fmt, max(problem.lengths)))
    if not backend.slow or fmt == "fp32":
        assert torch.equal(entries, served(problem, backend, fmt, max(spec.ratio - 1, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_real_entries_are_those_that_are_served(name: str) -> None:
    problem = Problem.make(REAL[name], BF16, [700, 129, 0, 128, 3])
    given = problem.given(CUDA) | {"round_rows": False, "out_dtype": FP32}
    found = compress_forward(problem.tokens(CUDA.device), problem.packing(CUDA.device), **given)
    for steps in (700, 3):
        assert torch.equal(found.entries[: problem.windows].cpu(), served(problem, CUDA, "fp32", steps))


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [60, 100, 150, 300])
def test_every_row_of_long_windows_gives_what_is_served(windows: int) -> None:
    """Of the table: programs that share windows, and programs that do not."""
    problem = Problem.make(REAL["hca"], BF16, [128 * (windows - 1), 100, 128], spare=0)
    problem.weights = Weights.make(problem.spec, 0, max_positions=128 * windows)
    given = problem.given(CUDA) | {"round_rows": False, "out_dtype": FP32}
    found = compress_forward(problem.tokens(CUDA.device), problem.packing(CUDA.device), **given)
    assert torch.equal(found.entries[: problem.windows].cpu(), served(problem, CUDA, "fp32", max(problem.lengths)))


@pytest.mark.parametrize("name", FORMATS)
def test_fake_quantization_is_what_is_read_of_the_records(backend: Backend, name: str) -> None:
    fmt = FORMATS[name]
    if backend.slow and name not in ("fp8_ds_mla", "fp8_tensor", "indexer_mxfp4_v41_sglang", "nvfp4_flashinfer", "mxfp4"):
        pytest.skip("the others are stored by the same code")
    head_dim = fmt.head_dims[0] if fmt.head_dims else 64
    spec = CompressorSpec(head_dim, 2, rope_dim=64 if fmt.rope_dim is None and head_dim > 64 else fmt.rope_dim or 16)
    problem = Problem.make(spec, BF16, [5, 1, 2])
    scale = torch.tensor([0.25], device=backend.device) if fmt.takes_scale else None
    given = problem.given(backend) | {"fake_quant": name, "cache_scale": scale, "out_dtype": FP32}
    rows = problem.tokens(backend.device).clone().requires_grad_()
    entries = compress(rows, problem.packing(backend.device), **given)
    n = problem.windows
    want = served(problem, backend, name, 5, 0.25 if fmt.takes_scale else 1.0)
    assert torch.equal(entries[:n].detach().cpu(), want) and not entries[n:].any()
    # The gradient is that without quantization: roundings pass it.
    g = problem.incoming().nan_to_num(0.0).to(entries)
    entries.backward(g)
    plain = problem.tokens(backend.device).clone().requires_grad_()
    given |= {"fake_quant": None, "cache_scale": None, "round_rows": fmt.round_rows}
    compress(plain, problem.packing(backend.device), **given).backward(g)
    assert torch.equal(rows.grad, plain.grad)


@pytest.mark.parametrize("name", ["fp8_tensor", "indexer_fp8_v41"])
def test_rounding_that_is_asked_for_beside_a_format(backend: Backend, name: str) -> None:
    """It stands in for the format's own."""
    fmt, problem = FORMATS[name], Problem.make(CompressorSpec(128, 2, rope_dim=64), BF16, [5, 1, 2])
    given, other = problem.given(backend) | {"out_dtype": FP32}, not fmt.round_rows
    cases = {"fake_quant": fmt, "round_rows": other}, {"fake_quant": replace(fmt, round_rows=other)}, {"fake_quant": fmt}
    packing, tokens = problem.packing(backend.device), problem.tokens(backend.device)
    asked, own, default = (compress_forward(tokens, packing, **given, **case).entries for case in cases)
    assert torch.equal(asked, own) and not torch.equal(asked, default)


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_read_as_torch_reads_them(backend: Backend, name: str) -> None:
    """Numbers of all sizes, and NaN where a format has it."""
    if backend.name == "torch":
        pytest.skip("it is the one to compare with")
    from kvfold.training import launch
    from kvfold.training.problem import How, Inputs, scratch_records

    fmt = FORMATS[name]
    head_dim = fmt.head_dims[0] if fmt.head_dims else 128
    spec = CompressorSpec(head_dim, 2, rope_dim=64 if fmt.rope_dim is None else fmt.rope_dim)
    draw, capacity = torch.Generator().manual_seed(9), 70  # two pages
    numbers = torch.randn(capacity, head_dim, generator=draw) * torch.randn(capacity, 1, generator=draw).mul(6).exp2()
    numbers[3], numbers[5, 1], numbers[64] = 0.0, torch.nan, torch.randint(-6, 7, (head_dim,), generator=draw).float()
    packing = Packing.build(torch.tensor([0, 139], device=backend.device), 140, 2)  # one window less than there is room for
    value = torch.zeros(140, spec.channels, device=backend.device)
    scale = torch.tensor([0.3], device=backend.device) if fmt.takes_scale else None
    x, how = Inputs(value, value, packing.pieces, None, value[0], None, scale), How(spec, True, FP32, fmt, False, backend.name)
    records, slots = scratch_records(x, how), torch.arange(capacity, device=backend.device)
    pack_records(records, slots, numbers.to(backend.device))
    want = unpack_records(records, slots)
    want[69] = 0.0
    for dtype in (FP32, BF16):
        entries = torch.empty(capacity, head_dim, dtype=dtype, device=backend.device)
        launch.read_records(x, replace(how, out_dtype=dtype), records, entries)
        assert torch.equal(entries.nan_to_num(nan=7e30), want.to(dtype).nan_to_num(nan=7e30)), dtype


@pytest.mark.parametrize("name", ["csa", "hca", "wide-overlap"])
def test_a_sequence_has_its_bits_in_every_packing(backend: Backend, name: str) -> None:
    """Entries, and gradients of its tokens, whatever is before and behind it, and however many groups there are."""
    spec = SPECS[name]
    rows = Problem.make(spec, lengths=[2 * spec.ratio + 1], spare=0)
    alone = run(rows, backend)
    others = Problem.make(spec, lengths=[spec.ratio + 1, 2 * spec.ratio + 1, 2 * spec.ratio], seed=1, spare=5)
    first = others.lengths[0]
    behind = first + rows.lengths[0]
    others.kv_score[first:behind] = rows.kv_score
    others.weights = rows.weights
    g = torch.stack([rows.incoming(seed) for seed in (7, 8)])
    others.incoming = lambda seed: torch.cat([g[seed - 7, :1], g[seed - 7], g[seed - 7], g[seed - 7]])[
        : others.kv_score.shape[0] // spec.ratio
    ]
    packed = run(others, backend)
    assert torch.equal(packed.entries[1:3], alone.entries) and torch.equal(packed.latent[1:3], alone.latent)
    assert torch.equal(packed.gradients.value[first:behind], alone.gradients.value)


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_the_table_changes_no_bit_but_by_groups(backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if backend.name == "torch":
        pytest.skip("it has no table")
    problem = Problem.make(SPECS[name])
    want = run(problem, backend)
    other = tuple(replace(c, ahead=4, fetch=not c.fetch, columns=min(c.columns, 16)) for c in table.CONFIGS)
    changed = {"spread": {"rows": 2}, "forward": {"slice": 16}}  # so several programs share a window
    other = tuple(replace(c, **changed.get(c.kernel, {})) for c in other)
    monkeypatch.setattr(table, "CONFIGS", other)
    from kvfold.training import launch

    launch.launches_of.cache_clear()
    try:
        assert same(run(problem, backend), want)
    finally:
        launch.launches_of.cache_clear()


def optimize(backend: Backend, steps: int) -> list[Tensor]:
    """The weights of a layer that makes kv_score and is trained on what entries should be."""
    spec = SMALL_ROWS["rows"]
    draw = torch.Generator().manual_seed(5)
    problem = Problem.make(spec, lengths=[9, 3, 12], spare=0)
    given, device = problem.given(backend), backend.device
    tokens = torch.randn(24, 8, generator=draw).to(device)
    target = torch.randn(6, spec.head_dim, generator=draw).to(device)
    weight = torch.randn(8, spec.kv_score_width, generator=draw).to(device).requires_grad_()
    leaves = [weight, given["ape"].requires_grad_(), given["norm_weight"].requires_grad_()]
    optimizer = torch.optim.AdamW(leaves, lr=0.05)
    packing, losses = Packing.build(problem.cu_seqlens.to(device), 24, spec.ratio), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (compress(tokens @ weight, packing, **given)[:5] - target[:5]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return [x.detach().cpu() for x in leaves]


def test_ten_steps_of_an_optimizer_twice(backend: Backend) -> None:
    one, other = (optimize(backend, 3 if backend.slow else 10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_kept_for_the_backward() -> None:
    """Beside the inputs: 12 bytes per entry channel of long windows, nothing of short ones."""
    for name, most in (("hca", 12), ("csa", 0), ("v41-r2", 0)):
        problem = Problem.make(SPECS[name], spare=0)
        given = problem.given(Backend("torch", torch.device("cpu")))
        rows = problem.kv_score.requires_grad_()
        packing, saved = problem.packing(rows.device), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            entries = compress(rows, packing, **given)
        inputs = {x.data_ptr() for x in (rows, packing.pieces, *given.values()) if isinstance(x, Tensor)}
        extra = sum(x.nbytes for x in saved if x.numel() and x.data_ptr() not in inputs)
        assert extra == most * entries.numel(), name
