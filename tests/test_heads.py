"""The heads room: a contract that every method keeps on every kind of model, gates, and what is missing."""

import dataclasses

import pytest
import torch
import transformers
from families import ALL, FAMILIES, VOCAB
from traces import traces

from headwise.anatomy import anatomy
from headwise.heads import (
    AntiOverconfidence,
    CopySuppression,
    Emergence,
    Induction,
    LocalShare,
    NameMover,
    Retrieval,
    SelectAndCopy,
    Topic,
    ValueScaling,
)
from headwise.method import catalogue, load
from headwise.narrow import kv_heads
from headwise.pattern import PatternMethod
from headwise.score import Score
from headwise.task import Batch

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
    "gpt2": {"reach": "not rotary"},
    "bert": {"reach": "not rotary"},
    "gpt_neox": {"select_and_copy": "does not offer q_pre"},
    "deepseek_v3": {
        **dict.fromkeys((*READ, "qk_eigenvalues"), "told apart by head"),
        "select_and_copy": "not offer q_pre",
        "reach": "not rotary",
    },
    "gptj": dict.fromkeys((*SEEN, "composition", "name_mover", "topic", "retrieval"), "does not offer pattern")
    | dict.fromkeys(("select_and_copy", "duo_gate", "need"), "does not offer [qv]")
    | {"reach": "not rotary"},
    "t5": {"copy_suppression": "no single token", "successor": "no single token", "reach": "not rotary"}
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
        if name == "reach":
            return "not rotary"
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
    assert traces(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_cards_name_their_paper(name):
    card = next(card for card in catalogue("heads") if card.name == name)
    assert card.title and card.authors and card.year and card.summary.endswith(".")


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
