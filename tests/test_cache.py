"""The cache room: what every method must keep, and what each of them drops, counted and compared with naive twins."""

import copy
import gc
import sys
from dataclasses import replace
from importlib.util import find_spec

import kv_twins
import naive_codes
import pytest
import torch
from families import FAMILIES, VOCAB
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from headwise.anatomy import anatomy
from headwise.attach import attach, attached, caching, detach, treated
from headwise.cache import AdaKV, Duo, Preallocated, Quantised, Razor, SnapKV, Streaming
from headwise.codes import Codes, primitives
from headwise.data import Needle, Planted
from headwise.kv_cache import CacheMethod, KVCache, kv_units
from headwise.method import catalogue, load
from headwise.store import GROWTH, Turn

PRIMITIVES = primitives
NAMES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")
PROMPT, NEW = 24, 9
# Fields with which a method of the room has something to do on prompts of 24 tokens.
SMALL = {
    "adakv": {"window": 4, "capacity": 10, "kernel": 3},
    "duo": {"sink": 2, "recent": 6},
    "infllm": {"sink": 2, "recent": 8, "block": 4, "blocks": 2, "representatives": 2, "chunk": 3, "single": 4},
    "longheads": {"chunk": 4, "chunks": 5, "together": 3, "single": 4},
    "pages": {"budget": 16, "page": 4, "piece": 2, "interval": 2, "single": 4},
    "razor": {"sink": 2, "recent": 6, "share": 0.0},
    "snapkv": {"window": 4, "capacity": 10, "kernel": 3},
    "streaming": {"sink": 2, "recent": 6},
}
# Tokens that a KV head holds at most after a prompt of `had` tokens and `new` more; the rest of the room holds all.
HOLDS = {
    "adakv": lambda had, new: (10 + new) * GROWTH,
    "duo": lambda had, new: 8,
    "razor": lambda had, new: 2 + 1 + 6 + 2 * 16,
    "snapkv": lambda had, new: (10 + new) * GROWTH,
    "streaming": lambda had, new: 8,
}
METHODS = {card.name.split(".")[1]: card.name for card in catalogue("cache")}
# Few bits on top of other methods: a buffer, a ring, slots that move, buffers of many lengths.
CODED = {"int4 streaming": (4, "streaming"), "int8 razor": (8, "razor"), "int4 adakv": (4, "adakv")}
METHODS |= dict.fromkeys(CODED, "cache.quantised")
WAYS = {
    "padded batch": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "streamer": {},
}


def small(name: str) -> CacheMethod:
    if name in CODED:
        bits, inner = CODED[name]
        return load("cache.quantised")(bits=bits, of=small(inner))
    return load(METHODS[name])(**SMALL.get(name, {}))


