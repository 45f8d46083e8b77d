"""What only the tasks of circuits know: whose answer is right, how it flips, and how one's own prompts are read."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headwise import models
from headwise.data.agreement import NOUNS, VERBS, Agreement
from headwise.data.coloured_objects import ColouredObjects
from headwise.data.docstring import Docstring
from headwise.data.greater_than import GreaterThan, numbers, probability_gap
from headwise.data.ioi import IOI
from headwise.data.ioi_abc import IOIABC
from headwise.data.ioi_symmetric import IOISymmetric
from headwise.data.laundry_list import LaundryList
from headwise.data.pair_file import Pair
from headwise.data.pairs import Pairs
from headwise.data.planted_words import lexicon
from headwise.data.pronouns import Pronouns
from headwise.data.random_labels import RandomLabels
from headwise.data.two_hop import COUNTRY_OF, TwoHop
from headwise.data.words import CAPITALS, NAMES, WOMEN
from headwise.task import METRICS, answer_logits, correct, logit_diff, sequence_logprob, solved


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.default_model_path())


@pytest.fixture(scope="module")
def words():
    return lexicon(40).tokenizer


@pytest.fixture(scope="module")
def tiny(words):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words), pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


def told(task, tokenizer, n=24):
    """Each prompt, its corrupt twin, the answer and the foil as texts."""
    batch = task.make(tokenizer, n)
    for row in range(n):
        real = batch.inputs["attention_mask"][row].bool()
        texts = (tokenizer.decode(ids[row][real][1:]) for ids in (batch.ids, batch.corrupt["input_ids"]))
        yield *texts, tokenizer.decode(batch.answer[row]).strip(), tokenizer.decode(batch.foil[row]).strip()


def flips(task, tokenizer, right):
    """Whether `right`, which reads the answer out of a prompt, gives the answer of each and the foil of its twin."""
    for text, other, answer, foil in told(task, tokenizer):
        assert right(text) == answer != foil == right(other), (text, other)


def test_docstrings_name_the_third_argument(tokenizer):
    flips(Docstring(), tokenizer, lambda text: re.findall(r"\w+", text.split("self, ")[1])[2])
    for text, other, *_ in told(Docstring(), tokenizer):
        head = re.findall(r"\w+", text.split("self, ")[1])
        assert re.findall(r":param (\w+):", text) == head[:2] == re.findall(r"\w+", other.split("self, ")[1])[:2]
        assert len(set(head[:4])) == 4


@pytest.mark.parametrize("examples", [0, 1, 3])
def test_the_colour_of_the_asked_object(tokenizer, examples):
    def right(text):
        question = text.rpartition("Q:")[2]
        asked = question.split("color is the ")[1].split("?")[0]
        return re.search(rf"an? (\w+) {asked}[,.]", question)[1]

    task = ColouredObjects(examples=examples)
    flips(task, tokenizer, right)
    batch = task.make(tokenizer, 6)
    assert all(text.count("Q:") == examples + 1 and text.endswith("A:") for text in batch.texts)
    assert torch.isin(torch.cat([batch.answer, batch.foil]), torch.tensor(batch.about["colours"])).all()


@pytest.mark.parametrize("items", [2, 3, 7])
def test_the_laundry_list_lacks_one_item(tokenizer, items):
    def right(text):
        needed, there = text.split(". I already have ")
        listed = re.findall(r"\w+", needed.removeprefix("I need to buy").replace(" and ", " "))
        lacking = [item for item in listed if not re.search(rf"the {item}\b", there)]
        assert len(listed) == items and len(lacking) == 1
        return lacking[0]

    flips(LaundryList(items=items), tokenizer, right)


def test_verbs_agree_with_the_first_noun(tokenizer):
    plural = {many: i for i, many in enumerate(NOUNS.values())}
    forms = {form: pair for pair in VERBS for form in pair}
    misled = 0
    for text, other, answer, foil in told(Agreement(), tokenizer):
        (_, subject, *_, nearest), (_, changed, *_) = text.split(), other.split()
        assert forms[answer] == forms[foil] and answer == forms[answer][subject in plural]
        assert foil == forms[answer][changed in plural]
        assert {subject, changed} in [{one, many} for one, many in NOUNS.items()]
        misled += (subject in plural) != (nearest in plural)
    assert misled == 12


def test_pronouns_fit_the_name(tokenizer):
    flips(Pronouns(), tokenizer, lambda text: "she" if text.split()[1] in WOMEN else "he")


def test_labels_stand_beside_the_words(tokenizer):
    def right(text):
        return re.search(rf"^(\w)\. {text.split(chr(34))[1]}$", text, re.M)[1]

    flips(RandomLabels(), tokenizer, right)
    labels = ["".join(re.findall(r"^(\w)\. ", text, re.M)) for text, *_ in told(RandomLabels(), tokenizer)]
    assert len(set(labels)) > 20 and len({letter for one in labels for letter in one}) > 15


def test_two_hops_lead_to_the_capital(tokenizer):
    task = TwoHop()
    for text, other, answer, foil in told(task, tokenizer, 80):
        here, there = (
            COUNTRY_OF[max((p for p in COUNTRY_OF if re.search(rf"\b{p}\b", said)), key=len)] for said in (text, other)
        )
        assert here != there and here not in text
        assert CAPITALS[here].startswith(answer) and CAPITALS[there].startswith(foil)
    assert len(set(task.make(tokenizer, 80).texts)) == 80
    whole, (first, second) = task.make(tokenizer, 12), task.hops(tokenizer, 12)
    assert torch.equal(second.answer, whole.answer) and torch.equal(second.foil, whole.foil)
    assert first.corrupt is None and first.about["hop"] == 1
    for row in range(12):
        country = second.texts[row].removeprefix("The capital of ").removesuffix(" is")
        assert country.startswith(tokenizer.decode(first.answer[row]).strip())
        place = tokenizer.decode(whole.ids[row, slice(*whole.spans["place"][row])]).strip()
        assert place in first.texts[row] and COUNTRY_OF[place] == country


def test_the_ioi_corruptions(tokenizer):
    flips(IOISymmetric(), tokenizer, lambda text: _receiver(text))
    for text, other, answer, foil in told(IOIABC(), tokenizer):
        assert _receiver(text) == answer
        assert not {answer, foil} & set(re.findall(r"\w+", other))
        assert len({name for name in NAMES if re.search(rf"\b{name}\b", other)}) == 3
    one, same = IOI().make(tokenizer, 6), IOISymmetric().make(tokenizer, 6)
    assert one.spans.keys() == same.spans.keys()


def _receiver(text):
    said = [word for word in re.findall(r"\w+", text) if word in NAMES]
    (once,) = [name for name in said if said.count(name) == 1]
    return once


def test_later_years_are_greater(tokenizer):
    batch = GreaterThan().make(tokenizer, 40)
    ids = batch.about["numbers"]
    assert [tokenizer.decode([i]) for i in ids] == list("0123456789")
    for text, answer, foil in zip(batch.texts, batch.answer, batch.foil, strict=True):
        century, year, again = re.search(r"year (\d\d)(\d\d) to the year (\d\d)$", text).groups()
        assert century == again
        assert ids.index(int(answer)) == int(year[0]) + 1 == ids.index(int(foil)) + 2
    assert all("01 to" in text for _, text, *_ in told(GreaterThan(), tokenizer))
    logits = torch.full((40, 1, len(tokenizer)), -30.0)
    assert probability_gap(logits, batch).abs().max() < 1e-3
    logits[:, :, ids[-1]] = 30.0
    assert probability_gap(logits, batch).min() > 0.999
    logits[:, :, ids[0]] = 60.0
    assert probability_gap(logits, batch).max() < -0.999


def test_years_of_pairs_of_digits():
    class Pairwise:
        unk_token_id = None

        def encode(self, text, **_):
            head, _, digits = text.rpartition(" ")
            return [7] * len(head.split()) + [100 + int(digits[i : i + 2]) for i in range(0, len(digits), 2)]

    found = numbers(Pairwise(), 17)
    assert list(found) == [f"{i:02d}" for i in range(100)] and found["32"] == 132


# One's own prompts


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return Pairs(str(path))


def pair(**changes):
    good = {"prompt": "Mary and John gave a ring to", "answer": "Mary", "foil": "John"}
    good["corrupt"] = "Mary and Anna gave a ring to"
    return {k: v for k, v in (good | changes).items() if v is not None}


def test_pairs_of_one_token(words, tmp_path):
    task = written(tmp_path / "own.jsonl", pair(), "", pair(answer="Anna", prompt="Anna gave a ring to John. John gave"
                   " a ring to", corrupt="Anna gave a ring to John. Anna gave a ring to"))  # fmt: skip
    batch = task.make(words, 2, seed=1)
    assert batch.weight is None and batch.against is None and batch.at.shape == (2, 1)
    assert {words.decode(one) for one in batch.answer} == {"Mary", "Anna"}
    assert sorted(batch.about["places"]) == ["own.jsonl, line 1", "own.jsonl, line 3"] and batch.about["sha256"]
    for row in range(2):
        assert words.decode(batch.ids[row, slice(*batch.spans["prompt"][row])]) == words.decode(
            words.encode(batch.texts[row])
        )
    bare = written(tmp_path / "bare.jsonl", pair(foil=None, corrupt=None)).make(words, 1)
    assert bare.foil is None and bare.corrupt is None


def test_tokens_that_answer_and_foil_share_end_the_prompt(tokenizer):
    task = Pairs(pairs=(Pair("5 + 7 =", "12", "13", "5 + 8 ="),))
    batch = task.make(tokenizer, 1)
    assert batch.at.shape == (1, 1) and tokenizer.decode(batch.ids[0]).endswith("5 + 7 = 1")
    assert tokenizer.decode(batch.corrupt["input_ids"][0]).endswith("5 + 8 = 1")
    assert (tokenizer.decode(batch.answer[0]), tokenizer.decode(batch.foil[0])) == ("2", "3")


def test_blanks_between_prompt_and_answer(tokenizer):
    want = tokenizer.encode(" Paris")
    for prompt, answer in (("It is", "Paris"), ("It is", " Paris"), ("It is ", "Paris")):
        batch = Pairs(pairs=(Pair(prompt, answer, "Rome"),)).make(tokenizer, 1)
        assert batch.answer[0].tolist() == want and tokenizer.decode(batch.ids[0]).endswith("It is")
    quoted = Pairs(pairs=(Pair('It is "', "Paris"),), between="").make(tokenizer, 1)
    assert tokenizer.decode(quoted.answer[0]) == "Paris"
    line = Pairs(pairs=(Pair("City:\n", "Paris"),)).make(tokenizer, 1)
    assert tokenizer.decode(line.answer[0]) == "Paris"


LONG = (
    Pair("Mary and John gave a ring to", "Mary and Anna", "John", "Mary and Anna gave a ring to"),
    Pair("Anna gave a book to John. Anna gave a ring to", "John", "Mary and John and Anna", "Mary gave a book to John. "
         "Anna gave a ring to"),
)  # fmt: skip


def test_answers_of_several_tokens(words, tiny):
    batch = Pairs(pairs=LONG).make(words, 2)
    assert batch.at.shape == batch.answer.shape == (2, 3) and batch.foil is None
    assert batch.against.at.shape == (2, 5)
    with torch.no_grad():
        for one, which in ((batch, "answer"), (batch.against, "foil"), (batch.flipped(), "answer")):
            got = sequence_logprob(answer_logits(tiny, one), one)
            for row, text in enumerate(batch.texts):
                own = next(pair for pair in LONG if pair.prompt == text)
                start = words.encode(own.corrupt if one.texts and one.inputs is batch.corrupt else text)
                end = words.encode(getattr(own, which))
                ids = torch.tensor([[words.bos_token_id, *start, *end]])
                each = tiny(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
                assert torch.allclose(got[row], each[-len(end) :].sum(), atol=1e-4)
                assert int(one.spans["end"][row, 0]) == int(one.at[row, 0])
        assert torch.allclose(
            METRICS["logprob"](answer_logits(tiny, batch), batch) * batch.weight.sum(-1),
            METRICS["sequence_logprob"](answer_logits(tiny, batch), batch),
        )
    with pytest.raises(ValueError, match="no foil"):
        logit_diff(answer_logits(tiny, batch), batch)
    part = batch.take([1]).to("cpu")
    assert part.against.texts == part.texts == batch.texts[1:] and part.weight.shape == (1, 3)
    back = batch.flipped().flipped()
    assert torch.equal(back.against.ids, batch.against.ids)


def test_solved_keeps_what_is_right(words, tiny):
    batch = IOI().make(words, 40)
    with torch.no_grad():
        right = (logit_diff(answer_logits(tiny, batch), batch) > 0).nonzero().flatten().tolist()
    kept = solved(tiny, batch, rows=7)
    assert 0 < len(kept) < 40 and kept.texts == [batch.texts[i] for i in right]
    assert kept.about["solved"] == f"{len(right)} of 40"
    with pytest.raises(ValueError, match="gets none of the"):
        solved(tiny, batch, top=True)
    wrong = batch.take([i for i in range(40) if i not in right])
    with pytest.raises(ValueError, match=rf"none of the {len(wrong)} prompts of data.ioi right"):
        solved(tiny, wrong)


def test_solved_compares_whole_answers(words, tiny):
    batch = Pairs(pairs=LONG).make(words, 2)
    with torch.no_grad():
        mine = sequence_logprob(answer_logits(tiny, batch), batch)
        other = sequence_logprob(answer_logits(tiny, batch.against), batch.against)
    assert solved(tiny, batch.take((mine > other).nonzero().flatten())).about["solved"] == "1 of 1"
    alone = Pairs(pairs=(LONG[0]._replace(foil=None),)).make(words, 1)
    with torch.no_grad():
        said = answer_logits(tiny, alone).argmax(-1)
    assert correct(torch.nn.functional.one_hot(said, len(words)).float(), alone) < 1
    with pytest.raises(ValueError, match="none of the 1 prompts of data.pairs"):
        solved(tiny, alone)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "bad.jsonl, line 2 is not valid JSON"),
        ("[1]", "line 2 is a JSON list, not an object"),
        (pair(prompt=None), "line 2 lacks 'prompt'; a pair needs prompt and answer"),
        (pair(answer=None), "line 2 lacks 'answer'"),
        (pair() | {"foils": "x"}, "line 2 has a field 'foils'; .* Did you mean 'foil'"),
        (pair(prompt="  "), "line 2 has an empty prompt"),
        (pair(answer=""), "line 2 has an empty answer"),
        (pair(answer=5), "line 2 has 5 as its answer, where a text is needed"),
        (pair(foil="Mary "), "line 2 has the answer 'Mary' as its foil too"),
        (pair(corrupt=pair()["prompt"]), "the prompt itself; something must differ"),
        (pair(foil=None), "line 2 has no foil, while others have"),
        (pair(corrupt=None), "line 2 has no corrupt, while others have"),
        (pair(corrupt="Mary gave a ring to"), "line 2: the prompt has 7 tokens and its corrupt prompt 5"),
        (pair(answer="Zanzibar"), "line 2: this tokenizer does not know the words of 'Zanzibar'"),
        (pair(corrupt="Mary and Zanzibar gave a ring to", prompt="Mary and Timbuktu gave a ring to"), "does not keep"),
    ],
    ids=str,
)
def test_bad_pairs_are_answered_in_a_sentence(words, tmp_path, line, sentence):
    with pytest.raises(ValueError, match=sentence):
        written(tmp_path / "bad.jsonl", pair(), line).make(words, 2)


def test_bad_files_are_answered_in_a_sentence(words, tmp_path):
    good = written(tmp_path / "good.jsonl", pair())
    with pytest.raises(ValueError, match="2 pairs were asked for; allowed is 1 to 1"):
        good.make(words, 2)
    with pytest.raises(ValueError, match="There is no file of pairs .*god.jsonl. Did you mean 'good.jsonl'"):
        Pairs(str(tmp_path / "god.jsonl")).make(words, 1)
    with pytest.raises(ValueError, match="is a folder"):
        Pairs(str(tmp_path)).make(words, 1)
    with pytest.raises(ValueError, match="holds no pairs"):
        written(tmp_path / "empty.jsonl", " ", "").make(words, 1)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        Pairs(str(tmp_path / "latin.jsonl")).make(words, 1)
    for task in (Pairs(), Pairs("a.jsonl", pairs=LONG)):
        with pytest.raises(ValueError, match="from a file or are given"):
            task.make(words, 1)
    with pytest.raises(ValueError, match="Pair 1 has an empty foil"):
        Pairs(pairs=(Pair("a", "b", ""),)).make(words, 1)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (ColouredObjects(examples=4), "4 examples were asked for; allowed are 0 to 3"),
        (LaundryList(items=1), "Lists of 1 items were asked for; allowed are 2 to 20"),
        (RandomLabels(options=27), "27 options were asked for; allowed are 2 to 26"),
        (TwoHop(template="Nowhere is"), "'Nowhere is' has no {place} before its last word"),
    ],
    ids=str,
)
def test_bad_fields_are_answered_in_a_sentence(tokenizer, task, sentence):
    with pytest.raises(ValueError, match=sentence):
        task.make(tokenizer, 2)
