"""`kvfold demo`: a small DeepSeek-V4 reads a text through transformers' compressors and through kvfold, compared."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.formats import FORMATS
from ..testing.engine import Engine, Part, Step
from .model import build_model, step

FEWEST_TOKENS = 1500
MOST_TOKENS = 1536
DECODED = 96
# fp32: both sides compute the same sums in another order. Entries have root mean square 1, logits magnitude 2.
BOUND = 1e-4
ENTRY_FORMAT = "fp32"  # as this model's are, state likewise: bytes on all sides are of the same dtype

Name = tuple[int, str]  # layer and "compressor" or "indexer"
Advance = Callable[[int], None]


@dataclass
class Pass:
    """One reading of the text: `logits` `[tokens, vocab]`, entries by compressor, milliseconds of each call, and the most
    bytes of unpooled rows that each layer of transformers' own cache held after a call."""

    logits: torch.Tensor
    entries: dict[Name, torch.Tensor]
    milliseconds: list[float]
    buffered: dict[int, int]
    cache: Any


@dataclass
class Kept:
    """Bytes that a system keeps per sequence: state by layer, and entries as a function of the context length."""

    state: dict[int, int]
    entries: Callable[[int], int]

    def total(self, context: int) -> int:
        return sum(self.state.values()) + self.entries(context)


