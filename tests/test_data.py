"""The data room: every task on every kind of tokenizer, and what each task promises about its columns."""

import dataclasses
import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headwise.data import agreement
from headwise.data.agreement import Agreement
from headwise.data.capitals import Capitals
from headwise.data.capitals_conflict import CapitalsConflict
from headwise.data.coloured_objects import ColouredObjects
from headwise.data.digits_images import DigitImages
from headwise.data.docstring import Docstring
from headwise.data.greater_than import GreaterThan
from headwise.data.held_out import HeldOut
from headwise.data.induction import Induction
from headwise.data.ioi import IOI, TEMPLATES
from headwise.data.ioi_abc import IOIABC
from headwise.data.ioi_symmetric import IOISymmetric
from headwise.data.key_values import KeyValues
from headwise.data.laundry_list import LaundryList
from headwise.data.layout import one_token_words, ordinary_ids, start_ids
from headwise.data.multiple_choice import MultipleChoice
from headwise.data.needle import STEM, Needle
from headwise.data.neutral import NeutralText
from headwise.data.pair_file import Pair
from headwise.data.pairs import Pairs
from headwise.data.passkeys import ALPHABET, Passkeys
from headwise.data.planted_words import lexicon
from headwise.data.pronouns import Pronouns
from headwise.data.prose import sentences
from headwise.data.random_labels import RandomLabels
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.data.successor import Successor
from headwise.data.two_hop import COUNTRY_OF, TwoHop
from headwise.data.verbatim import Verbatim
from headwise.data.words import (
    ARGUMENTS,
    CAPITALS,
    COLOURS,
    EVENTS,
    GIFTS,
    GROCERIES,
    MEN,
    NAMES,
    NOUNS,
    OBJECTS,
    ORDERED,
    PLACES,
    ROLES,
    WOMEN,
)

OWN = tuple(
    Pair(f"{a} and {b} gave a ring to", b, a, f"{a} and {a} gave a ring to")
    for a, b in zip(NAMES, NAMES[9:29], strict=False)
)
PHRASES = (
    "Q: On the table, I see a an and. What color is the\nA:",
    "Answer: I need to buy, and. I already have the and the, so I still need the",
    "So is such a good, isn't she he it",
    "def self, param",
)
GROUPS = (
    WOMEN, MEN, ROLES, ARGUMENTS, COLOURS, OBJECTS, GROCERIES,
    agreement.LINKS, agreement.NOUNS, agreement.NOUNS.values(), "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
)  # fmt: skip
TASKS = [
    RepeatedTokens(length=20),
    RepeatedTokens(length=9, repeats=4),
    Induction(),
    Induction(length=24, pairs=1, segment=1),
    Needle(length=120, depths=(0.0, 0.5, 1.0)),
    IOI(),
    Capitals(),
    CapitalsConflict(),
    MultipleChoice(),
    Successor(),
    Successor(between=""),
    NeutralText(length=40),
    Passkeys(length=300),
    Passkeys(length=420, passkeys=4, asked=3, words=3),
    KeyValues(length=300),
    KeyValues(length=400, pairs=6, asked=2, digits=3),
    Verbatim(length=300),
    Verbatim(length=250, shown=4, answers=5),
    HeldOut(length=40),
    IOIABC(),
    IOISymmetric(),
    GreaterThan(),
    Docstring(),
    ColouredObjects(),
    LaundryList(),
    LaundryList(items=2),
    RandomLabels(),
    TwoHop(),
    Agreement(),
    Pronouns(),
    Pairs(pairs=OWN),
    Pairs(pairs=tuple(pair._replace(answer=f"{pair.answer} and {pair.foil}") for pair in OWN)),
]


