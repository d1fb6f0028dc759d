"""A model's step as its compressors see it: real shapes, the bytes it must move, and what others recorded for it.

Of other projects there are figures of one compressor at a time (`peers_h200.jsonl`). Their step is the sum over its layers of
the fastest pipeline that the project has for each, which is what it would take them if nothing overlapped.
"""

from __future__ import annotations

from typing import NamedTuple

from . import floor, protocol
from .floor import Traffic
from .protocol import Case, Variant

VARIANTS = {128: Variant("fold", ("fp8_ds_mla",)), 4: Variant("many", ("fp8_ds_mla", "indexer_fp8_vllm"))}
BATCHES, NEW = (1, 16, 64, 256), (1, 4)
PROMPT = 65536  # tokens
FLOOR_DEVICE, READ_BYTES_PER_US = "NVIDIA H200", 4.5e6  # what it reads from memory, sustained
ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}  # names of peers in rows and in words


class Model(NamedTuple):
    """ratios: of the layers that have a compressor, in order; those of ratio 4 have an indexer as well."""

    name: str
    title: str
    hidden_dim: int
    ratios: tuple[int, ...]

    def weight_bytes(self, ratio: int) -> int:
        """Of a layer's projection in bf16, main and indexer together."""
        return self.hidden_dim * columns(ratio) * 2


MODELS = (
    Model("v4-flash", "V4-Flash", 4096, (4, *(128, 4) * 20)),
    Model("v4-pro", "V4-Pro", 7168, (128, *(128, 4) * 30)),
)


class StepCase(NamedTuple):
    """A decode step of a whole model. Its sequences are at all phases of each ratio."""

    model: Model
    batch: int
    new: int

    @property
    def name(self) -> str:
        return f"{self.model.name} b{self.batch} n{self.new}"

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @property
    def layers(self) -> tuple[Case, ...]:
        return tuple(layer_case(ratio, self.batch, self.new) for ratio in self.model.ratios)


class PromptCase(NamedTuple):
    """A prompt of one sequence, by one layer of a ratio."""

    model: Model
    ratio: int
    tokens: int = PROMPT

    @property
    def name(self) -> str:
        return f"{self.model.name} r{self.ratio} s{self.tokens}"

    @property
    def layers(self) -> tuple[Case, ...]:
        return (Case("prefill", 512, self.ratio, 1, self.tokens),)


AnyCase = StepCase | PromptCase


def step_cases() -> list[StepCase]:
    return [StepCase(model, batch, new) for model in MODELS for new in NEW for batch in BATCHES]


def prompt_cases() -> list[PromptCase]:
    return [PromptCase(model, ratio) for model in MODELS for ratio in (128, 4)]


def layer_case(ratio: int, batch: int, new: int) -> Case:
    return Case("decode", 512, ratio, batch, new, "spread")


def columns(ratio: int) -> int:
    """Of a layer's `kv_score`: main, then indexer."""
    return sum(spec.kv_score_width for spec in VARIANTS[ratio].specs(layer_case(ratio, 1, 1)))


def weight_bytes(case: AnyCase) -> int:
    return sum(case.model.weight_bytes(layer.ratio) for layer in case.layers)


def compress_traffic(case: AnyCase) -> Traffic:
    """What the compressors of all layers read and write, `kv_score` among it."""
    one = {layer.ratio: (layer, floor.traffic(layer, VARIANTS[layer.ratio])) for layer in case.layers}
    found = [one[layer.ratio][1] for layer in case.layers]
    return Traffic(sum(part.read for part in found), sum(part.write for part in found))


def kv_score_bytes(case: AnyCase) -> int:
    return sum(case.tokens * columns(layer.ratio) * 2 for layer in case.layers)


def floor_bytes(case: AnyCase, variant: str) -> int:
    """What a variant cannot do without, where hidden states are in L2 and `kv_score` need not leave it.

    A prompt's hidden states are no longer there: they are read once.
    """
    weights, moved = weight_bytes(case), compress_traffic(case)
    if variant == "compressors":
        return moved.total
    if variant == "fused-fp8":
        weights //= 2  # but for scales, a number for 16384 codes
    hidden = case.tokens * case.model.hidden_dim * 2 if isinstance(case, PromptCase) else 0
    if variant == "projections":
        return weights + hidden
    return weights + hidden + moved.total - kv_score_bytes(case)


