"""The heads room: a contract that every method keeps on every kind of model, and truths planted by hand."""

import dataclasses
import math

import pytest
import torch
import transformers
from families import ALL, FAMILIES, VOCAB

from headwise.anatomy import anatomy
from headwise.heads import (
    AntiOverconfidence,
    AttentionDistance,
    Copying,
    CopySuppression,
    CurrentToken,
    DistanceProfile,
    DuplicateToken,
    Echo,
    Emergence,
    Entropy,
    Induction,
    LocalShare,
    NameMover,
    PreviousToken,
    RazorInduction,
    Retrieval,
    SelectAndCopy,
    SelectAndCopyAttention,
    Sink,
    Successor,
    Topic,
    ValueScaling,
)
from headwise.method import catalogue, load
from headwise.narrow import kv_heads
from headwise.pattern import PatternMethod, after_same, earlier_same, score_together, to_kv_heads
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights, effective_embedding

METHODS = [card.name for card in catalogue("heads")]
KINDS = ("llama", "gpt2", "gpt_neox", "qwen3_5", "deepseek_v3", "gptj", "bert", "t5", "vit")
# Fields for tiny random models, which know nothing: gates are opened.
FIELDS = {"heads.retrieval": {"gate": -1.0}, "heads.composition": {"threshold": 0.0}, "heads.value_scaling": {"top": 2}}
FIELDS |= {"heads.duo_gate": {"steps": 3, "recent": 4, "sink": 1}, "heads.need": {"recent": 4, "sink": 1}}
# What must be refused, with a word of the sentence.
ANSWERS = (
    "name_mover", "memory_or_context", "value_scaling", "topic", "anti_overconfidence", "retrieval", "duo_gate", "need",
    "direct_attribution",
)  # fmt: skip
TOKENS = (
    "duplicate_token", "induction", "echo", "razor_induction", "select_and_copy", "select_and_copy_attention",
    "successor", "copying", "qk_eigenvalues", "copy_suppression", "composition",
)  # fmt: skip
READ = ("copying", "copy_suppression", "successor", "composition", "k_composition", "q_composition", "v_composition")
SEEN = [name.removeprefix("heads.") for name in METHODS if issubclass(load(name), PatternMethod)]
LIMITS = {
    "gpt_neox": {"select_and_copy": "does not offer q_pre"},
    "deepseek_v3": {
        **dict.fromkeys((*READ, "qk_eigenvalues"), "told apart by head"),
        "select_and_copy": "not offer q_pre",
    },
    "gptj": dict.fromkeys((*SEEN, "composition", "name_mover", "topic", "retrieval"), "does not offer pattern")
    | dict.fromkeys(("select_and_copy", "duo_gate", "need"), "does not offer [qv]"),
    "t5": {"copy_suppression": "no single token", "successor": "no single token"}
    | dict.fromkeys(("select_and_copy", "select_and_copy_attention"), "encoder's prompt"),
}
MAY_BE_EMPTY = ("k_composition", "q_composition", "v_composition", "composition", "value_scaling")


def refusal(method: str, kind: str) -> str | None:
    """A word of the sentence with which this method must refuse this kind of model; None when it must score."""
    name = method.removeprefix("heads.")
    if name == "emergence":
        return "two checkpoints"
    if name in ("back_patching", "activation_patching") and kind in ("bert", "t5", "vit"):
        return "next token|encoder-decoder"
    if kind == "vit":
        if name in ANSWERS:
            return "next token|has no span|needle|unembedding|not tokens"
        return (
            "not tokens|pixel_values|marks no options|no option letters|ordered lists|unembedding"
            if name in TOKENS
            else None
        )
    if name == "distance_profile":
        return "no square of patches|does not offer pattern"
    if kind in ("bert", "t5") and name in ANSWERS:
        return "does not predict next" if kind == "bert" else "is an encoder-decoder"
    return LIMITS.get(kind, {}).get(name)


def make(kind: str) -> Batch:
    """Prompts that every task's methods can read: repeated tokens, spans, letters, ordered lists, images."""
    family = ALL[kind]
    if kind == "vit":
        images = family.inputs(rows=4)
        other = {"pixel_values": images["pixel_values"].flip(0)}
        zero = torch.zeros(4, 1, dtype=torch.long)
        return Batch(images, at=zero, answer=zero, corrupt=other, about={"task": "test"})
    half = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([half, half], 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    spans = {
        "needle": (3, 6),
        "country": (4, 6),
        "option_end_0": (5, 6),
        "option_end_1": (9, 10),
        "option_end_2": (11, 12),
        "end": (23, 24),
    }
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask, **more},
        corrupt={"input_ids": ids.flip(0), "attention_mask": mask, **more},
        at=torch.full((4, 1), 23),
        answer=half[:, :1],
        foil=half[:, 1:2],
        spans={name: torch.tensor([edges] * 4) for name, edges in spans.items()},
        about={
            "task": "test",
            "letters": list(range(VOCAB)),
            "sets": {"odd": [5, 7, 9, 11], "even": [4, 6, 8]},
        },
    )