def corpus() -> list[str]:
    flow = sentences("tests")
    texts = [next(flow) for _ in range(60)]
    texts += [
        f"The capital of {land} is {city}. Q: What is the capital of {land}? A:" for land, city in CAPITALS.items()
    ]
    texts += [
        t.format(a=n, b=n, s=n, place=p, gift=g)
        for t in TEMPLATES
        for n in NAMES
        for p, g in zip(PLACES, GIFTS, strict=False)
    ]
    texts += [f'Which option is "{noun}"?\nA. {noun}\nAnswer: A' for noun in NOUNS] * 3
    texts += [f"{STEM} {i}.\n{STEM} {i}." for i in range(10)]
    texts += [" and ".join(["and", *words]) for words in ORDERED.values()] * 10
    texts += [ALPHABET, 'Passkey "dog":']
    texts += [*PHRASES, *(" and ".join(["", *group, "is"]) for group in GROUPS)] * 10
    texts += [f"The {event} lasted from the year 1732 to the year 17" for event in EVENTS] * 3
    texts += [f"{place} is a place in {land}." for place, land in COUNTRY_OF.items()]
    return texts


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")


def word_piece() -> PreTrainedTokenizerFast:
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(special.values()), show_progress=False)
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def marked_words() -> PreTrainedTokenizerFast:
    """Blanks are part of the word, as in SentencePiece; there is no start token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


MAKERS = {"bytes": byte_level, "pieces": word_piece, "marked": marked_words, "words": lambda: lexicon(100).tokenizer}
CANNOT = {
    ("words", "Passkeys"), ("words", "KeyValues"), ("words", "HeldOut"),
    ("words", "Verbatim"), ("words", "Capitals"), ("words", "CapitalsConflict"), ("words", "MultipleChoice"),
    ("words", "GreaterThan"), ("words", "Docstring"), ("words", "ColouredObjects"), ("words", "LaundryList"),
    ("words", "RandomLabels"), ("words", "TwoHop"), ("words", "Agreement"), ("words", "Pronouns"),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MAKERS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return MAKERS[kind]()


def made(task, tokenizer, kind, n, seed=0):
    if (kind, type(task).__name__) in CANNOT:
        with pytest.raises(ValueError, match="tokenizer"):
            task.make(tokenizer, n, seed)
        pytest.skip("this tokenizer lacks the words, and the task says so")
    return task.make(tokenizer, n, seed)


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_shapes_and_columns(task, tokenizer, kind, n):
    batch = made(task, tokenizer, kind, n)
    width = batch.ids.shape[1]
    assert len(batch) == n == len(batch.texts) == len(batch.ids)
    assert batch.at.shape == batch.answer.shape
    assert int(batch.at.min()) >= 0 and int(batch.at.max()) < width
    assert batch.ids.max() < len(tokenizer) and batch.answer.max() < len(tokenizer)
    mask = batch.inputs["attention_mask"]
    assert (mask.diff(dim=1) >= 0).all(), "padding stands on the left only"
    assert mask.gather(1, batch.at).all()
    for low, high in (edges.unbind(1) for edges in batch.spans.values()):
        assert (low < high).all() and (high <= width).all()
        assert mask.gather(1, low[:, None]).all()
    if batch.foil is not None:
        assert (batch.foil != batch.answer).all()
    for key in ("task", "version", "n", "seed", *(f.name for f in dataclasses.fields(task))):
        assert key in batch.about
    first = start_ids(tokenizer)
    starts = mask.argmax(1)
    if first:
        assert (batch.ids[torch.arange(n), starts] == first[0]).all()


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_seed_decides(task, tokenizer, kind):
    one, same, other = (made(task, tokenizer, kind, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(one.ids, same.ids) and torch.equal(one.answer, same.answer) and one.about == same.about
    assert one.texts != other.texts


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_corrupt_prompts_differ_only_where_they_must(task, tokenizer, kind):
    batch = made(task, tokenizer, kind, 4)
    if batch.corrupt is None:
        return
    assert batch.corrupt["input_ids"].shape == batch.ids.shape
    assert torch.equal(batch.corrupt["attention_mask"], batch.inputs["attention_mask"])
    changed = batch.corrupt["input_ids"] != batch.ids
    assert changed.any(1).all()
    columns = torch.arange(batch.ids.shape[1])
    places = {"IOI": ["s2"], "Capitals": ["country"], "CapitalsConflict": ["stated"], "Needle": ["needle"],
              "MultipleChoice": ["asked"], "IOISymmetric": ["s2"], "IOIABC": ["io", "s1", "s2"],
              "GreaterThan": ["start"], "Docstring": ["argument_2", "argument_3"], "ColouredObjects": ["asked"],
              "LaundryList": ["swapped"], "RandomLabels": ["asked"], "TwoHop": ["place"], "Agreement": ["subject"],
              "Pronouns": ["name"],
              "Passkeys": ["hidden_0", "hidden_1", "hidden_2"], "KeyValues": ["hidden_0", "hidden_1"],
              "Verbatim": ["hidden_0"]}  # fmt: skip
    allowed = torch.zeros_like(changed)
    for name in batch.spans.keys() & places.get(type(task).__name__, []):
        low, high = batch.spans[name].T[..., None]
        allowed |= (columns >= low) & (columns < high)
    if type(task).__name__ in places:
        assert not (changed & ~allowed).any()
    if isinstance(task, Induction):
        assert (changed.sum(1) == task.pairs).all()
        assert not changed[:, -1].any()
    if isinstance(task, RepeatedTokens):
        low, high = batch.spans["last"][0]
        assert not changed[:, low:high].any()


def test_repeated_tokens_repeat(tokenizer):
    for repeats in (2, 4):
        batch = RepeatedTokens(length=12, repeats=repeats).make(tokenizer, 3, 1)
        period = batch.about["period"]
        (low, high), (start, stop) = batch.spans["first"][0], batch.spans["last"][0]
        assert period == 12 and stop == batch.ids.shape[1]
        assert start - low == period * (repeats - 1)
        assert torch.equal(batch.ids[:, low:high], batch.ids[:, start:stop])
        assert torch.equal(batch.ids[:, batch.at[0] + 1], batch.answer)
        assert batch.at.shape[1] == 11
        assert not set(batch.ids[:, low:].flatten().tolist()) & set(tokenizer.all_special_ids)


def test_repeated_tokens_may_be_long(tokenizer):
    batch = RepeatedTokens(length=2500, repeats=4).make(tokenizer, 1)
    assert batch.ids.shape[1] >= 10000


def test_induction_answer_follows_the_earlier_token(tokenizer):
    batch = Induction().make(tokenizer, 6, 2)
    for ids, other, answer, foil, source, target in zip(
        batch.ids,
        batch.corrupt["input_ids"],
        batch.answer,
        batch.foil,
        batch.spans["source"],
        batch.spans["target"],
        strict=True,
    ):
        assert ids[source[0]] == ids[-1] != other[source[0]]
        assert ids[target[0]] == answer[0] == other[target[0]]
        assert foil[0] in ids
        places = (ids[:-1] == ids[-1]).nonzero().flatten()
        assert len(places) == 4 and (ids[places + 1] == answer[0]).all()
        assert ids[-1] not in other[:-1]


def test_needle_holds_the_code(tokenizer):
    batch = Needle(length=200, depths=(0.1, 0.9)).make(tokenizer, 6)
    size = batch.about["code_tokens"]
    for row, text in enumerate(batch.texts):
        low, high = batch.spans["needle"][row]
        code = batch.ids[row, low:high].tolist()
        assert high - low == size and code[0] == batch.answer[row, 0]
        assert batch.corrupt["input_ids"][row, low] == batch.foil[row, 0]
        assert len(set(code)) == size
        assert text.endswith(STEM) and text.count(STEM) == 2
        assert all(int((batch.ids[row] == token).sum()) == 1 for token in code)
    real = batch.inputs["attention_mask"].sum(1)
    assert (real <= 202).all() and (real > 150).all()
    start = batch.inputs["attention_mask"].argmax(1)
    place = (batch.spans["needle"][:, 0] - start) / real
    assert (place[0::2] < 0.35).all() and (place[1::2] > 0.65).all()


def test_ioi_names(tokenizer):
    batch = IOI().make(tokenizer, 8)
    ids = batch.ids
    row = torch.arange(8)
    io, s1, s2 = (ids[row, batch.spans[name][:, 0]] for name in ("io", "s1", "s2"))
    assert torch.equal(s1, s2) and torch.equal(io, batch.answer[:, 0]) and torch.equal(s1, batch.foil[:, 0])
    first = batch.spans["io"][:, 0] < batch.spans["s1"][:, 0]
    assert int(first.sum()) == 4
    assert torch.equal(batch.spans["end"][:, 1], torch.full((8,), ids.shape[1]))


def test_capitals_answer_what_the_text_says():
    tokenizer = byte_level()
    batch = Capitals(countries=("France", "Germany", "Italy", "Spain", "Japan")).make(tokenizer, 10)
    for text, answer in zip(batch.texts, batch.answer, strict=True):
        country = text.removeprefix("The capital of ").removesuffix(" is")
        assert f" {CAPITALS[country]}".startswith(tokenizer.decode(answer))
    for text, answer, foil in zip(
        *(lambda b: (b.texts, b.answer, b.foil))(CapitalsConflict().make(tokenizer, 10)), strict=True
    ):
        country = text.rpartition("capital of ")[2].removesuffix(" is")
        stated = text.partition(" is ")[2].partition(".")[0]
        assert stated != CAPITALS[country]
        assert f" {stated}".startswith(tokenizer.decode(answer))
        assert f" {CAPITALS[country]}".startswith(tokenizer.decode(foil))


def test_multiple_choice_marks_its_options():
    tokenizer = byte_level()
    batch = MultipleChoice().make(tokenizer, 12)
    letters = batch.about["letters"]
    rights = set()
    for row in range(12):
        right, wrong = letters.index(int(batch.answer[row])), letters.index(int(batch.foil[row]))
        rights.add(right)
        said = {
            name: tokenizer.decode(batch.ids[row, low:high])
            for name, (low, high) in ((k, v[row]) for k, v in batch.spans.items())
        }
        assert said[f"option_{right}"] == f"{'ABCD'[right]}. {said['asked']}\n"
        low, high = batch.spans["asked"][row]
        assert said[f"option_{wrong}"].strip().endswith(tokenizer.decode(batch.corrupt["input_ids"][row, low:high]))
        for i in range(4):
            assert batch.spans[f"option_end_{i}"][row].tolist() == [
                batch.spans[f"option_{i}"][row, 1] - 1,
                batch.spans[f"option_{i}"][row, 1],
            ]
    assert len(rights) > 2


def test_successor_answers_come_next(tokenizer):
    batch = Successor().make(tokenizer, 12)
    sets = batch.about["sets"]
    assert sets
    for row in range(12):
        last = int(batch.ids[row, batch.spans["last"][row, 0]])
        ids = next(one for one in sets.values() if last in one and int(batch.answer[row]) in one)
        assert ids[ids.index(last) + 1] == batch.answer[row, 0]


def test_neutral_text_predicts_every_token(tokenizer):
    batch = NeutralText(length=50).make(tokenizer, 3)
    assert batch.ids.shape == (3, 50)
    assert torch.equal(batch.ids.gather(1, batch.at + 1), batch.answer)
    assert batch.foil is None and batch.corrupt is None


def test_prose_is_varied_and_plain():
    flow = sentences("some seed")
    said = [next(flow) for _ in range(400)]
    assert len(set(said)) > 390
    assert not any(char.isdigit() or char == ":" for one in said for char in one)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_digit_images():
    batch = DigitImages().make(None, 20)
    assert batch.inputs["pixel_values"].shape == (20, 1, 8, 8)
    assert batch.inputs["pixel_values"].abs().max() <= 1
    assert batch.at.shape == batch.answer.shape == (20, 1) and batch.answer.max() <= 9
    train = DigitImages("train").make(None, 1297)
    test = DigitImages("test").make(None, 500)
    assert not set(train.texts) & set(test.texts)
    with pytest.raises(ValueError, match="not tokens"):
        _ = batch.ids
    with pytest.raises(ValueError, match="1 to 500"):
        DigitImages().make(None, 501)
    with pytest.raises(ValueError, match="'validation'.*train, test, all"):
        DigitImages("validation").make(None, 5)


@pytest.mark.parametrize(
    ("task", "n", "sentence"),
    [
        (RepeatedTokens(length=1), 2, "1 tokens said 2 times"),
        (RepeatedTokens(), 0, "0 prompts were asked for; allowed is at least 1"),
        (Induction(pairs=20), 2, "20 pairs of segment 2 do not fit in 40 tokens"),
        (Induction(length=4000), 2, "ordinary tokens; prompts of 4000 need 4004"),
        (Needle(depths=()), 2, "must be one or more numbers"),
        (Needle(depths=(1.5,)), 2, r"\(1.5,\) must be"),
        (Needle(digits=11), 2, "allowed are 1 to 10"),
        (Needle(length=20), 2, "20 tokens have no room"),
        (Capitals(countries=("Atlantis",)), 2, "'Atlantis' is not in the list; known are France"),
        (Capitals(template="no place"), 2, "no place for the {country}"),
        (CapitalsConflict(countries=("Atlantis",)), 2, "'Atlantis'"),
        (MultipleChoice(options=1), 2, "1 options were asked for"),
        (Successor(kinds=("weeks",)), 2, "'weeks'; allowed are days"),
        (Successor(shown=0), 2, "at least 1"),
        (Successor(kinds=("days",), shown=6), 2, "8 neighbours"),
        (NeutralText(length=2), 2, "predict nothing"),
    ],
    ids=str,
)
def test_bad_requests_are_answered_in_a_sentence(task, n, sentence):
    with pytest.raises(ValueError, match=sentence):
        task.make(byte_level_once(), n, 0)


_made: dict[str, PreTrainedTokenizerFast] = {}


def byte_level_once() -> PreTrainedTokenizerFast:
    return _made.setdefault("bytes", byte_level())


def test_tokenizers_without_the_words_are_told_so():
    inner = Tokenizer(
        models.WordLevel({"<unk>": 0, **{letter: i + 1 for i, letter in enumerate("abcdefgh")}}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for task in (IOI(), Capitals(), CapitalsConflict(), MultipleChoice(), Successor(), Needle(length=80)):
        with pytest.raises(ValueError, match="tokenizer"):
            task.make(tiny, 2)
    with pytest.raises(ValueError, match="8 ordinary tokens"):
        Induction().make(tiny, 2)
    assert len(ordinary_ids(tiny)) == 8
    with pytest.raises(ValueError, match="Only 0 of 60 first names"):
        one_token_words(tiny, NAMES, 8, "first names")


def test_left_padding_puts_answers_at_the_last_column():
    tokenizer = byte_level()
    batch = IOI().make(tokenizer, 40)
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).unique().numel() > 1, "rows differ in length"
    assert (batch.at == batch.ids.shape[1] - 1).all()
    for row in range(40):
        low, high = batch.spans["end"][row]
        assert tokenizer.decode(batch.ids[row, low:high]) == " to"
        assert tokenizer.decode(batch.ids[row][mask[row].bool()][1:]) == batch.texts[row]


def test_the_room_exports_every_task():
    from headwise import data
    from headwise.lesson import Lesson
    from headwise.method import catalogue

    names = {card.class_name for card in catalogue("data")}
    lessons = {name for name in names if issubclass(getattr(data, name), Lesson)}
    assert {type(task).__name__ for task in TASKS} | {"DigitImages", "Planted"} | lessons == names
    assert all(getattr(data, name) is not None for name in names)
