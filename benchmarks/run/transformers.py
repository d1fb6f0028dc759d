"""Times the demo's DeepSeek-V4 in transformers, patched beside unpatched, and counts its cache's bytes and compiled graphs.

python -m benchmarks.run.precompile --only "adapters transformers,adapters plan"         for a GPU
python -m benchmarks.run.transformers --out benchmarks/results/transformers.jsonl [--device cuda] [--only SUBSTRING]

Both models make the same calls in turn. `ms` is per call of the whole model: each call's fastest repeat, and of these the mean
over the calls of a case, so that what else runs on the machine counts little and a step that ends a window counts. On a CPU it
is one thread's own time. On a GPU, where a step takes as long as its launches, decoding is the last 64 of the same 128 steps,
of which one ends a window of 128. "in compressors": what of it they take, which is all that a patch replaces, on a CPU.
bytes are what all tensors of a cache show, without what they are views of. graphs: of
`torch.compile` over a prompt and 40 steps of one token, on a CPU; -1 where `fullgraph=True` gave up, as there were too many.
Each row is printed and written when it is there, those that are asked for most first; on a GPU no case begins after a minute.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kvfold.demo.model import build_model, step
from kvfold.integrations.transformers import patch

from ..lib import protocol, table

SIDES = ("transformers", "kvfold")
PROMPT, STEPS = 1024, 128
REPEATS = {"cpu": 8, "cuda": 3}
SECONDS = 60  # on a GPU no case begins behind that
LENGTHS = (2000, 4000)
Measure = Callable[[Any, torch.Tensor, Any], float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def models(device: str, dtype: torch.dtype) -> dict[str, Any]:
    plain = build_model(0, device).to(dtype)
    patched = copy.deepcopy(plain)
    patch(patched)
    return {"transformers": plain, "kvfold": patched}


def call(model: Any, tokens: torch.Tensor, cache: Any) -> float:
    """Milliseconds of a call."""
    if not tokens.is_cuda:
        begin = time.process_time()
        step(model, tokens, cache)
        return 1e3 * (time.process_time() - begin)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step(model, tokens, cache)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def in_compressors(model: Any, tokens: torch.Tensor, cache: Any) -> float:
    """Milliseconds of a call on a CPU that its compressors take, with all hooks of theirs."""
    times = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(".compressor"):
                begin = module.register_forward_pre_hook(lambda *_: times.append(-time.process_time()), prepend=True)
                end = module.register_forward_hook(lambda *_: times.append(time.process_time()))
                hooks.callback(begin.remove)
                hooks.callback(end.remove)
        step(model, tokens, cache)
    return 1e3 * sum(times)


def new_cache(model: Any) -> Any:
    return DynamicCache(config=model.config)


def timed(
    both: dict[str, Any], prompt: torch.Tensor | None, pieces: list[torch.Tensor], repeats: int, measure: Measure = call
) -> dict[str, float]:
    """The mean over `pieces` of each one's fastest call, by side; behind `prompt`, which is not timed."""
    begun = {side: new_cache(model) for side, model in both.items()}
    for side, model in both.items():
        if prompt is not None:
            step(model, prompt, begun[side])
    best = {side: [float("inf")] * len(pieces) for side in both}
    for _ in range(repeats):
        caches = {side: copy.deepcopy(cache) for side, cache in begun.items()}
        for i, piece in enumerate(pieces):
            for side, model in both.items():
                best[side][i] = min(best[side][i], measure(model, piece, caches[side]))
    return {side: sum(times) / len(times) for side, times in best.items()}


