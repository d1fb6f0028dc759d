"""Calls of a patched model in every form: casts and changes between them, gradients, selections, and what is refused."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from support.transformers_support import (
    CACHE,
    LAYERS,
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
from transformers import DynamicCache

from kvfold.integrations.transformers import UnsupportedError, entries, patch, rewind

TOKENS = ids(40, 2)
model = two_patched  # the fixture


# Whatever changes between two calls


def _frequencies(model):
    for compressor in compressors(model):
        compressor.rotary_emb.compress_inv_freq.mul_(0.5)


def _frequencies_unseen(model):
    for compressor in compressors(model):
        compressor.rotary_emb.compress_inv_freq.data.mul_(0.5)


def _rotary(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters["compress"]["factor"] = 2
    config.rope_parameters["compress"]["rope_theta"] = 777.0
    for compressor in compressors(model):
        compressor.rotary_emb = type(compressor.rotary_emb)(config)


def _scaling(model):
    for compressor in compressors(model):
        compressor.rotary_emb.compress_attention_scaling = 1.5


def _epsilon(model):
    for compressor in compressors(model):
        compressor.kv_norm.variance_epsilon = 0.3


def _loaded(model):
    state = {name: tensor.roll(1) for name, tensor in model.state_dict().items() if "compressor" in name}
    model.load_state_dict(state, strict=False)


def _replaced(model):
    for compressor in compressors(model):
        compressor.position_bias = torch.nn.Parameter(compressor.position_bias.detach().roll(1))
        compressor.kv_norm = type(compressor.kv_norm)(compressor.head_dim, eps=0.01)


CHANGES = [_frequencies, _frequencies_unseen, _rotary, _scaling, _epsilon, _loaded, _replaced]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_nothing_remembered_goes_stale(model, change):
    """Neither in a new cache nor in one that was begun before, but for what a changed bias means to windows under way."""
    plain = unpatched(model)
    caches = [begun(model, TOKENS[:, :16]), begun(plain, TOKENS[:, :16])]
    before = run(model, TOKENS)[0]
    for one in (model, plain):
        change(one)
    assert (run(model, TOKENS)[0] - before).abs().max() > 1e-3
    close(run(model, TOKENS)[0], run(plain, TOKENS)[0])
    if change in (_loaded, _replaced):
        return
    got, want = (step(one, TOKENS[:, 16:], cache) for one, cache in zip((model, plain), caches, strict=True))
    close(got, want)


def test_a_cast_after_a_run(model):
    """As when it was cast before: bf16 frequencies give other rotations."""
    tokens = ids(96, 2)
    run(model, tokens)
    got = run(model.to(torch.bfloat16), tokens)[0]
    fresh = tiny(torch.bfloat16, layer_types=TWO)
    patch(fresh)
    assert torch.equal(got, run(fresh, tokens)[0])


def test_a_cache_that_began_in_bf16_goes_on_in_fp32(model):
    """Kept tensors become fp32, as transformers' own do, and lose nothing."""
    plain = unpatched(model).to(torch.bfloat16)
    model.to(torch.bfloat16)
    caches = [begun(model, TOKENS[:, :21]), begun(plain, TOKENS[:, :21])]
    got, want = (step(one.float(), TOKENS[:, 21:], cache) for one, cache in zip((model, plain), caches, strict=True))
    assert got.dtype == want.dtype == torch.float32 and entries(caches[0], 0).dtype == torch.float32
    assert (got - want).norm() <= 0.05 * want.norm()


def test_autocast(model):
    plain = unpatched(model)
    exact = run(plain, TOKENS)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got, want = run(model, TOKENS, [21, 22])[0], run(plain, TOKENS, [21, 22])[0]
    assert got.dtype == want.dtype and (got - exact).norm() <= 1.5 * (want - exact).norm()


# Gradients


