"""The sign of a zero is a bit too: it does not follow how a sequence is cut, nor which rows a kernel masks.

Values are zeros of both signs and numbers that underflow, scores are tied, far apart or masked, so that sums come to -0 and to
+0. What a masked row adds must be -0, the one number that leaves both as they are.
"""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, Engine, bits
from support.window_support import WindowEngine, cut, run
from torch import Tensor
from triton.language import semantic

from kvfold import CompressorSpec
from kvfold.storage.fold_state import state_kind

DTYPES = [  # of kv_score, and of the rows that the state keeps
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True)
def constants_of_an_older_triton(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 compiles a constant -0.0 as +0. Its successors do not; here the interpreter does as it did."""
    if not backend.slow or not hasattr(semantic, "TritonSemantic"):
        return
    constant = semantic.TritonSemantic.scalar_constant

    def scalar_constant(self: object, value: object, dtype: object) -> object:
        return constant(self, 0 if value == 0 else value, dtype)

    monkeypatch.setattr(semantic.TritonSemantic, "scalar_constant", scalar_constant)


def make_zeros(spec: CompressorSpec, n: int, dtype: torch.dtype) -> Tensor:
    """kv_score rows that pool to zeros of both signs; each window of each channel has a score that is not -inf."""
    g = torch.Generator().manual_seed(100 * spec.ratio + spec.overlap)
    shape = n, spec.channels

    def draw(*choices: float) -> Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), shape, generator=g)]

    k = draw(-0.0, -0.0, -0.0, 0.0, -1e-37, 1e-37, -1e-30)
    channel = torch.arange(spec.channels)
    k[:, channel % 4 == 1] = -0.0
    k[:, channel % 8 == 2] = draw(-0.0, 0.0)[:, channel % 8 == 2]
    k[:, channel % 8 == 3] = draw(-1.0, 1.0, -0.0)[:, channel % 8 == 3]  # also rows that cancel to +0
    s = draw(-torch.inf, -torch.inf, 0.0, 0.0, -0.0, -1e4, 90.0, 200.0)
    s[0 :: spec.ratio] = draw(0.0, -300.0, 80.0)[0 :: spec.ratio]
    return torch.cat([k, s], dim=1).to(dtype)


def assert_same_bits(got: dict[int, Tensor], want: dict[int, Tensor], what: object) -> None:
    assert got.keys() == want.keys()
    for window, row in got.items():
        differing = (bits(row) != bits(want[window])).nonzero().flatten().tolist()
        assert not differing, f"{what}: channels {differing[:9]} of window {window} differ, or their zeros in sign"


def ways(backend: Backend, ratio: int, n: int) -> list[list[int]]:
    """Lengths of steps: of several kernels, and such as leave each kind of row to be masked."""
    some = [[1] * n, cut(n, max(9, ratio + 1))]
    return some if backend.device.type == "cpu" else [*some, cut(n, 4), cut(n, 8), [1, n - 1]]


def dtypes(backend: Backend, number: int) -> list[tuple[torch.dtype, torch.dtype]]:
    """Those to be run: on a CPU one in turn."""
    return [DTYPES[number % len(DTYPES)]] if backend.device.type == "cpu" else DTYPES


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", range(1, 10))
def test_fold_state(backend: Backend, ratio: int, overlap: bool) -> None:
    """A head_dim of 512, which has kernels that fold a window by halves; of the 584-byte record every byte."""
    if backend.slow and ratio not in (3, 5, 7, 9):
        pytest.skip("the interpreter takes seconds: it does those of which a row is masked")
    spec = CompressorSpec(head_dim=512, ratio=ratio, overlap=overlap, has_ape=False)
    n = max(2 * ratio + 1, 9)
    for dtype, state_dtype in dtypes(backend, ratio + overlap):
        kept = state_dtype if state_kind(spec) == "rows" else torch.float32
        tokens, cuts = make_zeros(spec, n, dtype), ways(backend, ratio, n)
        options = {"max_entries": n // ratio, "fmt": "fp8_ds_mla", "state_dtype": kept}
        engine = Engine(spec, backend, num_slots=len(cuts) + 1, max_new_tokens=8, **options)
        want = run(engine, len(cuts), tokens, [n])
        for slot, steps in enumerate(cuts):
            assert_same_bits(run(engine, slot, tokens, steps), want, (dtype, kept, steps))
            same = torch.equal(engine.records(slot, n // ratio), engine.records(len(cuts), n // ratio))
            assert same, f"{dtype}, {kept}: records differ in steps {steps}"
        zeros = torch.stack(list(want.values()))
        zeros = zeros[zeros == 0].signbit()
        assert zeros.any() and not zeros.all()  # both are there to be told apart


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
def test_window_state(backend: Backend, ratio: int, overlap: bool) -> None:
    """Raw rows: also whatever the size of a page."""
    if backend.slow and (ratio, overlap) not in ((1, False), (2, False), (4, True)):
        pytest.skip("the interpreter takes seconds")
    spec = CompressorSpec(head_dim=16, ratio=ratio, overlap=overlap, has_ape=False, rope_dim=0)
    n = max(2 * ratio + 1, 9)
    for dtype, state_dtype in dtypes(backend, ratio + overlap):
        tokens, want = make_zeros(spec, n, dtype), {}
        for page_size in (ratio, 3):
            cuts = ways(backend, ratio, n) if page_size == ratio else [cut(n, 4)]
            engine = WindowEngine(
                spec, backend, num_sequences=len(cuts) + 1, length=n, page_size=page_size, state_dtype=state_dtype
            )  # fmt: skip
            whole = run(engine, len(cuts), tokens, [n])
            want = want or whole
            for sequence, steps in enumerate(cuts):
                assert_same_bits(run(engine, sequence, tokens, steps), want, (dtype, state_dtype, page_size, steps))
            assert_same_bits(whole, want, (dtype, state_dtype, page_size))


def test_masked_rows_change_no_sign(backend: Backend) -> None:
    """The missing predecessor of window 0 leaves -0 as it is, and so do the rows that fill up a group of four."""
    for ratio, overlap in ((4, True), (5, False), (9, False)):
        spec = CompressorSpec(head_dim=512, ratio=ratio, overlap=overlap, has_ape=False)
        tokens = torch.zeros(2 * ratio, 2 * spec.channels)
        tokens[:, : spec.channels] = -1e-44
        tokens[:, spec.channels :] = torch.linspace(0, 60, len(tokens))[:, None]
        tokens[ratio - 1 :: ratio, : spec.channels] = -0.0  # all that weighs something, and the others underflow
        tokens[ratio - 1 :: ratio, spec.channels :] += 100.0
        for steps in ([len(tokens)], [1] * len(tokens)):
            engine = Engine(spec, backend, num_slots=1, max_new_tokens=8)
            pooled = run(engine, 0, tokens, steps)
            for window, row in pooled.items():
                assert torch.equal(bits(row), bits(torch.full_like(row, -0.0))), f"{spec}, {steps}, window {window}"
