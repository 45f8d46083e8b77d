"""Detectors of the heads room on patterns drawn by hand, and readers of weights on weights written by hand."""

import dataclasses
import math

import pytest
import torch
import transformers
from families import ALL, VOCAB
from test_heads import make

from headwise.heads import (
    AttentionDistance,
    Copying,
    CopySuppression,
    CurrentToken,
    DistanceProfile,
    DuplicateToken,
    Echo,
    Entropy,
    Induction,
    LocalShare,
    PreviousToken,
    RazorInduction,
    SelectAndCopy,
    SelectAndCopyAttention,
    Sink,
    Successor,
)
from headwise.pattern import after_same, earlier_same, score_together, to_kv_heads
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights, effective_embedding


@pytest.fixture(scope="module")
def models() -> dict[str, transformers.PreTrainedModel]:
    return {kind: ALL[kind].build() for kind in ("llama", "vit")}


# Patterns drawn by hand, one head each.


def prompt() -> Batch:
    half = torch.arange(3, 11)
    ids = torch.cat([torch.tensor([1]), half, half])[None]
    return Batch({"input_ids": ids}, at=torch.tensor([[16]]), answer=torch.tensor([[3]]))


def drawn(cells: torch.Tensor) -> torch.Tensor:
    """A pattern [1, 2, T, T]: head 0 attends evenly to the cells (to itself where there are none), head 1 to all."""
    size = cells.shape[-1]
    own = torch.eye(size, dtype=torch.bool)
    cells = torch.where(cells.any(-1, keepdim=True), cells, own).float()
    even = torch.ones(size, size).tril()
    return torch.stack([cells / cells.sum(-1, keepdim=True), even / even.sum(-1, keepdim=True)])[None]


SIZE = 17
DRAWN = {
    PreviousToken: torch.diag_embed(torch.ones(SIZE - 1), -1).bool(),
    CurrentToken: torch.eye(SIZE).bool(),
    DuplicateToken: earlier_same(prompt())[0],
    Echo: earlier_same(prompt())[0],
    Induction: after_same(prompt())[0],
    RazorInduction: after_same(prompt())[0],
    Sink: torch.arange(SIZE).expand(SIZE, -1) == 0,
    LocalShare: torch.eye(SIZE).bool(),
}


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: kind.__name__)
def test_a_drawn_pattern_is_found(kind):
    found = {other: other().read(drawn(DRAWN[kind]), prompt())[0] for other in DRAWN}
    assert float(found[kind][0]) == pytest.approx(1.0)
    assert float(found[kind][1]) < 0.85
    alike = {DuplicateToken, Echo} if kind in (DuplicateToken, Echo) else {Induction, RazorInduction}
    for other, value in found.items():
        if other is not kind and not {kind, other} <= alike and LocalShare not in (kind, other):
            assert float(value[0]) < 0.6, other


def test_by_hand_cells_of_a_repeated_run():
    same, after = earlier_same(prompt())[0], after_same(prompt())[0]
    assert same[9].nonzero().flatten().tolist() == [1]
    assert after[9].nonzero().flatten().tolist() == [2]
    assert not same[:9].any() and not after[:9].any()


def test_padding_is_no_prompt():
    half = torch.arange(3, 11)
    ids = torch.cat([torch.tensor([1]), half, half])
    padded = torch.cat([torch.zeros(5, dtype=torch.long), ids])[None]
    mask = (torch.arange(22) >= 5).long()[None]
    batch = Batch({"input_ids": padded, "attention_mask": mask}, at=torch.tensor([[21]]), answer=torch.tensor([[3]]))
    pattern = drawn(torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).tril() > 0.5)
    wide = torch.full((1, 2, 22, 22), 1 / 22)
    wide[:, :, 5:] = 0
    wide[:, :, 5:, 5:] = pattern
    for method in (*(kind() for kind in DRAWN), Entropy(), AttentionDistance()):
        torch.testing.assert_close(method.read(wide, batch), method.read(pattern, prompt()), rtol=1e-5, atol=1e-6)


def test_distances_and_entropy_in_their_units():
    back_two = torch.diag_embed(torch.ones(SIZE - 2), -2).bool()
    pattern = drawn(back_two)
    # 15 queries look 2 back, the one before them at itself.
    assert float(AttentionDistance().read(pattern, prompt())[0, 0]) == pytest.approx(30 / 16)
    assert float(Entropy().read(pattern, prompt())[0, 0]) == pytest.approx(0.0, abs=1e-6)
    even = sum(math.log(n) for n in range(2, SIZE + 1)) / (SIZE - 1)
    assert float(Entropy().read(pattern, prompt())[0, 1]) == pytest.approx(even, rel=1e-5)


