"""The attention room: a contract that every method keeps, use on models and gone afterwards, and what is refused."""

import pytest
import torch
from attending import left_padded, values
from families import FAMILIES

from headwise.anatomy import anatomy
from headwise.attention import CCA, HGRN2, FlexPrefill, Landmark, StreamingPrefill
from headwise.method import catalogue, load
from headwise.mixing import AttentionMethod, causal, use, visible
from headwise.models import fingerprint
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
