"""SGLang 0.5.23 as far as its compressors go: its own pools, metadata, hook registry and backend methods, for tests and
benchmarks.

Not SGLang's own here: its kernels, which are built where it is installed. What they compute before a compressor runs, cache
slots of tokens and lengths token by token, is computed by torch in `Backend`; what they compute instead of kvfold, in the
tests, in fp64. It imports SGLang, which must find no GPU then: it would ask for its own binaries.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import nn
from transformers.utils import import_utils


class _Stub(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


VISION = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
STUBS = {"torchvision": VISION, "IPython": ("", ".display")}


def _stub_out() -> None:
    """SGLang imports torchvision for image models and IPython for notebooks, of which nothing runs here.

    They are taken where they are; transformers shall not believe in a stub.
    """
    import_utils.is_torchvision_available()
    for package, names in STUBS.items():
        for name in names if find_spec(package) is None else ():
            stub = _Stub(package + name)
            stub.__spec__ = ModuleSpec(stub.__name__, None)
            sys.modules[stub.__name__] = stub


_stub_out()

from sglang.kernels.ops.quantization.fp4_fake_quant import ceil_pow2  # noqa: E402
from sglang.srt import plugins as sgl_plugins  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.layers.attention import deepseek_v4_backend as sgl_backend  # noqa: E402
from sglang.srt.layers.attention.dsv4 import compressor as sgl_compressor  # noqa: E402
from sglang.srt.layers.attention.dsv4 import dsv41_sparse  # noqa: E402
from sglang.srt.layers.attention.dsv4.online_c128_mtp import OnlineC128MTPController  # noqa: E402
from sglang.srt.mem_cache import deepseek_v4_memory_pool as sgl_pool  # noqa: E402
from sglang.srt.mem_cache.hybrid_cache import linker_pool_assembler  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.plugins import hook_registry  # noqa: E402
from sglang.srt.runtime_context import get_context  # noqa: E402
from sglang.test.kernels.deepseek_v4 import common, dsv41_kv_quant_reference, k_cache_reference  # noqa: E402

from kvfold.integrations import sglang as plugin  # noqa: E402
from kvfold.integrations import switch  # noqa: E402
from kvfold.integrations.sglang import layer as layer_module  # noqa: E402
from kvfold.integrations.sglang import plugin as plugin_module  # noqa: E402

compress = layer_module.compress
# Of SGLang, for the tests: they import it from here, as it does not import without the stubs above.
__all__ = [
    "ForwardMode",
    "ceil_pow2",
    "common",
    "dsv41_kv_quant_reference",
    "dsv41_sparse",
    "envs",
    "k_cache_reference",
    "linker_pool_assembler",
    "sgl_plugins",
]

PAGE = 256  # tokens of a page, of both pools
TEXT = 1024  # the longest request
REQUESTS = 5  # and slot 0, which is SGLang's padding


@contextmanager
def plugged(state: str | None = None, start: Callable[[], None] | None = None) -> Iterator[None]:
    """kvfold on in SGLang, by `start` or in code, and off again behind it, which SGLang itself has no way to do."""
    kinds = hook_registry.HookType
    targets = [target for target, _, _ in plugin_module._hooks(kinds) + plugin_module._fold_hooks(kinds)]
    before = {target: plugin_module._resolve(target) for target in targets}
    try:
        start() if start is not None else plugin.register(state)
        yield
    finally:
        for target, original in before.items():
            owner, name = target.rsplit(".", 1)
            owner, now = plugin_module._resolve(owner), plugin_module._resolve(target)
            if now is not original:
                setattr(owner, name, original)
                hook_registry._propagate_patch(now, original, owner)
        hook_registry.HookRegistry.reset()
        switch.ON.clear()


@contextmanager
def config(drafts: int = 0, device: str = "cpu", **more: Any) -> Iterator[None]:
    """SGLang's published settings, with `drafts` tokens to verify, and more of them."""
    override = get_context().override_server_args(
        attention_backend="dsv4",
        device=device,
        kv_cache_dtype="auto",
        speculative_algorithm="EAGLE" if drafts else None,
        speculative_num_draft_tokens=drafts,
        speculative_eagle_topk=1 if drafts else 0,
        speculative_num_steps=max(drafts - 1, 0),
        **more,
    )
    override.install()
    try:
        yield
    finally:
        override.restore()


