"""Why: the planted reason is found from one prompt; several tokens, made-up contrasts, and sentences for bad input."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from headwise import cli, models
from headwise.atlas import Atlas
from headwise.data import Planted, Successor
from headwise.graph import Graph
from headwise.view.circuits import circuits
from headwise.why import Why

PROMPT = "When Mary and John left the park, John gave a ring to"
KEYS = {
    "prompt", "answer", "instead", "tokens", "contrast", "how", "metric", "clean", "corrupt", "faithfulness", "left",
    "explains", "p", "losses", "says", "unseen", "of", "nodes", "edges", "about",
}  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    return Planted(plain=20).build(5)


def ask(planted, *words, **fields):
    return Why(**{"draws": 0, **fields}).ask(planted.model, planted.tokenizer, *words)


def test_the_planted_reason_is_found(planted):
    reason = ask(planted, PROMPT, "Mary", "John", draws=20)
    at = {role: unit for unit, role in planted.truth.items()}
    assert reason.how == "exchanged" and "John and Mary" in reason.contrast[0]
    assert reason.metric == "logit difference" and reason.worth.clean > 10 > -10 > reason.worth.corrupt
    assert {at["name mover"], "logits"} <= set(reason.graph.nodes)
    assert reason.graph.table["weight"].abs().max() < 1.25 * (reason.worth.clean - reason.worth.corrupt)
    assert reason.worth.faithfulness == pytest.approx(1, abs=0.2) and len(reason.graph) < 20
    assert reason.unseen[0].startswith("the exchanged prompt") and reason.unseen[1] == pytest.approx(1, abs=0.3)
    assert "had no say in choosing it" in reason.tested()
    assert reason.named("embed@2") == "Mary@2" and reason.named("L0.H1") == "L0.H1"
    assert set(reason.data()) == KEYS and reason.data()["edges"][0]["target"]
    assert json.dumps(reason.data(), default=str)


def test_your_own_contrast(planted):
    other = PROMPT.replace("John gave", "Paul gave")
    reason = ask(planted, PROMPT, "Mary", "John", other)
    assert reason.how == "given" and "Paul gave" in reason.contrast[0]
    again = ask(planted, PROMPT, "Mary", "John", reason.contrast[0])
    assert again.batch.corrupt["input_ids"].equal(reason.batch.corrupt["input_ids"])
    assert reason.unseen is None and "on the prompt that chose the graph" in reason.tested()
    assert reason.worth.faithfulness > 0.8


def test_a_contrast_is_made_up_where_no_name_can_be_exchanged(planted):
    batch = Successor().make(planted.tokenizer, 1, 0)
    answer, foil = (planted.tokenizer.decode(ids[0, :1]) for ids in (batch.answer, batch.foil))
    prompt = planted.tokenizer.decode(batch.ids[0, 1:])
    assert answer not in prompt and foil not in prompt
    reason = ask(planted, prompt, answer, foil)
    assert reason.how == "random" and len(reason.contrast) == 3
    assert reason.unseen[0].startswith("other random tokens") and reason.unseen[1] > 0.5
    assert reason.worth.faithfulness > 0.8 and reason.worth.corrupt < 0.5 * reason.worth.clean


def test_answers_of_several_tokens_are_compared_as_a_whole(planted):
    reason = ask(planted, PROMPT, "Mary and", "John")
    assert reason.metric == "log-probability ratio"
    with torch.no_grad():
        total = {}
        for text in ("Mary and", "John"):
            ids = planted.tokenizer(f"<s>{PROMPT} {text}", add_special_tokens=False, return_tensors="pt").input_ids
            logits = planted.model(ids).logits.log_softmax(-1)[0, :-1]
            count = len(text.split())
            total[text] = logits.gather(1, ids[0, 1:, None])[-count:].sum().item()
    assert reason.worth.clean == pytest.approx(total["Mary and"] - total["John"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("", "Mary", "John"), "The prompt is empty"),
        ((PROMPT, " ", "John"), "The answer is empty"),
        ((PROMPT, "Mary", ""), "The answer that it is compared with is empty"),
        ((PROMPT, "Mary", " Mary"), "are both 'Mary'; they must differ"),
        ((PROMPT, "Mary", "Xyzzy"), "cannot go on with 'Xyzzy'"),
        ((PROMPT, "Mary", "John", "When Mary"), "The contrast is 3 tokens and the prompt 14"),
        ((PROMPT, "Mary", "John", PROMPT), "The contrast is the prompt itself"),
        (("the " * 5000, "Mary", "John"), "this model reads at most 4096"),
        ((PROMPT, "John", "Mary"), "nothing that a circuit could explain"),
        ((PROMPT, "John", "Mary", PROMPT.replace("Mary", "Paul")), "prefers 'Mary' to 'John'|nothing that a circuit"),
    ],
)
def test_bad_input_is_a_sentence(planted, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(planted, *words)


def test_a_preference_that_hangs_on_no_word_is_a_sentence(planted, monkeypatch):
    monkeypatch.setattr(Why, "_replaced", lambda self, model, question: [[*question.ids[:1], 9, *question.ids[2:]]])
    monkeypatch.setattr("headwise.why._Question.exchanged", lambda self: [])
    monkeypatch.setattr("headwise.why.gap", lambda parts: (torch.ones(1), torch.full((1,), 0.9)))
    with pytest.raises(ValueError, match="is still 0.9 of 1: the model prefers 'Mary' anyway"):
        ask(planted, PROMPT, "Mary", "John")


def test_bad_fields_are_sentences(planted):
    with pytest.raises(ValueError, match="cannot show p < 0.05; draw at least 20"):
        ask(planted, PROMPT, "Mary", "John", draws=5)
    with pytest.raises(ValueError, match="not 1.2"):
        ask(planted, PROMPT, "Mary", "John", target=1.2)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Why().ask(planted.model, None, PROMPT, "Mary", "John")


def test_a_kept_graph_holds_the_question_and_its_numbers(planted, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "open_model", lambda _name: (planted.model, planted.tokenizer))
    reason = ask(planted, PROMPT, "Mary", "John")
    assert reason.name.startswith("why-mary-john-") and len(reason.name) == len("why-mary-john-") + 6
    atlas = Atlas.of(planted.model, tmp_path / "planted")
    atlas.add_graph(reason.name, reason.kept())
    held = atlas.graph(reason.name)
    asked = held.about["why"]
    assert held.table.equals(reason.graph.table) and asked["prompt"] == PROMPT
    assert asked["faithfulness"] == reason.worth.faithfulness and asked["losses"] == reason.worth.losses
    shown = circuits(atlas)["graphs"][0]
    assert shown["title"] == "Mary, not John" and shown["tokens"][2].strip() == "Mary"
    known: dict = {}
    exec(shown["code"], known)
    edge = shown["edges"][0]
    assert known["graph"][edge["source"], edge["target"]] == pytest.approx(edge["weight"], rel=1e-3)
    exact = shown["exact"].replace("SOURCE", repr(edge["source"])).replace("TARGET", repr(edge["target"]))
    exec(exact.replace("print(", "found = ("), known)
    assert known["found"] == pytest.approx(edge["weight"], abs=0.6 * abs(edge["weight"]))


def test_the_command(planted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "open_model", lambda *_args, **_options: (planted.model, planted.tokenizer))
    words = ["why", "default", PROMPT, "--answer", "Mary", "--instead", "John", "--draws", "0"]
    shown = CliRunner().invoke(cli.app, [*words, "-o", str(tmp_path / "g.parquet")])
    assert shown.exit_code == 0 and "'Mary' instead of 'John': logit difference" in shown.stdout
    assert "explain the behaviour" in shown.stdout and "logits" in shown.stdout
    assert len(Graph.load(tmp_path / "g.parquet")) > 2
    said = re.search(r"Circuit view: (\S+)#&graph=(why-mary-john-\w+)", shown.stdout)
    page = (tmp_path / said[1]).read_text()
    assert said[2] in page and Atlas((tmp_path / said[1]).parent).graphs().keys() == {said[2]}
    before = (tmp_path / said[1]).stat().st_mtime_ns
    quiet = CliRunner().invoke(cli.app, [*words, "--no-view"])
    assert "Circuit view" not in quiet.stdout and (tmp_path / said[1]).stat().st_mtime_ns == before
    held = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)
    assert set(held) == KEYS
    wrong = CliRunner().invoke(cli.app, [*words[:5], "John", "--instead", "John"])
    assert wrong.exit_code == 2
