"""A DeepSeek-V4 model of transformers gives the same with and without kvfold, however it is called."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from support.transformers_support import CACHE, LAYERS, LAYERS_MOVE, NAMES, TWO, close, ids, run, theirs, tiny
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from kvfold.integrations.transformers import UnsupportedError, entries, patch, planned, rewind, unpatch
from kvfold.integrations.transformers import step as steps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    return tiny().to(request.param)


@pytest.fixture(scope="module")
def two():
    """Two layers with a compressor each, patched."""
    made = tiny(layer_types=LAYERS[:2])
    patch(made, max_new_tokens=5)
    return made


@pytest.fixture
def patched(model):
    patch(model, max_new_tokens=5)
    yield model
    unpatch(model)


CUTS = {"prefill": [], "chunks": [3, 4, 17, 31, 48, 50], "one short": [1, 2, 3], "decode": list(range(30, 67))}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_logits_and_entries_agree(patched, cuts, batch):
    tokens = ids(67, batch)
    got, cache = run(patched, tokens, cuts)
    want, reference = theirs(patched, tokens, cuts)
    close(got, want)
    assert cache.get_seq_length() == reference.get_seq_length() == 67
    for layer, name in NAMES:
        mine, their = entries(cache, layer, name), reference.layers[layer].compressed_kv[name]
        assert mine.shape == their.shape and mine.dtype == their.dtype
        close(mine, their)


@pytest.mark.parametrize("length", [1, 3, 16, 67])
def test_without_a_cache(patched, length):
    close(run(patched, ids(length, 2), use_cache=False)[0], theirs(patched, ids(length, 2), use_cache=False)[0])


@pytest.mark.parametrize("length", [15, 16, 19, 20, 23])
def test_as_many_entries_as_may_be_picked_and_more(length):
    """Of ratio 4, and three of them: up to there kvfold scores none. Which of equal scores are picked depends on cuts."""
    model = tiny(index_topk=3, layer_types=TWO)
    cuts = (), range(1, length)
    wanted = [run(model, ids(length), cut)[0] for cut in cuts]
    patch(model)
    for cut, want in zip(cuts, wanted, strict=True):
        close(run(model, ids(length), cut)[0], want)


def test_compressor_outputs_and_top_k(model):
    """Entries, block bias and the indexer's choice, where it has one: fewer kept than there are."""
    small = tiny(index_topk=4)
    seen = {}

    def record(key):
        for index in (0, 1):
            compressor = small.model.layers[index].self_attn.compressor
            handles.append(compressor.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__((key, i), out)))
        indexer = small.model.layers[1].self_attn.compressor.indexer
        handles.append(indexer.register_forward_hook(lambda m, a, out: seen.__setitem__((key, "top_k"), out)))

    for key in ("theirs", "ours"):
        handles = []
        record(key)
        if key == "ours":
            patch(small)
        run(small, ids(50, 2))
        for handle in handles:
            handle.remove()
    for layer in (0, 1):
        for ours, their in zip(seen["ours", layer], seen["theirs", layer], strict=True):
            close(ours, their)
    assert torch.equal(seen["ours", "top_k"], seen["theirs", "top_k"])


