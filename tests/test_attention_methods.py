"""What each method of the attention room says of itself, told by hand."""

import sys

import pytest
import torch
from attending import values
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attention import CCA, FlexPrefill, Landmark, StreamingPrefill
from headwise.attention.flex_prefill import _cover, _divergence
from headwise.attention.landmark import with_landmarks
from headwise.mixing import AttentionMethod, causal, per_head, softmax_scores

# FlexPrefill.


def told(method: AttentionMethod, q, k, v) -> dict[str, torch.Tensor]:
    notes: dict[str, torch.Tensor] = {}
    method.attend(q, k, v, note=notes.__setitem__)
    return notes


@settings(max_examples=30, deadline=None)
@given(
    gamma=st.floats(0.05, 0.999), tau=st.floats(0, 1), length=st.integers(9, 60), past=st.integers(0, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_flex_covers_what_it_says(gamma, tau, length, past, seed):
    q, k, v = values(length, length + past, seed=seed)
    method = FlexPrefill(gamma=gamma, tau=tau, block=4, budget=4)
    notes = told(method, q, k, v)
    assert (notes["covered"] >= gamma - 1e-5).all() and (notes["covered"] <= 1 + 1e-5).all()
    keep = method.kept(q, k, 8**-0.5)
    lines = torch.arange(past // 4, past // 4 + keep.shape[2])
    assert keep[..., 0].all() and keep[:, :, torch.arange(len(lines)), lines].all()
    tokens = causal(length, length + past).clone()
    columns = torch.arange(length + past) // 4
    kept = keep[:, :, columns[past:] - columns[past]][..., columns] & tokens
    torch.testing.assert_close(notes["computed"], kept.sum((2, 3)) / tokens.sum())
    last = softmax_scores(q[:, :, -4:], k, 8**-0.5, tokens[-4:])
    mass = (last * kept[:, :, -4:]).sum(-1).mean(-1)
    assert (mass[notes["query_aware"] == 0] >= gamma - 1e-5).all()


def test_flex_skips_what_is_not_needed():
    """One head looks at the first tokens, one at the tokens before, one everywhere: the third needs more."""
    keys = torch.zeros(1, 3, 64, 8)
    keys[0, 0, :4, 0] = 30
    keys[0, 1] = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 6
    queries = torch.zeros(1, 3, 64, 8)
    queries[0, 0, :, 0] = 1
    queries[0, 1, 1:] = keys[0, 1, :-1]
    method = FlexPrefill(block=4, budget=4, tau=0.0)
    computed = told(method, queries, keys, keys)["computed"][0]
    assert computed[0] < 0.45 and computed[1] < 0.45 and computed[2] > 0.9


def test_flex_takes_fewer_blocks_for_less():
    q, k, v = values(64, 64)
    shares = [float(told(FlexPrefill(gamma=g, block=4, budget=0), q, k, v)["computed"].mean()) for g in (0.3, 0.6, 0.9)]
    assert shares == sorted(shares) and shares[0] < shares[-1]


def test_cover_is_the_fewest():
    mass = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert _cover(mass, 0.7, 0).tolist() == [False, True, False, True]
    assert _cover(mass, 0.7, 3).tolist() == [False, True, True, True]
    assert _cover(mass, 0.5, 0).tolist() == [False, True, False, False]


def test_divergence_is_a_distance():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(_divergence(one, one)) == 0 and float(_divergence(one, other)) == pytest.approx(0.8326, abs=1e-4)


# Streaming prefill.


def test_streaming_prefill_costs_the_window_not_the_square():
    shares = []
    for length in (128, 256, 512):
        q, k, v = values(length, length, rows=1)
        notes = told(StreamingPrefill(4, 16, 16), q, k, v)
        shares.append(float(notes["computed"].mean()) * length * (length + 1) / 2 / length)
    assert max(shares) < 4 + 16 + 16 and shares[2] < 1.1 * shares[0]


# Landmark attention.


@pytest.mark.parametrize("top", [None, 0, 1, 3])
@pytest.mark.parametrize("length", [30, 8])
def test_landmarks_whatever_is_looked_up(top, length):
    q, k, v = values(length, 30)
    method = Landmark(block=4, top=top)
    torch.testing.assert_close(method.attend(q, k, v), method.naive(q, k, v), rtol=1e-5, atol=1e-5)
    pattern = method.pattern(q, k, 0.35)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, length))
    assert pattern[..., 4::5].abs().max() == 0
    blocks = pattern.unflatten(-1, (6, 5)).sum(-1)[:, :, -1] > 0
    assert (blocks.sum(-1) == (6 if top is None else 1 + top)).all()


@pytest.mark.parametrize("top", [None, 2])
def test_far_blocks_may_seem_nearer(top):
    """Positions of a block that is far beyond reach do not matter; within reach nothing changes."""
    q, k, v = values(40, 40)
    method = Landmark(block=4, top=top, reach=3)
    torch.testing.assert_close(method.attend(q, k, v), method.naive(q, k, v), rtol=1e-5, atol=1e-5)
    plain = Landmark(block=4, top=top)
    torch.testing.assert_close(method.attend(q, k, v)[:, :, :20], plain.attend(q, k, v)[:, :, :20])
    assert (method.attend(q, k, v) - plain.attend(q, k, v))[:, :, 20:].abs().max() > 1e-3
    model = FAMILIES["llama"].build()
    rotary, at = model.model.rotary_emb, torch.arange(40)[None]
    turn = sys.modules[type(model).__module__].apply_rotary_pos_emb
    plain_q, plain_k = q[:1, :, -1:], k[:1]
    turned, far = turn(plain_q, plain_k, *(x[:, -1:] for x in rotary(q, at)))[0], turn(k[:1], k[:1], *rotary(q, at))[0]
    moved = turn(k[:1], k[:1], *rotary(q, (at + 20).where(at < 5, at)))[0]  # block 0 is 7 back, and seems 3 back
    scores = Landmark(block=4, reach=3)._scores(turned, per_head(far, 4), torch.tensor([7]))
    expected = turned @ per_head(moved, 4).transpose(2, 3)
    torch.testing.assert_close(scores[..., :5], expected[..., :5], rtol=1e-4, atol=1e-4)


def test_one_block_is_a_plain_softmax():
    q, k, v = values(12, 12)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(Landmark(block=12).attend(q, k, v), plain, rtol=1e-5, atol=1e-5)


def test_a_grouped_softmax_by_hand():
    """Two blocks of two: the last query gives its own token 1 and the landmark 3, which its block shares 1:4."""
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([0.0, 4.0, 3.0, 1.0]).log().clamp(min=-50).view(1, 1, 4, 1)
    k[0, 0, 0] = 0.0
    pattern = Landmark(block=2).pattern(q, k, 1.0)[0, 0]
    torch.testing.assert_close(pattern[3], torch.tensor([0.75 * 0.2, 0.75 * 0.8, 0.0, 0.25]))
    torch.testing.assert_close(pattern[2], torch.tensor([0.2, 0.8, 0.0, 0.0]))


def test_looking_up_reads_less():
    q, k, v = values(60, 60)
    shares = [float(told(Landmark(block=4, top=top), q, k, v)["read"].mean()) for top in (0, 1, 4, None)]
    assert shares == sorted(shares) and shares[0] < 0.4 and shares[-1] > 0.95


def test_landmarks_stand_after_every_block():
    ids = torch.arange(1, 9)[None]
    assert with_landmarks(ids, 0, 3).tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7, 8]]
    assert with_landmarks(ids, 0, 4).tolist() == [[1, 2, 3, 4, 0, 5, 6, 7, 8, 0]]


