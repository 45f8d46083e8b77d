"""The attention room: a contract that every method keeps, use on models and gone afterwards, and truths by hand."""

import sys

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.anatomy import anatomy
from headwise.attention import CCA, HGRN2, FlexPrefill, Landmark, StreamingPrefill
from headwise.attention.flex_prefill import _cover, _divergence
from headwise.attention.landmark import with_landmarks
from headwise.method import catalogue, load
from headwise.mixing import AttentionMethod, causal, per_head, softmax_scores, use, visible
from headwise.models import fingerprint
from headwise.replicate import cca, flex_prefill, landmark, recall
from headwise.tap import tap

METHODS = [card.name for card in catalogue("attention")]
# Fields for tests of a few dozen tokens.
SMALL = {
    "attention.flex_prefill": {"block": 4, "budget": 4, "gamma": 0.6, "tau": 0.3},
    "attention.streaming_prefill": {"sink": 2, "window": 5, "block": 4},
    "attention.landmark": {"block": 4, "top": 2},
    "attention.cca": {"group": 3, "window": 5, "block": 8},
    "attention.hgrn2": {"keep": 1.0, "block": 4},
}
# Recurrent methods, whose memory of the past has one size; the twin of these is a mixture of values too.
RECURRENT = {"attention.hgrn2"}
# Fields with which a method is plain attention, which all but the recurrent ones have.
FULL = {
    "attention.flex_prefill": {"block": 4, "budget": 4, "gamma": 1.0},
    "attention.streaming_prefill": {"sink": 0, "window": 10**6, "block": 7},
    "attention.landmark": {"block": 100},
    "attention.cca": {"group": 1, "window": 4, "block": 8},
}
KINDS = ("llama", "gpt2", "qwen3", "gpt_neox", "phi3", "olmo2")


def small(name: str) -> AttentionMethod:
    return load(name)(**SMALL[name])


def values(length: int, keys: int, rows: int = 2, heads: int = 4, kv: int = 2, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, length, 8), (kv, keys, 8), (kv, keys, 6))
    return [(1.5 * torch.randn(rows, *size, generator=generator)).to(dtype).requires_grad_() for size in sizes]


def left_padded(pads: list[int], length: int, keys: int) -> torch.Tensor:
    return causal(length, keys) & (torch.arange(keys) >= torch.tensor(pads)[:, None, None, None])


@pytest.fixture(scope="module")
def models():
    return {kind: FAMILIES[kind].build() for kind in KINDS}


