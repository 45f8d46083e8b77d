"""The data room: a contract that every task keeps on every kind of tokenizer, and what is refused."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from trained_tokenizers import MAKERS, byte_level
from transformers import PreTrainedTokenizerFast

from headwise.data.agreement import Agreement
from headwise.data.capitals import Capitals
from headwise.data.capitals_conflict import CapitalsConflict
from headwise.data.coloured_objects import ColouredObjects
from headwise.data.docstring import Docstring
from headwise.data.greater_than import GreaterThan
from headwise.data.held_out import HeldOut
from headwise.data.induction import Induction
from headwise.data.ioi import IOI
from headwise.data.ioi_abc import IOIABC
from headwise.data.ioi_symmetric import IOISymmetric
from headwise.data.key_values import KeyValues
from headwise.data.laundry_list import LaundryList
from headwise.data.layout import one_token_words, ordinary_ids, start_ids
from headwise.data.multiple_choice import MultipleChoice
from headwise.data.needle import Needle
from headwise.data.neutral import NeutralText
from headwise.data.pair_file import Pair
from headwise.data.pairs import Pairs
from headwise.data.passkeys import Passkeys
from headwise.data.pronouns import Pronouns
from headwise.data.random_labels import RandomLabels
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.data.successor import Successor
from headwise.data.two_hop import TwoHop
from headwise.data.verbatim import Verbatim
from headwise.data.words import NAMES

OWN = tuple(
    Pair(f"{a} and {b} gave a ring to", b, a, f"{a} and {a} gave a ring to")
    for a, b in zip(NAMES, NAMES[9:29], strict=False)
)
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
