"""What `project_compress` and `project_compress_many` refuse, by the name of the argument and before anything is written."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from support.project_support import FOLD, NARROW, ROWS, Projected

import kvfold
from kvfold import ScaledWeight
from kvfold.testing.projected import make_hidden, make_scaled_weight

CPU = BACKENDS["torch"]
WIDTH = FOLD.kv_score_width


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one byte behind a multiple of its element size."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    room = torch.zeros(len(raw) + 9, dtype=torch.uint8)
    room[9:] = raw
    return torch.frombuffer(room.numpy(), dtype=tensor.dtype, offset=9).view(tensor.shape)


def wrong(one: Projected) -> dict[str, tuple[type, str, dict]]:
    """Of each case the error, how its message begins, and the arguments that are other than in a good call."""
    hidden, weight = make_hidden(4, 512), one.weight
    long = torch.zeros(WIDTH + 8, 512, dtype=torch.bfloat16)
    shared = torch.zeros(4 * 512 * 2, dtype=torch.uint8)
    odd, narrow = ({"hidden": hidden[:, :n], "weight": weight[:, :n].contiguous()} for n in (500, 192))
    over = {
        "hidden": shared.view(torch.bfloat16).view(4, 512),
        "kv_score": shared.view(torch.float32)[: 4 * WIDTH].view(4, WIDTH),
    }
    of_state = {"kv_score": one.state.rows.view(-1)[: 4 * WIDTH].view(4, WIDTH)}
    of_kv_score = {"kv_score": torch.zeros(4, WIDTH), "rows": "of kv_score"}
    in_bf16 = {"kv_score": torch.empty(4, WIDTH, dtype=torch.bfloat16)}
    codes, scales = fp8 = make_scaled_weight(WIDTH, 512)
    half = make_scaled_weight(WIDTH // 2, 512)
    long_scales = torch.ones(4 * WIDTH)
    over_scales = {"weight": ScaledWeight(codes, long_scales[:4].view(1, 4)), "kv_score": long_scales.view(4, WIDTH)}
    over_codes = {"weight": fp8, "kv_score": codes.view(torch.float32).view(-1)[: 4 * WIDTH].view(4, WIDTH)}
    return {
        "no tensor": (TypeError, "hidden must be", {"hidden": [1]}),
        "fp32": (TypeError, "hidden must be", {"hidden": hidden.float()}),
        "one dimension": (ValueError, "hidden must have shape", {"hidden": hidden[0]}),
        "odd width": (ValueError, "hidden must be a multiple of 64", odd),
        "too narrow": (ValueError, "hidden must be a multiple of 64", narrow),
        "columns apart": (ValueError, "hidden must be contiguous", {"hidden": hidden.repeat(1, 2)[:, ::2]}),
        "another width": (ValueError, "weight must have shape", {"weight": weight[:, :448].contiguous()}),
        "too many rows": (ValueError, "weight must have shape", {"weight": long}),
        "weight in fp32": (TypeError, "weight must be", {"weight": weight.float()}),
        "weight apart": (ValueError, "weight must be contiguous", {"weight": weight.t().contiguous().t()}),
        "three weights": (TypeError, "weight must be", {"weight": (weight, weight, weight)}),
        "halves": (ValueError, r"weight\[1\] must have shape", {"weight": (weight[:32], weight[:16])}),
        "no weight": (TypeError, "weight must be", {"weight": None}),
        "codes without scales": (TypeError, "weight must be torch.bfloat16, or a kvfold.ScaledWeight", {"weight": codes}),
        "a plain tuple": (TypeError, r"weight\[0\] must be torch.bfloat16, or", {"weight": (half.codes, half.scales)}),
        "one of each": (TypeError, "weight must be of one kind", {"weight": (half, weight[: WIDTH // 2])}),
        "no codes": (TypeError, "weight.codes must be a torch.Tensor", {"weight": ScaledWeight(None, scales)}),
        "no scales": (TypeError, "weight.scales must be a torch.Tensor", {"weight": ScaledWeight(codes, 1.0)}),
        "codes in e5m2": (
            TypeError,
            "weight.codes must be torch.float8_e4m3fn",
            {"weight": ScaledWeight(codes.view(torch.float8_e5m2), scales)},
        ),
        "codes as bytes": (TypeError, "weight.codes must be", {"weight": ScaledWeight(codes.view(torch.uint8), scales)}),
        "scales in bf16": (
            TypeError,
            "weight.scales must be torch.float32",
            {"weight": ScaledWeight(codes, scales.bfloat16())},
        ),
        "codes too narrow": (ValueError, "weight.codes must have shape", {"weight": ScaledWeight(codes[:, :448], scales)}),
        "a scale per row": (ValueError, "weight.scales must have shape", {"weight": ScaledWeight(codes, torch.ones(WIDTH, 1))}),
        "one scale": (ValueError, "weight.scales must have shape", {"weight": ScaledWeight(codes, torch.ones(1))}),
        "codes apart": (
            ValueError,
            "weight.codes must be contiguous",
            {"weight": ScaledWeight(codes.t().contiguous().t(), scales)},
        ),
        "scales apart": (
            ValueError,
            "weight.scales must be contiguous",
            {"weight": ScaledWeight(codes, torch.ones(4, 2)[:, :1].t())},
        ),
        "scales of a half": (
            ValueError,
            r"weight\[1\].scales must have shape",
            {"weight": (half, half._replace(scales=torch.ones(1, 3)))},
        ),
        "scales between elements": (
            ValueError,
            r"weight\[1\].scales must begin at a multiple of its element size, 4 bytes",
            {"weight": (half, half._replace(scales=shifted(half.scales)))},
        ),
        "between elements": (ValueError, "weight must begin at a multiple of its element size", {"weight": shifted(weight)}),
        "elsewhere": (ValueError, "weight must be on cpu", {"weight": weight.to("meta")}),
        "scales elsewhere": (ValueError, "weight.scales must be on cpu", {"weight": fp8._replace(scales=scales.to("meta"))}),
        "kv_score over codes": (ValueError, "kv_score must not share memory with weight.codes", over_codes),
        "kv_score over scales": (ValueError, "kv_score must not share memory with weight.scales", over_scales),
        "kv_score too short": (ValueError, "kv_score must have 4 rows", {"kv_score": torch.empty(3, WIDTH)}),
        "kv_score too narrow": (ValueError, "kv_score must have shape", {"kv_score": torch.empty(4, WIDTH - 1)}),
        "kv_score in two": (TypeError, "kv_score must be", {"kv_score": (torch.empty(4, 32), torch.empty(4, 32))}),
        "kv_score in fp16": (TypeError, "kv_score must be", {"kv_score": torch.empty(4, WIDTH, dtype=torch.float16)}),
        "kv_score in bf16": (ValueError, "round_kv_score must be True", in_bf16),
        "rows on each other": (ValueError, "kv_score must have rows apart", {"kv_score": torch.empty(1, WIDTH).expand(4, -1)}),
        "no switch": (TypeError, "round_kv_score must be", {"round_kv_score": 1}),
        "no pdl": (TypeError, "pdl must be", {"pdl": 1}),
        "unknown backend": (ValueError, "backend must be", {"backend": "cuda"}),
        "kv_score over hidden": (
            ValueError,
            "kv_score must not share memory with hidden",
            over,
        ),
        "hidden over state": (
            ValueError,
            "hidden must not share memory with state",
            {"hidden": one.state.rows.view(torch.bfloat16).view(-1)[: 4 * 512].view(4, 512)},
        ),
        "kv_score over state": (ValueError, "kv_score must not share memory with state", of_state),
        "rows over kv_score": (ValueError, "rows must not share memory with kv_score", of_kv_score),
        "spec": (TypeError, "spec must be", {"spec": 4}),
        "state of another": (ValueError, "state must be for", {"spec": ROWS, "weight": Projected(ROWS, CPU).weight}),
    }


@pytest.mark.parametrize("case", wrong(Projected(FOLD, CPU)))
def test_one(case: str) -> None:
    one = Projected(FOLD, CPU)
    kind, message, changed = wrong(one)[case]
    plan = one.plan([(0, 14, 4)])
    if changed.get("rows") == "of kv_score":
        changed["rows"] = changed["kv_score"].view(-1)[:32].view(1, 32)
    given = {"hidden": make_hidden(4, 512), "weight": one.weight, "backend": "torch", **one.given} | changed
    before = [x.clone() for x in (one.state.rows, one.state.positions, one.cache.storage)]
    with pytest.raises(kind, match=f"^{message}"):
        kvfold.project_compress(given.pop("hidden"), given.pop("weight"), plan, one.state, one.cache, **given)
    assert all(torch.equal(x, y) for x, y in zip(before, (one.state.rows, one.state.positions, one.cache.storage), strict=True))


def test_a_state_in_bf16_wants_rounding() -> None:
    one = Projected(ROWS, CPU, kept=torch.bfloat16)
    with pytest.raises(TypeError, match=r"^round_kv_score must be True"):
        one.step(make_hidden(4, 512), [(0, 0, 4)])


def test_kv_scores_over_each_other() -> None:
    """Of two compressors; side by side in one tensor they are apart."""
    both, room = [Projected(ROWS, CPU), Projected(NARROW, CPU)], torch.empty(4, 192)
    plan = both[0].plan([(0, 0, 4)])
    for first in (100, 128):
        kv_scores = room[:, :128], room[:, first : first + 64]
        given = [(kv_score, one.state, one.cache, *one.given.values()) for one, kv_score in zip(both, kv_scores, strict=True)]
        call = [make_hidden(4, 512), [one.weight for one in both], given, plan]
        if first == 128:
            kvfold.project_compress_many(*call, backend="torch")
            continue
        with pytest.raises(ValueError, match=r"^kv_score must not share memory with kv_score"):
            kvfold.project_compress_many(*call, backend="torch")


def test_many() -> None:
    both = [Projected(ROWS, CPU), Projected(NARROW, CPU)]
    given = [(None, one.state, one.cache, *one.given.values()) for one in both]
    weights, hidden, plan = [one.weight for one in both], make_hidden(4, 512), both[0].plan([(0, 0, 4)])
    scaled = [make_scaled_weight(one.spec.kv_score_width, 512) for one in both]
    stacked, turned = (ScaledWeight(*map(torch.cat, zip(*order, strict=True))) for order in (scaled, scaled[::-1]))
    for weight, compressors, kind, message in (
        (weights[:1], given, TypeError, "weight must be"),
        (weights[::-1], given, ValueError, r"weight\[0\] must have shape"),
        (torch.cat(weights)[1:], given, ValueError, "weight must have shape"),
        (weights, given[:1], TypeError, "weight must be a torch.Tensor or a kvfold.ScaledWeight, or a sequence of 1"),
        (scaled[:1], given, TypeError, "weight must be"),
        ([scaled[0], weights[1]], given, TypeError, "weight must be of one kind"),
        (scaled[::-1], given, ValueError, r"weight\[0\].codes must have shape"),
        ([scaled[0], (scaled[1], scaled[1])], given, ValueError, r"weight\[1\]\[0\].codes must have shape"),
        (stacked._replace(scales=stacked.scales[1:]), given, ValueError, "weight.scales must have shape"),
        (turned, given[::-1], ValueError, "weight must have a multiple of 128 rows for each compressor but the last"),
        (weights, [], ValueError, "compressors must hold"),
        (weights, [given[0], given[0]], ValueError, ""),
        (weights, [(torch.empty(3, WIDTH), *given[0][1:]), given[1]], ValueError, r"compressors\[0\]: kv_score must have"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            kvfold.project_compress_many(hidden, weight, compressors, plan, backend="torch")
