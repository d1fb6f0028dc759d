"""`compress(..., latent=)`: the rows between RMSNorm and RoPE, by every kernel that makes entries."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, bits, make_tokens, norm_error
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.backend_torch.finish import norm
from kvfold.contract import pooled_bound

SPECS = {
    "fold": CompressorSpec(head_dim=32, ratio=16, rope_dim=8),
    "rows": CompressorSpec(head_dim=32, ratio=2, rope_dim=8, has_ape=False, norm_eps=1e-20),
    "wide rows": CompressorSpec(head_dim=256, ratio=2, has_ape=False),
    "overlap": CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=0, hadamard=True),
    "ungated": CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, gate=False),
}
CALLS = [
    (name, kind, bound)
    for name in SPECS
    for kind in ("fold", "window")
    for bound in (4, 40)
    if kind == "fold" or name != "ungated"
]
PAGE = 8


class Step:
    """One sequence's step from position 0, of `count` tokens, and where its entries go. Entry 1 is dropped."""

    def __init__(self, spec: CompressorSpec, kind: str, count: int, bound: int, device: torch.device, dtype=torch.float32):
        self.spec, self.device = spec, device
        ints = {"dtype": torch.int32, "device": device}
        windows = count // spec.ratio
        slots = torch.arange(windows, device=device)
        slots[1:2] = -1
        where, pages = {}, -(-count // PAGE)
        if kind == "window":
            tables = tuple(torch.arange(pages, **ints)[None] for _ in range(2))
            where, self.state = (
                {"block_tables": tables, "page_size": PAGE},
                kvfold.WindowState.allocate(spec, pages, PAGE, device=device),
            )
        elif spec.gate:
            where = {"state_slots": torch.zeros(1, **ints)}
            self.state = kvfold.FoldState.allocate(spec, 1, 4, device=device)
        else:
            self.state = None
        self.plan = kvfold.StepPlan.build(
            spec.ratio, torch.zeros(1, **ints), torch.tensor([0, count], **ints), bound, entry_slots=slots, **where
        )
        self.made = [w for w in range(windows) if w != 1]
        self.tokens = make_tokens(spec, count, 1, dtype)[:, : spec.kv_score_width].contiguous()
        draw = torch.Generator().manual_seed(2)
        self.ape = torch.randn(spec.ratio, spec.channels, generator=draw) if spec.has_ape else None
        self.weight = torch.randn(spec.head_dim, generator=draw)
        self.rope = reference.rope_table(64, spec.rope_dim)

    def run(
        self, backend: Backend, fmt: str | None, rows: bool, latent: bool = True
    ) -> tuple[Tensor, Tensor, kvfold.EntryCache | None]:
        shape = self.plan.entry_capacity, self.spec.head_dim
        pooled = torch.full(shape, torch.nan, device=self.device)
        made = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.device)
        cache = None
        if fmt:
            cache = kvfold.EntryCache.allocate(fmt, 3, 20, self.spec, device=self.device)
        at = [x if x is None else x.to(self.device) for x in (self.tokens, self.ape, self.weight, self.rope)]
        kvfold.compress(
            at[0], self.plan, self.state, cache, spec=self.spec, ape=at[1], norm_weight=at[2],
            rope=at[3] if fmt and self.spec.rope_dim else None, rows=pooled if rows else None,
            latent=made if latent else None, backend=backend.name,
        )  # fmt: skip
        assert int(self.plan.errors) == 0
        return pooled.cpu(), made.cpu(), cache


@pytest.mark.parametrize("name, kind, bound", CALLS)
def test_latents(backend: Backend, name: str, kind: str, bound: int) -> None:
    """With and without pooled rows and a cache: the same bits, those of the norm of the pooled row, rounded once."""
    spec = SPECS[name]
    step = Step(spec, kind, min(bound, 2 * spec.ratio + 3) if bound == 4 else bound, bound, backend.device)
    if not step.made:
        step = Step(spec, kind, 2 * spec.ratio, 2 * spec.ratio, backend.device)
    pooled, both, cache = step.run(backend, "fp32", rows=True)
    _, alone, _ = step.run(backend, None, rows=False)
    _, beside, again = step.run(backend, "fp32", rows=False)
    _, _, without = step.run(backend, "fp32", rows=False, latent=False)
    assert torch.equal(bits(both), bits(alone)) and torch.equal(bits(both), bits(beside))
    assert torch.equal(cache.storage, again.storage) and torch.equal(cache.storage, without.storage)
    dropped = [w for w in range(len(both)) if w not in step.made]
    assert bool(both[dropped].isnan().all())
    assert torch.equal(both[step.made], norm(pooled[step.made], spec, step.weight).bfloat16())
    want = reference.latents(step.tokens, spec, step.ape, step.weight)[step.made]
    assert norm_error(both[step.made], want) < 2.0**-8 + pooled_bound(spec.window_rows)


def test_of_rows_that_the_format_rounds(backend: Backend) -> None:
    """A format that rounds pooled rows to bf16 has records, and so latents, of the rounded ones."""
    step = Step(SPECS["rows"], "fold", 8, 8, backend.device)
    pooled, latent, _ = step.run(backend, "bf16_trtllm", rows=True)
    want = norm(pooled[step.made].bfloat16().float(), step.spec, step.weight)
    assert torch.equal(latent[step.made], want.bfloat16())


def test_tiny_and_zero_rows(backend: Backend) -> None:
    """V4.1's epsilon of 1e-20: a row of zeros stays one, a tiny one has unit size."""
    step = Step(SPECS["rows"], "fold", 8, 8, backend.device)
    step.tokens[:2] = 0
    step.tokens[4:6, :32] *= 1e-8
    pooled, latent, _ = step.run(backend, "fp32", rows=True)
    assert not bool(latent[0].any())
    assert torch.equal(latent[2], norm(pooled[2:3], step.spec, step.weight)[0].bfloat16())
    assert 0.3 < float((latent[2].double() / step.weight.double()).square().mean()) < 1.01


def test_errors() -> None:
    step = Step(SPECS["rows"], "fold", 8, 8, torch.device("cpu"))
    given = {"spec": step.spec, "ape": None, "norm_weight": step.weight, "rope": None}
    good = torch.zeros(step.plan.entry_capacity, 32, dtype=torch.bfloat16)

    def call(latent: Tensor, **changed: object) -> None:
        kvfold.compress(step.tokens, step.plan, step.state, None, **given | changed, latent=latent)

    with pytest.raises(TypeError, match=r"^latent must be torch\.bfloat16"):
        call(good.float())
    with pytest.raises(ValueError, match=r"^latent must have shape \[4, 32\]"):
        call(good[1:])
    with pytest.raises(TypeError, match=r"^norm_weight must be a torch\.Tensor for latent"):
        call(good, norm_weight=None)
    with pytest.raises(ValueError, match=r"^latent must not share memory with rows"):
        call(good, rows=good)
    with pytest.raises(ValueError, match=r"^latent must not share memory with state"):
        call(step.state.rows.view(torch.bfloat16).view(-1)[: good.numel()].view_as(good))
    call(good)
    assert bool(good[0].any())
