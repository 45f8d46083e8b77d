"""Weights by head: what they multiply out to equals what the model computes."""

import pytest
import torch
from families import ALL, FAMILIES

from headwise.direct import direct_attribution, toward_answer
from headwise.factored import Factored
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights, composition, effective_embedding

GATED = ("qwen3_next", "qwen3_5")
DECODERS = [name for name, family in ALL.items() if family.kind == "decoder"]


def prompts(name):
    inputs = ALL[name].inputs()
    ids = inputs["input_ids"]
    return Batch(inputs, at=torch.full((3, 1), 9), answer=ids[:, :1], foil=ids[:, 1:2])


def close(a, b, limit=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in GATED])
def test_heads_results_add_up_to_the_attention_output(name):
    model = FAMILIES[name].build()
    weights = Weights(model)
    layer = weights.layers[-1]
    with torch.no_grad(), tap(model, "z", "attn") as t:
        model(**FAMILIES[name].inputs())
    z = t[f"L{layer}.z"]
    total = sum(z[:, :, h] @ weights.o(layer, h) for h in range(weights.heads(layer)))
    bias = getattr(weights.body.layer(layer).out, "bias", None)
    close(total if bias is None else total + bias, t[f"L{layer}.attn"])


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].kind == "decoder" and n != "deepseek_v3"])
def test_values_and_z_are_made_by_the_v_weights(name):
    model = FAMILIES[name].build()
    weights = Weights(model)
    layer = weights.layers[-1]
    with torch.no_grad(), tap(model, "v", "z", "pattern", f"L{layer}.resid_pre") as t:
        model(**FAMILIES[name].inputs())
    place = weights._places[layer]
    x = t[f"L{layer}.resid_pre"]
    x = x if place.before is None else place.before.module(x)
    for head in range(weights.heads(layer)):
        value = x @ weights.v(layer, head)
        bias = weights.bias("v", layer, head)
        value = value if bias is None else value + bias
        close(value, t[f"L{layer}.v"][:, weights.body.group(layer, head)])
        close(t[f"L{layer}.pattern"][:, head] @ value, t[f"L{layer}.z"][:, :, head])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_queries_and_keys_without_rope(name):
    model = FAMILIES[name].build()
    weights = Weights(model)
    with torch.no_grad(), tap(model, "L1.scores", "L1.resid_pre") as t:
        model(**FAMILIES[name].inputs())
    x = weights._places[1].before.module(t["L1.resid_pre"])
    for head in range(4):
        q = x @ weights.q(1, head) + weights.bias("q", 1, head)
        k = x @ weights.k(1, head) + weights.bias("k", 1, head)
        seen = torch.ones(10, 10, dtype=torch.bool).tril()
        close((q @ k.transpose(1, 2) * 8**-0.5)[:, seen], t["L1.scores"][:, head][:, seen], 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3_5", "gemma3", "opt"])
def test_ov_is_what_a_head_writes_for_the_token_it_sees(name):
    model = FAMILIES[name].build()
    weights = Weights(model)
    layer = weights.layers[-1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    place = weights._places[layer]
    normed = place.before.module(x) - place.before.shift
    plain = normed @ weights.v(layer, 2) @ weights.o(layer, 2)
    if weights.post_norm(layer) is not None:
        plain = plain * weights.post_norm(layer).gain
    ours = weights.into_layer(layer, x) @ weights.ov(layer, 2).full()
    close(ours, plain, 1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_direct_attribution_of_heads_adds_up(name):
    model, batch = ALL[name].build(), prompts(name)
    weights = Weights(model)
    directions = toward_answer(weights, batch)
    given = direct_attribution(weights, batch, directions, at_once=2)
    layer, last = weights.layers[-1], max(weights.body.blocks[""])
    with torch.no_grad(), tap(model, f"L{layer}.attn", f"L{last}.resid_post") as t:
        logits = model(**batch.inputs).logits[:, 9]
    wrote, post = t[f"L{layer}.attn"][:, 9], weights.post_norm(layer)
    bias = getattr(weights.body.layer(layer).out, "bias", None)
    wrote = post.module(wrote) - post.shift if post is not None else wrote if bias is None else wrote - bias
    end = t[f"L{last}.resid_post"][:, 9]
    scale = weights.final.scale(end)
    close((wrote / scale * directions[:, 0]).sum(-1), given[layer].sum(-1), 1e-4)
    if name != "gemma2":  # its logits are capped after the unembedding
        difference = (logits.gather(1, batch.answer) - logits.gather(1, batch.foil))[:, 0]
        bias = getattr(model.get_output_embeddings(), "bias", None)
        assert bias is None or not bias.any()
        close((end / scale * directions[:, 0]).sum(-1), difference, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_5", "gpt_oss", "deepseek_v3"])
def test_attribution_splits_by_source(name):
    model, batch = ALL[name].build(), prompts(name)
    weights = Weights(model)
    directions = toward_answer(weights, batch)
    whole = direct_attribution(weights, batch, directions)
    early = torch.arange(10).expand(3, -1) < 4
    parts = [direct_attribution(weights, batch, directions, some) for some in (early, ~early)]
    for layer, value in whole.items():
        close(parts[0][layer] + parts[1][layer], value, 1e-4)


def test_factored_equals_the_full_matrix():
    torch.manual_seed(0)
    one, two = Factored(torch.randn(12, 3), torch.randn(3, 12)), Factored(torch.randn(12, 4), torch.randn(4, 9))
    matrix = torch.randn(9, 12)
    close((one @ two).full(), one.full() @ two.full(), 1e-4)
    close((matrix @ one).full(), matrix @ one.full(), 1e-4)
    close((two @ matrix).full(), two.full() @ matrix, 1e-4)
    close(two.T.full(), two.full().T)
    assert one.norm() == pytest.approx(float(one.full().norm()), rel=1e-5)
    u, s, v = two.svd()
    close(u @ s.diag() @ v.T, two.full(), 1e-4)
    all_of_it = torch.linalg.eigvals(one.full().double())
    largest = all_of_it[all_of_it.abs().argsort(descending=True)][:3]
    ours = one.eigenvalues()
    assert float(ours.real.sum()) == pytest.approx(float(largest.real.sum()), rel=1e-6)
    with pytest.raises(ValueError, match="no eigenvalues"):
        two.eigenvalues()


@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_composition_equals_the_plain_products(side):
    model = FAMILIES["llama"].build()
    weights = Weights(model)
    ours = composition(weights, side)[1]
    for later in range(4):
        for earlier in range(4):
            wrote = weights.ov(0, earlier).full()
            reader = weights.ov(1, later).full() if side == "v" else weights.qk(1, later).full()
            reader = reader.T if side == "k" else reader
            plain = (wrote @ reader).norm() / wrote.norm() / reader.norm() - 32**-0.5
            assert float(ours[later, earlier]) == pytest.approx(float(plain), abs=1e-4)


def test_effective_embedding_is_embedding_plus_first_mlp():
    model = FAMILIES["llama"].build()
    block = model.model.layers[0]
    ids = torch.tensor([5, 9])
    x = model.model.embed_tokens(ids)
    with torch.no_grad():
        close(effective_embedding(Weights(model), ids), x + block.mlp(block.post_attention_layernorm(x)))


def test_what_is_not_there_is_said():
    with pytest.raises(ValueError, match="deepseek_v3 cannot be told apart by head"):
        Weights(FAMILIES["deepseek_v3"].build()).v(0, 0)
    with pytest.raises(ValueError, match="no unembedding"):
        _ = Weights(FAMILIES["llama"].build().model).unembed
    with pytest.raises(ValueError, match="not tokens"):
        _ = Weights(FAMILIES["vit"].build()).embed
    weights = Weights(FAMILIES["llama"].build())
    with pytest.raises(ValueError, match="heads 0 to 3, not 4"):
        weights.o(0, 4)
    with pytest.raises(ValueError, match="no attention in layer 2"):
        weights.q(2, 0)
    with pytest.raises(ValueError, match="'w'"):
        composition(weights, "w")
