"""Methods of the cache room against naive twins: whole passes under a mask, or with the compensation written out."""

from dataclasses import replace

import kv_twins
import pytest
import torch
from caches import METHODS, built_once, size, small, text, through
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from headwise.anatomy import anatomy
from headwise.attach import caching
from headwise.cache import AdaKV, Duo, Preallocated, Razor, SnapKV, Streaming
from headwise.kv_cache import KVCache, kv_units
from headwise.store import Turn


@pytest.fixture(scope="module")
def models():
    return built_once()


@pytest.mark.parametrize("pads", [(0, 0), (0, 5), (3, 9)], ids=str)
@pytest.mark.parametrize("turns", [[20, *[1] * 20], [7, 9, 10, 1, 1, 1, 1, 10], [1] * 40, [40]], ids=len)
def test_streaming_and_razor_equal_their_twins(models, turns, pads):
    for name in ("llama", "gemma3"):
        model, inputs = models(name), text(length=40, pads=pads)
        real, where = inputs["attention_mask"].bool(), torch.tensor(pads)
        with caching(model):
            ours = through(model, inputs, Streaming(2, 5).build(model), turns)
        body = anatomy(model)
        full = {int(unit.split(".")[0][1:]) for unit in kv_units(model)}
        seen = kv_twins.streaming(2, 5, where)
        if len(full) == len(body.layers):
            twin = kv_twins.masked_logits(model, inputs["input_ids"], inputs["attention_mask"], seen)
            torch.testing.assert_close(ours[real], twin[real], atol=2e-4, rtol=1e-4)
        for share, single in ((0.0, 1), (0.4, 1), (0.4, 9)):
            with caching(model):
                ours = through(model, inputs, Razor(2, 5, share, single).build(model), turns)
            cut = [turns[0], *(one for turn in turns[1:] for one in ([1] * turn if turn <= single else [turn]))]
            twin = kv_twins.compensated_logits(model, inputs["input_ids"], where, cut, 2, 5, share, full)
            torch.testing.assert_close(ours[real], twin[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "method", [SnapKV(4, 10, kernel=3), AdaKV(4, 10, kernel=3), AdaKV(4, 12, safeguard=0.0)], ids=str
)
def test_chosen_tokens_are_those_of_the_twin(models, name, method):
    model, ids = models(name), text(rows=1, length=40)["input_ids"]
    safeguard = getattr(method, "safeguard", None)
    stay = kv_twins.chosen(model, ids[:, :25], method.window, method.capacity, method.kernel, safeguard)
    twin = kv_twins.masked_logits(model, ids, None, kv_twins.after_prompt(stay, 25))
    with caching(model):
        ours = kv_twins.cached_logits(model, ids, None, method.build(model), [25, *[1] * 10, 3, 2])
    torch.testing.assert_close(ours, twin, atol=2e-4, rtol=1e-4)
    if safeguard is not None:
        assert len({len(one) for one in stay.values()}) > 1 or name != "gpt2"
        assert sum(map(len, stay.values())) == method.capacity * len(stay)


def test_ada_kv_frees_what_a_head_gives_up(models):
    model, ids = models("gpt2"), text(rows=1, length=100)["input_ids"]
    for method in (SnapKV(4, 20), AdaKV(4, 20), AdaKV(4, 20, safeguard=1.0)):
        cache = method.build(model)
        with caching(model):
            kv_twins.cached_logits(model, ids, None, cache, [100])
        assert cache.bytes() == size(model, 20, rows=1)
        lengths = {one.shape[2] for one in cache.tensors()}
        assert (lengths == {20}) == (method != AdaKV(4, 20))
    share = SnapKV(window=4, share=0.25).build(model)
    with caching(model):
        kv_twins.cached_logits(model, ids, None, share, [40, 60])
    assert share.bytes() == size(model, 25, rows=1)


def test_compensation_is_exact_where_all_dropped_keys_are_alike():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 31, 8, generator=draw) for heads in (6, 3, 3))
    k[:, :, 2:20] = k[:, :, 2:3]
    store = Razor(sink=2, recent=5, share=0.0).store()
    assert store.read(q[:, :, :20], k[:, :, :20], v[:, :, :20], Turn(0)).shape == (2, 6, 20, 8)
    for at in range(20, 25):
        now = slice(at, at + 1)
        got = store.read(q[:, :, now], k[:, :, now], v[:, :, now], Turn(at))
        whole = scaled_dot_product_attention(q[:, :, now], k[:, :, : at + 1], v[:, :, : at + 1], enable_gqa=True)
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


