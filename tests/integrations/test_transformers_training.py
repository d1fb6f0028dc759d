"""A patched model trains: gradients of transformers' own, entries of eval mode, with caches and checkpointing."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from support.training_support import off
from support.transformers_support import CACHE, TWO, compressors, ids, tiny

from kvfold import reference
from kvfold.integrations.transformers import entries, patch, unpatch, weights
from kvfold.integrations.transformers.weights import rope_table, spec_of

TOKENS = ids(49, 2)
TINY = 1e-2  # of the largest gradient; smaller ones are sums that cancel


@pytest.fixture
def pair():
    """The same model patched and not, in train mode."""
    made = tiny(layer_types=TWO).train().requires_grad_()
    own = copy.deepcopy(made)
    patch(made)
    return made, own


def gradients(model, **how):
    model.zero_grad()
    model(TOKENS, labels=TOKENS, **how).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["without a cache", "with a cache", "checkpointed"])
def test_gradients_are_those_of_transformers(pair, how, monkeypatch):
    monkeypatch.setattr(weights, "_ENTRY_DTYPES", {})  # the first step of a process; checkpointing makes it a second time
    if how == "checkpointed":
        for model in pair:
            # transformers 5.24 warns of its older name.
            older = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", older)()
    got, want = (gradients(model, use_cache=how == "with a cache") for model in pair)
    assert got.keys() == want.keys() and any("compressor.position_bias" in name for name in got)
    most = max(float(x.norm()) for x in want.values())
    worst = {name: off(got[name], x) for name, x in want.items() if "compressor" in name or x.norm() > TINY * most}
    assert len(worst) > 20 and max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_compiled_as_a_whole(pair, train, cached):
    model = pair[0].train(train)
    want = gradients(model, use_cache=cached)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(TOKENS, labels=TOKENS, use_cache=cached).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(off(got[name], x) for name, x in want.items()) < 1e-5
    assert not any(x.any() for name, x in got.items() if name not in want)  # zeros where eager code has none: torch's way


def test_compiled_again_for_another_epsilon(pair):
    """Of which torch makes a variable from the second one on."""
    model, _ = pair
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for eps in (1e-6, 0.25, 0.5):
        for part in compressors(model):
            part.kv_norm.variance_epsilon = eps
        got, want = (call(TOKENS, use_cache=False).logits.detach() for call in (compiled, model))
        assert off(got, want) < 1e-5


@pytest.mark.parametrize("length", [1, 3, 5])
def test_prompts_shorter_than_a_window(pair, length):
    """Of which several have tokens for one together."""
    for model in pair:
        model.zero_grad()
    got, want = (model(ids(length, 8), use_cache=True).logits for model in pair)
    assert off(got.detach(), want.detach()) < 1e-5
    got.sum().backward(), want.sum().backward()
    weights = [model.model.layers[0].self_attn.kv_proj.weight for model in pair]
    assert off(*(weight.grad for weight in weights)) < 1e-4


def test_entries_of_train_mode_have_the_bits_of_eval_mode(pair):
    model, found = pair[0], []
    for mode in (True, False):
        handle = compressors(model)[1].register_forward_hook(lambda module, args, out: found.append(out[0].detach()))
        cache = model.train(mode)(TOKENS, use_cache=True)
        handle.remove()
    assert torch.equal(*found)
    assert torch.equal(found[1][:, 0], entries(cache[CACHE], 1))


def test_a_model_learns_and_can_be_unpatched(pair):
    model, _ = pair
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    patched = model.eval()(TOKENS).logits.detach()
    unpatch(model)
    assert off(model(TOKENS).logits.detach(), patched) < 1e-5


@pytest.mark.parametrize("name", ["kv_proj.weight", "gate_proj.weight", "position_bias", "kv_norm.weight"])
def test_one_part_of_a_compressor_is_trained(pair, name):
    """All else is frozen, also what comes before."""
    found = []
    for model in pair:
        model.requires_grad_(False)
        weight = compressors(model)[0].get_parameter(name).requires_grad_()
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append(weight.grad)
    assert off(*found) < 1e-5 and found[1].any()


def test_the_gradient_of_an_input_in_train_mode(pair):
    found = []
    for model in pair:
        embeds = model.model.embed_tokens(TOKENS).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.sin().sum().backward()
        found.append(embeds.grad)
    assert off(*found) < 1e-5


def test_in_bf16_it_is_closer_to_fp64_than_transformers(pair, record_property):
    """The gradient of the ratio-16 compressor's position bias, from the same projections in bf16."""
    hidden = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    g = torch.randn(2, 1, 3, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    figures = []
    for model in pair:
        part = compressors(model.bfloat16())[0]
        part.position_bias.data = part.position_bias.data.float()
        part.kv_norm.float()
        part.zero_grad()
        found, _ = part(hidden, torch.zeros(2, 48, 16), torch.arange(48)[None].expand(2, -1), None, 0)
        found.backward(g)
        figures.append(part.position_bias.grad)
    bias = part.position_bias.detach().double().requires_grad_()
    spec, rope = spec_of(part), rope_table(part.rotary_emb, torch.arange(48))
    rows = torch.cat([part.kv_proj(hidden), part.gate_proj(hidden)], dim=-1).detach()
    exact = torch.stack([reference.entries(one, spec, bias, part.kv_norm.weight.detach(), rope) for one in rows])
    exact.backward(g[:, 0].double())
    ours, theirs = (off(x, bias.grad) for x in figures)
    record_property("kvfold", ours)
    record_property("transformers", theirs)
    assert ours < 1e-5 < theirs, (ours, theirs)