# CCA attention.


@pytest.mark.parametrize("window", [1, 5, 100])
def test_groups_of_one_are_plain_attention(window):
    q, k, v = values(29, 29)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(CCA(group=1, window=window, block=8).attend(q, k, v), plain, rtol=1e-5, atol=1e-5)


def test_core_tokens_are_what_the_last_token_of_their_group_attends_to():
    q, k, v = values(24, 24, heads=2, kv=2)
    pattern = CCA(group=4, window=4).pattern(q, k, 0.35)
    for number in range(4):
        members = slice(4 * number, 4 * number + 4)
        own = ((q[:, :, 4 * number + 3, None] * k[:, :, members]).sum(-1) * 0.35).softmax(-1)
        given = pattern[:, :, 23, members]
        torch.testing.assert_close(given / given.sum(-1, keepdim=True), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_blocks_of_queries_change_nothing(block):
    q, k, v = values(40, 40)
    torch.testing.assert_close(CCA(3, 5, block).attend(q, k, v), CCA(3, 5, 16).attend(q, k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        StreamingPrefill(2, 5, block).attend(q, k, v), StreamingPrefill(2, 5, 16).attend(q, k, v), rtol=1e-5, atol=1e-5
    )


def test_cca_sees_few_keys():
    q, k, v = values(320, 320, rows=1)
    assert float(told(CCA(16, 32), q, k, v)["kept"].max()) <= (320 / 16 + 48) / 320
