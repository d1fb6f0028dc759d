"""A patched model lives as an unpatched one does: memory, threads, copies, pickles, hooks, offloading, casts, gradients."""

import copy
import functools
import gc
import io
import pickle
import sys
import threading
import weakref

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
import contextlib

from support.transformers_support import (
    CACHE,
    NAMES,
    TWO,
    begun,
    close,
    compressors,
    ids,
    run,
    step,
    tiny,
    two_patched,
    unpatched,
)
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from kvfold.integrations.transformers import UnsupportedError, entries, patch, unpatch
from kvfold.integrations.transformers import cache as transformers_cache

TOKENS = ids(40, 2)
model = two_patched  # the fixture


@pytest.fixture
def pooled(monkeypatch):
    """Counts kvfold's calls."""
    calls, real = [], transformers_cache.step
    monkeypatch.setattr(transformers_cache, "step", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    return calls


# Memory


def fail_once(model):
    """The head fails at the next call, when every layer has made its step."""

    def fail(*_):
        handle.remove()
        raise ArithmeticError

    handle = model.lm_head.register_forward_pre_hook(fail)


def _eager(model):
    return begun(model, TOKENS[:, :21])


def _generated(model):
    return model.generate(TOKENS, max_new_tokens=4, num_beams=2, return_dict_in_generate=True)[CACHE]


def _failed(model):
    cache = begun(model, TOKENS[:, :21])
    fail_once(model)
    with contextlib.suppress(ArithmeticError):
        step(model, TOKENS[:, 21:], cache)
    model.model.layers[1].self_attn.compressor.indexer.kv_proj.register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        step(model, TOKENS[:, 21:], cache)
    return cache


@pytest.mark.parametrize("use", [_eager, _generated, _failed])
def test_a_cache_is_freed_with_its_last_reference(model, use):
    gc.collect()
    gc.disable()
    try:
        cache = use(model)
        folds = [cache.layers[layer].kvfold.folds[name] for layer, name in NAMES]
        alive = [weakref.ref(thing) for thing in (cache, *cache.layers, *folds)]
        alive += [weakref.ref(tensor) for fold in folds for tensor in (fold.storage, *fold.state)]
        del cache, folds
        assert [one() for one in alive] == [None] * len(alive)
    finally:
        gc.enable()


# Threads


def test_threads_share_a_model(model):
    """Caches of different lengths, steps of different lengths, with and without a cache."""
    plain = copy.deepcopy(model)
    unpatch(plain)
    work = [(ids(20 + 7 * i, 1 + i % 2, seed=i), [5 + i, 9 + i, 10 + i, 11 + i]) for i in range(4)]
    want = [run(plain, *one)[0] for one in work]
    got, start = {}, threading.Barrier(len(work))

    def answer(i):
        start.wait(60)
        for turn in range(3):
            got[i, turn] = (
                run(model, *work[i], use_cache=turn < 2)[0] if turn < 2 else run(model, work[i][0], use_cache=False)[0]
            )

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    finally:
        sys.setswitchinterval(before)
    assert len(got) == 12  # none raised
    for (i, _), logits in got.items():
        close(logits, want[i])


# Copies and pickles


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"save": _saved, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_cache_goes_on_from_a_copy(model, again):
    cache = begun(model, TOKENS[:, :21])
    copied = again(cache)
    rest = [TOKENS[:, 21:24], TOKENS[:, 24:25], TOKENS[:, 25:]]
    want = [step(model, piece, cache) for piece in rest]
    assert all(torch.equal(step(model, piece, copied), logits) for piece, logits in zip(rest, want, strict=True))
    for layer, name in NAMES:
        assert torch.equal(entries(copied, layer, name), entries(cache, layer, name))
    assert type(DynamicCache(config=model.config).layers[0]) is type(begun(unpatched(model), TOKENS).layers[0])


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_patched_model_is_patched_by_itself(model, again, pooled, monkeypatch):
    want = run(model, TOKENS, [21])[0]
    # As in the process that loads a file: hooks are numbered from the start.
    made = pickle.dumps(model) if again is COPIES["pickle"] else None
    if made is not None:
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
    copied = again(model) if made is None else pickle.loads(made)
    for _ in range(200):
        compressors(copied)[0].register_forward_pre_hook(lambda *_: None)
    pooled.clear()
    assert torch.equal(run(copied, TOKENS, [21])[0], want) and len(pooled) == 6
    with torch.no_grad():
        compressors(copied)[0].position_bias.add_(1)
    close(run(copied, TOKENS)[0], run(unpatched(copied), TOKENS)[0])
    assert torch.equal(run(model, TOKENS, [21])[0], want)  # the original has its own
    unpatch(copied)
    pooled.clear()
    run(copied, TOKENS)
    assert not pooled


def replica(module):
    """What `torch.nn.parallel.replicate` makes, on the same device: weights are tensors, not parameters."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.detach().clone())
    for name, child in module._modules.items():
        made._modules[name] = replica(child) if child is not None else None
    return made


def test_a_replica_uses_its_own_weights(model):
    compressor, plain = compressors(model)[1], compressors(unpatched(model))[1]
    made = replica(compressor)
    with torch.no_grad():
        for name in ("kv_proj", "gate_proj", "kv_norm"):
            getattr(made, name).weight.mul_(1.5)
            getattr(plain, name).weight.mul_(1.5)
        made.position_bias.add_(1.0)
        plain.position_bias.add_(1.0)
        hidden, residual = torch.randn(2, 32, 32), torch.randn(2, 32, 16)
        arguments = (hidden, residual, torch.arange(32)[None], None, 1)
        close(made(*arguments)[0], plain(*arguments)[0])


# Other people's wrappers


def wrap(module, seen):
    """As accelerate and others hook a module: its `forward` is replaced by one that calls it."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        seen.append(module)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


@pytest.mark.parametrize("order", ["wrapped first", "patched first"])
def test_somebody_elses_forward_survives(order, pooled):
    model, seen = tiny(layer_types=TWO), []
    want = run(model, TOKENS)[0]
    steps = [lambda: [wrap(module, seen) for module in compressors(model)], lambda: patch(model)]
    for one in steps if order == "wrapped first" else steps[::-1]:
        one()
    close(run(model, TOKENS)[0], want)
    assert len(seen) == 2 and len(pooled) == 3
    unpatch(model)
    assert torch.equal(run(model, TOKENS)[0], want) and len(seen) == 4 and len(pooled) == 3


def test_a_compiled_compressor(model, pooled):
    want, _ = run(model, TOKENS, [21])
    pooled.clear()
    compressors(model)[0].compile(backend="eager", fullgraph=True)
    close(run(model, TOKENS, [21])[0], want)
    assert len(pooled) == 6


# Weights that come and go


class Offload:
    """Keeps the tensors of one module elsewhere; loads them while it runs and drops them behind it."""

    def __init__(self, module, form):
        self.kept = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        self.drop(module)
        if form == "hooks":
            module.register_forward_pre_hook(lambda module, args: self.load(module), prepend=True)
            module.register_forward_hook(lambda module, args, out: self.drop(module))
        else:
            module._old_forward = module.forward
            module.forward = functools.partial(self.run, module)

    def run(self, module, *args, **kwargs):
        self.load(module)
        try:
            return module._old_forward(*args, **kwargs)
        finally:
            self.drop(module)

    def load(self, module):
        self.put(module, lambda kept: kept.detach().clone())

    def drop(self, module):
        self.put(module, lambda kept: kept.detach().to("meta"))

    def put(self, module, made):
        for name, kept in self.kept.items():
            store = module._parameters if name in module._parameters else module._buffers
            store[name] = torch.nn.Parameter(made(kept)) if isinstance(kept, torch.nn.Parameter) else made(kept)


@pytest.mark.parametrize("form", ["hooks", "forward"])
@pytest.mark.parametrize("patched_first", [True, False])
def test_offloaded_weights_are_read_while_their_module_runs(form, patched_first, pooled):
    model = tiny(layer_types=TWO)
    want = run(model, TOKENS, [21, 22])[0]
    if patched_first:
        patch(model)
    for compressor in compressors(model):
        for module in compressor.modules():
            Offload(module, form)
    if not patched_first:
        patch(model)
    close(run(model, TOKENS, [21, 22])[0], want)
    assert len(pooled) == 9


def test_weights_that_are_not_there():
    """A model without data can be patched, refuses to run, and runs once it was loaded."""
    source = tiny(layer_types=TWO)
    model = copy.deepcopy(source).to("meta")
    patch(model)
    with pytest.raises(UnsupportedError, match="load the weights first"), torch.no_grad():
        model(TOKENS.to("meta"))
    for change in ("position_bias", "kv_norm", "rotary_emb"):
        part = copy.deepcopy(source)
        patch(part)
        compressor = compressors(part)[0]
        if change == "position_bias":
            compressor.position_bias = torch.nn.Parameter(compressor.position_bias.to("meta"))
        else:
            getattr(compressor, change).to("meta")
        with pytest.raises(UnsupportedError, match="load the weights first"):
            step(part, TOKENS, DynamicCache(config=part.config))
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for mine, other in zip(model.modules(), source.modules(), strict=True):
        mine._buffers.update(other._buffers)
    close(run(model, TOKENS)[0], run(source, TOKENS)[0])


@pytest.mark.parametrize("gradient", [True, False])
def test_fake_tensors_leave_nothing_behind(gradient):
    """A run under `FakeTensorMode`, as tools estimate memory by, and then a real one of the same shape."""
    tokens = ids(37, 3)  # a shape that no other test has
    with torch.set_grad_enabled(gradient):
        patched = tiny(torch.bfloat16, TWO)
        patch(patched)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(patched(tokens).logits, FakeTensor)
        logits = patched(tokens).logits
    assert type(logits) is torch.Tensor and logits.isfinite().all()