class Norm(nn.Module):
    """The two things that kvfold takes of SGLang's RMSNorm."""

    def __init__(self, size: int, eps: float, draw: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size, generator=draw), requires_grad=False)
        self.variance_epsilon = self.eps = eps


def make_compressor(layer: int, ratio: int, head_dim: int, freqs: torch.Tensor, seed: int) -> Any:
    """SGLang's `Compressor` without its projection, where `freqs` is; `ape` is loaded by its own loader."""
    draw = torch.Generator().manual_seed(seed)
    made = sgl_compressor.Compressor.__new__(sgl_compressor.Compressor)
    nn.Module.__init__(made)
    made.layer_id, made.ratio, made.head_dim, made.overlap = layer, ratio, head_dim, ratio == 4
    made.is_in_indexer = made.rotate = head_dim == 128
    made.norm, made.freqs_cis = Norm(head_dim, 3e-6, draw).to(freqs.device), freqs
    width = head_dim * (1 + made.overlap)
    made.ape = nn.Parameter(torch.empty(ratio, width, device=freqs.device), requires_grad=False)
    made.plain_ape = torch.randn(ratio, width, generator=draw)
    made.load_ape_weight(made.ape, made.plain_ape.to(freqs.device))
    made.compute_kv_score = lambda x, batch: x
    return made


def rope_freqs() -> torch.Tensor:
    """complex64 `[TEXT, 32]`."""
    angles = torch.arange(TEXT)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    return torch.polar(torch.ones_like(angles), angles)