# The contract.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 4, 30, 37])
def test_every_method_equals_its_twin_gradients_too(name, length):
    method = small(name)
    q, k, v = values(length, length)
    z, naive = method.attend(q, k, v), method.naive(q, k, v)
    assert z.shape == (2, 4, length, 6) and z.dtype == v.dtype
    torch.testing.assert_close(z, naive, rtol=1e-5, atol=1e-5)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((z * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((naive * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_the_pattern_sum_to_one_and_never_look_ahead(name):
    q, k, _ = values(30, 30)
    pattern = small(name).pattern(q, k, 0.35)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 30))
    assert pattern.min() >= 0
    assert pattern.masked_select(~causal(30, 30)).abs().max() == 0


def test_all_but_the_recurrent_can_be_plain_attention():
    assert set(METHODS) == set(FULL) | RECURRENT


@pytest.mark.parametrize("name", FULL)
def test_with_the_right_fields_it_is_plain_attention(name):
    q, k, v = values(33, 33)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(load(name)(**FULL[name]).attend(q, k, v), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_the_left_changes_nothing(name):
    method, pads = small(name), [0, 3, 9]
    q, k, v = values(31, 31, rows=3)
    z = method.attend(q, k, v, left_padded(pads, 31, 31))
    torch.testing.assert_close(z, method.naive(q, k, v, left_padded(pads, 31, 31)), rtol=1e-5, atol=1e-5)
    for row, pad in enumerate(pads):
        alone = method.attend(*(x[row : row + 1, :, pad:] for x in (q, k, v)))
        torch.testing.assert_close(z[row, :, pad:], alone[0], rtol=1e-5, atol=1e-5)
        assert z[row, :, :pad].abs().sum() == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 9, 18])
def test_queries_fewer_than_keys(name, length):
    method = small(name)
    q, k, v = values(length, 31, rows=2)
    mask = left_padded([0, 5], length, 31)
    if not method.resumes:
        with pytest.raises(ValueError, match="needs the queries of all 31 keys.*use_cache=False"):
            method.attend(q, k, v, mask)
        return
    torch.testing.assert_close(method.attend(q, k, v, mask), method.naive(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(name, dtype):
    method = small(name)
    q, k, v = values(24, 24, dtype=dtype)
    z = method.attend(q, k, v)
    assert z.dtype == dtype
    torch.testing.assert_close(z, method.naive(q, k, v), rtol=3e-2, atol=3e-2)


# In a model.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_attends_so_and_is_as_it_was_after(name, kind, padded, models):
    model, method = models[kind], small(name)
    inputs = FAMILIES[kind].inputs(length=22, padded=padded)
    before, weights = model(**inputs).logits, fingerprint(model)
    with torch.no_grad(), use(model, method) as notes, tap(model, "q", "k", "v", "z") as t:
        model(**inputs, use_cache=False)
    pads = (22 - inputs["attention_mask"].sum(1)).tolist() if padded else [0] * 3
    scale = anatomy(model).layer(1).attention.scaling
    z = method.naive(t["L1.q"], t["L1.k"], t["L1.v"], left_padded(pads, 22, 22), scale)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(t["L1.z"][row, pad:], z.transpose(1, 2)[row, pad:], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**inputs).logits, before) and fingerprint(model) == weights
    assert model.config._attn_implementation == "sdpa"
    assert len(notes.table()) == 8


@pytest.mark.parametrize("name", FULL)
def test_as_plain_attention_it_leaves_the_logits(name, models):
    inputs = FAMILIES["llama"].inputs(length=22, padded=True)
    real = inputs["attention_mask"].bool()
    for attention in ("sdpa", "eager"):
        model = FAMILIES["llama"].build(attention)
        plain = model(**inputs).logits
        with use(model, load(name)(**FULL[name])):
            got = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(got[real], plain[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_some_heads_only(name, models):
    model, method = models["llama"], small(name)
    inputs = FAMILIES["llama"].inputs(length=22)
    with torch.no_grad(), tap(model, "z") as plain:
        model(**inputs)
    with torch.no_grad(), use(model, method, heads=["L0.H1"]) as notes, tap(model, "z") as t:
        model(**inputs, use_cache=False)
    others = [0, 2, 3]
    torch.testing.assert_close(t["L0.z"][:, :, others], plain["L0.z"][:, :, others], rtol=1e-5, atol=1e-6)
    assert (t["L0.z"][:, :, 1] - plain["L0.z"][:, :, 1]).abs().max() > 1e-3
    assert notes.table()["unit"].to_list() == ["L0.H1"]


def test_a_kv_head_stands_for_its_query_heads(models):
    with use(models["llama"], StreamingPrefill(), heads=["L1.G1"]) as notes:
        models["llama"](**FAMILIES["llama"].inputs())
    assert notes.table()["unit"].to_list() == ["L1.H2", "L1.H3"]


def test_the_innermost_method_counts(models):
    model, inputs = models["llama"], FAMILIES["llama"].inputs(length=22)
    narrow, wide = StreamingPrefill(1, 3, 4), StreamingPrefill(0, 100, 4)
    with torch.no_grad():
        plain = model(**inputs).logits
        with use(model, narrow), use(model, wide):
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
        with use(model, wide), use(model, narrow, heads=["L0.H0"]):
            assert (model(**inputs).logits - plain).abs().max() > 1e-3
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", METHODS)
def test_generate_with_and_without_a_cache(name, models):
    method, model = small(name), models["llama"]
    if not method.resumes or name == "attention.flex_prefill":  # its choice rests on the queries of one pass
        return
    inputs = FAMILIES["llama"].inputs(length=18, padded=True)
    with use(model, method):
        cached, plain = (
            model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0)
            for use_cache in (True, False)
        )
        chunks = model.generate(**inputs, max_new_tokens=8, do_sample=False, prefill_chunk_size=7, pad_token_id=0)
    assert torch.equal(cached, plain) and torch.equal(cached, chunks)


def test_a_model_can_be_trained_so(models):
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(length=22)
    with use(model.train(), StreamingPrefill(1, 4, 4)):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# What is refused.


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mistral", "not causal with padding on the left"),
        ("gemma2", "attends with softcap"),
        ("gpt_oss", "sinks"),
        ("bert", "looks both ways"),
    ],
)
def test_models_that_attend_otherwise_are_refused(kind, words):
    model = FAMILIES[kind].build()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=words), use(model, StreamingPrefill()):
        model(**FAMILIES[kind].inputs(length=12))
    assert model.config._attn_implementation == before
    model(**FAMILIES[kind].inputs(length=12))