def floor_us(case: AnyCase, variant: str) -> float:
    """On the device that others' figures were taken on."""
    return floor_bytes(case, variant) / READ_BYTES_PER_US


class Sum(NamedTuple):
    """Microseconds of all layers. whole: every case of them was recorded; else it is the least that it can be."""

    us: float
    whole: bool


def engine_us(case: StepCase, peer: str) -> Sum:
    """A step's compressors in an engine, without what it builds once for a step.

    A batch that was not recorded counts as the largest smaller one that was, or as nothing. With one token a quarter of the
    sequences end a window of 4; recorded is the step in which none does, which takes no longer.
    """
    us, whole = 0.0, True
    for ratio in sorted(set(case.model.ratios)):
        count = case.model.ratios.count(ratio)
        for head_dim in (512, 128) if ratio == 4 else (512,):
            found, recorded = _fastest(peer, head_dim, ratio, case)
            us, whole = us + count * found, whole and recorded
    return Sum(us, whole)


def _fastest(peer: str, head_dim: int, ratio: int, case: StepCase) -> tuple[float, bool]:
    """Of one compressor: its fastest pipeline, and whether just this step was recorded."""
    mode = "spread" if ratio == 128 else ("hit" if case.new % ratio == 0 else "miss")
    for batch in sorted((batch for batch in (1, 16, 64, 128, 256) if batch <= case.batch), reverse=True):
        name = Case("decode", head_dim, ratio, batch, case.new, mode).name
        found = [row["us"] for row in protocol.peers() if _is_pipeline(row, peer, name)]
        if found:
            return min(found), batch == case.batch and mode != "miss"
    return 0.0, False


def _is_pipeline(row: dict, peer: str, case: str) -> bool:
    return (row["peer"], row["case"]) == (peer, case) and row["what"].startswith("pipeline") and row["us"] is not None


# What the change that this project began from reported of its kernel: its part of the GPU time of a decode step, in percent,
# before and after. V4-Pro, 3 drafts, 16 sequences to a GPU. TensorRT-LLM, pull request 14124.
REPORTED = (2.1, 0.6)
REPORTED_CASE = StepCase(MODELS[1], 16, 4)
REPORTED_KERNEL = ("trtllm", "may2026_fm")  # that kernel, as it was recorded here


def reported_us() -> float:
    """That kernel in all compressors of the step, without norm, RoPE, quantization and store."""
    peer, variant = REPORTED_KERNEL
    rows = {row["case"]: row["us"] for row in protocol.peers() if (row["peer"], row["variant"]) == (peer, variant)}
    spread, hits = layer_case(128, 16, 4).name, [Case("decode", width, 4, 16, 4, "hit").name for width in (512, 128)]
    ratios = REPORTED_CASE.model.ratios
    return ratios.count(128) * rows[spread] + ratios.count(4) * sum(rows[name] for name in hits)


def share(compressors_us: float) -> float:
    """Percent of that step, with kvfold's compressors in place of that kernel and all else as long as it was."""
    after = REPORTED[1]
    ours = after * compressors_us / reported_us()
    return 100 * ours / (100 - after + ours)


def share_text(compressors_us: float) -> str:
    """That, with what it rests on. compressors_us: of plans and compressors in `REPORTED_CASE`."""
    before, after = REPORTED
    return (
        "kvfold began from a change to TensorRT-LLM's pooling kernel (its pull request 14124), whose part of a decode step's "
        f"GPU time went from {before} % to {after} %: V4-Pro, 3 drafts, 16 sequences to a GPU. With kvfold's plans and "
        f"compressors in place of that kernel it would be {share(compressors_us):.2f} %, norm, RoPE, quantization and store "
        f"included. Assumed: the {after} % are the kernel in all 91 compressors of the step, at all phases; kvfold's "
        f"{compressors_us:.0f} us stand to it as on an H200 to the {reported_us():.0f} us that were recorded of it; and all "
        "else in the step takes as long as it did."
    )
