"""How a model is put on kvfold, saved, compiled, and what it costs: no look at the device, no more bytes than before."""

import copy
import io
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from support.transformers_support import CACHE, TWO, begun, close, compressors, ids, run, tiny, two_patched, unpatched
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from kvfold.demo.model import build_model
from kvfold.integrations import transformers as kvfold_transformers
from kvfold.integrations.switch import ON
from kvfold.integrations.transformers import UnsupportedError, patch, register, rewind, unpatch, unregister
from kvfold.integrations.transformers.step import OPS
from kvfold.integrations.transformers.weights import Shape

TOKENS = ids(40, 2)
model = two_patched  # the fixture

LOAD = """
import sys, torch
from transformers import DynamicCache
model, tokens, want = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    cache = DynamicCache(config=model.config)
    got = [model(piece, None, None, cache).logits for piece in (tokens[:, :21], tokens[:, 21:])]
assert torch.equal(torch.cat(got, 1), want)
print(type(model.model.layers[0].self_attn.compressor).__name__)
"""


def test_a_saved_model_loads_in_a_new_process(model, tmp_path):
    torch.save((model, TOKENS, run(model, TOKENS, [21])[0]), tmp_path / "model.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "KvfoldHCACompressor\n", done.stderr


def test_register_and_unregister(model, tmp_path):
    """Models that are loaded or made between the two are on kvfold, and no others."""
    plain = unpatched(model)
    want = run(model, TOKENS, [21])[0]
    plain.save_pretrained(tmp_path)
    register(max_new_tokens=5)
    try:
        register(max_new_tokens=5)  # again changes nothing
        assert "DeepSeek-V4" in ON["transformers"]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        made = AutoModelForCausalLM.from_config(plain.config)
    finally:
        unregister()
    assert "transformers" not in ON
    for one in (loaded, made):
        assert {type(part).__name__ for part in compressors(one)} == {"KvfoldHCACompressor", "KvfoldCSACompressor"}
        assert "pooled by kvfold" in repr(one)
    assert torch.equal(run(loaded, TOKENS, [21])[0], want)
    with pytest.raises(ValueError, match="patched already"):
        patch(loaded)
    unpatch(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(run(loaded, TOKENS)[0], run(plain, TOKENS)[0])
    after = AutoModelForCausalLM.from_config(plain.config)
    assert {type(part) for part in compressors(after)} == {v4.DeepseekV4HCACompressor, v4.DeepseekV4CSACompressor}
    with pytest.raises(ValueError, match="not registered"):
        unregister()


def test_wrong_options():
    for call in (register, lambda **options: patch(tiny(layer_types=TWO), **options)):
        with pytest.raises(ValueError, match="max_new_tokens"):
            call(max_new_tokens=0)
        with pytest.raises(ValueError, match="backend"):
            call(backend="cuda")
    with pytest.raises(AttributeError, match="nothing"):
        kvfold_transformers.nothing  # noqa: B018


@torch.no_grad()
def test_compiled_as_a_whole(model):
    """Steps of one token are two graphs: the first, and all others, whatever windows end in them."""
    tokens = ids(52, 2)
    want = run(model, tokens, range(40, 52))[0][:, 40:]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, cache = torch.compile(model, fullgraph=True, backend="eager"), begun(model, tokens[:, :40])
    for fold in (fold for layer in cache.layers for fold in layer.kvfold.folds.values()):  # room, as a compiled prompt makes
        fold.storage = torch.nn.functional.pad(fold.storage, (0, 0, 0, 20))
    got = [compiled(token[:, None], **{CACHE: cache}).logits for token in tokens[:, 40:].unbind(1)]
    close(torch.cat(got, 1), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("ratio", [4, 16])
def test_operators(ratio):
    """What a compiler is told of them is true."""
    shape, kv = Shape(32, ratio, ratio == 4, 16), torch.randn(2, 5, 32 * (1 + (ratio == 4)))
    opcheck(OPS.new_state, (kv, 3, *shape, None))
    state = OPS.new_state(kv, 3, *shape, None)
    weights = torch.randn(ratio, kv.shape[2]), torch.ones(32), torch.rand(2, 16)
    opcheck(OPS.step, (kv, kv, *weights, *state, torch.zeros(2, 9, 32), 14, 3, *shape, 1e-6, None))


class Looks(TorchDispatchMode):
    """Counts what makes a GPU's host wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero")
        return func(*args, **(kwargs or {}))


def test_no_step_looks_at_a_value(model):
    """More often than transformers' own code does, which looks at the positions of chunks."""
    counts = []
    for one in (unpatched(model), model):
        with Looks() as looks:
            run(one, TOKENS, [3, 21, 22, 23, 24, 25])
            run(one, TOKENS[:, :30], use_cache=False)
        counts.append(looks.count)
    assert counts[1] <= counts[0]
    with Looks() as looks:
        TOKENS[0, 0].item()
    assert looks.count == 1


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu():
    made = tiny(layer_types=TWO).cuda()
    patch(made, max_new_tokens=5)
    tokens = TOKENS.cuda()
    run(made, tokens, [21, 22, 23])  # compiles kernels
    caches = [DynamicCache(config=made.config) for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            hidden, residual, positions = (torch.zeros(2, 9, n, device="cuda") for n in (32, 16, 1))
            for index, part in enumerate(compressors(made)):
                part(hidden, residual, positions[..., 0].long(), caches[index], index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shown(cache):
    """Bytes that the tensors of a cache show."""
    file, found = io.BytesIO(), {}

    class Pickler(__import__("pickle").Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, torch.Tensor):
                found[id(thing)] = thing
                return id(thing)
            return None

    Pickler(file).dump(cache)
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2000, 4000])
@torch.no_grad()
def test_a_cache_is_no_larger(dtype, length):
    """Of one HCA and one CSA compressor with the real geometry, filled by projections alone."""
    sizes = []
    plain = build_model(0, "cpu").to(dtype)
    patched = copy.deepcopy(plain)
    patch(patched)
    hidden, residual = torch.randn(1, length, 128, dtype=dtype), torch.zeros(1, length, 64, dtype=dtype)
    for one in (plain, patched):
        cache = DynamicCache(config=one.config)
        for index in (0, 1):
            keys = torch.zeros(1, 1, length, 512, dtype=dtype)
            cache.update(keys, keys, index)
            part = compressors(one)[index]
            if index:
                part.indexer.index_topk = 1  # which makes its choice of 4000 tokens cheap
            part(hidden, residual, torch.arange(length)[None], cache, index)
        sizes.append(shown(cache))
    assert sizes[1] <= sizes[0], sizes


def test_without_drafts_nothing_is_kept_to_take_back(model):
    made = unpatched(model)
    patch(made)
    cache = run(made, TOKENS, [30])[1]
    assert all(layer.kvfold.older is None for layer in cache.layers)
    with pytest.raises(UnsupportedError, match="max_new_tokens=1"):
        rewind(cache, 30)
    rewind(cache, 0)
    assert torch.equal(run(made, TOKENS)[0], made(TOKENS, **{CACHE: cache}).logits.detach())


def test_caches_made_of_another_copys_classes(model):
    """A copy of kvfold under another name, imported later, has put classes of its own where transformers looks for them."""
    from transformers import cache_utils

    want = run(model, TOKENS, [21])[0]
    before = dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
    try:
        for base in (v4.DeepseekV4HCACache, v4.DeepseekV4CSACache):
            type(base.__name__.replace("DeepseekV4", "Kvfold"), (base,), {"kvfold": None})  # making it registers it
        assert {type(layer) for layer in DynamicCache(config=model.config).layers}.isdisjoint(before.values())
        assert torch.equal(run(model, TOKENS, [21])[0], want)
        filled = DynamicCache(config=model.config)
        filled.layers[0].kvfold = object()
        with pytest.raises(UnsupportedError, match="another copy of kvfold"):
            model(TOKENS, **{CACHE: filled})
    finally:
        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.update(before)


def test_a_cache_from_before_kvfold_was_imported(model):
    """Its layers are of transformers' own classes."""
    cache = DynamicCache(config=model.config)
    kinds = [v4.DeepseekV4HCACache if "HCA" in type(layer).__name__ else v4.DeepseekV4CSACache for layer in cache.layers]
    cache.layers = [kind(model.config) for kind in kinds]
    with torch.no_grad():
        assert torch.equal(model(TOKENS, **{CACHE: cache}).logits, run(model, TOKENS)[0])