def test_what_razor_keeps_does_not_depend_on_the_cut():
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 200, 8, generator=draw) for _ in range(2))
    pads, states = torch.tensor([0, 9]), []
    for turns in ([200], [50, 1, 99, 50], [1] * 200):
        store, past = Razor(sink=3, recent=20, share=0.25).store(), 0
        for length in turns:
            store.remember(k[:, :, past : past + length], v[:, :, past : past + length], Turn(past, pads))
            past += length
        fixed, recent = slice(0, 4), slice(store.start, store.stop)
        states.append([torch.cat([one[:, :, fixed], one[:, :, recent]], 2) for one in (store.k, store.v, store.bias)])
        assert store.stop - store.start == 50 and store.dropped.tolist() == [147, 138]
    for state in states[1:]:
        for one, other in zip(state, states[0], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", [Preallocated(), Duo(2, 6, whole=True), Razor(2, 6, 0.3)], ids=str)
def test_a_context_may_come_from_another_cache(models, method):
    model, inputs = models("llama"), text(length=50)
    own = DynamicCache(config=model.config)
    with caching(model), torch.no_grad():
        model(inputs["input_ids"][:, :40], past_key_values=own)
        cache = method.build(model)
        cache.take(model, own)
        got = model(inputs["input_ids"][:, 40:], past_key_values=cache).logits
        want = kv_twins.cached_logits(model, inputs["input_ids"], None, method.build(model), [40, 10])[:, 40:]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="50 tokens already"):
            cache.take(model, own)


# How many first tokens of a prompt of 30 may come from a cache that keeps everything; of other methods none.
OPENINGS = {str(small(name)): range(30, 31) for name in ("pages", "razor", "quantised", "int8 razor")}
OPENINGS |= {str(Preallocated()): range(31), str(Duo(2, 6, whole=True)): range(30, 31)}
OPENINGS |= {str(small("duo")): range(9), str(small("streaming")): range(9)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_prompt_may_be_begun_by_another_cache(models, family, name, codes):
    """As many tokens as the method says, and the others read as the rest of the prompt: against reading all at once."""
    model, inputs, methods = models(family), text(length=40), [small(name)]
    methods += [replace(small("duo"), whole=True)] if name == "duo" else []
    units = kv_units(model)
    for method in methods:
        for some in (units, units[::2]):
            found = KVCache(model, dict.fromkeys(some, method)).openings(30)
            assert list(found) == ([] if family == "gemma2" else list(OPENINGS.get(str(method), range(0))))
            if family != "gemma2" and 30 not in found:
                own = DynamicCache(config=model.config)
                with torch.no_grad():
                    model(inputs["input_ids"][:, :30], past_key_values=own)
                with pytest.raises(ValueError, match="would have read these 30 tokens otherwise"):
                    KVCache(model, dict.fromkeys(some, method)).take(model, own)
            for tokens in {*found[:1], *found[1:][:1], *found[-1:]} - {0}:
                own = DynamicCache(config=model.config)
                cache = KVCache(model, dict.fromkeys(some, method))
                with caching(model), torch.no_grad():
                    model(inputs["input_ids"][:, :tokens], past_key_values=own)
                    cache.take(model, own)
                    turns = [n for n in (30 - tokens, 1, 9) if n]
                    got = [
                        model(ids, past_key_values=cache).logits
                        for ids in inputs["input_ids"][:, tokens:].split(turns, 1)
                    ]
                    whole = KVCache(model, dict.fromkeys(some, method))
                    want = kv_twins.cached_logits(model, inputs["input_ids"], None, whole, [30, 1, 9])
                torch.testing.assert_close(torch.cat(got, 1), want[:, tokens:], atol=1e-4, rtol=1e-4)
