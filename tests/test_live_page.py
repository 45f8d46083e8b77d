"""The page of an experiment, opened in a browser before the first run and followed until the last is done."""

import json
import subprocess
import time
from dataclasses import replace

import pytest
from test_report_page import LONGEST, WEB, need_browser

from headwise.comparison import Condition, compare
from headwise.data import FewShotLabels
from headwise.lab import Edit, TinyConfig, Training, pattern, steps
from headwise.view import live

pytestmark = pytest.mark.timeout(LONGEST + 60)
LESSON = FewShotLabels(classes=20, dim=8)
CONFIG = TinyConfig(**LESSON.config(layers=2, heads=4, width=16))
SHORT = Training(steps=60, batch=8, lr=1e-3, measure_every=5, rows=16)
HOLD = [Edit("L1.pattern", pattern("match"), heads=(3,), when=steps(0, 30))]
CONDITIONS = {"none": Condition(CONFIG, LESSON, SHORT), "match, early": Condition(CONFIG, LESSON, SHORT, HOLD)}


class Slow(live.Live):
    """As slow as a long run: some measurements come between two looks of the page, and two looks between two runs."""

    def __call__(self, run) -> None:
        super().__call__(run)
        time.sleep(2.5 if run.done else 0.3)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    need_browser()
    folder = tmp_path_factory.mktemp("live")
    page = live.write(folder, "two_conditions", CONDITIONS, (5,))
    words = ["node", str(WEB / "test" / "live.mjs"), str(page), str(LONGEST // 2)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as browser:
        ready = browser.stdout.readline()
        if ready == "ready\n":
            compare(CONDITIONS, seeds=(5,), folder=folder, watch=Slow(pause=0.0))
        out, said = browser.communicate(timeout=LONGEST)
    assert ready == "ready\n" and browser.returncode == 0, said
    return json.loads(out)


def test_the_page_opens_before_anything_is_measured_and_loads_what_lies_beside_it(seen):
    assert "Nothing is measured yet." in seen["before"]
    assert seen["errors"] == [] and seen["requests"] == [] and seen["violations"] == []


def test_the_page_follows_the_steps_of_one_run_after_the_other(seen):
    said = seen["said"]
    first = [one for one in said if one.startswith("Run 1 of 2, none, seed 5: step ")]
    assert len(first) >= 3 and all(one.endswith(" of 60.") for one in first)
    assert said[-1] == "Run 2 of 2, match, early, seed 5: done after 60 steps."
    assert seen["lines"][said[-1]] == 13 and seen["lines"][first[1]] < 13
    assert [" 8 lines" in label or " 1 lines" in label for label in seen["labels"]] == [True, True]


def test_what_was_held_is_shaded_and_a_run_can_be_chosen_by_a_link(seen):
    free, held = seen["shaded"]["none/seed=5"], seen["shaded"]["match,-early/seed=5"]
    assert free["boxes"] == 0 and held["boxes"] == 2
    assert "Edit L1.pattern of heads 3, steps 0 to 30" in held["key"]
    assert seen["linked"] == "match,-early/seed=5" and "run=match%2C-early%2Fseed%3D5" in seen["chosen"]


def test_a_run_writes_what_is_on_its_tape_and_a_finished_one_is_left_as_it_is(tmp_path):
    text = live.write(tmp_path, "a <b>", CONDITIONS, (5,)).read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt; - headwise</title>" in text and "script-src 'unsafe-inline' 'self' file:;" in text
    file = tmp_path / "none" / "seed=5" / "training.js"
    assert told(file) == {"step": 0, "of": 60, "done": False, "training": None}
    brief = {"none": replace(CONDITIONS["none"], training=replace(SHORT, steps=10))}
    compare(brief, seeds=(5,), folder=tmp_path, watch=live.Live())
    end = told(file)
    assert (end["step"], end["of"], end["done"]) == (10, 10, True) and end["training"]["steps"] == [0, 10]
    live.write(tmp_path, "again", CONDITIONS, (5, 6))
    assert told(file) == end and not told(tmp_path / "none" / "seed=6" / "training.js")["done"]


def told(file):
    return json.loads(file.read_text().removeprefix("headwiseTold(").removesuffix(");\n"))