def test_heads_that_do_not_exist(models):
    for heads, words in (
        (["L0.H4"], "layer 0 has H0 to H3"),
        (["L0.G2"], "layer 0 has G0 to G1"),
        (["L7.H0"], "no attention in layer 7"),
        (["L0.mlp"], "no attention head"),
    ):
        with pytest.raises(ValueError, match=words), use(models["llama"], StreamingPrefill(), heads=heads):
            pass
    with pytest.raises(ValueError, match="not both"):
        with use(models["llama"], StreamingPrefill(), layers=[0], heads=["L0.H0"]):
            pass


def test_dropout_is_refused():
    model = FAMILIES["gpt2"].build().train()
    with pytest.raises(ValueError, match="attention dropout 0.1"), use(model, StreamingPrefill()):
        model(**FAMILIES["gpt2"].inputs())


def test_a_tap_is_entered_inside(models):
    with tap(models["llama"], "z"), pytest.raises(ValueError, match="before anything else"):
        with use(models["llama"], StreamingPrefill()):
            pass


def test_masks_of_other_kinds():
    q, k, _ = values(6, 6)
    assert visible(left_padded([0, 2], 6, 6), q, k).pads == [0, 2]
    room = torch.cat([causal(6, 6), torch.zeros(6, 3, dtype=torch.bool)], 1)[None, None]
    longer = torch.cat([k, k[:, :, :3]], 2)
    assert visible(room, q, longer).end == 6
    right = causal(6, 6) & (torch.arange(6) < 4)
    for mask in (causal(6, 6).triu(-2), torch.ones(6, 6, dtype=torch.bool), right):
        with pytest.raises(ValueError, match="not causal with padding on the left"):
            visible(mask[None, None], q, k)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (FlexPrefill, {"gamma": 0.0}),
        (FlexPrefill, {"tau": -1.0}),
        (FlexPrefill, {"block": 0}),
        (StreamingPrefill, {"window": 0}),
        (Landmark, {"block": 0}),
        (Landmark, {"top": -1}),
        (CCA, {"group": 0}),
        (HGRN2, {"block": 0}),
    ],
)
def test_fields_out_of_range(method, fields):
    with pytest.raises(ValueError, match="must be"):
        method(**fields)


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


# Replications.


def test_text_asks_back_what_it_said():
    ids = recall.recalling_text(50, 128, torch.Generator().manual_seed(0), needle=(0, 30))
    assert torch.equal(ids, recall.recalling_text(50, 128, torch.Generator().manual_seed(0), needle=(0, 30)))
    asked = recall.is_asked(ids)
    assert 0.2 < asked.float().mean() < 0.5 and asked[:, -1].all()
    for row, where in zip(ids.unflatten(1, (-1, 2)).tolist(), asked.tolist(), strict=True):
        known: dict[int, int] = {}
        for (key, value), ask in zip(row, where, strict=True):
            assert ask == (key in known) and (not ask or known[key] == value)
            if key < recall.KEYS:
                known[key] = value
        assert sum(key == row[-1][0] for key, _ in row) == 2
        assert [key for key, _ in row].index(row[-1][0]) < 30


