"""Sentences and code of the report: no more than the evidence says, and Python that runs."""

import numpy as np
import pytest
from synthetic_atlas import score_table, synthetic_atlas

from headwise.atlas import Atlas
from headwise.claim import Claim, Rung
from headwise.score import Score
from headwise.view import words
from headwise.view.gather import gather


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> Atlas:
    return synthetic_atlas(tmp_path_factory.mktemp("atlas") / "small", layers=8, heads=9)


def rung(step: str, passed: bool) -> Rung:
    return Rung(step, "score", 0.5, 0.4, 0.6, 0.1, 0.01, 0.02, 20, 0.5, passed)


def sentence(verdict: str, *rungs: Rung, role: str = "induction") -> str:
    head = {"unit": "L5.H1", "role": role if verdict == "proved" else "unknown", "verdict": verdict}
    return words.head_sentence(head, [Claim("L5.H1", role, verdict, list(rungs))])


def test_a_sentence_says_no_more_than_the_evidence():
    seen, needed, enough = (rung(step, True) for step in ("seen", "needed", "enough"))
    assert sentence("proved", seen, needed, enough) == "L5.H1 is an induction head: proved (needed, enough)."
    assert sentence("proved", needed, role="sink") == "L5.H1 is a sink head: proved (needed)."
    assert sentence("unknown", seen, rung("needed", False)) == "L5.H1 is unknown; looks like an induction head (seen)."
    assert (
        sentence("refuted", seen, rung("needed", False), rung("enough", False))
        == "L5.H1 is not an induction head (not needed and not enough): refuted."
    )
    assert sentence("unknown", rung("needed", False)) == "L5.H1 is unknown: no test singles it out."


def test_the_summary_counts_add_up():
    heads = [{"role": "induction", "verdict": "proved"}] * 2 + [{"role": "sink", "verdict": "proved"}]
    heads += [{"role": "unknown", "verdict": "unknown"}] * 4 + [{"role": "induction", "verdict": "refuted"}]
    expected = "3 of 8 heads are proved: 2 induction and 1 sink. 1 was tested and refuted. 4 are unknown."
    assert words.summary_sentence(heads) == expected


def test_a_head_that_only_looks_like_a_role_is_drawn_with_it(atlas):
    heads = {head["unit"]: head for head in gather(atlas)["heads"]}
    assert (heads["L6.H1"]["role"], heads["L6.H1"]["verdict"]) == ("previous token", "unknown")
    assert (heads["L4.H7"]["role"], heads["L4.H7"]["verdict"]) == ("induction", "refuted")


def test_the_code_of_a_score_is_python_that_names_its_method(atlas):
    code = words.score_code(atlas.score("induction_stripe"))
    compile(code, "score", "exec")
    assert 'load("data.repeated")().make(tokenizer, n=100, seed=0)' in code
    assert 'load("heads.induction")().score(model, batch)' in code
    assert words.score_code(Score("x", score_table([(0, 0)], np.array([1.0])), about={"method": "by hand"})) == ""


def test_the_code_takes_the_prompts_that_were_used():
    task = {"task": "data.needle", "version": 1, "n": 12, "seed": 3, "length": 500, "part": "rows 6 to 11", "rows": 6}
    about = {"method": {"name": "heads.retrieval", "fields": {"gate": 0.5}}, "task": task, "model": "m/x"}
    code = words.score_code(Score("retrieval", score_table([(0, 0)], np.array([1.0])), about=about))
    assert 'batch = load("data.needle")(length=500).make(tokenizer, n=12, seed=3).take(slice(6, 12))' in code
    assert "open_model('m/x')" in code and 'load("heads.retrieval")(gate=0.5)' in code
