"""The benchmark protocol: which cases, how a call is timed, and what other projects cost under the same rules.

A call gets one of several independent buffer sets in turn, so many that a round of them is four times the L2 cache: inputs
and state are cold, as they are between the layers of a model. One CUDA graph holds all calls of a round; its median replay
time over 30 replays, divided by the calls, is the figure. `peers_h200.jsonl` holds the figures of other projects, taken on an
H200 (torch 2.11, CUDA 13) with these cases and this timer: bf16 kv_score, fp32 state, fp32 ape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

import kvfold
from kvfold.arguments.files import write_atomically

HERE = Path(__file__).parents[1]  # the folder `benchmarks`
PEERS = HERE / "peers_h200.jsonl"
MOST_SETS = 64
# Whole pipelines over raw fp32 rows, one per position: what WindowState is to be compared with.
RAW_FP32 = (("sglang", "compress+normrope"), ("vllm", "pipeline"), ("trtllm", "main+post_fm"))


@dataclass(frozen=True)
class Case:
    """One row of the protocol.

    Attributes:
        kind: "decode" or "prefill".
        new: new tokens per sequence.
        mode: decode: "hit" every sequence finishes one window in the step, "miss" none does, "spread" sequence b stands at
            phase `b * ratio / batch`.
    """

    kind: str
    head_dim: int
    ratio: int
    batch: int
    new: int
    mode: str = ""

    @property
    def spec(self) -> kvfold.CompressorSpec:
        """The compressor of V4 with this shape; with ratio 1 or 2 that of V4.1."""
        if self.ratio <= 2:
            return kvfold.V41_MAIN_R2 if self.ratio == 2 else kvfold.V41_MAIN_R1
        if self.head_dim == 128:
            return kvfold.V4_INDEXER
        return kvfold.V4_HCA if self.ratio == 128 else kvfold.V4_CSA

    @property
    def name(self) -> str:
        """The name that the peers' figures carry."""
        head = f"{self.kind[:3]} hd{self.head_dim} r{self.ratio} b{self.batch}"
        return f"{head} n{self.new} {self.mode}" if self.kind == "decode" else f"{head} s{self.new}"

    def start_positions(self) -> list[int]:
        """Tokens that each sequence has before the step: four windows and what the mode asks for."""
        if self.kind == "prefill":
            return [0] * self.batch
        base = 4 * self.ratio
        if self.mode == "spread":
            return [base + b * self.ratio // self.batch for b in range(self.batch)]
        if self.mode == "hit" and self.new % self.ratio:
            base += self.ratio - self.new % self.ratio
        return [base] * self.batch

    @property
    def windows(self) -> int:
        """How many the step touches."""
        return sum((start + self.new - 1) // self.ratio - start // self.ratio + 1 for start in self.start_positions())


def cases() -> list[Case]:
    """All cases: real shapes of V4, from one sequence to 256."""
    found = []
    for mode in ("hit", "spread", "miss"):
        for new in (1, 4):
            found += [Case("decode", 512, 128, batch, new, mode) for batch in (1, 16, 64, 128, 256)]
    for new, mode in ((1, "hit"), (1, "miss"), (4, "hit")):
        found += [Case("decode", 512, 4, batch, new, mode) for batch in (1, 16, 64, 128, 256)]
    for new in (1, 4):
        found += [Case("decode", 128, 4, batch, new, "hit") for batch in (16, 64, 256)]
    for ratio in (128, 4):
        found += [Case("prefill", 512, ratio, b, s) for b, s in ((1, 8192), (1, 65536), (8, 8192), (8, 65536))]
    return found


@dataclass(frozen=True)
class Variant:
    """What is called, as `state:output`: `fold:fp8_ds_mla`, `window:rows`, `many:fp8_ds_mla+indexer_mxfp4`.

    Attributes:
        state: "fold" (`FoldState`), "window" (`WindowState`, fp32) or "many" (`compress_many` over two `FoldState`: main and
            indexer compressor of a ratio-4 layer).
        outputs: of each compressor, a record format or "rows": bf16 pooled rows and no cache.
    """

    state: str
    outputs: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> Variant:
        state, _, outputs = name.partition(":")
        variant = cls(state, tuple(outputs.split("+")))
        if state not in ("fold", "window", "many") or len(variant.outputs) != (2 if state == "many" else 1):
            raise ValueError(f"variant must be fold:X, window:X or many:X+Y, got {name!r}")
        for output in variant.outputs:
            if output != "rows":
                kvfold.storage.formats.get_format(output)
        return variant

    @property
    def name(self) -> str:
        return f"{self.state}:{'+'.join(self.outputs)}"

    def specs(self, case: Case) -> tuple[kvfold.CompressorSpec, ...]:
        """The compressors of one call, one for each output."""
        return (kvfold.V4_CSA, kvfold.V4_INDEXER) if self.state == "many" else (case.spec,)

    def fits(self, case: Case) -> bool:
        """Whether the variant is defined for a case."""
        if self.state == "many" and case.spec != kvfold.V4_CSA:
            return False
        formats = [None if output == "rows" else kvfold.storage.formats.get_format(output) for output in self.outputs]
        return all(
            fmt is None or not fmt.head_dims or spec.head_dim in fmt.head_dims
            for spec, fmt in zip(self.specs(case), formats, strict=True)
        )


def buffer_sets(bytes_per_set: int) -> int:
    """How many buffer sets make a round cold in the L2 cache of this device."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, -(-4 * l2 // max(bytes_per_set, 1))))


def time_graph(calls: list[Callable[[], None]], replays: int = 30, rounds: int | None = None) -> float:
    """Median microseconds per call; `calls` holds one call for each buffer set. rounds: of them in the graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        rounds = rounds or max(1, 64 // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


@lru_cache
def peers() -> tuple[dict, ...]:
    """Every figure of other projects; none where their file is not there."""
    return tuple(json.loads(line) for line in PEERS.read_text().splitlines()) if PEERS.is_file() else ()


def best_peer(case: Case, among: tuple[tuple[str, str], ...] | None = None) -> tuple[float, str] | None:
    """The fastest whole pipeline of any other project for this case, in microseconds, and whose it is.

    Args:
        among: only these pairs of project and variant, such as `RAW_FP32`.
    """
    found = [
        (row["us"], f"{row['peer']} {row['variant']}")
        for row in peers()
        if row["case"] == case.name
        and row["what"].startswith("pipeline")
        and row["us"] is not None
        and (among is None or (row["peer"], row["variant"]) in among)
    ]
    return min(found) if found else None


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, help="file that the JSON lines are added to")
    found.add_argument("--commit", help="what the rows give as the commit (default: git's HEAD)")
    return found


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def environment(commit: str | None = None) -> dict[str, str]:
    """What every result row says about where it was taken."""
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    return {"device": device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def append_rows(path: Path | None, rows: list[dict]) -> None:
    """Adds JSON lines to a results file, if there is one: all of them or, where that fails, none."""
    if path is None:
        return
    new = "".join(json.dumps(row) + "\n" for row in rows)
    before = path.read_bytes() if path.is_file() else b""
    with write_atomically(path) as beside:
        beside.write_bytes(before + new.encode())
