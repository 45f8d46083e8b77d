"""The cache room: what every method must keep, counted; fields and planted heads."""

import gc

import kv_twins
import pytest
import torch
from caches import HOLDS, METHODS, NAMES, NEW, PROMPT, WAYS, build, generated, size, small, text, through

from headwise.anatomy import anatomy
from headwise.attach import caching, treated
from headwise.buffer import GROWTH
from headwise.cache import AdaKV, Duo, Quantised, Razor, SnapKV, Streaming
from headwise.data import Needle, Planted
from headwise.kv_cache import KVCache, kv_units

pytestmark = pytest.mark.usefixtures("codes")


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