def traces(model: transformers.PreTrainedModel) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    own = [tuple(sorted(m.__dict__)) for m in model.modules()]
    weights = [(name, value.clone()) for name, value in model.state_dict().items()]
    grads = [p.requires_grad and p.grad is None for p in model.parameters()]
    return hooks, own, model.config._attn_implementation, model.training, weights, grads


@pytest.fixture(scope="module")
def models() -> dict[str, transformers.PreTrainedModel]:
    return {kind: ALL[kind].build() for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name, kind, models):
    model, batch = models[kind], make(kind)
    method = load(name)(**FIELDS.get(name, {}))
    before = traces(model)
    said = refusal(name, kind)
    if said is not None:
        with pytest.raises(ValueError, match=said):
            method.score(model, batch)
    else:
        score = method.score(model, batch)
        again = method.score(model, batch)
        assert isinstance(score, Score)
        body = anatomy(model)
        blocks = {f"L{n}" for n in body.blocks[""]}
        units = {"kv": kv_heads(model), "layer": blocks}.get(score.kind, body.units())
        assert set(score.table["unit"]) <= set(units)
        assert set(score.layers) <= set(body.blocks[""] if score.kind == "layer" else body.layers)
        assert len(score.table) > 0
        assert score.table.equals(again.table, null_equal=True)
        if name.removeprefix("heads.") not in MAY_BE_EMPTY:
            assert score.table["value"].is_finite().all(), score.table
        else:
            assert score.table["value"].is_finite().any()
        assert score.about["method"]["name"] == name
        assert score.about["method"]["fields"] == dataclasses.asdict(method)
        assert score.about["fingerprint"] and score.about["versions"]["torch"] and score.about["when"]
        assert score.about["task"] is None or score.about["task"]["rows"] == 4
    after = traces(model)
    assert before[:4] == after[:4]
    assert before[5] == after[5]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[4], after[4], strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_cards_name_their_paper(name):
    card = next(card for card in catalogue("heads") if card.name == name)
    assert card.title and card.authors and card.year and card.summary.endswith(".")


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


# Answers and gates.


def test_the_gate_says_what_to_try(models):
    with pytest.raises(ValueError, match="None of 4 prompts passes the answer gate.*length.*gate"):
        Retrieval().score(models["llama"], make("llama"))


def test_needles_must_be_marked_and_equal(models):
    batch = make("llama")
    with pytest.raises(ValueError, match="no span 'needle'"):
        Retrieval().score(models["llama"], dataclasses.replace(batch, spans={}))
    uneven = batch.spans["needle"].clone()
    uneven[0, 1] += 1
    with pytest.raises(ValueError, match="3, 4 tokens"):
        Retrieval().score(models["llama"], dataclasses.replace(batch, spans={"needle": uneven}))


def test_methods_without_what_they_need_say_so(models):
    batch = make("llama")
    with pytest.raises(ValueError, match="has no span 'city'; it has needle"):
        Topic(span="city").score(models["llama"], batch)
    with pytest.raises(ValueError, match="1 to 2 attention layers"):
        AntiOverconfidence(last=3).score(models["llama"], batch)
    with pytest.raises(ValueError, match="tries no head"):
        ValueScaling(top=0).score(models["llama"], batch)
    with pytest.raises(ValueError, match="marks no options"):
        SelectAndCopy().score(models["llama"], dataclasses.replace(batch, spans={}))
    with pytest.raises(ValueError, match="on prompts, and there are none"):
        Induction().score(models["llama"], None)
    with pytest.raises(ValueError, match="window of -1"):
        LocalShare(window=-1)
    with pytest.raises(ValueError, match="cannot be taken"):
        CopySuppression(share=0.0)


def test_name_movers_must_raise_the_answer(models):
    model, batch = models["llama"], make("llama")
    shares = NameMover().score(model, batch).table["value"]
    assert shares.min() >= 0 and shares.max() <= 1
    swapped = dataclasses.replace(batch, foil=batch.answer)
    assert NameMover().score(model, swapped).table["value"].max() == 0.0


# Two checkpoints.


def test_emergence_between_checkpoints(models, tmp_path):
    before, batch = models["llama"], make("llama")
    nothing = Emergence().between(before, before, batch)
    assert nothing.name == "emergence_of_induction" and nothing.evidence == "grown"
    assert nothing.table["value"].abs().max() == 0.0
    after = FAMILIES["llama"].build(seed=1)
    before.save_pretrained(tmp_path)
    grown = Emergence(before=str(tmp_path)).score(after, batch)
    expected = Induction().score(after, batch)["L1.H2"] - Induction().score(before, batch)["L1.H2"]
    assert grown["L1.H2"] == pytest.approx(expected, abs=1e-6)
    assert grown.about["before"] != grown.about["fingerprint"]
    with pytest.raises(ValueError, match="8 and 8|one architecture|2 and 8|heads"):
        Emergence().between(models["qwen3_5"], after, batch)
    with pytest.raises(ValueError, match="no number per head"):
        Emergence(method="data.induction").between(before, after, batch)
