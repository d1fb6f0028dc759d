"""`compressor_postprocess_scatter`: RMSNorm, RoPE, Hadamard, quantization and store of pooled rows, in one launch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ...arguments.checks import check_device, check_int, check_tensor
from ...contract import UnsupportedError
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.formats import FORMATS, RecordFormat
from ...store import store
from .kept import cache_of, errors, once, place

# By `cache_scale_type`; rows that are kept as they came have the format of their dtype.
FORMATS_BY_TYPE = (None, "fp8_tensor_trtllm", "fp8_block128", "mxfp4", "nvfp4_trtllm")
_PLAIN = {torch.bfloat16: "bf16_trtllm", torch.float32: "fp32"}
_INT32 = (torch.int32,)


class Told(NamedTuple):
    """Where rows go, as the operator is told: its arguments."""

    compressed_mask: torch.Tensor
    position_ids: torch.Tensor
    num_outputs: torch.Tensor
    cu_kv_comp: torch.Tensor
    start_pos: torch.Tensor
    block_offsets: torch.Tensor


def postprocess_scatter(
    kv_comp: torch.Tensor,
    kv_out: torch.Tensor | None,
    rms_weight: torch.Tensor,
    rms_eps: float,
    cos_sin_table: torch.Tensor,
    position_ids: torch.Tensor,
    nope_dim: int,
    rope_dim: int,
    kv_cache: torch.Tensor,
    num_outputs: torch.Tensor,
    cu_kv_comp: torch.Tensor,
    start_pos: torch.Tensor,
    block_offsets: torch.Tensor,
    compressed_mask: torch.Tensor,
    tokens_per_block: int,
    cache_scale_type: int,
    rotate_activation: bool,
    quant_output: torch.Tensor | None = None,
    scale_output: torch.Tensor | None = None,
    kv_cache_scale: torch.Tensor | None = None,
    nvfp4_global_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Stores row `cu_kv_comp[b] + i` of `kv_comp` as entry `start_pos[b] + i` of request b, for i below `num_outputs[b]`.

    Rows whose mask is False are neither read nor written anywhere. A page of -1 drops the record.

    Args:
        kv_comp: bf16 `[n, head_dim]`; fp32 with `cache_scale_type` 0. rms_weight: `[head_dim]`, bf16 or fp32.
        kv_out: mutated if given, like `kv_comp`: the finished rows, before they are quantized.
        cos_sin_table: fp32 `[max_pos, 2, rope_dim / 2]`. position_ids: int32 `[n]`.
        kv_cache: mutated: contiguous blocks of `tokens_per_block` records. block_offsets: int32 `[B, width]`.
        num_outputs, start_pos: int32 `[B]`. cu_kv_comp: int32 `[B + 1]`. compressed_mask: bool `[n]`.
        cache_scale_type: 0 plain, 1 fp8 of scale 1, 2 fp8 with a scale for 128 values, 3 MXFP4, 4 NVFP4.
        quant_output, scale_output: mutated if given, for types 2 and 3: codes and scales of each row, `[n, ...]`, both or none.
        kv_cache_scale, nvfp4_global_scale: for type 4: blocks of scales, mutated, and the factor that goes with them.

    Raises:
        TypeError, ValueError: naming the argument; `UnsupportedError` for what TensorRT-LLM has and kvfold lacks.
    """
    if kv_comp.dim() != 2:
        raise ValueError(f"kv_comp must have shape [n, head_dim], got {list(kv_comp.shape)}")
    count, head_dim = kv_comp.shape
    if count == 0:
        return
    check_int("tokens_per_block", tokens_per_block, 1, 1 << 20)
    fmt = format_of(kv_comp.dtype, cache_scale_type)
    spec = finishing_spec(head_dim, nope_dim, rope_dim, rms_eps, rotate_activation)
    if (kv_cache_scale is None) == (cache_scale_type == 4):
        raise ValueError(f"kv_cache_scale must be given with cache_scale_type 4 alone, which is {cache_scale_type}")
    told = Told(compressed_mask, position_ids, num_outputs, cu_kv_comp, start_pos, block_offsets)
    _check(kv_comp, told)
    check_device("kv_cache", kv_cache, kv_comp.device)
    scale = nvfp4_global_scale if cache_scale_type == 4 else 1.0
    cache = cache_of(kv_cache, fmt, tokens_per_block, spec, kv_cache_scale, scale)
    also = _other(kv_comp, fmt, spec, kv_out, quant_output, scale_output)
    check_tensor("rms_weight", rms_weight, (head_dim,), (torch.bfloat16, torch.float32), kv_comp.device)
    rope = rows_of_table(cos_sin_table, rope_dim, kv_comp.device) if rope_dim else None
    if backend == "torch" or (backend is None and not kv_comp.is_cuda):
        _with_torch(kv_comp, told, cache, also, (rms_weight, rope))
        return
    _with_triton(kv_comp, told, cache, also, (rms_weight, rope))


