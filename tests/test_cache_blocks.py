"""Caches that choose what is read: equal to their naive twins, and to the full cache where all is read."""

from dataclasses import replace

import block_twins
import naive_codes
import pytest
import torch
from families import FAMILIES, VOCAB
from kv_twins import cached_logits

from headwise.attach import caching, treated
from headwise.blocks import Bounds
from headwise.cache.infllm import InfLLM
from headwise.cache.longheads import LongHeads
from headwise.cache.pages import Paged, Pages
from headwise.cache.quantised import Quantised
from headwise.kv_cache import kv_units
from headwise.replicate.far import Made, divergence, last_logits, nats
from headwise.rotary import rotation


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build(seed=3)


def text(rows: int = 2, length: int = 44, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def through(model, method, ids, pads, turns):
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long() if any(pads) else None
    with caching(model):
        cache = method.build(model)
        return cached_logits(model, ids, mask, cache, turns), cache


def same(ours: torch.Tensor, twin: torch.Tensor, pads: list[int]) -> None:
    for row, pad in enumerate(pads):
        torch.testing.assert_close(ours[row, pad:], twin[row, pad:], atol=1e-4, rtol=1e-4)


SMALL = Pages(budget=16, page=4, piece=2, interval=2, single=4)
TURNS = {
    "token by token": [24] + [1] * 20,
    "all at once": [44],
    "in chunks": [16, 13, 3, 1, 1, 10],
    "speculating": [25, 4, 3, 2, 1, 4, 4, 1],
}


@pytest.mark.parametrize("pads", [[0, 0], [0, 7]], ids=["full rows", "padded"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_pages_equal_their_twin(llama, turns, pads):
    ids = text()
    ours, _ = through(llama, SMALL, ids, pads, turns)
    same(ours, block_twins.twin_logits(llama, ids, pads, turns, block_twins.pages(SMALL)), pads)


def test_page_bounds_are_never_below_the_true_products():
    draw = torch.Generator().manual_seed(0)
    for padding in ([0, 0], [3, 8]):
        first = torch.tensor(padding)
        bounds = Bounds(4)
        k, q = torch.randn(2, 3, 41, 8, generator=draw), torch.randn(2, 6, 1, 8, generator=draw)
        for start, stop in ((0, 9), (9, 10), (10, 38), (38, 41)):
            bounds.take(k[:, :, start:stop], start, first)
        above = bounds.above(q, bounds.length)
        true = q.view(2, 3, 2, 8) @ k.transpose(2, 3)
        for row, pad in enumerate(padding):
            for piece in range((41 - pad) // 4):
                there = true[row, :, :, pad + 4 * piece : pad + 4 * piece + 4]
                assert bool((above[row, :, :, piece] >= there.amax(-1) - 1e-5).all())


def test_bounds_after_taking_back_are_those_of_what_is_left():
    first, k = torch.tensor([0, 5]), torch.randn(2, 3, 40, 8)
    bounds, other = Bounds(4), Bounds(4)
    bounds.take(k, 0, first)
    bounds.shrink(k[:, :, :22])
    other.take(k[:, :, :22], 0, first)
    assert torch.equal(bounds.k[:, :, : other.length], other.k)
    assert torch.equal(bounds.v[:, :, : other.length], other.v)
    assert bool((bounds.k[:, :, other.length :] == torch.inf).all())


def test_pages_read_no_more_than_their_budget(llama):
    ids = text(length=100)
    _, cache = through(llama, SMALL, ids, [0, 0], [40] + [1] * 60)
    stores = [part.store for layer in cache.layers for part in layer.parts]
    assert {store.read_tokens for store in stores} == {16}


def test_half_streaming_half_pages_is_a_plan(llama):
    from headwise.cache import Streaming

    units = kv_units(llama)
    mixed = {unit: SMALL if i % 2 else Streaming(sink=2, recent=6) for i, unit in enumerate(units)}
    with treated(llama, mixed):
        out = llama.generate(text(), max_new_tokens=30, do_sample=False, num_beams=2)
    assert out.shape[1] == 74


@pytest.mark.parametrize(
    "fields", [{"budget": 100}, {"page": 0}, {"piece": 24}, {"interval": 7}, {"budget": 128}, {"single": 0}]
)
def test_pages_refuse_sizes_that_do_not_fit(fields):
    with pytest.raises(ValueError, match=r"budget|page"):
        Pages(**fields)


MEMORY = InfLLM(sink=2, recent=8, block=4, blocks=3, representatives=2, chunk=5, single=4)
CHUNKS = LongHeads(chunk=4, chunks=5, together=3, single=4)
MOVING = {"infllm": (MEMORY, block_twins.infllm), "longheads": (CHUNKS, block_twins.longheads)}


@pytest.mark.parametrize("pads", [[0], [0, 7]], ids=["full rows", "padded"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("name", MOVING)
def test_moving_methods_equal_their_twins(llama, name, turns, pads):
    method, twin = MOVING[name]
    ids = text(len(pads))
    ours, _ = through(llama, method, ids, pads, turns)
    same(ours, block_twins.twin_logits(llama, ids, pads, turns, twin(method, rotation(llama))), pads)


@pytest.mark.parametrize("name", MOVING)
def test_moving_methods_give_padded_rows_what_they_get_alone(llama, name):
    ids = text(2)
    both, _ = through(llama, MOVING[name][0], ids, [0, 7], TURNS["token by token"])
    alone, _ = through(llama, MOVING[name][0], ids[1:, 7:], [0], [17] + [1] * 20)
    torch.testing.assert_close(both[1:, 7:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 6])
@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_after_rollback_they_go_on_as_if_nothing_had_been(llama, method, cut):
    ids = text()
    plain, _ = through(llama, method, ids, [0, 0], [24] + [1] * 20)
    with caching(llama), torch.no_grad():
        cache = method.build(llama)
        llama(ids[:, :24], past_key_values=cache)
        cache.activate_past_recording()
        start, out = 24, []
        while start < 44:
            # The last tokens of a turn are guesses that turn out wrong.
            wrong = torch.cat([ids[:, start : start + 2], (ids[:, start + 2 : start + 2 + cut] + 1) % VOCAB], 1)[:, :4]
            out.append(llama(wrong, past_key_values=cache).logits[:, :2])
            cache.crop(-(wrong.shape[1] - 2))
            start += 2
    torch.testing.assert_close(torch.cat(out, 1), plain[:, 24:], atol=1e-4, rtol=1e-4)


# How many tokens of each turn are right and how many wrong. The second turn goes beyond what is read whole and the
# third does not, so that nothing chosen in the one may be kept for those behind the other.
GUESSES = [(7, 0), (1, 10), (5, 2), (3, 6), (1, 1), (4, 12), (2, 0), (3, 5), (4, 4), (4, 9), (4, 2), (4, 3), (2, 0)]


@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_wrong_guesses_from_the_first_tokens_on_leave_no_trace(llama, method):
    method, ids = replace(method, single=64), text()
    plain, _ = through(llama, method, ids, [0, 0], [1] * 44)
    with caching(llama), torch.no_grad():
        cache = method.build(llama)
        cache.activate_past_recording()
        at, out = 0, []
        for right, wrong in GUESSES:
            guesses = torch.cat([ids[:, at : at + right], (ids[:, at : at + wrong] + 1) % VOCAB], 1)
            out.append(llama(guesses, past_key_values=cache).logits[:, :right])
            cache.crop(-wrong)
            at += right
    assert at == 44
    torch.testing.assert_close(torch.cat(out, 1), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [MEMORY, CHUNKS], ids=["infllm", "longheads"])
def test_a_long_turn_can_be_taken_back_in_part(llama, method):
    # 15 is a multiple of what looks together, so that the tokens that stay looked as they would have without the rest.
    ids, stay = text()[:, :40], 25
    plain, _ = through(llama, method, ids, [0, 5], [stay] + [1] * 15)
    mask = (torch.arange(40) >= torch.tensor([0, 5])[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with caching(llama), torch.no_grad():
        cache = method.build(llama)
        cache.activate_past_recording()
        llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(stay - 40)
        for at in range(stay, 40):
            here = {"attention_mask": mask[:, : at + 1], "position_ids": positions[:, at : at + 1]}
            z = llama(ids[:, at : at + 1], past_key_values=cache, **here).logits
            torch.testing.assert_close(z, plain[:, at : at + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_beams_run_and_speculation_says_what_decoding_says(llama, method):
    # The first turn of prompt lookup holds the prompt and guesses; it is the same turn where all look token by token.
    ids = text(rows=1, length=12).repeat(1, 3)
    with treated(llama, replace(method, single=64)):
        alone = llama.generate(ids, max_new_tokens=30, do_sample=False)
        assert torch.equal(alone, llama.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3))
        assert llama.generate(ids, max_new_tokens=12, do_sample=False, num_beams=3).shape == (1, 48)


@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_in_eight_bits_they_say_nearly_the_same(llama, method, monkeypatch):
    monkeypatch.setattr("headwise.codes.primitives", lambda: naive_codes)
    ids, turns = text(), [40, 1, 1, 1, 1]
    plain, _ = through(llama, method, ids, [0, 5], turns)
    ours, _ = through(llama, Quantised(8, of=method), ids, [0, 5], turns)
    off = (ours - plain)[:, -4:].abs().median() / plain[:, -4:].abs().median()
    assert 0 < off < 0.1


@pytest.mark.parametrize(
    "roomy", [Pages(), InfLLM(), LongHeads(), InfLLM(recent=120), LongHeads(chunk=4, chunks=60)], ids=str
)
def test_where_all_fits_they_generate_what_the_model_does(llama, roomy):
    ids = text(length=20)
    for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}):
        ids = ids[:1] if "prompt_lookup_num_tokens" in more else ids
        plain = llama.generate(ids, max_new_tokens=20, do_sample=False, **more)
        with treated(llama, roomy):
            ours = llama.generate(ids, max_new_tokens=20, do_sample=False, **more)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_what_is_said_again_and_again_is_chosen_alike_by_drafts_and_single_tokens(llama, method):
    # In the first layer equal words fit equally well, so that rounding would choose among them.
    for seed in range(6):
        order = torch.randint(3, (14,), generator=torch.Generator().manual_seed(seed))
        ids = text(rows=3, length=4, seed=seed)[order].view(1, -1)
        alone, _ = through(llama, method, ids, [0], [30, *[1] * 26])
        for turns in ([30, *[3] * 8, 2], [30, 4, 4, 1, *[4] * 4, 1]):
            together, _ = through(llama, method, ids, [0], turns)
            torch.testing.assert_close(alone[:, 30:], together[:, 30:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [SMALL, MEMORY, CHUNKS], ids=["pages", "infllm", "longheads"])
def test_a_text_that_goes_round_in_a_circle_is_read_alike_by_drafts_and_single_tokens(llama, method):
    # Blocks of the same words with representatives of other places: equal fits of unequal blocks.
    for seed, period in ((0, 3), (1, 5), (2, 7), (3, 3), (4, 5), (5, 7)):
        ids = text(rows=1, length=period, seed=seed).repeat(1, 20)[:, :56]
        alone, _ = through(llama, method, ids, [0], [30, *[1] * 26])
        together, _ = through(llama, method, ids, [0], [30, *[3] * 8, 2])
        torch.testing.assert_close(alone[:, 30:], together[:, 30:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [MEMORY, CHUNKS], ids=["infllm", "longheads"])
def test_without_rotary_positions_nothing_is_moved(method):
    model = FAMILIES["gpt2"].build()
    with caching(model), pytest.raises(ValueError, match="moves keys to other positions"):
        model(text(length=20), past_key_values=method.build(model))


def test_what_is_offloaded_is_counted_apart(llama):
    ids = text(rows=1, length=100)
    _, cache = through(llama, MEMORY, ids, [0], [60] + [1] * 40)
    _, full = through(llama, Pages(), ids, [0], [100])
    assert cache.resident_bytes() + cache.offloaded_bytes() == cache.bytes()
    assert cache.offloaded_bytes() >= 2 * 2 * 2 * 84 * 8 * 4
    near = [part.store.near for layer in cache.layers for part in layer.parts]
    assert max(one.length for one in near) < MEMORY.recent + 2 * MEMORY.block + MEMORY.chunk
    assert full.offloaded_bytes() == 0


@pytest.mark.parametrize(
    "make", [lambda: InfLLM(blocks=0), lambda: InfLLM(block=4, representatives=5), lambda: LongHeads(chunks=3)]
)
def test_sizes_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match="allowed are"):
        make()


def test_what_the_replications_measure(llama):
    ids = text(rows=1)[0]
    with torch.no_grad():
        plain = llama(ids[None]).logits[0]
    made = Made(llama, dict.fromkeys(kv_units(llama), SMALL))
    full, _ = last_logits(llama, ids, Made(llama, {}), 10, turn=4)
    torch.testing.assert_close(full, plain[-11:-1], atol=1e-4, rtol=1e-4)
    other, cache = last_logits(llama, ids, made, 10, turn=4)
    assert made.last is cache and len(made.stores(Paged)) == 2
    assert divergence(full, full) == 0.0 and divergence(full, other) > 0.0
    assert nats(full, ids) == pytest.approx(-float(plain.log_softmax(-1)[range(33, 43), ids[34:]].mean()), rel=1e-4)