class Backend(sgl_backend.DeepseekV4AttnBackend):
    """SGLang's backend over its pool, with what its kernels put into the metadata computed by torch."""

    def __init__(
        self,
        ratios: list[int],
        *,
        drafts: int = 0,
        layout: str = "v4",
        fp4: bool = False,
        dtype: torch.dtype = torch.float32,
        requests: int = REQUESTS,
        device: str = "cpu",
        **more: Any,
    ) -> None:
        pages = requests * TEXT // PAGE + 1  # page 0 is nobody's
        size, self.where = pages * PAGE, device
        self.token_to_kv_pool = sgl_pool.DeepSeekV4TokenToKVPool(
            max_num_reqs=requests,
            swa_size=size,
            c4_size=size // 4,
            c128_size=size // 128,
            c4_state_pool_size=pages * (16 if drafts else 8),
            c128_state_pool_size=0,
            page_size=PAGE,
            swa_page_size=PAGE,
            dtype=torch.float8_e4m3fn,
            c4_state_dtype=dtype,
            c128_state_dtype=dtype,
            qk_nope_head_dim=448,
            qk_rope_head_dim=64,
            indexer_head_dim=128,
            layer_num=len(ratios),
            device=device,
            enable_memory_saver=False,
            compression_ratios=ratios,
            full_size=size,
            kv_layout=layout,
            **more,
        )
        draw = torch.Generator().manual_seed(7)
        order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(pages - 1, generator=draw)])
        self.full_to_swa = (order[:, None] * PAGE + torch.arange(PAGE)).flatten().to(device)
        self.token_to_kv_pool.register_mapping(self.full_to_swa)
        table = ReqToTokenPool(size=requests, max_context_len=TEXT, device=device, enable_memory_saver=False)
        self.req_to_token = table.req_to_token
        self.free_pages = (1 + torch.randperm(pages - 1, generator=draw)).tolist()
        self.speculative_num_draft_tokens, self.mtp_enabled = drafts, drafts > 0
        self.enable_deepseek_v4_fp4_indexer = fp4
        self.MAX_SEQ_LEN_FOR_CAPTURE = TEXT
        self.present_ratios = tuple(sorted(set(ratios)))
        self.low_ratios = tuple(r for r in self.present_ratios if r in (1, 2))
        self.online_c128_mtp = OnlineC128MTPController(self)
        self.cuda_int32_kwargs = {"device": device, "dtype": torch.int32}
        self.is_dspark_draft = False
        self.cp_size = 1

    @property
    def has_c4(self) -> bool:
        return 4 in self.present_ratios

    @property
    def has_c128(self) -> bool:
        return 128 in self.present_ratios

    def allocate(self, request: int, length: int, shared: list[int] = ()) -> None:
        """Pages for positions up to `length`, of which the first are another request's."""
        have = list(shared) + [self.free_pages.pop() for _ in range(-(-length // PAGE) - len(shared))]
        for k, page in enumerate(have):
            at = torch.arange(page * PAGE, (page + 1) * PAGE, device=self.where)
            self.req_to_token[request, k * PAGE : (k + 1) * PAGE] = at

    def pages_of(self, request: int, count: int) -> list[int]:
        return (self.req_to_token[request, : count * PAGE : PAGE] // PAGE).tolist()

    def make_core_attn_metadata(self, *, req_pool_indices_repeated: Any, seq_lens_casual: Any, out_loc: Any, **_: Any) -> Any:
        """SGLang's own metadata, of which only what a compressor reads is filled."""
        seq_lens = seq_lens_casual.to(torch.int32)
        made = sgl_backend.DSV4AttnMetadata(
            page_size=PAGE,
            raw_out_loc=out_loc,
            seq_lens_casual=seq_lens,
            cuda_int32_kwargs=self.cuda_int32_kwargs,
            positions_casual=seq_lens - 1,
            page_table=torch.zeros(len(seq_lens), 1, **self.cuda_int32_kwargs),
            swa_page_indices=torch.zeros(len(seq_lens), 1, **self.cuda_int32_kwargs),
            swa_topk_lengths=torch.zeros(len(seq_lens), **self.cuda_int32_kwargs),
            index_topk=512,
            present_ratios=self.present_ratios,
            low_ratios=self.low_ratios,
        )
        for ratio in self.present_ratios:
            none = 0 if ratio >= 4 else -1
            slots = torch.where(seq_lens[: len(out_loc)] % ratio == 0, out_loc.long() // ratio, none)
            setattr(made, f"c{ratio}_out_loc", slots)
        made.c4_sparse_topk_lengths = made.c4_sparse_page_indices = None
        for name in ("c0", "c4", "c128"):
            setattr(made, f"{name}_flashmla_metadata", None)
        return made

    def init_forward_metadata_indexer(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _columns(self, steps: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        return [torch.tensor(column, device=self.where) for column in zip(*steps, strict=True)]

    def slots_of(self, steps: list[tuple[int, int, int]]) -> torch.Tensor:
        """int64: the slot of each new token; 0 for those of request 0, which is padding."""
        return torch.cat([self.req_to_token[r, s : s + n].long() * (r > 0) for r, s, n in steps])

    def extend(self, steps: list[tuple[int, int, int]], *, graph: int = 0) -> Any:
        """The metadata of a prefill step over (request, start, new tokens), by SGLang's own builder; of a graph of so many."""
        requests, start, new = self._columns(steps)
        seq_lens = start + new
        casual = torch.cat([torch.arange(s, s + n, device=self.where) + 1 for _, s, n in steps])
        padding = max(graph - len(casual), 0)
        padded = torch.nn.functional.pad(casual, (0, padding), value=1)
        repeated = torch.nn.functional.pad(requests.repeat_interleave(new), (0, padding))
        self.expand_prefill_casually = lambda **_: (padded, repeated)  # a Triton kernel
        return self.init_forward_metadata_prefill(
            max_seq_len=TEXT,
            req_pool_indices=requests,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.tolist(),
            out_cache_loc=torch.nn.functional.pad(self.slots_of(steps), (0, padding)),
            num_tokens=int(new.sum()),
            extend_seq_lens=new,
            extend_seq_lens_cpu=new.tolist(),
            use_prefill_cuda_graph=graph > 0,
        )

    def decode(self, steps: list[tuple[int, int, int]]) -> Any:
        requests, start, _ = self._columns(steps)
        raw = sgl_backend.DSV4RawDecodeMetadata(requests, start + 1, self.slots_of(steps))
        return self.make_forward_metadata_from_raw_decode(raw)

    def verify(self, steps: list[tuple[int, int, int]]) -> Any:
        """Each with as many tokens as there are drafts."""
        requests, start, new = self._columns(steps)
        self.online_c128_mtp._verify_ctx = None
        offset = self.online_c128_mtp.state_slot_offset()
        raw = sgl_backend.DSV4RawVerifyMetadata(
            requests,
            start,
            self.slots_of(steps),
            extend_seq_lens=new,
            c128_compress_metadata=self._make_target_verify_c128_metadata(requests, start, start.tolist(), new, True, offset),
        )
        return self.make_forward_metadata_from_raw_verify(raw, online_c128_state_slot_offset=offset)


class Text:
    """What the projection of one compressor gives for each request and position."""

    def __init__(self, compressor: Any, seed: int = 3) -> None:
        draw = torch.Generator().manual_seed(seed + compressor.layer_id)
        self.compressor = compressor
        self.rows = torch.randn(REQUESTS + 1, TEXT, 2 * compressor.head_dim * (1 + compressor.overlap), generator=draw)
        self.rows[0] = torch.nan  # padding
        self.found: dict[tuple[int, int], torch.Tensor] = {}  # by request and window

    def of(self, steps: list[tuple[int, int, int]]) -> torch.Tensor:
        return torch.cat([self.rows[r, s : s + n] for r, s, n in steps])

    def spy(self, steps: list[tuple[int, int, int]]) -> Callable[..., None]:
        """`compress` that also keeps the pooled row of each entry of the step."""
        ratio = self.compressor.ratio

        def run(kv_score: torch.Tensor, plan: Any, *args: Any, **rest: Any) -> None:
            rows = torch.full((plan.entry_capacity, self.compressor.head_dim), torch.nan)
            compress(kv_score, plan, *args, **rest, rows=rows)
            for b, (request, start, new) in enumerate(steps):
                for i in range((start + new) // ratio - start // ratio if request else 0):
                    self.found[request, start // ratio + i] = rows[plan.cu_entries[b] + i]

        return run

    def pooled(self, request: int, window: int) -> torch.Tensor:
        """fp64 `[head_dim]`: the softmax-weighted mean, and nothing clever."""
        c, ratio = self.compressor, self.compressor.ratio
        rows = self.rows[request, max(window - c.overlap, 0) * ratio : (window + 1) * ratio].double()
        value, score = rows.chunk(2, dim=1)
        at = torch.arange(len(rows)) % ratio
        score = score + c.plain_ape[at].double()
        if c.overlap:
            low, high = slice(0, c.head_dim), slice(c.head_dim, None)
            parts = [(value[-ratio:, high], score[-ratio:, high])]
            parts += [(value[:-ratio, low], score[:-ratio, low])] if window else []
            value, score = (torch.cat(x) for x in zip(*parts, strict=True))
        return (value * score.softmax(0)).sum(0)


class World:
    """A model of some layers: its backend, compressors, texts, and the pooled rows that kvfold gave of each entry."""

    def __init__(self, ratios: list[int], **options: Any) -> None:
        self.backend, freqs = Backend(ratios, **options), rope_freqs()
        self.texts: list[Text] = []
        for layer, ratio in enumerate(ratios):
            self.texts.append(Text(make_compressor(layer, ratio, 512, freqs, layer)))
            if ratio == 4:
                self.texts.append(Text(make_compressor(layer, ratio, 128, freqs, 100 + layer)))
        self.batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False, is_target_verify=lambda: False))

    def run(self, metadata: Any, steps: list[tuple[int, int, int]]) -> None:
        """All layers of a step, through SGLang's own `forward_unified`; kvfold's pooled rows go to `Text.found`."""
        self.backend.forward_metadata = metadata
        tokens = len(metadata.core_metadata.raw_out_loc)  # a graph has more than the step
        for text in self.texts:
            x = text.of(steps)
            x = torch.nn.functional.pad(x, (0, 0, 0, tokens - len(x)), value=torch.nan)
            with mock.patch.object(layer_module, "compress", text.spy(steps)):
                self.backend.forward_unified(x, self.batch, text.compressor.layer_id, text.compressor)

    def check(self, ends: dict[int, int], more: float = 0.0) -> None:
        """That every entry of these requests, up to their ends, is the mean in fp64; `more` is allowed of resumed rows."""
        for text in self.texts:
            ratio = text.compressor.ratio
            for request, end in ends.items():
                for window in range(end // ratio):
                    exact, got = text.pooled(request, window), text.found[request, window].double()
                    assert (got - exact).norm() <= (2e-6 + more) * exact.norm(), (ratio, request, window)

    def cache_of(self, text: Text) -> tuple[torch.Tensor, int]:
        """The pages of a compressor's entries, and how many entries a page has."""
        c, pool = text.compressor, self.backend.token_to_kv_pool
        if c.is_in_indexer:
            return pool.get_index_k_with_scale_buffer(c.layer_id), pool.get_index_k_page_size(c.ratio)
        return pool.get_extra_key_buffer(c.layer_id), pool.get_extra_key_page_size(c.layer_id)

    def slots(self, text: Text, request: int, count: int) -> torch.Tensor:
        """Cache slots of a request's first entries."""
        ratio = text.compressor.ratio
        return self.backend.req_to_token[request, ratio - 1 : count * ratio : ratio].long() // ratio