@pytest.mark.parametrize(
    "name", ["position_bias", "kv_norm.weight", "kv_proj.weight", "gate_proj.weight", "indexer.position_bias"]
)
def test_training_a_compressor_behind_a_filled_cache_is_refused_by_name(model, name):
    """What came before is kept without its gradient."""
    cache, filled = begun(model, TOKENS[:, :21]), {"use_cache": True}
    model.requires_grad_(False).train()
    model(TOKENS[:, 21:], **{CACHE: copy.deepcopy(cache)}, **filled)  # nothing asks for a gradient
    model.lm_head.requires_grad_()
    model(TOKENS[:, 21:], **{CACHE: copy.deepcopy(cache)}, **filled).logits.sum().backward()  # nor is one lost here
    assert model.lm_head.weight.grad is not None
    compressors(model)[1].get_parameter(name).requires_grad_()
    with pytest.raises(UnsupportedError, match=f"gradients.* {name}"):
        model(TOKENS[:, 21:], **{CACHE: cache}, **filled)
    with torch.no_grad():
        close(model(TOKENS).logits, run(unpatched(model), TOKENS)[0])
    close(model.eval()(TOKENS).logits, run(unpatched(model), TOKENS)[0])


def test_training_what_comes_before_a_compressor_behind_a_filled_cache_is_refused(model):
    cache = begun(model, TOKENS[:, :21])
    model.requires_grad_(False).train().model.embed_tokens.requires_grad_()
    with pytest.raises(UnsupportedError, match=r"gradients.* hidden_states"):
        model(TOKENS[:, 21:], **{CACHE: cache})


@pytest.mark.parametrize("name", ["kv_proj", "gate_proj"])
def test_training_what_a_hook_adds_to_a_projection_is_refused(model, name):
    """It is no parameter of the compressor, and the gradient of it would be lost likewise."""
    cache = begun(model, TOKENS[:, :21])
    model.requires_grad_(False).train()
    scale = torch.ones(1, requires_grad=True)
    getattr(compressors(model)[0], name).register_forward_hook(lambda module, args, out: out * scale)
    with pytest.raises(UnsupportedError, match=f"gradients.* {name}"):
        model(TOKENS[:, 21:], **{CACHE: cache})


def test_eval_mode_behind_a_filled_cache_runs_detached(model):
    """As from_pretrained gives a model: all parameters require a gradient and nobody wants one."""
    cache = DynamicCache(config=model.config)
    logits = [model(piece, **{CACHE: cache}).logits for piece in (TOKENS[:, :21], TOKENS[:, 21:])]
    close(torch.cat(logits, 1).detach(), run(model, TOKENS)[0])
    logits[1].sum().backward()
    assert model.lm_head.weight.grad is not None
    with pytest.raises(UnsupportedError, match=r"gradients.* inputs_embeds"):
        model(inputs_embeds=model.model.embed_tokens(TOKENS), **{CACHE: cache})


def test_eval_mode_has_gradients_of_whole_sequences(model):
    """Those of parameters and of the input, as transformers' own; with a cache, which goes on from there."""
    found = []
    for one in (model, unpatched(model)):
        embeds, cache = one.model.embed_tokens(TOKENS).detach().requires_grad_(), DynamicCache(config=model.config)
        one(inputs_embeds=embeds, **{CACHE: cache}).logits.sin().sum().backward()
        found.append(
            [embeds.grad, *(parameter.grad for parameter in compressors(one)[0].parameters()), step(one, TOKENS, cache)]
        )
    for mine, their in zip(*found, strict=True):
        assert (mine - their).norm() <= 1e-4 * their.norm()


# Calls in every form

OLD_NAME = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("name", [None, CACHE, "past_key_values"])
def test_a_model_takes_its_cache_by_place_and_by_both_names(model, name):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in (TOKENS[:, :21], TOKENS[:, 21:]):
            got = model(piece, **{name: cache}) if name else model(piece, None, None, cache)
    assert torch.equal(got.logits, run(model, TOKENS, [21])[0][:, 21:])
    assert got[CACHE] is cache and entries(cache, 1).shape[1] == TOKENS.shape[1] // 4


