"""What was written behind the pooling, against the pooled rows that it was made of: records, latents, values read back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..backend_torch.finish import finish, norm
from ..backend_torch.items import Items
from ..plan import StepPlan
from ..storage.cache import EntryCache
from ..storage.pack import unpack_records
from ..storage.step import Compressor
from .compare import Difference, bytes_of, explained, first_channels, put_bytes, size_of, within_bf16

EPILOGUE = 5e-7  # of an entry, of its norm: what the order of fp32 operations behind the pooling can change
LEAST = 2.0**-149  # of fp32
Owner = Callable[[int], tuple[int, int, str]]  # of a record: its sequence and window, -1 for none, and words for its place


def slots_of(plan: StepPlan, cache: EntryCache, items: Items) -> Tensor:
    """The cache slot of each item, -1 for none that can be."""
    slot = plan.entry_slots[items.entry]
    return torch.where((slot >= 0) & (slot < cache.num_slots), slot, -1)


def record_differences(
    c: Compressor, got: EntryCache, want: EntryCache, rows: Tensor, slots: Tensor, positions: Tensor, owner: Owner
) -> list[Difference]:
    """Records that these pooled rows do not explain, and bytes of pages that are in no record of the call.

    rows: fp32 `[n, head_dim]`, of the records at `slots`, which are turned by `positions`.
    """
    found, have, due = [], bytes_of(got, slots), bytes_of(want, slots)
    other = (have != due).any(1).nonzero()[:, 0]
    size = got.format.record_bytes(c.spec) - got.format.tail_bytes(c.spec)
    if other.numel():
        y = finish(rows[other], c.spec, c.norm_weight, c.rope, positions[other], got.format)
        fine = explained(got, have[other], y, EPILOGUE * size_of(y))
        for i, channel in first_channels(~fine):
            byte = int((have[other[i]] != due[other[i]]).nonzero()[0])
            sequence, window, place = owner(int(other[i]))
            where = f"{place}, {f'record byte {byte}' if byte < size else f'tail byte {byte - size}'}"
            values = (f"{int(x[other[i], byte]):#04x}" for x in (have, due))
            found.append(Difference(sequence, window, "record bytes", channel, *values, "torch", where))
    put_bytes(want, slots, have)
    for name, a, b in (("page", got.pages, want.pages), ("scale page", got.scale_pages, want.scale_pages)):
        for page, byte in [] if a is None else first_channels(a != b):
            values, where = (int(x[page, byte]) for x in (a, b)), f"{name} {page}, byte {byte}, outside of the step's records"
            found.append(Difference(-1, -1, "record bytes", None, *values, "torch", where))
    return found


def entry_differences(
    c: Compressor, got: EntryCache, want: EntryCache, rows: Tensor, made: Items, plan: StepPlan
) -> list[Difference]:
    """`record_differences` of the entries of work items. rows: by entry."""
    slots = slots_of(plan, got, made)

    def owner(i: int) -> tuple[int, int, str]:
        return int(made.sequence[i]), int(made.window[i]), f"slot {int(slots[i])}"

    return record_differences(c, got, want, rows[made.entry], slots, made.window * c.spec.ratio, owner)


def latent_differences(c: Compressor, got: Tensor, rows: Tensor, made: Items) -> list[Difference]:
    """Latents that the pooled rows of this call do not explain."""
    pooled, have = rows[made.entry], got[made.entry]
    fine, y = latents_explained(c, have, pooled)
    found = []
    for i, channel in first_channels(~fine):
        place, values = (int(made.sequence[i]), int(made.window[i])), (float(have[i, channel]), float(y[i, channel]))
        found.append(Difference(*place, "latent", channel, *values, "torch"))
    return found


def latents_explained(c: Compressor, latents: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """bool like `latents` `[n, head_dim]`, whether they are what becomes of these pooled rows; and what does, in fp32."""
    y = norm(pooled, c.spec, c.norm_weight, None if c.cache is None else c.cache.format)
    return within_bf16(latents, y, EPILOGUE * size_of(y)) | (latents.isnan() & y.isnan()), y


def value_differences(
    c: Compressor, cache: EntryCache, exact: Tensor, bound: Tensor, made: Items, plan: StepPlan
) -> list[Difference]:
    """Entries that read back as something which the fp64 entry, within the bound of its pooled row, does not round to."""
    spec, slots, found = c.spec, slots_of(plan, cache, made), []
    y = reference.rms_norm(exact, c.norm_weight.double(), spec.norm_eps)
    over = exact.square().sum(dim=1, keepdim=True) > torch.finfo(torch.float32).max  # the norm's sum is infinite in fp32
    y = torch.where(over & exact.isfinite(), 0.0, y)
    if spec.rope_dim:
        y = reference.rope(y, c.rope, made.window * spec.ratio, spec.rope_dim)
    y = reference.hadamard(y) if spec.hadamard else y
    heaviest = c.norm_weight.double().abs().nan_to_num(nan=0.0, posinf=0.0).max()
    pooled = 2 * bound * spec.head_dim**0.5 * heaviest
    slack = pooled + EPILOGUE * size_of(y)
    # Rounded to bf16 before the norm, or behind it.
    slack = slack + 2.0**-8 * size_of(y) * (cache.format.round_rows + cache.format.round_normed)
    # Under an infinite sum finite channels are zeros, of either sign where the pooled one is near zero.
    slack = torch.where(over, LEAST, slack)
    fine = explained(cache, bytes_of(cache, slots), y.float(), slack.float())
    for i, channel in first_channels(~fine):
        value = float(unpack_records(cache, slots[i : i + 1])[0, channel])
        place = int(made.sequence[i]), int(made.window[i])
        found.append(Difference(*place, "read-back value", channel, value, float(y[i, channel]), "fp64"))
    return found