def format_of(dtype: torch.dtype, cache_scale_type: int) -> RecordFormat:
    check_int("cache_scale_type", cache_scale_type, 0, len(FORMATS_BY_TYPE) - 1)
    if dtype not in _PLAIN or (cache_scale_type and dtype != torch.bfloat16):
        raise TypeError(f"kv_comp must be bfloat16, or float32 with cache_scale_type 0, got {dtype} with {cache_scale_type}")
    return FORMATS[FORMATS_BY_TYPE[cache_scale_type] or _PLAIN[dtype]]


def rows_of_table(table: torch.Tensor, rope_dim: int, device: torch.device) -> torch.Tensor:
    """fp32 `[max_pos, 2, rope_dim / 2]`, or that flat, as `[max_pos, rope_dim]`: the same tensor in every call, as calls whose
    tensors are those of the last one are not checked whole."""

    def make() -> torch.Tensor:
        shape = (None, rope_dim) if table.dim() == 2 else (None, 2, rope_dim // 2)
        check_tensor("cos_sin_table", table, shape, (torch.float32,), device)
        return table.detach().view(-1, rope_dim)

    return once(("rope", place(table), rope_dim, table.is_neg(), table.device == device), make, device)


@lru_cache(maxsize=64)
def finishing_spec(head_dim: int, nope_dim: int, rope_dim: int, eps: float, hadamard: bool) -> CompressorSpec:
    """A spec for rows that are finished one by one: the operator is not told what the ratio was."""
    if nope_dim + rope_dim != head_dim:
        raise ValueError(f"nope_dim and rope_dim must add up to {head_dim}, as wide as kv_comp, got {nope_dim} and {rope_dim}")
    return CompressorSpec(head_dim, 1, has_ape=False, rope_dim=rope_dim, norm_eps=eps, hadamard=hadamard, gate=False)


def _check(kv_comp: torch.Tensor, told: Told) -> None:
    count, batch, device = kv_comp.shape[0], told.num_outputs.shape[0], kv_comp.device
    if kv_comp.stride(1) != 1:
        raise ValueError(f"kv_comp must be contiguous in its last dimension, got strides {kv_comp.stride()}")
    check_tensor("compressed_mask", told.compressed_mask, (None,), (torch.bool,), device)
    for name in ("position_ids", "num_outputs", "cu_kv_comp", "start_pos"):
        check_tensor(name, getattr(told, name), (None,), _INT32, device)
    least = {"compressed_mask": count, "position_ids": count, "cu_kv_comp": batch + 1, "start_pos": batch}
    for name, size in (*least.items(), ("block_offsets", batch)):
        if getattr(told, name).shape[0] < size:
            raise ValueError(f"{name} must have {size} rows or more, got {list(getattr(told, name).shape)}")
    table = told.block_offsets
    if table.dtype != torch.int32 or table.dim() != 2 or table.device != device or table.stride(1) != 1:
        raise ValueError(
            f"block_offsets must be int32 [batch, width] on {device} with rows side by side, got {table.dtype} "
            f"{list(table.shape)} on {table.device}"
        )


@lru_cache(maxsize=8)
def with_scales_apart(fmt: RecordFormat) -> RecordFormat:
    return fmt if fmt.separate else replace(fmt, name=f"{fmt.name}, scales apart", separate=True)


class Other(NamedTuple):
    """A second output: a record for each row, in the row's place. values, scales: bytes `[n, ...]`."""

    fmt: RecordFormat
    values: torch.Tensor
    scales: torch.Tensor | None


def _other(
    kv_comp: torch.Tensor,
    fmt: RecordFormat,
    spec: CompressorSpec,
    kv_out: torch.Tensor | None,
    codes: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> Other | None:
    if (codes is None) != (scales is None):
        raise ValueError("quant_output and scale_output must be given together, got one of them")
    if codes is None:
        if kv_out is None:
            return None
        check_tensor("kv_out", kv_out, tuple(kv_comp.shape), (kv_comp.dtype,), kv_comp.device)
        return Other(FORMATS[_PLAIN[kv_comp.dtype]], kv_out.detach().view(torch.uint8), None)
    if kv_out is not None:
        raise UnsupportedError("kv_out must be None with quant_output: a launch has one output of rows besides the cache")
    if fmt.group < 32:
        raise ValueError(f"quant_output must be None unless cache_scale_type is 2 or 3, whose format {fmt.name!r} is not")
    apart = with_scales_apart(fmt)
    found = []
    for name, x, size in (
        ("quant_output", codes, apart.row_bytes(spec)),
        ("scale_output", scales, apart.tail_bytes(spec)),
    ):
        if not x.is_contiguous() or x.nbytes != kv_comp.shape[0] * size or x.device != kv_comp.device:
            raise ValueError(
                f"{name} must be contiguous, {size} bytes for each of {kv_comp.shape[0]} rows on {kv_comp.device}, got "
                f"{x.dtype} {list(x.shape)} on {x.device}"
            )
        found.append(x.detach().view(-1).view(torch.uint8).view(kv_comp.shape[0], size))
    return Other(apart, *found)


Weights = tuple[torch.Tensor, torch.Tensor | None]


def _with_triton(rows: torch.Tensor, told: Told, cache: EntryCache, also: Other | None, weights: Weights) -> None:
    from ...backend_triton.launcher import launcher_of  # imports triton, which the torch backend does not need
    from . import kernel

    norm_weight, rope = weights
    key = kernel.PostprocessKey(cache.spec, cache.format, None if also is None else also.fmt, rows.dtype, norm_weight.dtype)
    table = told.block_offsets
    where = kernel.Rows(
        told.compressed_mask.view(torch.uint8),
        told.position_ids,
        told.num_outputs,
        told.cu_kv_comp,
        told.start_pos,
        table,
        table.stride(0),
        table.shape[1],
        told.num_outputs.shape[0],
        errors(rows.device),
    )
    outputs = cache, None if also is None else also[1:]
    kernel.launch(launcher_of(key, rows.device), where, rows, norm_weight, rope, *outputs)


def _with_torch(rows: torch.Tensor, told: Told, cache: EntryCache, also: Other | None, weights: Weights) -> None:
    """The same in steps: the place of each row, and `store` without a plan."""
    row, batch = torch.arange(rows.shape[0], device=rows.device), told.num_outputs.shape[0]
    offsets, per_page = told.cu_kv_comp[: batch + 1].long(), cache.rows_per_page
    sequence = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    known = told.compressed_mask[: len(row)] & (sequence < batch)
    sequence = sequence.clamp(max=max(batch - 1, 0))
    index = row - offsets[sequence]  # below 0 of rows before the first request's
    known &= (index >= 0) & (index < told.num_outputs[sequence])
    number = told.start_pos[sequence] + index
    column = number // per_page
    inside = known & (number >= 0) & (column < told.block_offsets.shape[1])
    page = told.block_offsets[sequence, torch.where(inside, column, 0)].long()
    slots = torch.where(inside & (page >= 0), page * per_page + number % per_page, -1)
    counted = errors(rows.device)
    counted.add_(((known & ~inside) | (inside & (page < -1))).sum().int())
    given = {"positions": told.position_ids[: len(row)], "spec": cache.spec, "norm_weight": weights[0], "rope": weights[1]}
    store(rows, cache, slots=slots, **given, errors=counted, backend="torch")
    if also is not None:
        own = EntryCache(also.values, also.fmt, 1, cache.spec, scales=also.scales)
        store(rows, own, slots=torch.where(known, row, -1), **given, backend="torch")