@OLD_NAME
def test_a_compressor_takes_its_arguments_in_any_form(model):
    plain = unpatched(model)
    hidden, residual, positions = torch.randn(2, 20, 32), torch.randn(2, 20, 16), torch.arange(20)[None]
    named = {"hidden_states": hidden, "q_residual": residual, "position_ids": positions}
    with torch.no_grad():
        for index in (0, 1, -1):
            want = compressors(plain)[index](hidden, residual, positions, DynamicCache(config=model.config), index)
            for arguments, keywords in (
                ((hidden, residual, positions, DynamicCache(config=model.config), index), {}),
                ((hidden, residual, positions), {CACHE: DynamicCache(config=model.config), "layer_idx": index}),
                ((), named | {"past_key_values": DynamicCache(config=model.config), "layer_idx": index}),
                ((hidden,), dict(list(named.items())[1:]) | {CACHE: None, "layer_idx": index}),
            ):
                got = compressors(model)[index](*arguments, **keywords)
                for mine, their in zip(got, want, strict=True):
                    close(mine, their)
        with pytest.raises(TypeError, match="layer_idx"):
            compressors(model)[0](hidden, residual, positions, None)


SELECTIONS = {
    "indices": torch.tensor([2, 0, 0]),
    "mask": torch.tensor([True, False, True]),
    "list": [1, -1],
    "slice": slice(1, 3),
}