def test_nothing_repeated_gives_no_number():
    ids = torch.arange(3, 12)[None]
    batch = Batch({"input_ids": ids}, at=torch.tensor([[8]]), answer=torch.tensor([[3]]))
    assert torch.isnan(Induction().read(drawn(torch.ones(9, 9).tril().bool()), batch)).all()


def test_one_forward_pass_serves_one_detector_or_several(models):
    model = models["llama"]
    Induction().score(model, make("llama"))  # on first use the model is probed and compared with itself
    passes = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    Induction().score(model, make("llama"))
    several = score_together([PreviousToken(), Induction(), Sink()], model, make("llama"))
    hook.remove()
    assert len(passes) == 2
    assert [score.name for score in several] == ["previous_token", "induction", "sink"]
    for score, method in zip(several, (PreviousToken(), Induction(), Sink()), strict=True):
        assert score.table.equals(method.score(model, make("llama")).table)


def test_kv_heads_take_their_best_query_head(models):
    model, batch = models["llama"], make("llama")
    heads, kv = Echo().score(model, batch), Echo().kv(model, batch)
    assert kv.kind == "kv" and len(kv.table) == 4
    assert kv["L1.G1"] == max(heads["L1.H2"], heads["L1.H3"])
    with pytest.raises(ValueError, match="kind 'kv'"):
        to_kv_heads(kv, model)


def test_patches_of_an_image(models):
    model, batch = models["vit"], make("vit")
    profile = DistanceProfile().profile(model, batch)
    with torch.no_grad(), tap(model, "L0.pattern") as t:
        model(**batch.inputs)
    own = t["L0.pattern"][:, :, 1:, 1:]
    own = (own / own.sum(-1, keepdim=True)).diagonal(dim1=-2, dim2=-1).mean((0, -1))
    torch.testing.assert_close(profile[0][:, 0], own, rtol=1e-5, atol=1e-6)
    across = torch.zeros(1, 1, 17, 17)
    across[0, 0, 1:, 1:] = torch.eye(16)[[i ^ 1 for i in range(16)]]
    assert float(DistanceProfile().read(across, batch)) == pytest.approx(1.0)


# Weights written by hand.


@pytest.fixture
def wide() -> transformers.PreTrainedModel:
    """Two layers of two heads as wide as the residual stream, a silent first MLP, unembedding tied to the embedding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=48, vocab_size=VOCAB, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_()
    return model


def write(model, head: int, ov: torch.Tensor) -> None:
    """Layer 1: the head writes x @ ov for what it attends to."""
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[head * 48 : (head + 1) * 48] = torch.eye(48)
        attention.o_proj.weight[:, head * 48 : (head + 1) * 48] = ov.T


def test_copying_and_its_suppression_are_told_from_weights(wide):
    write(wide, 0, torch.eye(48))
    write(wide, 1, -torch.eye(48))
    copying, suppression = Copying().score(wide), CopySuppression().score(wide)
    assert copying["L1.H0"] == pytest.approx(1.0, abs=1e-4)
    assert copying["L1.H1"] == pytest.approx(-1.0, abs=1e-4)
    assert suppression["L1.H1"] > 0.95
    assert suppression["L1.H0"] == 0.0
    assert suppression["L0.H0"] < 0.2


def test_successor_is_told_from_weights(wide):
    order = torch.tensor([7, 20, 4, 51, 33, 12])
    weights = Weights(wide)
    given = weights.into_layer(1, effective_embedding(weights, order))
    write(wide, 1, torch.linalg.pinv(given[:-1]) @ weights.readout[order[1:]])
    batch = Batch({}, at=torch.zeros(1, 1), answer=torch.zeros(1, 1), about={"sets": {"six": order.tolist()}})
    score = Successor().score(wide, batch)
    assert score["L1.H1"] == 1.0
    assert max(score["L0.H0"], score["L0.H1"], score["L1.H0"]) < 0.8
    with pytest.raises(ValueError, match="ordered lists"):
        Successor().score(wide, dataclasses.replace(batch, about={}))


def test_options_are_judged_by_query_and_key(models):
    model, batch = models["llama"], make("llama")
    with torch.no_grad(), tap(model, "q_pre", "k_pre") as t:
        model(**batch.inputs)
    q, k = t["L1.q_pre"][:, 3, 23], t["L1.k_pre"][:, 1]
    best = torch.stack([(q * k[:, column]).sum(-1) for column in (5, 9, 11)], -1).argmax(-1)
    assert SelectAndCopy().choices(model, batch)[1][:, 3].tolist() == best.tolist()
    pattern = torch.zeros(1, 1, 24, 24)
    pattern[:, :, 23, 9] = 1
    batch = batch.take([0])
    letters = dataclasses.replace(batch, about={"letters": [60, int(batch.answer[0, 0]), 61]})
    assert SelectAndCopyAttention().read(pattern, letters)[0, 0] == 1.0