@dataclass
class Result:
    """What the demo found; `problems` is empty when all agreed within the stated bounds. steps: see `_draft_steps`."""

    tokens: torch.Tensor
    prefilled: int
    specs: dict[Name, CompressorSpec]
    theirs: dict[str, Pass]
    ours: dict[str, Pass]
    rows: dict[Name, torch.Tensor]
    biases: dict[Name, torch.Tensor]
    steps: list[tuple[int, int, int]]
    draft_logits: float = 0.0
    identical: dict[Name, tuple[bool, bool]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_text(path: Path | None, most: int = MOST_TOKENS) -> tuple[torch.Tensor, Path]:
    """The first `most` bytes of a file as token ids, int64 `[1, n]`, and the path used.

    Without a path it is the repository's DESIGN.md, or this module where kvfold was installed without its repository.
    """
    if path is None:
        here = Path(__file__).resolve()
        design = here.parents[3] / "DESIGN.md"
        path = design if here.parents[2].name == "src" and design.is_file() else here
    if not path.is_file():
        raise ValueError(f"--text must name a file, got {path}")
    data, least = path.read_bytes()[:most], f"{FEWEST_TOKENS} bytes, for ten entries at ratio 128"
    if len(data) < min(FEWEST_TOKENS, most):
        raise ValueError(f"--text must have at least {least}; {path} has {len(data)}")
    return torch.tensor(list(data))[None], path


def schedules(length: int, prefilled: int, seed: int) -> dict[str, list[int]]:
    """Lengths of the calls of each reading: one prefill, random chunks, a prefill followed by single tokens."""
    draw = random.Random(seed)
    chunks = []
    while (left := length - sum(chunks)) > 0:
        chunks.append(min(left, draw.choice((draw.randint(1, 8), draw.randint(9, 120), draw.randint(121, 400)))))
    return {"prefill": [length], "chunks": chunks, "decode": [prefilled] + [1] * (length - prefilled)}


def work(length: int) -> int:
    """Tokens that `run` reports to `advance` in all: three readings on each side, one with drafts, and the replay."""
    return 8 * length


@contextmanager
def _one_thread() -> Iterator[None]:
    # The matrices are small: a second thread gains little, and threads that wait for each other on shared cores lose tenfold.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
@torch.no_grad()
def run(tokens: torch.Tensor, *, device: str, drafts: int, seed: int, advance: Advance, decoded: int = DECODED) -> Result:
    """Reads `tokens` int64 `[1, n]` in three ways through both, then once more with drafts; compares everything.

    Args:
        device: `"cpu"` or `"cuda"`; drafts: proposed tokens per verification step; seed: of weights, chunks and drafts.
        decoded: how many tokens at the end are decoded one by one.
        advance: called with the number of tokens done since the last call.
    """
    from ..integrations.transformers import entries, patch, unpatch

    def theirs_of(cache: Any, layer: int, what: str) -> torch.Tensor:
        return cache.layers[layer].compressed_kv[what]

    model, tokens, length = build_model(seed, device), tokens.to(device), tokens.shape[1]
    parts, prefilled = _parts(model), length - decoded
    plans = schedules(length, prefilled, seed)
    _read(model, tokens[:, :64], [60, 1, 1, 1, 1], theirs_of)  # warm up, not timed
    theirs = {name: _read(model, tokens, lengths, theirs_of, advance) for name, lengths in plans.items()}
    patch(model, max_new_tokens=1 + drafts)
    _read(model, tokens[:, :64], [60, 1, 1, 1, 1], entries)
    ours = {name: _read(model, tokens, plans[name], entries, advance) for name in ("prefill", "chunks")}
    with _recorded(parts) as recorded:
        ours["decode"] = _read(model, tokens, plans["decode"], entries, advance)
    rows = {name: torch.cat([torch.cat(kv), torch.cat(gate)], dim=1) for name, (kv, gate) in recorded.items()}
    specs = {(layer, what): ours["decode"].cache.layers[layer].kvfold.folds[what].spec for layer, what in parts}
    biases = {name: part.position_bias.detach() for name, part in parts.items()}
    steps = _draft_steps(length, prefilled, drafts, seed)
    result = Result(tokens[0].cpu(), prefilled, specs, theirs, ours, rows, biases, steps)
    _compare(result)
    _decode_with_drafts(model, tokens, result, seed, advance)
    for name, part in parts.items():
        result.identical[name] = _replay(result, name, part, drafts)
        if not all(result.identical[name]):
            result.problems.append(f"layer {name[0]} {name[1]}: entries or state after drafts are not bit-identical")
        advance(length // len(parts))
    advance(length % len(parts))
    unpatch(model)
    return result


def _parts(model: Any) -> dict[Name, Any]:
    parts: dict[Name, Any] = {}
    for index, layer in enumerate(model.model.layers):
        compressor = layer.self_attn.compressor
        parts[index, "compressor"] = compressor
        if hasattr(compressor, "indexer"):
            parts[index, "indexer"] = compressor.indexer
    return parts


def _read(
    model: Any, tokens: torch.Tensor, lengths: list[int], get: Callable[..., torch.Tensor], advance: Advance | None = None
) -> Pass:
    """Feeds `tokens` to `model` in pieces of these lengths, with a new cache, whose entries `get` finds."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    logits, milliseconds, buffered = [], [], dict.fromkeys(range(len(model.model.layers)), 0)
    wait = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    for piece in tokens.split(lengths, dim=1):
        wait()
        began = time.perf_counter()
        logits.append(step(model, piece, cache)[0])
        wait()
        milliseconds.append(1e3 * (time.perf_counter() - began))
        for index, layer in enumerate(cache.layers):
            buffered[index] = max(buffered[index], _buffered(layer))
        if advance:
            advance(piece.shape[1])
    made = {name: get(cache, *name)[0] for name in _parts(model)}
    return Pass(torch.cat(logits), made, milliseconds, buffered, cache)


@contextmanager
def _recorded(parts: dict[Name, Any]) -> Iterator[dict[Name, tuple[list[torch.Tensor], list[torch.Tensor]]]]:
    """Collects what the projections of every compressor return: `[tokens, channels]` pieces of K and of S."""
    seen: dict[Name, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in parts}
    handles = []
    for name, part in parts.items():
        for rows, projection in zip(seen[name], (part.kv_proj, part.gate_proj), strict=True):
            handles.append(projection.register_forward_hook(lambda m, a, out, rows=rows: rows.append(out[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare(result: Result) -> None:
    for name, ours in result.ours.items():
        theirs = result.theirs[name]
        for key, mine in ours.entries.items():
            want, where = theirs.entries[key], f"{name}, layer {key[0]} {key[1]}"
            if mine.shape != want.shape:
                result.problems.append(f"{where}: {len(mine)} entries, not {len(want)}")
            elif not largest(mine, want) <= BOUND:
                result.problems.append(f"{where}: entries differ by more than {BOUND:g}")
        if not largest(ours.logits, theirs.logits) <= BOUND:
            result.problems.append(f"{name}: logits differ by more than {BOUND:g}")
        if unexcused(ours.logits, theirs.logits):
            result.problems.append(f"{name}: greedy tokens differ where transformers' best two are far apart")


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN if there is one on either side, 0 for empty tensors."""
    return float((a - b).abs().max()) if a.numel() else 0.0


def unexcused(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Greedy tokens that differ although transformers' best two logits are more than twice the bound apart."""
    best, second = theirs.topk(2, dim=-1).values.unbind(-1)
    return int(((ours.argmax(-1) != theirs.argmax(-1)) & (best - second > 2 * BOUND)).sum())


def _buffered(layer: Any) -> int:
    """Bytes of unpooled rows in a layer of transformers' cache."""
    held = [getattr(layer, kind, {}) for kind in ("buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate")]
    return sum(t.numel() * t.element_size() for tensors in held for t in tensors.values() if t is not None)


def _draft_steps(length: int, prefilled: int, drafts: int, seed: int) -> list[tuple[int, int, int]]:
    """`(start, new, accepted)` of each verification step: one sure token and up to `drafts` proposals, some rejected."""
    draw = random.Random(seed + 1)
    steps, start = [], prefilled
    while start < length:
        new = min(1 + drafts, length - start)
        accepted = new - draw.randint(0, new - 1)
        steps.append((start, new, accepted))
        start += accepted
    return steps


def _decode_with_drafts(model: Any, tokens: torch.Tensor, result: Result, seed: int, advance: Advance) -> None:
    """Decodes through the whole model; rejected drafts are wrong bytes, and kvfold is told only where to go on."""
    from transformers import DynamicCache

    from ..integrations.transformers import rewind

    draw = torch.Generator().manual_seed(seed)
    cache, want, differences = DynamicCache(config=model.config), result.ours["decode"].logits, []
    step(model, tokens[:, : result.prefilled], cache)
    advance(result.prefilled)
    for start, new, accepted in result.steps:
        piece = tokens[:, start : start + new].clone()
        wrong = torch.randint(1, 256, (new - accepted,), generator=draw).to(tokens.device)
        piece[0, accepted:] = (piece[0, accepted:] + wrong) % 256
        logits = step(model, piece, cache)[0, :accepted]
        differences.append(largest(logits, want[start : start + accepted]))
        rewind(cache, start + accepted)
        advance(accepted)
    result.draft_logits = float(torch.tensor(differences).max())  # unlike Python's max, keeps a NaN
    if not result.draft_logits <= BOUND:
        result.problems.append(f"drafts: logits differ from those of plain decoding by more than {BOUND:g}")


def _replay(result: Result, name: Name, part: Any, drafts: int) -> tuple[bool, bool]:
    """Drafts on the recorded rows of the plain run: are entries the same bits, and the final state that of one long step?

    A matrix product rounds differently for different batch shapes, so the bits of a run of the model are promised only from
    `kv_score` on. Accepted tokens get the rows that the plain run had, rejected ones NaN.
    """
    from ..integrations.transformers import rope_table

    rows, spec, plain = result.rows[name], result.specs[name], result.ours["decode"]
    length, rope = len(rows), rope_table(part.rotary_emb, torch.arange(len(rows), device=rows.device))
    weights = {"spec": spec, "ape": part.position_bias.detach(), "norm_weight": part.kv_norm.weight.detach(), "rope": rope}
    engine, whole = (Engine.make([rows], weights, fmt="fp32", most=1 + drafts, rows=None) for _ in range(2))
    steps = [(0, result.prefilled, result.prefilled), *result.steps]
    try:
        engine.run([Step(new, (Part(0, start, new, accepted),)) for start, new, accepted in steps])
        whole.run([Step(length, (Part(0, 0, length, length),))])
    except AssertionError:  # refused
        return False, False
    # At the end of a window an HCA step would read nothing, and that row is not kept; the one before says as much.
    kept = whole.state.history_of(length) or range(length - 2, length - 1)
    states = (_state_rows(one.state, one.slots[0], kept) for one in (engine, whole))
    return _same_bits(engine.entries()[0], plain.entries[name]), _same_bits(*states)


def _state_rows(state: FoldState, slot: int, positions: range) -> torch.Tensor:
    """The rows of a slot that stand for these positions, of halves the lo one. Raises LookupError if one is not there."""
    held = state.held()[slot].tolist()
    try:
        return state.rows[slot, [held.index(x) for x in positions]]
    except ValueError:
        raise LookupError(f"the state does not hold all of {positions}") from None


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def kept_bytes(result: Result) -> dict[str, Kept]:
    """What each system keeps for this model: state and entries in fp32 as this model is, on all sides, so that they differ in
    state alone. That of transformers is measured, its unpooled rows at their most while decoding.
    """
    layers, raw, folded = result.ours["decode"].cache.layers, Counter(), Counter()
    for (layer, name), spec in result.specs.items():
        raw[layer] += spec.window_rows * 2 * spec.channels * 4
        folded[layer] += sum(tensor.nbytes for tensor in layers[layer].kvfold.folds[name].state)

    def entries(context: int) -> int:
        row = FORMATS[ENTRY_FORMAT].page_bytes
        return sum(row(spec, 1) * (context // spec.ratio) for spec in result.specs.values())

    return {
        "transformers": Kept(result.theirs["decode"].buffered, entries),
        "raw fp32 rows": Kept(raw, entries),
        "kvfold": Kept(folded, entries),
    }


def kind(result: Result, name: Name) -> str:
    """`HCA`, `CSA` or `CSA indexer`."""
    return "CSA indexer" if name[1] == "indexer" else "CSA" if result.specs[name].overlap else "HCA"
