"""Why of a whole task: planted circuits are found on prompts that did not choose them; the command; sentences."""

import json

import pytest
from typer.testing import CliRunner

from headwise import cli, models
from headwise.atlas import Atlas
from headwise.data import IOI, DigitImages, Induction, Pairs, Planted
from headwise.data.pair_file import Pair
from headwise.graph import Graph
from headwise.view.circuits import circuits
from headwise.why_task import WhyTask

KEYS = {
    "task", "prompts", "metric", "clean", "corrupt", "chosen", "faithfulness", "left", "explains", "p", "losses",
    "says", "of", "nodes", "edges", "about",
}  # fmt: skip
FRAME = "When {} and {} left the park, {} gave a ring to"


@pytest.fixture(scope="module")
def planted():
    return Planted(plain=20).build(5)


@pytest.fixture(scope="module")
def reason(planted):
    return WhyTask(draws=20).ask(planted.model, planted.tokenizer, IOI(), 16)


def own(more=""):
    """Four pairs in which the second name gives; `more` makes answers and foils longer."""
    names = (("Mary", "John"), ("John", "Mary"), ("Peter", "Susan"), ("Susan", "Peter"))
    return Pairs(pairs=tuple(Pair(FRAME.format(a, b, b), a + more, b + more, FRAME.format(a, b, a)) for a, b in names))


def test_the_planted_circuit_is_found_and_measured_on_other_prompts(planted, reason):
    at = {role: unit for unit, role in planted.truth.items()}
    assert {at["name mover"], at["subject inhibition"], at["duplicate token"], "logits"} <= set(reason.graph.nodes)
    assert reason.worth.faithfulness == pytest.approx(1, abs=0.2) and len(reason.graph) < 20
    assert reason.worth.explains and reason.chosen == pytest.approx(1, abs=0.11)
    assert len(reason.batch) == len(reason.held) == 8 and not set(reason.batch.texts) & set(reason.held.texts)
    assert "8 prompts that had no say in choosing it" in reason.tested()
    gap = reason.worth.clean - reason.worth.corrupt
    assert 0.5 * gap < reason.graph.table["weight"].abs().max() < 1.5 * gap
    assert set(reason.data()) == KEYS and json.dumps(reason.data(), default=str)
    assert reason.named("embed") == "the tokens" and reason.name == "why-ioi"


def test_the_view_gives_python_that_gives_the_same_numbers(planted, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "open_model", lambda _name: (planted.model, planted.tokenizer))
    atlas = Atlas.of(planted.model, tmp_path / "planted")
    atlas.add_graph(reason.name, reason.kept())
    shown = circuits(atlas)["graphs"][0]
    assert shown["title"] == "ioi, the whole task" and shown["question"]["prompts"] == [8, 8]
    known: dict = {}
    exec(shown["code"], known)
    assert known["worth"].faithfulness == pytest.approx(shown["question"]["faithfulness"], rel=1e-3)
    edge = shown["edges"][0]
    assert known["graph"][edge["source"], edge["target"]] == pytest.approx(edge["weight"], rel=1e-3)
    exact = shown["exact"].replace("SOURCE", repr(edge["source"])).replace("TARGET", repr(edge["target"]))
    exec(exact.replace("print(", "found = ("), known)
    assert known["found"] == pytest.approx(edge["weight"], abs=0.6 * abs(edge["weight"]))


def test_prompts_of_ones_own_with_answers_of_several_tokens(planted):
    task = own(" and")
    reason = WhyTask(draws=0).ask(planted.model, planted.tokenizer, task, 4)
    assert reason.metric == "log-probability of the answer" and reason.worth.clean > reason.worth.corrupt


def test_too_little_to_look_at_is_a_sentence(planted):
    model, tokenizer = planted.model, planted.tokenizer
    with pytest.raises(ValueError, match="has no tokenizer"):
        WhyTask().ask(model, None, IOI(), 8)
    with pytest.raises(ValueError, match="The model gets 3 of 3 prompts of induction right; at least 4 are needed"):
        WhyTask().ask(model, tokenizer, Induction(), 3)
    with pytest.raises(ValueError, match="The prompts of digits_images are not text"):
        WhyTask().ask(model, tokenizer, DigitImages(), 4)
    with pytest.raises(ValueError, match="has no corrupt prompts"):
        WhyTask().ask(model, tokenizer, Pairs(pairs=(Pair("When Mary", "and"), Pair("When John", "and"))), 2)


def test_the_command(planted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "open_model", lambda *_args, **_options: (planted.model, planted.tokenizer))
    lines = [json.dumps(pair._asdict()) for pair in own().pairs]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    run = CliRunner().invoke
    said = run(cli.app, ["why", "default", "--pairs", "mine.jsonl", "--draws", "0", "-o", "g.parquet"])
    assert said.exit_code == 0, said.output
    assert "pairs: logit difference" in said.stdout and "on 2 prompts that the model gets right" in said.stdout
    assert "#&graph=why-pairs-" in said.stdout and len(Graph.load(tmp_path / "g.parquet")) > 2
    held = run(cli.app, ["why", "default", "--task", "ioi", "--n", "4", "--draws", "0", "--no-view", "--json"])
    assert set(json.loads(held.stdout)) == KEYS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "given: none of them"),
        (["x", "--task", "ioi"], "given: a prompt, --task"),
        (["x"], "A prompt lacks --answer and --instead"),
        (["x", "--answer", "a", "--instead", "b", "--n", "3"], "A prompt takes no --n"),
        (["--task", "ioi", "--answer", "a"], "Only a prompt takes --answer"),
        (["--task", "ioy"], "There is no method 'data.ioy'"),
        (["--task", "heads.induction"], "heads.induction is not a task"),
        (["--pairs", "none.jsonl"], "There is no file of pairs none.jsonl"),
    ],
)
def test_words_that_do_not_go_together_are_sentences(words, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["why", "default", *words])
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output