def test_small_models_are_given_the_token_before():
    model = recall.small_model()
    ids = recall.recalling_text(2, 16, torch.Generator().manual_seed(0))
    own = model.get_input_embeddings()(ids)
    more = recall.given(model, ids) - own
    torch.testing.assert_close(more[:, 1:].norm(dim=-1), own[:, :-1].norm(dim=-1))
    assert more[:, 0].abs().max() == 0


@pytest.mark.parametrize(("method", "block"), [(Landmark(block=8), 8), (CCA(4, 8), None), (None, None)])
def test_small_models_learn_with_a_method(method, block):
    models = [recall.trained(0, method, block, steps=4, length=32) for _ in range(2)]
    ids = recall.recalling_text(4, 32, torch.Generator().manual_seed(1))
    one, other = (recall.answers(model, ids, method, block) for model in models)
    assert torch.equal(one, other) and one.shape == (4, 16, recall.LANDMARK + 1)
    changed = (
        recall.nats(one, ids) - recall.nats(recall.answers(recall.small_model(0), ids, method, block), ids)
    ).abs()
    assert changed > 1e-4


def test_the_latest_blocks_see_no_others():
    model = recall.small_model()
    ids = recall.recalling_text(2, 128, torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :8] = recall.LANDMARK - 1
    one, _ = landmark.latest_only(model, ids, 2)
    two, asked = landmark.latest_only(model, other, 2)
    assert one.shape[:2] == asked.shape == (2, 56)
    torch.testing.assert_close(one[:, 4:], two[:, 4:])
    assert (one[:, :4] - two[:, :4]).abs().max() > 1e-4


def test_windows_of_a_share():
    for share in (0.1, 0.4, 0.9):
        window = flex_prefill.window_of_share(share, 300, 16)
        at = torch.arange(300)
        seen = [float(StreamingPrefill(16, w)._seen(at, at).sum()) / (300 * 301 / 2) for w in (window, window + 1)]
        assert share <= seen[0] < seen[1]
        if window > 1:
            less = float(StreamingPrefill(16, window - 1)._seen(at, at).sum()) / (300 * 301 / 2)
            assert less < share


def test_coverage_is_true_attention_inside_the_blocks():
    q, k, _ = values(64, 64, rows=1)
    method = FlexPrefill(gamma=0.6, block=8, budget=8)
    found = flex_prefill.covered(method, q, k, 0.35)
    keep = method.kept(q, k, 0.35).repeat_interleave(8, 2).repeat_interleave(8, 3)
    mass = (softmax_scores(q, k, 0.35, causal(64, 64)) * keep).sum(-1)
    torch.testing.assert_close(found, mass[0].unflatten(-1, (8, 8)).mean(-1))


def test_outcomes_on_made_up_numbers():
    row = {"covered": 0.99, "query_aware": 0.0, "window": 9, "right": {"full": True, "flex": True, "fixed": False}}
    for flex, share, outcome in ((0.01, 0.4, "holds"), (0.01, 0.6, "partly"), (0.3, 0.4, "fails")):
        one = row | {"change": {"flex": flex, "fixed": 0.2}, "computed": share, "cases": 0.97}
        assert flex_prefill.FlexPrefill()._judge([one], 2048).outcome == outcome
    for nats, needles, outcome in ((0.05, 90, "holds"), (0.2, 90, "partly"), (0.6, 90, "fails"), (0.05, 50, "partly")):
        found = {"full": {"nats": 0.01, "needles": 100.0}, "window": {"nats": 0.5, "needles": 5.0}}
        found["cca"] = {"nats": nats, "needles": needles}
        assert cca.CCA()._judge(found, 9, 9).outcome == outcome
    for looked_up, latest, near, outcome in (
        (0.1, 1.0, 90, "holds"), (0.1, 1.0, 50, "partly"), (0.1, 0.12, 90, "partly"), (0.4, 1.0, 90, "fails"),
    ):  # fmt: skip
        found = {"all": 0.09, "looked up": looked_up, "latest": latest, "plain": 0.01}
        needles = {"near": near, "as they stand": 40.0, "cut": 3.0}
        assert landmark.Landmark()._judge(found, needles, 64).outcome == outcome