MODES = {
    "greedy": {},
    "padded": {"attention_mask": (torch.arange(21) >= torch.tensor([[3], [0]])).long()},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_generate(patched, options):
    prompt = ids(21, 2).to(patched.device)
    other = copy.deepcopy(patched)
    unpatch(other)
    options = {name: x.to(patched.device) if torch.is_tensor(x) else x for name, x in options.items()}
    want_options = dict(options)
    if "num_beams" in options and not LAYERS_MOVE:  # without a cache there is nothing to move
        want_options["use_cache"] = False
    torch.manual_seed(3)
    want = other.generate(prompt, max_new_tokens=24, **want_options)
    torch.manual_seed(3)
    assert torch.equal(patched.generate(prompt, max_new_tokens=24, **options), want)


@pytest.mark.parametrize("together", [True, False])
def test_storage_is_as_large_as_it_must_be_and_written_in_place(patched, monkeypatch, together):
    """A prompt has no room to spare; later there is a little, a little more where another capacity is another plan."""
    monkeypatch.setattr(steps, "goes_together", lambda device, backend: together and device.type == "cpu")
    tokens = ids(4 * 140)
    cuts = [20, *range(4 * 130 + 2, 4 * 140)]
    got, cache = run(patched, tokens, cuts)
    close(got, theirs(patched, tokens, cuts)[0])
    fold = cache.layers[1].kvfold.folds["compressor"]
    assert fold.entries().data_ptr() == fold.storage.data_ptr()
    sizes = [layer.kvfold.folds["compressor"].storage.shape[1] for layer in cache.layers[:2]]
    assert sizes == ([36, 146] if together and patched.device.type == "cpu" else [48, 146])


def test_layers_of_a_ratio_share_a_plan(patched, monkeypatch):
    monkeypatch.setattr(steps, "goes_together", lambda *_: False)
    calls, real = [], planned.compress
    monkeypatch.setattr(planned, "compress", lambda rows, plan, *a, **k: (calls.append(plan), real(rows, plan, *a, **k)))
    run(patched, ids(40))
    hca, main, indexer = calls
    assert main is indexer and main is not hca


def test_new_cache_is_a_new_sequence_and_reset_too(patched):
    tokens, other = ids(37).to(patched.device), ids(41, seed=5)
    want, cache = run(patched, tokens, [20])
    run(patched, other, [7])
    assert torch.equal(run(patched, tokens, [20])[0], want)
    copied = copy.deepcopy(cache)
    if LAYERS_MOVE:
        cache.reset()
        with torch.no_grad():
            assert torch.equal(patched(tokens[:, :20], **{CACHE: cache}).logits, want[:, :20])
    more = ids(6, seed=6).to(patched.device)
    with torch.no_grad():  # the copy went on from where it was, by itself
        got = patched(more, **{CACHE: copied}).logits
    close(got, run(patched, torch.cat([tokens, more], 1))[0][:, -6:])


def test_inference_mode_and_back(patched):
    tokens = ids(40).to(patched.device)
    cache = DynamicCache(config=patched.config)
    with torch.inference_mode():
        first = patched(tokens[:, :17].clone(), **{CACHE: cache}).logits
    with torch.no_grad():  # tokens one by one, which are written into what was made in there
        rest = [patched(token[:, None], **{CACHE: cache}).logits for token in tokens[:, 17:].unbind(1)]
    close(torch.cat([first, *rest], 1), theirs(patched, tokens)[0])


@pytest.mark.parametrize("accepted", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("start", [3, 14, 40])
@pytest.mark.parametrize("where", ["cpu", "plan", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rewind(two, monkeypatch, where, start, accepted):
    """plan: over a plan and a `FoldState`, as on a GPU."""
    if where == "plan":
        monkeypatch.setattr(steps, "goes_together", lambda *_: False)
    device = "cuda" if where == "cuda" else "cpu"
    model = two.to(device)
    tokens, drafts = ids(start + 12).to(device), ids(5, seed=9).to(device)
    drafts[:, :accepted] = tokens[:, start : start + accepted]
    want, plain = run(model, tokens, range(start, start + 12))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens[:, :start], **{CACHE: cache})
        model(drafts, **{CACHE: cache})
        rewind(cache, start + accepted)
        assert cache.get_seq_length() == start + accepted
        got = torch.cat([model(t[None], **{CACHE: cache}).logits for t in tokens[:, start + accepted :].T], 1)
    close(got, want[:, start + accepted :])
    for layer, name in NAMES:
        close(entries(cache, layer, name), entries(plain, layer, name), 1e-5)


def test_rewind_reaches_the_start_of_a_long_step_and_no_further():
    model = tiny(layer_types=LAYERS[:2])
    patch(model, max_new_tokens=3)
    tokens = ids(60)
    want, cache = run(model, tokens[:, :50], [20])
    with pytest.raises(UnsupportedError, match="rewind from 50 to 30"):
        rewind(cache, 30)
    with pytest.raises(UnsupportedError, match="rewind from 50 to 19"):
        rewind(cache, 19)
    with pytest.raises(ValueError, match="length"):
        rewind(cache, 51)
    rewind(cache, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, 20:50], **{CACHE: cache}).logits, want[:, 20:])


def test_rewind_refuses_a_sliding_layer_that_has_forgotten(patched):
    cache = run(patched, ids(30), [28])[1]
    with pytest.raises(UnsupportedError, match="layer 2, which has no compressor"):
        rewind(cache, 29)
    assert cache.get_seq_length() == 30  # nothing was touched


def test_sliding_layer_that_records_its_past_is_rewound(patched):
    tokens = ids(40).to(patched.device)
    cache = DynamicCache(config=patched.config)
    with torch.no_grad():
        patched(tokens[:, :30], **{CACHE: cache})
        cache.layers[2].activate_past_recording()
        patched(torch.cat([tokens[:, 30:31], ids(3, seed=8).to(patched.device)], 1), **{CACHE: cache})
        rewind(cache, 31)
        got = patched(tokens[:, 31:], **{CACHE: cache}).logits
    close(got, run(patched, tokens)[0][:, 31:])


def test_bf16_compressors_within_the_derived_bound():
    """The bound in the docstring of kvfold.integrations.transformers, on every entry of every compressor."""
    model = tiny(torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if "position_bias" in parameter_name or "norm" in parameter_name:
            parameter.data = parameter.data.float()  # as from_pretrained keeps them
    u = 2.0**-8
    hidden = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    positions = torch.arange(64)[None]
    q_residual = torch.randn(2, 64, 16).bfloat16()
    worst = 0.0
    for index, ratio in ((0, 16), (1, 4)):
        compressor = model.model.layers[index].self_attn.compressor
        with torch.no_grad():
            want = compressor(hidden, q_residual, positions, None, index)[0][:, 0].double()
            patch(compressor)
            got = compressor(hidden, q_residual, positions, None, index)[0][:, 0].double()
            unpatch(compressor)
            kappa = cancellation(compressor.kv_proj(hidden), compressor.gate_proj(hidden), compressor.position_bias, ratio)
        error = (got - want).norm(dim=-1) / want.norm(dim=-1)
        bound = (3 * kappa + 4) * u
        assert (error <= bound).all()
        worst = max(worst, float((error / bound).max()))
    assert worst > 0.01  # a bound that is far too wide would show nothing


def cancellation(kv, gate, bias, ratio):
    """kappa of each window, [batch, windows]."""
    kv, gate = kv.double(), gate.double()
    batch, _, channels = kv.shape
    kv = kv.view(batch, -1, ratio, channels)
    gate = gate.view(batch, -1, ratio, channels) + bias.double()
    if ratio == 4:  # overlap: the lo halves of the window before, then the own hi halves
        half = channels // 2
        before = torch.nn.functional.pad(kv[:, :-1, :, :half], (0, 0, 0, 0, 1, 0))
        weight = torch.nn.functional.pad(gate[:, :-1, :, :half], (0, 0, 0, 0, 1, 0), value=-torch.inf)
        kv, gate = torch.cat([before, kv[..., half:]], 2), torch.cat([weight, gate[..., half:]], 2)
    weight = gate.softmax(2)
    return (weight * kv.abs()).sum(2).norm(dim=-1) / (weight * kv).sum(2).norm(dim=-1)


def test_bf16_logits_are_no_further_from_fp32_than_transformers_own():
    model = tiny(torch.bfloat16)
    tokens = ids(64, 2)
    exact = run(copy.deepcopy(model).float(), tokens)[0]
    want = run(model, tokens)[0].float()
    patch(model)
    got = run(model, tokens)[0].float()
    theirs_off, ours_off = (want - exact).norm(), (got - exact).norm()
    assert ours_off <= 1.5 * theirs_off
    assert (got - want).norm() <= 2.5 * theirs_off


def test_unpatch_restores(model):
    forwards = [m.forward for m in model.modules()]
    want = run(model, ids(40))[0]
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    unpatch(model)
    assert [m.forward for m in model.modules()] == forwards
    assert torch.equal(run(model, ids(40))[0], want)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)


def test_copy_of_a_patched_model_is_patched_by_itself(patched):
    other = copy.deepcopy(patched)
    with torch.no_grad():
        for module in other.modules():
            if hasattr(module, "position_bias"):
                module.position_bias.zero_()
    assert not torch.equal(run(other, ids(20))[0], run(patched, ids(20))[0])


def test_refusals(patched):
    tokens = ids(20).to(patched.device)
    with pytest.raises(ValueError, match="found none"):
        patch(torch.nn.Linear(2, 2))
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match="cache layer of type DynamicLayer"):
            patched(tokens, **{CACHE: DynamicCache()})
        static = Cache(layers=[StaticLayer(max_cache_len=64) for _ in LAYERS])
        with pytest.raises(UnsupportedError, match="cache layer of type StaticLayer"):
            patched(tokens, **{CACHE: static})


def test_caches_do_not_cross_over(model):
    theirs_cache = run(model, ids(20))[1]
    patch(model)
    try:
        with pytest.raises(UnsupportedError, match="already holds 20 tokens of which kvfold saw 0"), torch.no_grad():
            model(ids(1).to(model.device), **{CACHE: theirs_cache})
        ours = run(model, ids(20))[1]
    finally:
        unpatch(model)
    with pytest.raises(UnsupportedError, match="start with a new cache"), torch.no_grad():
        model(ids(1).to(model.device), **{CACHE: ours})


def test_wrong_geometry_and_half_precision():
    with pytest.raises(ValueError, match="head_dim must be a power of two"):
        patch(tiny(head_dim=96))
    half = tiny(torch.float16)
    patch(half)
    with pytest.raises(UnsupportedError, match="float16"):
        run(half, ids(20))
