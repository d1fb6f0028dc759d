"""Weights in FP8: each result has the bits of the call with the weight in bf16 that codes and scales stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend
from support.project_support import FOLD, NARROW, ONE, ROWS, Projected, moved
from torch import Tensor

import kvfold
from kvfold import ScaledWeight, reference
from kvfold.backend_triton import launch_product, table
from kvfold.backend_triton.keys import AddKey, DequantizeKey, ProjectKey
from kvfold.contract import projected_worst
from kvfold.storage.step import Projection
from kvfold.testing import Engine, ProjectedEngine, drafts, make_weights
from kvfold.testing.projected import make_hidden, make_scaled_weight
from kvfold.verify.project import check_cut, kv_score_of

WIDE = replace(FOLD, head_dim=128)  # 256 rows: two blocks, and all codes
SPECS = {"fold": FOLD, "rows": ROWS, "ungated": ONE, "wide": WIDE}
CUTS = ([24], [1] * 24, [4] * 6, [3, 8, 1, 12])
SCALES = (1.0, 0.7, -1.5, 0.0, -0.0, 3e38, 2.0**-126, 1e-41, 1.4e-45, torch.inf, -torch.inf, torch.nan)
SCALES += (1 + 2**-8, 1 + 3 * 2**-8)  # of which products lie in the middle of two numbers in bf16


def numbers(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales stand for, code by code: by the definition of e4m3."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        values.append(torch.nan if code & 0x7F == 0x7F else -value if code & 0x80 else value)
    of = torch.tensor(values)[codes.view(torch.uint8).long()]
    rows, columns = (torch.arange(n) // 128 for n in codes.shape)
    return (of * scales[rows[:, None], columns[None, :]]).bfloat16()


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits, but for what a NaN is."""
    bits = torch.int16 if one.dtype is torch.bfloat16 else torch.int32
    return bool(((one.view(bits) == other.view(bits)) | (one.isnan() & other.isnan())).all())


def odd(codes: Tensor) -> Tensor:
    """A copy that begins at an odd address."""
    room = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=codes.device)[1:]
    room.copy_(codes.view(torch.uint8).flatten())
    return room.view(codes.shape).view(codes.dtype)


def kv_score(one: Projected, hidden: Tensor, weight: object) -> Tensor:
    found = torch.empty(len(hidden), one.spec.kv_score_width, device=one.backend.device)
    one.step(hidden, [(0, 0, len(hidden))], weight, kv_score=found)
    return found


