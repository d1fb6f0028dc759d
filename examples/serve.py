"""A whole serving engine on kvfold, small: `python examples/serve.py`, on a GPU or a CPU.

Continuous batching, chunked prefill beside decode, drafts with rejection, paged caches, a prefix cache, slots used again, and
CUDA graphs where there is a GPU. The layers are DeepSeek-V4's compressors. A table by token id stands in for embedding and
projections, and a rule for what a model says. In the end every request's entries must be those of one prefill of it alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

import kvfold
from kvfold import V4_CSA, V4_HCA, V4_INDEXER, EntryCache, FoldState, Snapshots, StepPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 2  # of each kind: of ratio 128, and of ratio 4 with its indexer
SLOTS, DRAFTS, CHUNK = 4, 3, 192  # requests that run at once, tokens guessed in a step, tokens of a step with prompts
BUCKETS = (1, 2, 4)  # batch sizes of steps that only decode
PAGE, PAGES, TEXT, VOCAB = 128, 10, 640, 997  # positions of a page, pages in all, longest request, token ids
MAIN, KEYS = "fp8_ds_mla", "indexer_mxfp4"  # record formats
COLUMNS = TEXT // PAGE
torch.set_num_threads(1)  # on a CPU these tensors are too small to share


def follow(token: int, position: int) -> int:
    """What the model says stands behind this token."""
    return (token * 7 + position * 13 + 5) % VOCAB


def guess(token: int, position: int) -> int:
    """What a draft model says: mostly the same."""
    return follow(token, position) if position % 5 else 0


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Kept:
    """One compressor of one layer: its weights and what it keeps. A page has one number, in all caches and for its snapshot."""

    def __init__(self, spec: kvfold.CompressorSpec, fmt: str, draw: torch.Generator) -> None:
        self.spec, self.fmt, self.rows = spec, fmt, PAGE // spec.ratio  # entries of a page
        self.state = FoldState.allocate(spec, SLOTS, 1 + DRAFTS, device=DEVICE)
        self.cache = EntryCache.allocate(fmt, PAGES, self.rows, spec, device=DEVICE)
        # What a step reads that starts behind a page: nothing where windows end with pages and do not overlap.
        self.snapshots = Snapshots.allocate(spec, PAGES, PAGE, device=DEVICE) if spec.overlap else None
        self.table = torch.randn(VOCAB, 2 * spec.channels, generator=draw).to(DEVICE)
        self.ape = torch.randn(spec.ratio, spec.channels, generator=draw).to(DEVICE)
        self.weights = self.ape, torch.ones(spec.head_dim, device=DEVICE), kvfold.reference.rope_table(TEXT, 64).to(DEVICE)

    def entries(self, r: Request) -> torch.Tensor:
        """As attention reads them from the pages of a request."""
        windows = torch.arange(r.computed // self.spec.ratio, device=DEVICE)
        return self.cache.read(ints(r.pages).long()[windows // self.rows] * self.rows + windows % self.rows)

    def alone(self, ids: list[int]) -> torch.Tensor:
        """The entries of one prefill, over a state and a cache of its own."""
        slots = torch.arange(len(ids) // self.spec.ratio, device=DEVICE)
        whole = ints([0]), ints([0, len(ids)]), len(ids)
        plan = StepPlan.build(self.spec.ratio, *whole, state_slots=ints([0]), entry_slots=slots)
        state = FoldState.allocate(self.spec, 1, 1, device=DEVICE)
        cache = EntryCache.allocate(self.fmt, len(slots), 1, self.spec, device=DEVICE)
        kvfold.compress_many([(self.table[ids], state, cache, self.spec, *self.weights)], plan)
        return cache.read(slots)


class Pages:
    """Who has which page. One that is known for its prefix stays when nobody has it, until room is needed."""

    def __init__(self) -> None:
        self.free, self.users = list(range(PAGES)), [0] * PAGES
        self.known: dict[tuple[int, ...], int] = {}  # by all tokens up to the end of the page

    def find(self, ids: list[int]) -> list[int]:
        """Known pages that `ids` begins with, but not all of it: the last token must be computed."""
        found: list[int] = []
        while (end := (len(found) + 1) * PAGE) < len(ids) and tuple(ids[:end]) in self.known:
            found.append(self.known[tuple(ids[:end])])
        return found

    def take(self, shared: list[int], count: int) -> list[int] | None:
        """`shared`, and new ones behind them, `count` in all; None if there are not enough."""
        idle = [prefix for prefix, page in self.known.items() if not self.users[page] and page not in shared]
        while len(self.free) < count - len(shared) and idle:
            self.free.append(self.known.pop(idle.pop(0)))
        if len(self.free) < count - len(shared):
            return None
        pages = shared + [self.free.pop() for _ in range(count - len(shared))]
        for page in pages:
            self.users[page] += 1
        return pages

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if not self.users[page] and page not in self.known.values():
                self.free.append(page)


@dataclass
class Request:
    """ids: the prompt, then what was generated, `wanted` in the end. computed: how many of them are in state and caches."""

    ids: list[int]
    wanted: int
    computed: int = 0
    hit: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    entries: list[torch.Tensor] = field(default_factory=list)


class Step:
    """One shape of step: its inputs, at addresses that stay, a plan for each ratio, and on a GPU its graph."""

    def __init__(self, engine: Engine, batch: int, most: int, tokens: int, record: bool) -> None:
        self.layers, self.batch, self.sizes = engine.layers, batch, [tokens, batch, batch + 1, batch, batch * COLUMNS]
        self.inputs = ints([0] * sum(self.sizes))
        self.ids, self.start, self.ends, slots, pages = self.inputs.split(self.sizes)
        table = pages.view(batch, COLUMNS)
        given = {"state_slots": slots, "cache_block_table": table, "max_tokens": tokens, "errors": engine.errors}
        kept = {"snapshot_table": table, "snapshot_page_size": PAGE}  # the snapshot of a page is in the row of its number
        self.plans = {
            128: StepPlan.build(128, self.start, self.ends, most, rows_per_page=PAGE // 128, **given),
            4: StepPlan.build(4, self.start, self.ends, most, rows_per_page=PAGE // 4, **given, **kept),
        }
        self.graph: torch.cuda.CUDAGraph | None = None
        self.run([])  # nobody is in it: what is made once is made before a graph is recorded
        if record:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.launch()

    def launch(self) -> None:
        for plan in self.plans.values():
            plan.update(self.start, self.ends)
        for layer in self.layers:  # one launch for each, also where a layer has two compressors
            parts = [(c.table[self.ids], c.state, c.cache, c.spec, *c.weights, c.snapshots) for c in layer]
            kvfold.compress_many(parts, self.plans[layer[0].spec.ratio])

    def run(self, work: list[tuple[Request, list[int]]]) -> None:
        """A step of these requests with these tokens. The batch is filled up with absent ones: slot -1 and no tokens."""
        absent = self.batch - len(work)
        ids = [token for _, tokens in work for token in tokens]
        ends = [sum(len(tokens) for _, tokens in work[:b]) for b in range(len(work) + 1)]
        numbers = ids + [0] * (len(self.ids) - len(ids))
        numbers += [r.computed for r, _ in work] + [0] * absent
        numbers += ends + ends[-1:] * absent
        numbers += [r.slot for r, _ in work] + [-1] * absent
        numbers += [page for r, _ in work for page in r.pages + [-1] * (COLUMNS - len(r.pages))] + [-1] * absent * COLUMNS
        self.inputs.copy_(torch.tensor(numbers, dtype=torch.int32))
        if self.graph:
            self.graph.replay()
        else:
            self.launch()


class Engine:
    """All layers with what they keep, and who runs when."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        kinds = [[(V4_HCA, MAIN)], [(V4_CSA, MAIN), (V4_INDEXER, KEYS)]] * LAYERS
        self.layers = [[Kept(*kind, draw) for kind in layer] for layer in kinds]
        self.compressors = [c for layer in self.layers for c in layer]
        self.errors, self.pages, self.slots = ints([0]), Pages(), list(range(SLOTS))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        if DEVICE == "cuda":  # compile everything first: inside a graph nothing may
            shapes = {"dtypes": (torch.float32,), "max_new_tokens": (1 + DRAFTS, CHUNK)}
            kvfold.warmup([V4_HCA], [MAIN], **shapes)
            kvfold.warmup([], [], **shapes, many=[((V4_CSA, MAIN), (V4_INDEXER, KEYS))], snapshots=(True,))
        most = 1 + DRAFTS
        self.decode = [Step(self, batch, most, batch * most, record=DEVICE == "cuda") for batch in BUCKETS]
        self.mixed = Step(self, SLOTS, CHUNK, CHUNK, record=False)

    def step(self) -> None:
        """One step of the model: prompts and decode together, or decode alone by the graph of the next larger batch."""
        self.admit()
        work = self.schedule()
        only_decode = all(len(tokens) <= 1 + DRAFTS for _, tokens in work)
        step = next(step for step in self.decode if step.batch >= len(work)) if only_decode else self.mixed
        step.run(work)
        if int(self.errors):  # an engine copies it to the host with the sampled tokens
            raise RuntimeError(f"{int(self.errors)} sequences or entries were refused")
        for r, tokens in work:
            self.accept(r, tokens)

    def admit(self) -> None:
        """Gives requests that wait a slot and all pages that they will need. A slot and a page need no clearing."""
        while self.waiting and self.slots:
            r = self.waiting[0]
            shared = self.pages.find(r.ids)
            pages = self.pages.take(shared, -(-(r.wanted + DRAFTS) // PAGE))
            if pages is None:
                return
            r.pages, r.slot, r.computed, r.hit = pages, self.slots.pop(), len(shared) * PAGE, len(shared)
            if shared:
                at = {"slots": ints([r.slot]), "pages": ints(shared[-1:]), "start_pos": ints([r.computed])}
                for c in self.compressors:
                    if c.snapshots:
                        kvfold.restore(c.state, c.snapshots, **at, errors=self.errors)
            self.running.append(self.waiting.pop(0))

    def schedule(self) -> list[tuple[Request, list[int]]]:
        """Who gets which tokens: first those that decode, with drafts, then as much of the prompts as there is room for."""
        work, room = [], CHUNK
        for r in sorted(self.running, key=lambda r: len(r.ids) - r.computed):
            tokens = r.ids[r.computed : r.computed + room]
            if r.computed == len(r.ids) - 1:
                for position in range(r.computed, r.computed + DRAFTS):
                    tokens.append(guess(tokens[-1], position))
            if tokens:
                work.append((r, tokens))
                room -= len(tokens)
        return work

    def accept(self, r: Request, tokens: list[int]) -> None:
        """Counts what was computed, and of the drafts what the model says too. A draft is rejected by not being counted."""
        drafts = tokens[len(r.ids) - r.computed :]
        r.computed = min(r.computed + len(tokens), len(r.ids))
        if r.computed == len(r.ids):
            r.ids.append(follow(r.ids[-1], r.computed - 1))
            for draft in drafts:
                if draft != r.ids[-1] or len(r.ids) == r.wanted:
                    break
                r.computed += 1
                r.ids.append(follow(draft, r.computed - 1))
        for k in range(r.computed // PAGE):
            self.pages.known.setdefault(tuple(r.ids[: (k + 1) * PAGE]), r.pages[k])
        if len(r.ids) == r.wanted:
            r.entries = [c.entries(r) for c in self.compressors]  # before others get its pages
            self.running.remove(r)
            self.slots.append(r.slot)
            self.pages.release(r.pages)


def main() -> None:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(VOCAB, (8, TEXT), generator=draw).tolist()
    lengths = (150, 3, 300, 260, 90, 420, 330, 270)
    # All but two begin like the first: as if with the same system prompt.
    prompts = [(words[0][:130] + words[n][130:] if n not in (1, 5) else words[n])[:length] for n, length in enumerate(lengths)]
    engine, steps = Engine(), 0
    requests = [Request(prompt, len(prompt) + 12 + 3 * n) for n, prompt in enumerate(prompts)]
    engine.waiting += requests
    begin = time.perf_counter()
    while engine.waiting or engine.running:
        engine.step()
        steps += 1
    seconds, computed = time.perf_counter() - begin, sum(r.computed for r in requests)
    for r in requests:
        for c, entries in zip(engine.compressors, r.entries, strict=True):
            assert torch.equal(entries, c.alone(r.ids[: r.computed])), "not the entries of one prefill"
    cache_bytes = sum(c.cache.pages.nbytes for c in engine.compressors)
    state_bytes = sum(c.state.rows.nbytes for c in engine.compressors)
    speed = f"{computed} tokens in {steps} steps, {computed / seconds:.0f} tokens/s on {DEVICE}"
    print(f"{len(requests)} requests in {SLOTS} slots: {speed}")
    print(f"{sum(r.hit for r in requests) * PAGE} of {sum(lengths)} tokens of prompts were in the prefix cache")
    print(f"caches of {cache_bytes / 1e6:.2f} MB for {PAGES * PAGE} positions, states of {state_bytes / 1e6:.2f} MB")
    print("all requests have the entries of one prefill of them alone, to the bit")


if __name__ == "__main__":
    main()