def chunks(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of random lengths, as of the demo."""
    draw, lengths = random.Random(0), []
    while (left := tokens.shape[1] - sum(lengths)) > 0:
        lengths.append(min(left, draw.choice((draw.randint(1, 8), draw.randint(9, 120), draw.randint(121, 400)))))
    return list(tokens.split(lengths, 1))


def tensors(thing: Any, seen: dict[int, Any]) -> Iterator[torch.Tensor]:
    """All tensors that can be reached from a cache, once each."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for one in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors(one, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type | torch.nn.Module):
        yield from tensors(vars(thing), seen)


def cache_bytes(cache: Any) -> int:
    """What all tensors of a cache show, not what they keep from being freed: transformers' own are views of much more."""
    found = {(t.untyped_storage().data_ptr(), t.storage_offset()): t.nbytes for t in tensors(cache, {})}
    return sum(found.values())


def graphs(model: Any, tokens: torch.Tensor) -> int:
    """Graphs that a prompt of 300 tokens and 40 steps of one take, all of them without a break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, cache = torch.compile(model, fullgraph=True, backend="eager"), new_cache(model)
    try:
        for piece in tokens[:, :340].split([300] + [1] * 40, 1):
            step(compiled, piece, cache)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return -1
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, help="of each call; 8 on a CPU, 3 on a GPU")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    args = parser.parse_args()
    repeats = args.repeats or REPEATS[args.device]
    where = protocol.environment(args.commit) | {"transformers": transformers.__version__}
    if args.device == "cpu":
        torch.set_num_threads(1)
        where |= {"device": "cpu"}
    tokens = torch.randint(0, 256, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(args.device)
    steps = STEPS if args.device == "cpu" else STEPS // 2
    prompt, behind = tokens[:, :PROMPT], list(tokens[:, PROMPT + STEPS - steps : PROMPT + STEPS].split(1, 1))
    shown = []

    def add(case: str, unit: str, make: Callable[[], dict[str, float]]) -> None:
        if args.only not in case:
            return
        if args.device == "cuda" and time.monotonic() - begun > SECONDS:
            print(f"{case}: left out, as {SECONDS} s have gone", flush=True)
            return
        found = make()
        rows = [{"bench": "transformers", "case": case, "variant": side, unit: round(found[side], 3)} for side in SIDES]
        protocol.append_rows(args.out, [row | where for row in rows])
        shown.append([case, unit, *(f"{found[side]:,.3f}".rstrip("0").rstrip(".") for side in SIDES)])
        print(*shown[-1], sep="  ", flush=True)

    def add_times(name: str, both: dict[str, Any]) -> None:
        ahead = tokens[:, : PROMPT + STEPS - steps]
        add(f"{name} decode {PROMPT}", "ms", lambda: timed(both, ahead, behind, repeats))
        add(f"{name} prefill {PROMPT}", "ms", lambda: timed(both, None, [prompt], repeats))
        add(f"{name} chunks {PROMPT}", "ms", lambda: timed(both, None, chunks(prompt), repeats))
        if args.device == "cpu":
            inside = {"prefill": [prompt], "chunks": chunks(prompt)}
            for case, pieces in inside.items():
                of = f"{name} {case} {PROMPT} in compressors"
                add(of, "ms", lambda pieces=pieces: timed(both, None, pieces, repeats, in_compressors))

    def add_bytes(name: str, both: dict[str, Any]) -> None:
        caches = {side: new_cache(model) for side, model in both.items()}
        for before, length in zip((0, *LENGTHS), LENGTHS, strict=False):
            if args.only in f"{name} cache {length}":
                for side, model in both.items():
                    step(model, tokens[:, before:length], caches[side])
                add(f"{name} cache {length}", "bytes", lambda: {side: cache_bytes(c) for side, c in caches.items()})

    made = {name: models(args.device, dtype) for name, dtype in DTYPES.items()}
    begun = time.monotonic()
    for name, both in made.items():
        if name == "fp32" or args.device == "cuda":
            add_times(name, both)
    for name, both in made.items():
        add_bytes(name, both)
    if args.device == "cpu":
        add("graphs", "count", lambda: {side: graphs(model, tokens) for side, model in made["fp32"].items()})
    table.show("transformers and kvfold", ("case", "unit", *SIDES), shown)


if __name__ == "__main__":
    main()
