"""SGLang's V4.1 compressors, of ratios 1 and 2, as calls of kvfold: the entry, its latent, and the index key made of that."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn

from ...compress import compress
from ...contract import UnsupportedError
from ...plan import StepPlan
from ...spec import V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState
from ...storage.window_state import WindowState
from ...store import store
from .layer import rope_of
from .records import index_format, main_format
from .source import ERRORS, POOLS, source_of
from .tables import request_rings

_LAYERS: weakref.WeakKeyDictionary[nn.Module, _LowLayer] = weakref.WeakKeyDictionary()
_PLAN = "_kvfold_plans"  # on SGLang's metadata of a step: its plans by ratio


@dataclass
class _LowLayer:
    spec: CompressorSpec
    rope: torch.Tensor
    cache: EntryCache
    state: FoldState | WindowState | None
    key_spec: CompressorSpec | None
    key_cache: EntryCache | None
    made_of: tuple[int, ...]


def compress_low_ratio(backend: Any, layer: Any, x: torch.Tensor, req: Any, pos: Any, forward_batch: Any) -> None:
    """What `DeepseekV4AttnBackend._low_ratio_compress` is replaced by: two launches, and SGLang's own product for the key.

    Raises:
        UnsupportedError: for steps of a late-layer tail, and for verify steps of ragged lengths.
    """
    mine = _layer_of(backend.token_to_kv_pool, layer)
    plan = _plan_of(backend, layer, x, forward_batch)
    kv, score = layer.compressor.project(x)
    latent = torch.empty(plan.entry_capacity, kv.shape[1], dtype=torch.bfloat16, device=x.device)
    compress(
        kv if score is None else (kv, score),
        plan,
        mine.state,
        mine.cache,
        spec=mine.spec,
        ape=None,
        norm_weight=layer.compressor.norm.weight.data,
        rope=mine.rope,
        latent=latent,
        pdl=False,  # SGLang has a stream of its own for these layers
    )
    if mine.key_cache is not None:
        key = layer.indexer.forward_wk(latent)
        weight = layer.indexer.k_norm.weight.data
        store(key, plan, mine.key_cache, spec=mine.key_spec, norm_weight=weight, rope=mine.rope)


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of SGLang's own kernels of these ratios, which do not know the state of `state="fold"`."""
    raise UnsupportedError('state must be "pools" for V4.1 in graphs of prefill and in context parallel, got "fold"')


def _layer_of(pool: Any, layer: Any) -> _LowLayer:
    layer_id, ratio = layer.layer_id, layer.compress_ratio
    pages = pool.get_extra_key_buffer(layer_id)
    owns_key = layer.indexer is not None and layer.indexer.owns_k
    keys = pool.get_index_k_with_scale_buffer(layer_id) if owns_key else None
    buffer = pool.get_attention_compress_states(layer_id).kv_score_buffer.kv_score if ratio == 2 else None
    made_of = tuple(0 if t is None else t.data_ptr() for t in (pages, keys, buffer, layer.freqs_cis))
    norm = layer.compressor.norm
    known = _LAYERS.get(norm)
    if known is not None and known.made_of == made_of:
        return known
    spec = replace(V41_MAIN_R2 if ratio == 2 else V41_MAIN_R1, norm_eps=norm.eps)
    layout = "uniform_fp8" if pool.uniform_fp8 else pool.get_extra_key_layout(layer_id).value
    cache = EntryCache(
        pages.view(torch.uint8).flatten(1), main_format(layout, ratio), pool.get_extra_key_page_size(layer_id), spec
    )
    key_spec, key_cache = None, None
    if owns_key:
        key_spec = replace(V41_INDEX_K, ratio=ratio, gate=ratio > 1, norm_eps=layer.indexer.k_norm.eps)
        key_cache = EntryCache(keys, index_format(True, ratio), pool.get_index_k_page_size(ratio), key_spec)
    _LAYERS[norm] = _LowLayer(spec, rope_of(layer.freqs_cis), cache, _state(pool, spec, buffer), key_spec, key_cache, made_of)
    return _LAYERS[norm]


def _state(pool: Any, spec: CompressorSpec, buffer: torch.Tensor | None) -> FoldState | WindowState | None:
    if buffer is None:
        return None
    source = source_of(pool, 2)
    if source.kind == "fold":
        return POOLS[buffer.data_ptr()].views(spec)[0]
    half, rings = buffer.shape[1] // 2, buffer.shape[0] // source.ring
    rows = buffer[: rings * source.ring].view(rings, source.ring, 2 * half)
    return WindowState(rows[..., :half], rows[..., half:])


def _plan_of(backend: Any, layer: Any, x: torch.Tensor, batch: Any) -> StepPlan:
    """The step's plan, made by its first layer of the ratio: SGLang says the requests of V4.1 to layers alone."""
    metadata, ratio, pool = backend.forward_metadata, layer.compress_ratio, backend.token_to_kv_pool
    plans = metadata.__dict__.setdefault(_PLAN, {})
    if ratio in plans and layer.layer_id != min(pool.sources_by_ratio[ratio]):
        return plans[ratio]
    if metadata.late_layer_tail is not None:
        raise UnsupportedError("encoder SWA replay must be off: kvfold does not serve its steps of a late-layer tail")
    slots, seq_lens, cu_seqlens, most = _lengths(batch, x)
    places: dict[str, Any] = {}
    if ratio == 2:
        source = source_of(pool, 2)
        if source.kind == "fold":
            places = {"state_slots": slots, "null_slot": 0}
        else:
            table = request_rings(slots, 1)
            places = {"block_tables": (table, table), "page_size": source.ring, "ring": True}
    plans[ratio] = StepPlan.build(
        ratio,
        None,
        cu_seqlens,
        most,
        seq_lens=seq_lens,
        max_tokens=x.shape[0],
        token_slots=getattr(metadata.core_metadata, f"c{ratio}_out_loc"),
        no_slot=0,
        errors=ERRORS[x.device],
        **places,
    )
    return plans[ratio]


def _lengths(batch: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Request slots int64 `[B]`, lengths after the step, int32 offsets of its tokens, and the most tokens of a request."""
    slots, seq_lens, mode = batch.req_pool_indices.long(), batch.seq_lens.long(), batch.forward_mode
    if mode.is_decode() or mode.is_target_verify():
        new = 1 if mode.is_decode() else int(batch.spec_info.draft_token_num)
        if x.shape[0] != new * len(slots):
            raise UnsupportedError(f"a verify step must have {new} tokens of each request, got {x.shape[0]} of {len(slots)}")
        ends = torch.arange(len(slots) + 1, dtype=torch.int32, device=x.device) * new
        return slots, seq_lens if mode.is_decode() else seq_lens + new, ends, new
    count = len(slots) if batch.extend_start_loc is None else batch.extend_start_loc.shape[0]
    ends = torch.zeros(count + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(batch.extend_seq_lens[:count], 0, dtype=torch.int32, out=ends[1:])
    longest = x.shape[0] if batch.extend_seq_lens_cpu is None else max(batch.extend_seq_lens_cpu[:count], default=1)
    return slots[:count], seq_lens[:count], ends, max(int(longest), 1)