@pytest.mark.parametrize("chosen", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_selected_rows_go_on(model, chosen, mode):
    """What a cache of the chosen rows would have been; in inference mode too, and outside of it again."""
    tokens = ids(40, 3)
    rows = tokens[chosen]
    cache = DynamicCache(config=model.config)
    with mode():
        model(tokens[:, :21], **{CACHE: cache})
        cache.batch_select_indices(chosen)
        cache.batch_repeat_interleave(2)
    got = step(model, rows[:, 21:].repeat_interleave(2, 0), cache)
    close(got, run(model, rows, [21])[0][:, 21:].repeat_interleave(2, 0))


@pytest.mark.parametrize("removed", [1, 3, 5])
def test_crop_takes_the_end_of_the_last_step_back(model, removed):
    cache = DynamicCache(config=model.config)
    step(model, TOKENS[:, :30], cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):  # transformers' own word
        cache.crop(-removed)
    cache.activate_past_recording()
    step(model, TOKENS[:, 10:15], cache)  # five other tokens
    cache.crop(0)
    assert cache.get_seq_length() == 35
    with pytest.raises(UnsupportedError, match="rewind from 35 to 29"):
        cache.crop(-6)
    cache.crop(-removed)
    assert cache.get_seq_length() == 35 - removed
    sequence = torch.cat([TOKENS[:, :30], TOKENS[:, 10 : 15 - removed], TOKENS[:, 30:]], 1)
    got = step(model, TOKENS[:, 30:], cache)
    close(got, run(model, sequence)[0][:, 35 - removed :])


def test_a_rewind_behind_a_selection(model):
    """Keys from before the step, which only a rewind reads, follow the rows, too."""
    cache = begun(model, TOKENS[:, :21])
    step(model, TOKENS[:, 21:25], cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    rewind(cache, 22)
    close(step(model, TOKENS[[1, 0], 22:], cache), run(model, TOKENS[[1, 0]], [21, 22])[0][:, 22:])


def test_a_cache_that_was_reset_is_anyones(model):
    cache = begun(model, TOKENS[:, :21])
    cache.reset()
    assert torch.equal(step(unpatched(model), TOKENS, cache), run(unpatched(model), TOKENS)[0])


def test_a_second_rewind_reaches_as_far_as_the_state_does(model):
    """Rows of tokens that were taken back have cost rows before them; that is said at once, not at the next step."""
    cache = begun(model, TOKENS[:, :2])
    step(model, TOKENS[:, 2:7], cache)
    rewind(cache, 4)
    with pytest.raises(UnsupportedError, match="rewind from 4 to 1"):
        rewind(cache, 1)
    rewind(cache, 2)
    close(step(model, TOKENS[:, 2:], cache), run(model, TOKENS)[0][:, 2:])


def test_a_refused_rewind_changes_nothing():
    """Not even a layer without a compressor that comes first and could go back."""
    model = tiny(layer_types=[LAYERS[2], *TWO])
    patch(model, max_new_tokens=2)
    cache = begun(model, TOKENS[:, :20])
    cache.layers[0].activate_past_recording()
    step(model, TOKENS[:, 20:26], cache)
    with pytest.raises(UnsupportedError, match="rewind from 26 to 22"):
        rewind(cache, 22)
    assert {layer.get_seq_length() for layer in cache.layers} == {26}
    rewind(cache, 25)
    close(step(model, TOKENS[:, 25:], cache), run(model, TOKENS)[0][:, 25:])


# Refused calls leave all as it was


def _contents(cache):
    return copy.deepcopy([{name: one for name, one in layer.__dict__.items() if name != "kvfold"} for layer in cache.layers])


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b


def _batch(model, cache):
    with torch.no_grad():
        model(TOKENS[:1, 21:], **{CACHE: cache})


def _training(model, cache):
    model.train()
    try:
        model(TOKENS[:, 21:], **{CACHE: cache})
    finally:
        model.eval()


def _half(model, cache):
    with torch.autocast("cpu", torch.float16):
        step(model, TOKENS[:, 21:], cache)


def _late(model, cache):
    """Refused by the second of three compressors of the step."""
    bias = compressors(model)[1].position_bias
    compressors(model)[1].position_bias = torch.nn.Parameter(bias.to("meta"))
    try:
        step(model, TOKENS[:, 21:], cache)
    finally:
        compressors(model)[1].position_bias = bias


REFUSED = [_batch, _training, _half, _late]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("refused", REFUSED)
def test_a_refused_call_changes_nothing(refused, begin):
    """Of sliding layers either, which come first here; and the call that is right is made then."""
    if not begin and refused in (_batch, _training):
        return  # nothing to be of another batch than, and nothing that has lost its gradient
    model = tiny(layer_types=[LAYERS[2], *TWO])
    patch(model, max_new_tokens=30)
    cache = DynamicCache(config=model.config)
    want = run(model, TOKENS, [21] if begin else [])[0]
    if begin:
        step(model, TOKENS[:, :21], cache)
    before, kinds = _contents(cache), [type(layer) for layer in cache.layers]

    with pytest.raises(RuntimeError):  # kvfold's UnsupportedError is one, and transformers' own for another batch
        refused(model, cache)
    assert _same(dict(enumerate(before)), dict(enumerate(_contents(cache))))
    assert [type(layer) for layer in cache.layers] == kinds
    rest = TOKENS[:, 21:] if begin else TOKENS
    assert torch.equal(step(model, rest, cache), want[:, -rest.shape[1] :])


def test_a_call_that_fails_can_be_made_again(model):
    """Somebody else's error, in the last layer, after kvfold wrote; drafts before it can no longer be taken back."""
    want = run(model, TOKENS, [21, 24])[0]
    cache = begun(model, TOKENS[:, :21])
    step(model, TOKENS[:, 21:24], cache)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, TOKENS[:, 24:], cache)
    handle.remove()
    assert cache.get_seq_length() == 24
    with pytest.raises(UnsupportedError, match="rewind from 24 to 22"):
        rewind(cache, 22)
    assert torch.equal(step(model, TOKENS[:, 24:], cache), want[:, 24:])


def test_a_crop_that_failed_halfway_is_not_gone_on_from():
    """transformers crops layer by layer, so those before the one that refuses are shorter; `rewind` checks all before."""
    model = tiny(layer_types=["sliding_attention", *TWO])
    patch(model, max_new_tokens=2)
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.activate_past_recording()
    for start in range(0, 30, 3):
        step(model, ids(30)[:, start : start + 3], cache)
    with pytest.raises(UnsupportedError, match="a rewind from 30 to 10 tokens"):
        rewind(cache, 10)
    assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3
    with pytest.raises(UnsupportedError, match="a rewind from 30 to 10 tokens"):
        cache.crop(-20)
    assert [layer.get_seq_length() for layer in cache.layers] == [10, 30, 30]
    with pytest.raises(UnsupportedError, match="layers hold 10, 30, 30 tokens"):
        step(model, ids(1), cache)


def test_an_interrupted_call_is_told_of(model):
    """Ctrl-C runs no hooks, so the cache stays half-way; a step on it is refused and says why."""
    cache = begun(model, TOKENS[:, :21])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, TOKENS[:, 21:24], cache)
    handle.remove()
    with pytest.raises(UnsupportedError, match=r"layers hold 24, 21 tokens, as after .* a call that was interrupted"):
        step(model, TOKENS[:, 21:24], cache)
