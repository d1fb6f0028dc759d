"""The public calls: `compress`, with a gradient, and its forward and backward for code with its own autograd."""

from __future__ import annotations

import torch

from ..arguments.checks import traced
from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from . import ops
from .checks import check_call, check_gradients
from .function import Compress
from .packing import Packing
from .problem import Entries, Gradients
from .run import backward, forward

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def compress(
    kv_score: Tokens,
    packing: Packing,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    round_rows: bool | None = None,
    out_dtype: torch.dtype | None = None,
    fake_quant: str | RecordFormat | None = None,
    cache_scale: torch.Tensor | None = None,
    latent: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The entries of packed sequences, each from its first token on, with gradients for kv_score, ape and norm_weight.

    Before they are rounded to `out_dtype`, entries have the bits that `kvfold.compress` on the same backend makes from the
    same tokens, however it is called. Gradients are deterministic: the same bits in every run. The gradient of kv_score does
    not depend on what else is packed. Nothing is mutated.

    Args:
        kv_score: bf16 or fp32 (with the torch backend fp64 too) `[T, 2 * channels]`, rows `[K | S]`; or two tensors `(K, S)` of
            one dtype, `[T, channels]` each; without a gate `[T, channels]`, rows `K`. The last dimension is contiguous, the row
            stride free. The gradient has the same dtype, and is one tensor or two likewise.
        packing: which rows belong to which sequence, for T tokens and `spec.ratio`.
        spec: the compressor.
        ape: fp32 (fp64 where kv_score is) `[ratio, channels]`; None if and only if `spec.has_ape` is false.
        norm_weight: fp32 or bf16 (fp64 where kv_score is) `[head_dim]`.
        rope: fp32 `[max_pos, rope_dim]`, cosines then sines, with a row for the first token of every window that a sequence may
            have. It gets no gradient. Not read with `rope_dim` 0.
        round_rows: whether pooled rows are rounded to bf16 before the norm, as trainers do. Default: if kv_score is bf16; with
            `fake_quant`, as the format says. With fp32 and no `fake_quant` nothing is rounded.
        out_dtype: bf16 or fp32, the dtype of entries and latents. Default: that of kv_score.
        fake_quant: a record format, or its name: entries become what an attention kernel reads from their records.
        cache_scale: fp32 `[1]`, the scale of the cache that `fake_quant` imitates, if the format takes one; None for 1. It gets
            no gradient.
        latent: whether to return latents too.
        backend: as for `kvfold.compress`.

    Returns:
        Entries `[T // ratio, head_dim]`, in the order of `packing.cu_entries`; rows after the last one are zeros. With `latent`
        also the same rows after RMSNorm and before RoPE. To autograd both depend on all inputs, even if they are empty.
        Roundings and quantization pass gradients through unchanged (straight-through).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if traced(kv_score[0] if isinstance(kv_score, tuple) and kv_score else kv_score):
        entries, normed = ops.compress(
            kv_score, packing, spec, (ape, norm_weight, rope), round_rows, out_dtype, fake_quant, cache_scale, latent, backend
        )
    else:
        x, how = check_call(
            kv_score,
            packing,
            spec=spec,
            ape=ape,
            norm_weight=norm_weight,
            rope=rope,
            round_rows=round_rows,
            out_dtype=out_dtype,
            fake_quant=fake_quant,
            cache_scale=cache_scale,
            latent=latent,
            backend=backend,
        )
        return Compress.apply(x.value, x.score, x.ape, x.norm_weight, x, how)
    return (entries, normed) if latent else entries


def compress_forward(
    kv_score: Tokens,
    packing: Packing,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    round_rows: bool | None = None,
    out_dtype: torch.dtype | None = None,
    fake_quant: str | RecordFormat | None = None,
    cache_scale: torch.Tensor | None = None,
    latent: bool = False,
    backend: str | None = None,
) -> Entries:
    """`compress` without autograd: its results, and what `compress_backward` needs besides the inputs.

    Arguments and errors: as for `compress`.
    """
    x, how = check_call(
        kv_score,
        packing,
        spec=spec,
        ape=ape,
        norm_weight=norm_weight,
        rope=rope,
        round_rows=round_rows,
        out_dtype=out_dtype,
        fake_quant=fake_quant,
        cache_scale=cache_scale,
        latent=latent,
        backend=backend,
    )
    return forward(x, how)


def compress_backward(
    d_entries: torch.Tensor,
    kv_score: Tokens,
    packing: Packing,
    kept: torch.Tensor,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    d_latent: torch.Tensor | None = None,
    round_rows: bool | None = None,
    out_dtype: torch.dtype | None = None,
    fake_quant: str | RecordFormat | None = None,
    backend: str | None = None,
) -> Gradients:
    """The gradients of a `compress_forward` with these arguments.

    Args:
        d_entries: `[T // ratio, head_dim]` in `out_dtype`, the gradient of the entries; rows without an entry are not read.
        kept: `Entries.kept` of the forward.
        d_latent: the same for latents, if the forward returned any.
        kv_score, packing, spec, ape, norm_weight, rope, round_rows, out_dtype, fake_quant, backend: as the forward had them.

    Returns:
        Gradients of kv_score, one tensor or two, in its dtype; of ape and norm_weight in fp32. They are new tensors; rows that
        belong to no window are zeros.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x, how = check_call(
        kv_score,
        packing,
        spec=spec,
        ape=ape,
        norm_weight=norm_weight,
        rope=rope,
        round_rows=round_rows,
        out_dtype=out_dtype,
        fake_quant=fake_quant,
        cache_scale=None,
        latent=d_latent is not None,
        backend=backend,
    )
    return backward(x, how, kept, *check_gradients(x, how, kept, d_entries, d_latent))
