"""Caches enter a model and leave it as it was, and say where they are not read."""

import copy
import shutil

import kv_twins
import pytest
import torch
from caches import PROMPT, built_once, text

from headwise.attach import attach, attached, caching, detach, treated
from headwise.cache import AdaKV, InfLLM, LongHeads, Pages, Preallocated, Razor, SnapKV, Streaming
from headwise.kv_cache import KVCache


@pytest.fixture(scope="module")
def models():
    return built_once()


def test_attach_and_detach_leave_the_model_as_it_was(models):
    model, inputs = models("llama"), text(pads=(0, 4))
    name, before = model.config._attn_implementation, copy.deepcopy(model.state_dict())
    own = set(vars(model))
    with torch.no_grad():
        logits = model(**inputs).logits
    attach(model, Streaming(2, 6))
    assert attached(model)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, {})
    with pytest.raises(RuntimeError, match="boom"):
        model.generate(**inputs, max_new_tokens=3, logits_processor=[_Boom()])
    detach(model)
    assert model.config._attn_implementation == name and set(vars(model)) == own and not attached(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    with pytest.raises(ValueError, match="No cache plan"):
        detach(model)
    with pytest.raises(ValueError, match=r"L9.G0 is no KV head"):
        attach(model, {"L9.G0": Preallocated()})
    with pytest.raises(RuntimeError, match="boom"), caching(model):
        raise RuntimeError("boom")
    assert model.config._attn_implementation == name and set(vars(model)) == own


def test_treatments_hold_inside_a_block(models):
    model, inputs = models("llama"), text(pads=(0, 4))
    for treatments in (Streaming(2, 6), {}):
        with treated(model, treatments):
            assert attached(model)
            out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
            assert isinstance(out.past_key_values, KVCache)
        assert not attached(model)
    with treated(model, None):
        assert not attached(model)
    with pytest.raises(RuntimeError, match="boom"), treated(model, Streaming(2, 6)):
        raise RuntimeError("boom")
    assert not attached(model)
    # What was attached outside is neither replaced nor taken off by a block that cannot be entered.
    with treated(model, {}):
        with pytest.raises(ValueError, match="attached already"), treated(model, Streaming(2, 6)):
            pass
        assert attached(model)


class _Boom:
    def __call__(self, ids, scores):
        raise RuntimeError("boom")


def test_a_cache_that_is_not_read_says_so(models):
    model, inputs = models("llama"), text()
    with pytest.raises(RuntimeError, match="does not go through it"):
        model.generate(**inputs, max_new_tokens=3, past_key_values=Streaming(2, 6).build(model))


def test_masks_that_hide_other_keys(models):
    """Right padding: what keeps everything follows it, what drops tokens refuses."""
    model, inputs = models("llama"), text()
    inputs["attention_mask"][1, -4:] = 0
    with caching(model), torch.no_grad():
        want = model(**inputs).logits
        got = model(**inputs, past_key_values=Preallocated().build(model)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        for method in (Streaming(2, 6), Razor(), SnapKV(), AdaKV()):
            with pytest.raises(ValueError, match="hides other keys"):
                model(**inputs, past_key_values=method.build(model))


def test_taking_back_what_was_not_recorded(models):
    model = models("llama")
    for method in (Streaming(2, 6), Razor(2, 6), SnapKV(4, 10)):
        cache = method.build(model)
        with caching(model):
            kv_twins.cached_logits(model, text()["input_ids"], None, cache, [PROMPT])
        with pytest.raises(ValueError, match="than this cache has recorded"):
            cache.crop(-3)
        with pytest.raises(ValueError, match="as a negative one"):
            cache.crop(3)


COMPILED = [
    Preallocated(),
    Streaming(2, 12),
    Pages(budget=16, page=4, piece=4),
    LongHeads(chunk=4, chunks=4, together=4),
    InfLLM(sink=2, recent=8, block=4, blocks=2, representatives=1, chunk=4),
]


def _compiled(model, monkeypatch, method, **how):
    """Whether a compiled model generates what it generates as it is, through a cache."""
    torch._dynamo.reset()
    with treated(model, method):
        plain = model.generate(**text(length=40), max_new_tokens=6, do_sample=False)
        monkeypatch.setattr(model, "forward", torch.compile(model.forward, **how))
        return torch.equal(plain, model.generate(**text(length=40), max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("method", COMPILED, ids=lambda method: type(method).__name__)
def test_a_compiled_model_says_the_same(models, monkeypatch, method):
    # Traced by torch.compile as on a GPU, though no kernels are made.
    assert _compiled(models("llama"), monkeypatch, method, backend="eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.timeout(1800)  # kernels are made one after the other
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles kernels with g++")
@pytest.mark.parametrize("method", COMPILED, ids=lambda method: type(method).__name__)
def test_kernels_that_are_made_say_the_same(models, monkeypatch, method):
    assert _compiled(models("llama"), monkeypatch, method, backend="inductor", dynamic=True)