def build(name: str, dtype: torch.dtype = torch.float32):
    family = FAMILIES[name]
    if name == "mistral":
        family = replace(family, fields={**family.fields, "sliding_window": None})
    model = family.build(dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module", autouse=True)
def codes():
    """Where torchao is not installed, its naive twin takes its place."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torchao") is None:
            patch.setattr("headwise.codes.primitives", lambda: naive_codes)
        yield


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, build(name))


def text(rows: int = 2, length: int = PROMPT, pads: tuple = (), seed: int = 0) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= torch.tensor(pads or (0,) * rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def through(model, inputs: dict, cache, turns: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of a text read through a cache in turns of so many tokens, in a model that is entered."""
    return kv_twins.cached_logits(model, inputs["input_ids"], inputs["attention_mask"], cache, turns)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def generated(model, way: str) -> list:
    """Tokens that `generate` gives, in one of the ways in which users call it."""
    options = {"max_new_tokens": NEW, "do_sample": False, **WAYS.get(way, {})}
    inputs = text(pads=(0, 5)) if way in ("padded batch", "beams", "chunks", "sampling") else text(rows=1)
    if way == "prompt lookup":
        part = text(rows=1, length=8)["input_ids"]
        inputs = {"input_ids": part.repeat(1, 3), "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    torch.manual_seed(11)
    if way == "streamer":
        heard = Heard()
        model.generate(**inputs, **options, streamer=heard)
        return heard.tokens
    if way != "chat":
        return model.generate(**inputs, **options).tolist()
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    more = torch.cat([first.sequences, text(rows=1, length=7, seed=5)["input_ids"]], 1)
    mask = torch.ones_like(more)
    return model.generate(more, attention_mask=mask, **options, past_key_values=first.past_key_values).tolist()


@pytest.mark.parametrize("way", [*WAYS, "chat"])
@pytest.mark.parametrize("name", NAMES)
def test_with_everything_kept_generate_is_what_it_was(models, name, way):
    model = models(name)
    plain = generated(model, way)
    with treated(model, {}):
        assert generated(model, way) == plain


@pytest.mark.parametrize("way", [*WAYS, "chat"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_generates_in_every_way(models, method, way):
    with treated(models("llama"), small(method)):
        first, again = (generated(models("llama"), way) for _ in range(2))
        assert first == again


def refuses(method: str, model) -> bool:
    """Whether a method says that it cannot serve a model."""
    try:
        with caching(model), torch.no_grad():
            model(**text(), past_key_values=small(method).build(model))
    except ValueError as error:
        assert len(str(error)) > 30, error
        return True
    return False


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama"])
def test_every_method_serves_every_family(models, name, method):
    model = models(name)
    if refuses(method, model):
        pytest.skip(f"{method} refuses {name}")
    # A head that is treated beside one that keeps all: two stores in a layer.
    with treated(model, dict.fromkeys(kv_units(model)[::2], small(method))):
        assert len(generated(model, "padded batch")[0]) == PROMPT + NEW


def size(model, tokens: float, rows: int = 2) -> float:
    """Bytes of so many tokens in every KV head of the full-attention layers."""
    body = anatomy(model)
    layers = {int(unit.split(".")[0][1:]) for unit in kv_units(model)}
    width = sum(body.kv_heads(n) * (body.layer(n).head_dim + body.layer(n).value_dim) for n in layers)
    return rows * tokens * width * 4


def storages(tensors) -> dict[int, int]:
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.numel()}


def alive() -> dict[int, int]:
    gc.collect()
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return storages(one for one in found if one.dtype != torch.long)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_dropped_is_gone(models, method):
    """Everything that lives on after a text is counted by `bytes`, and it is no more than the method promises."""
    turns = [40, 10, 10, *[1] * 12]
    model, inputs = models("llama"), text(length=72, pads=(0, 3))
    with caching(model), torch.no_grad():
        through(model, inputs, small(method).build(model), turns)
        before = alive()
        cache = small(method).build(model)
        through(model, inputs, cache, turns)
        left = {place: bytes_ for place, bytes_ in alive().items() if place not in before}
        held = storages(cache.tensors())
        assert set(left) <= set(held), sum(left.values()) - cache.bytes()
    assert cache.bytes() == sum(held.values())
    most = HOLDS.get(method, lambda had, new: 1.3 * (had + new) * GROWTH)(60, 12)
    # Beside keys and values: where rows begin, biases and sums, all without the factor d.
    assert cache.bytes() <= size(model, most) + 2 * 2 * 8 * (8 + most) + 2 * 2 * 2 * 16 * 4 * 2
    assert cache.get_seq_length() == 72


@pytest.mark.parametrize("method", METHODS)
def test_what_is_taken_back_never_was(models, method):
    model, inputs = models("llama"), text(length=40, pads=(0, 3))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = text(length=12, seed=3)["input_ids"]

    def read(turns, cache, ids=ids, mask=mask):
        with caching(model):
            return kv_twins.cached_logits(model, ids[:, : sum(turns)], mask[:, : sum(turns)], cache, turns)

    for wrong, back, right in (([4], 4, []), ([4], 2, [2]), ([1, 3], 4, []), ([1, 1, 1], 2, [1]), ([8], 3, [5])):
        ours = small(method).build(model)
        ours.activate_past_recording()
        start, added = 24 + sum(wrong) - back, torch.ones_like(more)
        seen = torch.cat([ids[:, :start], more], 1)
        with caching(model), torch.no_grad():
            kv_twins.cached_logits(model, ids[:, :24], mask[:, :24], ours, [20, 1, 1, 1, 1])
            ours.crop(0)
            for length in wrong:
                at = ours.get_seq_length()
                places = (mask.cumsum(-1) - 1).clamp_min(0)[:, at : at + length]
                model(ids[:, at : at + length], attention_mask=mask[:, : at + length], position_ids=places,
                      past_key_values=ours)  # fmt: skip
            ours.crop(-back)
            assert ours.get_seq_length() == start
            places = (torch.cat([mask[:, :start], added], 1).cumsum(-1) - 1)[:, start:]
            whole = torch.cat([mask[:, :start], added], 1)
            got = model(more, attention_mask=whole, position_ids=places, past_key_values=ours).logits
        never = read([20, 1, 1, 1, 1, *right, 12], small(method).build(model), seen, whole)[:, -12:]
        torch.testing.assert_close(got, never, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_picked(models, method):
    """Beams: rows that are copied, swapped and dropped go on as if they had always been so."""
    model, inputs = models("llama"), text(rows=3, length=40, pads=(0, 3, 6))
    rows = torch.tensor([2, 2, 0])
    turns = [24, 1, 1, 1, 5, 1, 7]
    chosen = {name: value[rows] for name, value in inputs.items()}
    with caching(model), torch.no_grad():
        ours, theirs = (small(method).build(model) for _ in range(2))
        half = {name: value[:, :27] for name, value in inputs.items()}
        through(model, half, ours, turns[:4])
        ours.reorder_cache(rows)
        want = through(model, chosen, theirs, turns)
        places = chosen["attention_mask"].cumsum(-1) - 1
        for start, stop in ((27, 32), (32, 33), (33, 40)):
            got = model(chosen["input_ids"][:, start:stop], attention_mask=chosen["attention_mask"][:, :stop],
                        position_ids=places[:, start:stop], past_key_values=ours).logits  # fmt: skip
            torch.testing.assert_close(got, want[:, start:stop], atol=1e-4, rtol=1e-4)
        single = KVCache(model, dict.fromkeys(kv_units(model), small(method)))
        kv_twins.cached_logits(model, inputs["input_ids"][:1, :20], None, single, [20])
        single.batch_repeat_interleave(3)
        assert next(iter(single.tensors())).shape[0] == 3
        single.reset()
        assert single.get_seq_length() == 0 and not list(single.tensors())
        again = through(model, inputs, single, [33, 1, 1, 5])
        fresh = through(model, inputs, small(method).build(model), [33, 1, 1, 5])
        assert torch.equal(again, fresh)


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(models, method):
    model, inputs = models("llama"), text(length=44, pads=(0, 7))
    with caching(model):
        both = through(model, inputs, small(method).build(model), [30, 6, *[1] * 8])
        alone = kv_twins.cached_logits(
            model, inputs["input_ids"][1:, 7:], None, small(method).build(model), [23, 6, *[1] * 8]
        )
        torch.testing.assert_close(both[1:, 7:], alone, atol=1e-4, rtol=1e-4)
        # The longer row is not disturbed by the shorter one, nor by a chunk in which the other has not begun.
        alone = kv_twins.cached_logits(
            model, inputs["input_ids"][:1], None, small(method).build(model), [5, 25, 6, *[1] * 8]
        )
        both = through(model, inputs, small(method).build(model), [5, 25, 6, *[1] * 8])
        torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
        assert both[1, 7:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype):
    for name in ("llama", "gpt2"):
        model, exact = build(name, dtype), build(name)
        for method in METHODS:
            if refuses(method, exact):
                continue
            cache = small(method).build(model)
            inputs = text(length=40, pads=(0, 5))
            with caching(model):
                logits = through(model, inputs, cache, [30, 4, *[1] * 6])
            with caching(exact):
                want = through(exact, inputs, small(method).build(exact), [30, 4, *[1] * 6])
            real = inputs["attention_mask"].bool()
            off = (logits.float() - want)[real].abs().mean() / want[real].abs().mean()
            assert off < 0.25, (name, method, off)
            assert {one.dtype for one in cache.tensors() if one.ndim == 4 and one.shape[3] == 8} <= {
                dtype,
                torch.uint8,
                torch.int8,
            }


# Each method against its naive twin


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


# Few bits


def test_few_bits_are_few_bytes_and_near():
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 10
    for bits, most, off in ((8, 0.27, 0.02), (4, 0.165, 0.2)):
        codec = Codes(bits)
        parts = codec.encode(x)
        again = codec.decode(parts)
        assert sum(one.numel() * one.itemsize for one in parts) <= most * x.numel() * 4
        assert (again - x).norm() / x.norm() < off
        for one, other in zip(codec.encode(again), parts, strict=True):
            assert (one.float() - other.float()).abs().mean() < 1e-3
        half = codec.decode(codec.encode(x.bfloat16()))
        assert half.dtype == torch.bfloat16 and (half.float() - x).norm() / x.norm() < off + 0.01


@pytest.mark.parametrize("inner", [None, Streaming(2, 12), Razor(2, 12), SnapKV(4, 16), AdaKV(4, 16)], ids=str)
def test_few_bits_change_little(models, inner):
    model, inputs = models("llama"), text(length=60, pads=(0, 5))
    real, turns = inputs["attention_mask"].bool(), [30, *[1] * 30]
    with caching(model):
        want = through(model, inputs, (inner or Preallocated()).build(model), turns)[real]
        for bits, most in ((8, 0.01), (4, 0.1)):
            got = through(model, inputs, Quantised(bits, of=inner).build(model), turns)[real]
            assert 0 < (got - want).norm() / want.norm() < most


def test_the_naive_codes_are_those_of_torchao():
    real = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        ours, theirs = Codes(bits), Codes(bits)
        ours.tools, theirs.tools = naive_codes, real
        for one, other in zip(ours.encode(x), theirs.encode(x), strict=True):
            torch.testing.assert_close(one, other, atol=1, rtol=1e-5)
        parts = theirs.encode(x)
        torch.testing.assert_close(ours.decode(parts), theirs.decode(parts), atol=1e-5, rtol=1e-5)


def test_without_torchao_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install headwise\[quantised\]"):
        PRIMITIVES()


def test_a_method_inside_another_has_a_name():
    method = Quantised(4, of=Streaming(2, 6))
    inner = {"name": "cache.streaming", "fields": {"sink": 2, "recent": 6}}
    assert method.identity() == {"name": "cache.quantised", "fields": {"bits": 4, "of": inner}}
    assert Quantised().identity()["fields"] == {"bits": 8, "of": None}


# Planted heads


@pytest.fixture(scope="module")
def planted():
    return Planted(parts=("retrieval",), decoys=("mute",), kv_heads=3).build(seed=2)


@pytest.mark.parametrize("method", [Streaming(4, 32), Duo(4, 32), Razor(4, 32, 0.0)], ids=str)
def test_the_planted_retrieval_head_must_be_kept(planted, method):
    needles = Needle(length=160, depths=(0.1, 0.3, 0.5)).make(planted.tokenizer, 3)
    unit = next(unit for unit, part in planted.truth.items() if part == "retrieval")
    layer, head = int(unit.split(".")[0][1:]), int(unit.split("H")[1])
    retrieves = f"L{layer}.G{anatomy(planted.model).group(layer, head)}"
    others = [one for one in kv_units(planted.model) if one != retrieves]
    question = int(needles.spans["question"][:, 0].min())
    turns = [question, *[1] * (needles.ids.shape[1] - question)]

    def found(heads: list[str]) -> float:
        cache = method.build(planted.model, heads)
        with caching(planted.model):
            logits = kv_twins.cached_logits(planted.model, needles.ids, needles.inputs["attention_mask"], cache, turns)
        return float((logits[:, -1].argmax(-1) == needles.answer[:, 0]).float().mean())

    assert found([]) == found(others) == 1.0
    assert found([retrieves]) == 0.0


# Entering and leaving


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


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (Razor, {"recent": 0}, "allowed are sink >= 0"),
        (Razor, {"share": 1.0}, "less than 1"),
        (Razor, {"single": 0}, "a length of 1 or more tokens"),
        (SnapKV, {"window": 1}, "2 or more"),
        (SnapKV, {"capacity": 32}, "more than the window"),
        (SnapKV, {"share": 1.5}, "0 to 1"),
        (AdaKV, {"kernel": 4}, "1, 3, 5"),
        (AdaKV, {"safeguard": 2.0}, "safeguard is 2.0"),
        (Quantised, {"bits": 3}, "8 and 4"),
    ],
)
def test_fields_out_of_range(method, fields, message):
    with pytest.raises(ValueError, match=message):
        method(**fields)


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
