"""The fp64 rows that a call is compared with: the reference's, but for what docs/numerics.md says of infinities."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..backend_torch.items import Items
from ..contract import pooled_bound, pooled_worst
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.step import Compressor
from ..storage.window_state import WindowState
from .call import History
from .compare import size_of
from .refusals import heads

FLUSHED = -80.0  # of a score below its window's largest: weights under 2**-115, which one exp2 may make 0 and another not


def exact_of_call(c: Compressor, plan: StepPlan, made: Items, history: History, got: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 pooled rows `[k, head_dim]` of the entries whose sequence is known from its start, and which of `made` they are.

    The third, fp64 `[k, 1]`, is how far each may be off, of its norm: what roundings alone can do to any values and scores.

    Args:
        history: `full_history` of `check`.
        got: pooled rows of the call by entry, for channels that may be infinite or NaN: those are as in `got` then.
    """
    c = c.joined()
    spec, starts = c.spec, plan.start_pos.tolist()
    none = torch.zeros(0, spec.head_dim, dtype=torch.float64, device=got.device)
    found, known, bounds = [none], [none.long()[:, 0]], [none[:, :1]]
    for b, _, start, end, token in heads(made):
        before = c.kv_score[:0] if start == 0 else None if history is None or start != starts[b] else history[b]
        if before is None:
            continue
        mine = (made.sequence == b).nonzero()[:, 0]
        skip = max(int(made.window[mine[0]]) - int(spec.overlap), 0)
        new = c.kv_score[token : token + end - start]
        tokens = torch.cat((before[skip * spec.ratio :].to(c.kv_score), new))[-(end - skip * spec.ratio) :].float()
        window = made.window[mine] - skip
        exact, either = exact_rows(tokens, spec, c.ape, c.state)[window], _either(tokens, spec, c.ape, c.state)[window]
        have = got[made.entry[mine]].double()
        found.append(torch.where(either & (have.isnan() | (have == exact)), have, exact))
        known.append(mine)
        sizes = torch.cat((tokens[:, : spec.channels].abs(), tokens[:, spec.channels :]), dim=1)
        mean = size_of(exact_rows(sizes, spec, c.ape, c.state)[window])
        # A row of zeros has roundings of the values that cancel in it, and of nothing else.
        bounds.append(pooled_worst(spec.window_rows) * mean / size_of(exact).clamp(min=torch.finfo(torch.float32).tiny))
    bound = torch.cat(bounds).clamp(min=pooled_bound(spec.window_rows))
    return torch.cat(found), torch.cat(known), bound


def exact_rows(tokens: Tensor, spec: CompressorSpec, ape: Tensor | None, state: FoldState | WindowState) -> Tensor:
    """fp64 pooled rows `[windows, head_dim]` of tokens from the start of a window, of the rows as `state` keeps them.

    A score of +inf makes its channel NaN, as in the reference; over fold rows, if it is the only one, its token's value.
    """
    tokens, spec, ape = _as_kept(tokens, spec, ape, state)
    rows = reference.pooled(tokens, spec, ape)
    if not isinstance(state, FoldState) or state.kind != "fold":
        return rows
    value, score = reference.windows_of(tokens, spec, ape)
    top = score == torch.inf
    others = torch.where(top, 0.0, value)
    alone = (top.sum(dim=1) == 1) & ~score.isnan().any(1) & others.isfinite().all(1)
    return torch.where(alone, torch.where(top, value, 0.0).sum(dim=1), rows)


def _either(tokens: Tensor, spec: CompressorSpec, ape: Tensor | None, state: FoldState | WindowState) -> Tensor:
    """bool `[windows, head_dim]`: an infinite value is NaN instead where its weight is 0, which is a matter of exp2."""
    value, score = reference.windows_of(*_as_kept(tokens, spec, ape, state))
    return (value.isinf() & (score - score.amax(dim=1, keepdim=True) < FLUSHED)).any(1)


def _as_kept(
    tokens: Tensor, spec: CompressorSpec, ape: Tensor | None, state: FoldState | WindowState
) -> tuple[Tensor, CompressorSpec, Tensor | None]:
    """Tokens as a bf16 state keeps them: a `FoldState` as they come, a `WindowState` with the bias added before."""
    if isinstance(state, FoldState) and state.round_inputs:
        return tokens.bfloat16(), spec, ape
    if not isinstance(state, WindowState) or state.dtype != torch.bfloat16:
        return tokens, spec, ape
    k, s = tokens.float().split(spec.channels, dim=1)
    s = s if ape is None else s + ape[torch.arange(len(s), device=s.device) % spec.ratio]
    return torch.cat((k, s), dim=1).bfloat16(), replace(spec, has_ape=False), None
