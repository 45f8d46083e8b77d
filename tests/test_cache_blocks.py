"""Caches that choose what is read: equal to their naive twins, and to the full cache where all is read."""

import block_twins
import pytest
import torch
from families import FAMILIES, VOCAB
from kv_twins import cached_logits

from headwise.attach import attach, caching, detach
from headwise.blocks import Bounds
from headwise.cache.pages import Pages
from headwise.kv_cache import kv_units


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build(seed=3)


def text(rows: int = 2, length: int = 60, seed: int = 0) -> torch.Tensor:
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
    "token by token": [30] + [1] * 30,
    "all at once": [60],
    "in chunks": [20, 20, 3, 1, 1, 15],
    "speculating": [31, 4, 3, 2, 1, 4, 4, 1, 3, 4, 3],
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


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_pages_after_rollback_go_on_as_if_nothing_had_been(llama, cut):
    ids = text(length=60)
    turns = [30] + [1] * 30
    plain, _ = through(llama, SMALL, ids, [0, 0], turns)
    with caching(llama), torch.no_grad():
        cache = SMALL.build(llama)
        cache.activate_past_recording()
        llama(ids[:, :30], past_key_values=cache)
        start, out = 30, []
        while start < 60:
            # The last tokens of a turn are guesses that turn out wrong.
            wrong = torch.cat([ids[:, start : start + 2], (ids[:, start + 2 : start + 2 + cut] + 1) % VOCAB], 1)[:, :4]
            kept = min(2, 60 - start)
            out.append(llama(wrong, past_key_values=cache).logits[:, :kept])
            cache.crop(-(wrong.shape[1] - kept))
            start += kept
    torch.testing.assert_close(torch.cat(out, 1), plain[:, 30:], atol=1e-4, rtol=1e-4)


def test_pages_read_no_more_than_their_budget(llama):
    ids = text(length=100)
    _, cache = through(llama, SMALL, ids, [0, 0], [40] + [1] * 60)
    stores = [part.store for layer in cache.layers for part in layer.parts]
    assert {store.read_tokens for store in stores} == {16}


def test_pages_with_room_for_all_generate_the_same(llama):
    ids = text(length=20)
    for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}):
        plain = llama.generate(ids, max_new_tokens=20, do_sample=False, **more)
        attach(llama, Pages(budget=192))
        try:
            ours = llama.generate(ids, max_new_tokens=20, do_sample=False, **more)
        finally:
            detach(llama)
        assert torch.equal(plain, ours)


def test_pages_speculation_says_what_decoding_says(llama):
    ids = text(rows=1, length=12).repeat(1, 3)
    attach(llama, Pages(budget=16, page=4, piece=2, interval=2, single=12))
    try:
        plain = llama.generate(ids, max_new_tokens=40, do_sample=False)
        guessed = llama.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5)
    finally:
        detach(llama)
    assert torch.equal(plain, guessed)


def test_half_streaming_half_pages_is_a_plan(llama):
    from headwise.cache import Streaming

    units = kv_units(llama)
    mixed = {unit: SMALL if i % 2 else Streaming(sink=2, recent=6) for i, unit in enumerate(units)}
    attach(llama, mixed)
    try:
        out = llama.generate(text(), max_new_tokens=30, do_sample=False, num_beams=2)
    finally:
        detach(llama)
    assert out.shape[1] == 90


@pytest.mark.parametrize(
    "fields", [{"budget": 100}, {"page": 0}, {"piece": 24}, {"interval": 7}, {"budget": 128}, {"single": 0}]
)
def test_pages_refuse_sizes_that_do_not_fit(fields):
    with pytest.raises(ValueError, match=r"budget|page"):
        Pages(**fields)