@pytest.mark.parametrize("shape", [(256, 448), (100, 320), (129, 960)])
def test_what_codes_and_scales_stand_for(shape: tuple[int, int], backend: Backend) -> None:
    """All codes by all kinds of scales; by the launch that makes bf16 of them, too, of one tensor, two and three."""
    rows, width = shape
    draw = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).view(torch.float8_e4m3fn)
    blocks = -(-rows // 128), -(-width // 128)
    for i in range(len(SCALES)) if not backend.slow else (0, 5):
        scales = torch.tensor(SCALES * 2).roll(i)[: blocks[0] * blocks[1]].reshape(blocks).contiguous()
        right, weight = numbers(codes, scales), moved(ScaledWeight(codes, scales), backend.device)
        assert same(weight.dequantized().cpu(), right)
        if backend.name == "triton":
            assert same(launch_product.dequantize((weight,), False).cpu(), right)
            for tensors in (2, 3):
                assert same(launch_product.dequantize((weight,) * tensors, False).cpu(), torch.cat([right] * tensors))


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("path", ["tile", "launch"])
def test_special_numbers(path: str, scale: float, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code in a column of the weight, by a hidden state that is one there: in each product, and so in what is folded."""
    if path == "launch":
        monkeypatch.setattr(table, "SCALED", ())
    one, width = Projected(WIDE, backend, 320), 320
    codes, scales = torch.zeros(256, width, dtype=torch.uint8), torch.full((2, 3), 1.0)
    codes[:, 130], codes[:, 7] = torch.arange(256), torch.arange(256).flip(0)
    scales[:, 1] = scale
    weight = moved(ScaledWeight(codes.view(torch.float8_e4m3fn), scales), backend.device)
    hidden = torch.zeros(3, width, dtype=torch.bfloat16)
    hidden[0, 130] = hidden[1, 7] = 1
    assert same(kv_score(one, hidden, weight), kv_score(one, hidden, weight.dequantized()))


@pytest.mark.parametrize("width", [320, 832, 960])
def test_nothing_is_multiplied_by_an_infinite_scale(width: int, backend: Backend) -> None:
    """Behind the end of a hidden state there is no weight, whatever the scale of the last block."""
    if backend.slow and width == 832:
        pytest.skip("as 960")
    one = Projected(FOLD, backend, width)
    weight = ScaledWeight(torch.ones(64, width).to(torch.float8_e4m3fn), torch.ones(1, -(-width // 128)))
    weight.scales[:, -1] = torch.inf
    hidden = torch.ones(2, width, dtype=torch.bfloat16)
    assert (kv_score(one, hidden, moved(weight, backend.device)) == torch.inf).all()


@pytest.mark.parametrize("name", SPECS)
def test_every_cut(name: str, backend: Backend) -> None:
    """Prefill, chunks and decode: the entries of the weight in bf16."""
    spec, hidden = SPECS[name], make_hidden(24, 512)
    weight = make_scaled_weight(spec.kv_score_width, 512, device=backend.device)
    right = Projected(spec, backend).run(hidden, [24], weight=weight.dequantized())
    assert right.any()
    for cuts in CUTS[: 2 if backend.slow else None]:
        assert torch.equal(Projected(spec, backend).run(hidden, cuts, weight=weight), right)


@pytest.mark.parametrize("row", range(len(table.SCALED) + 1))
def test_every_row_of_the_table(row: int, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for a few tokens; hidden_dims with a short last chunk, with empty chunks, and that end inside of a block. And none,
    so that a launch makes the weight bf16."""
    if backend.name == "torch":
        pytest.skip("it has no table")
    rows = [replace(one, max_tokens=table.ANY, max_columns=table.ANY) for one in table.SCALED]
    for width in (320, 448) if backend.slow else (320, 448, 832, 960, 4096):
        hidden = make_hidden(5, width)
        hidden[2] = 0
        one, weight = Projected(WIDE, backend, width), make_scaled_weight(256, width, device=backend.device)
        right = kv_score(one, hidden, weight.dequantized())
        with monkeypatch.context() as patch:
            patch.setattr(table, "SCALED", tuple(rows[row : row + 1]))
            assert same(kv_score(one, hidden, weight), right)


@pytest.mark.parametrize(
    ("count", "launches"),
    [(64, "product add"), (65, "dequantize product add"), (512, "dequantize product add"), (513, "dequantize product")],
)
def test_launches(count: int, launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/projection.md has them, before `compress`."""
    found: list[str] = []
    names = {ProjectKey: "product", AddKey: "add", DequantizeKey: "dequantize"}
    monkeypatch.setattr(launch_product, "launcher_of", lambda key, device: found.append(names[type(key)]) or (lambda *_: None))
    p = Projection(make_hidden(count, 512), ((make_scaled_weight(1024, 512),),), False)
    launch_product.product_triton(p, [torch.empty(count, 1024)], False)
    assert " ".join(found) == launches


def test_every_number_of_tokens(backend: Backend) -> None:
    """On both sides of where the weight is made bf16 before."""
    counts = (1, 17, 64, 65) if backend.slow or backend.name == "torch" else (1, 16, 17, 64, 65, 513, 2049)
    one = Projected(replace(FOLD, ratio=4096), backend)
    one.state = kvfold.FoldState.allocate(one.spec, 2, counts[-1], device=backend.device)
    hidden, weight = make_hidden(counts[-1], 512), make_scaled_weight(64, 512, device=backend.device)
    right = kv_score(one, hidden, weight.dequantized())
    for count in counts:
        assert same(kv_score(one, hidden[-count:], weight), right[-count:])


@pytest.mark.parametrize("form", ["two", "far", "odd", "same"])
@pytest.mark.parametrize("path", ["tile", "launch"])
@pytest.mark.parametrize("name", ["fold", "wide"])
def test_two_tensors(name: str, path: str, form: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and scores; blocks of both begin at their own first rows. Codes of one at an odd address; one tensor as both."""
    if path == "launch":
        monkeypatch.setattr(table, "SCALED", ())
    spec = SPECS[name]
    one, half, hidden = Projected(spec, backend, 448), spec.channels, make_hidden(9, 448)
    if form == "two" and half % 128 == 0:
        weights = make_scaled_weight(2 * half, 448, device=backend.device).split([half, half])
    else:
        weights = tuple(make_scaled_weight(half, 448, seed, device=backend.device) for seed in (1, 2))
    if form == "odd":
        weights = weights[0], weights[1]._replace(codes=odd(weights[1].codes))
    if form == "same":
        weights = weights[:1] * 2
    for given in (weights, weights[::-1]):
        found = kv_score(one, hidden, given)
        assert same(found, kv_score(one, hidden, tuple(weight.dequantized() for weight in given)))


@pytest.mark.parametrize("form", ["stacked", "list", "tuples", "asked"])
@pytest.mark.parametrize("path", ["tile", "launch"])
def test_two_compressors(path: str, form: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Main and indexer at once, as in bf16: the second's rows are half a block."""
    if path == "launch":
        monkeypatch.setattr(table, "SCALED", ())
    both, hidden = [Projected(spec, backend, 320) for spec in (ROWS, NARROW)], make_hidden(10, 320).to(backend.device)
    weights: object = [make_scaled_weight(one.spec.kv_score_width, 320, i, device=backend.device) for i, one in enumerate(both)]
    in_bf16: object = [weight.dequantized() for weight in weights]
    right = [one.run(hidden, [10], weight=weight) for one, weight in zip(both, in_bf16, strict=True)]
    if form == "stacked":
        weights = ScaledWeight(*(torch.cat(parts) for parts in zip(*weights, strict=True)))
    elif form == "tuples":
        weights = [tuple(make_scaled_weight(one.spec.channels, 320, i, device=backend.device) for i in (3, 4)) for one in both]
        stood = [torch.cat([half.dequantized() for half in pair]) for pair in weights]
        right = [one.run(hidden, [10], weight=weight) for one, weight in zip(both, stood, strict=True)]
    for one in both:
        one.cache.storage.zero_()
    made = []
    for one in both:
        asked = torch.empty(10, one.spec.kv_score_width, device=backend.device) if form == "asked" else None
        made.append((asked, one.state, one.cache, *one.given.values()))
    plan = both[0].plan([(0, 0, 10)])
    kvfold.project_compress_many(hidden, weights, made, plan, backend=backend.name)
    assert int(plan.errors) == 0
    assert all(torch.equal(one.records(0), records) and records.any() for one, records in zip(both, right, strict=True))


@pytest.mark.parametrize("name", ["fold", "rows"])
def test_an_engine(name: str, backend: Backend) -> None:
    """Decoding with rejected drafts, from hidden states on: to the bit what one `compress` of the kv_score in bf16 gives."""
    spec, device, lengths = SPECS[name], backend.device, (37, 19)
    weights = make_weights(spec, max(lengths), "normal", torch.Generator().manual_seed(1), torch.float32, device)
    hidden = make_hidden(sum(lengths), 320, device=device).split(lengths)
    weight = make_scaled_weight(spec.kv_score_width, 320, device=device)
    inputs = [kv_score_of(text, weight.dequantized(), weights, backend.name) for text in hidden], weights
    cut = ProjectedEngine.make(*inputs, fmt="fp32", backend=backend.name).begin(hidden, weight)
    check_cut(cut, Engine.make(*inputs, fmt="fp32", backend=backend.name), drafts(lengths, 4, 9))


@pytest.mark.parametrize("width", [256, 448, 4096])
def test_accuracy(width: int, backend: Backend) -> None:
    """Within the bound of docs/numerics.md of what fp64 makes of the numbers that codes and scales stand for."""
    weight, hidden = make_scaled_weight(256, width), make_hidden(3, width)
    found = kv_score(Projected(WIDE, backend, width), hidden, moved(weight, backend.device)).cpu().double()
    stood = numbers(*weight)
    most = hidden.double().abs() @ stood.double().abs().T
    assert ((found - reference.projected(hidden, stood)).abs() <= projected_worst(width) * most).all()
    assert most.min() > 0


def test_input_rows_in_bf16(backend: Backend) -> None:
    hidden, weight = make_hidden(20, 512), make_scaled_weight(128, 512, device=backend.device)
    right = Projected(ROWS, backend).run(hidden, [20], weight=weight.dequantized(), round_kv_score=True)
    kept = Projected(ROWS, backend, kept=torch.bfloat16)
    assert torch.equal(kept.run(hidden, [4] * 5, weight=weight, round_kv_score=True), right)


@pytest.mark.parametrize("rows", [[64, 256], [128, 64], [128, 256]])
def test_a_weight_is_split_where_blocks_begin(rows: list[int]) -> None:
    """And nowhere else, where its numbers would get scales of other blocks."""
    weight = make_scaled_weight(320, 256)
    for all_rows in ([256, 64], [128, 192], [320]):
        assert torch.equal(torch.cat([part.dequantized() for part in weight.split(all_rows)]), weight.dequantized())
    with pytest.raises(ValueError, match=r"^rows must be"):
        weight.split(rows)


def test_tests_draw_what_differs() -> None:
    """Codes of all kinds, scales of all blocks, and weights of every seed are not alike."""
    weight = make_scaled_weight(256, 448)
    assert len(weight.codes.view(torch.uint8).unique()) == 254 and len(weight.scales.unique()) == 8
    assert not torch.equal(weight.scales, make_scaled_weight(256, 448, 1).scales)
    assert BACKENDS["torch"].device == weight.codes.device
