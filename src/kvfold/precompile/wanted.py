"""Which kernels `warmup` and `prebuild` make for what calls will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch

from ..arguments.checks import check_int, check_switch, check_type
from ..backend_triton import keys
from ..backend_triton.keys import Key
from ..contract import INT32_MAX, check_hidden_dim
from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from .choices import FLOATS, INDICES, check_all, check_choices, check_formats, defined_for, fits, several

STATES = ("fold", "mean", "window")
WEIGHTS = ("bf16", "fp8")


def keys_of(calls: dict[str, Any]) -> tuple[list[Key], Callable[[Key], bool]]:
    """The keys of all calls that these arguments of `warmup` describe, and whether a key's calls may be dependent launches.

    Raises as `warmup` does.
    """
    specs, names = check_all("specs", calls["specs"], CompressorSpec), check_formats("formats", calls["formats"])

    def choices(name: str, accepted: tuple) -> tuple:
        return check_choices(name, calls[name], accepted)

    dtypes, norms = choices("dtypes", FLOATS), choices("norm_weight_dtypes", (*FLOATS, None))
    state_dtypes, states = choices("state_dtypes", FLOATS), choices("states", STATES)
    rows = choices("rows", (None, *FLOATS))
    snapshots, latents, apart = (choices(name, (False, True)) for name in ("snapshots", "latents", "apart"))
    plans = choices("plans", keys.TABLES)
    rows_of_training = _numbers(calls, "training", 0)
    rounds, outs = choices("round_rows", (None, False, True)), choices("out_dtypes", (None, *FLOATS))
    steps = _numbers(calls, "max_new_tokens", 1)
    pages = None if calls["page_sizes"] is None else _numbers(calls, "page_sizes", 1)
    slots, positions = choices("slot_dtypes", INDICES), choices("position_dtypes", INDICES)
    together = [check_formats(f"also[{i}]", pair) for i, pair in enumerate(several("also", calls["also"]))]
    pairs = [_pair(i, pair) for i, pair in enumerate(several("many", calls["many"]))]
    hidden_dims, rounded = _numbers(calls, "hidden_dims", 1), choices("round_kv_score", (False, True))
    weights = choices("weights", WEIGHTS)
    for width in hidden_dims:
        check_hidden_dim("hidden_dims", width)
    if hidden_dims:  # what projections make
        dtypes = tuple(dict.fromkeys((*dtypes, *(torch.bfloat16 if to_bf16 else torch.float32 for to_bf16 in rounded))))
    pdl, round_inputs = calls["pdl"], calls["round_inputs"]
    check_switch("pdl", pdl)
    check_type("round_inputs", round_inputs, bool)
    chosen = defined_for(specs, names)
    stored = [one for i, pair in enumerate(together) for one in _stored(i, pair, specs)]

    from ..training.keys import Calls, TrainingKey, training_keys

    w = keys.Wanted(
        dtypes, steps, state_dtypes, norms, snapshots, round_inputs, slots, positions, _tables(plans), latents, apart
    )
    paired = [spec for pair in pairs for spec, _ in pair]
    found = [*keys.plan_keys({spec.ratio for spec in (*specs, *paired) if spec.gate}, states, plans)]
    if not all(spec.gate for spec in specs):
        found += keys.plan_keys({1}, STATES, plans)  # with slots or without
    for (spec, fmt), dtype in product(chosen, rows):
        found += _entry_keys(spec, fmt, w, dtype, states, pages)
    for (spec, fmt, second), dtype in product(stored, rows):
        found += keys.store_keys(spec, fmt, w, dtype, second)
    for pair in pairs:
        found += keys.pair_keys(pair, w)
    for width, tensors in _projections(specs, pairs):
        found += keys.project_keys(width, hidden_dims, rounded, tensors, weights)
    if True in snapshots:
        for spec in dict.fromkeys((*(specs if "fold" in states else ()), *paired)):
            found += keys.restore_keys(spec, w) if spec.gate else ()
    normed = tuple(norm for norm in norms if norm is not None)
    train = Calls(rows_of_training, dtypes, normed, apart, latents, rounds, outs)
    found += [key for spec, fmt in chosen for key in training_keys(spec, fmt, train)]

    def dependent(key: Key) -> bool:
        return isinstance(key, TrainingKey) or (pdl is not False and not isinstance(key, (keys.PlanKey, keys.RestoreKey)))

    return found, dependent


def _numbers(calls: dict[str, Any], name: str, least: int) -> tuple:
    found = several(name, calls[name])
    for number in found:
        check_int(name, number, least, INT32_MAX)
    return found


def _entry_keys(
    spec: CompressorSpec, fmt: RecordFormat | None, w: keys.Wanted, rows: torch.dtype | None, states: tuple, pages: tuple | None
) -> Iterator[Key]:
    """Keys of `store` and of `compress` over each kind of state. rows: dtype of pooled rows, if calls ask for them."""
    yield from keys.store_keys(spec, fmt, w, rows)
    if "fold" in states or not spec.gate:
        yield from keys.step_keys(spec, fmt, w, rows)
    if "mean" in states:
        yield from keys.mean_keys(spec, fmt, w, rows)
    if "window" in states and spec.gate:
        yield from keys.window_keys(spec, fmt, w, rows, pages)


def _projections(specs: Sequence[CompressorSpec], pairs: Sequence) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Columns of kv_score of each product, and how many tensors its weights may be in."""
    for spec in specs:
        yield spec.kv_score_width, (1, 2) if spec.gate else (1,)
    for pair in pairs:
        yield sum(spec.kv_score_width for spec, _ in pair), (2, 4)
        for spec, _ in pair:  # where each has a kv_score of its own
            yield spec.kv_score_width, (1, 2)


def _tables(plans: tuple[str, ...]) -> tuple[str, ...]:
    """How kernels of a `WindowState` read its tables: what is of an engine elsewhere may be plain here."""
    return tuple(dict.fromkeys((*plans, *["plain"] * ("engine" in plans))))


def _stored(
    i: int, pair: tuple[RecordFormat | None, ...], specs: tuple[CompressorSpec, ...]
) -> list[tuple[CompressorSpec, RecordFormat, RecordFormat]]:
    """One of `also`, with each of the specs that both are defined for."""
    if len(pair) != 2 or None in pair:
        raise ValueError(f"also[{i}] must be the names of two formats, got {[fmt and fmt.name for fmt in pair]}")
    first, second = pair
    found = [(spec, first, second) for spec in specs if fits(spec, first) and fits(spec, second)]
    if not found:
        raise ValueError(f"also[{i}] must be defined for one of the specs at least, got {first.name!r} and {second.name!r}")
    return found


def _pair(i: int, pair: object) -> tuple[tuple[CompressorSpec, RecordFormat | None], ...]:
    """One of `many`, with its formats looked up."""
    name = f"many[{i}]"
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(one, tuple) and len(one) == 2 for one in pair):
        raise TypeError(f"{name} must be a pair of (spec, format) tuples, got {pair!r}")
    found = []
    for spec, fmt in pair:
        check_type(name, spec, CompressorSpec)
        (known,) = check_formats(name, (fmt,))
        if known is not None:
            try:
                known.check(spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        found.append((spec, known))
    if found[0][0].ratio != found[1][0].ratio:
        raise ValueError(f"{name} must have one ratio, got {found[0][0].ratio} and {found[1][0].ratio}")
    return tuple(found)
