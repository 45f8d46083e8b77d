"""The report in a real browser: offline, by keyboard, by link, and for readers who use assistive technology."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_atlas import add_run, synthetic_atlas

from headwise.view import report

WEB = Path(__file__).parent.parent / "web"
# Seconds for all that is done in the browser; 555 were seen where others took three quarters of the machine.
LONGEST = 1200
pytestmark = pytest.mark.timeout(LONGEST + 60)
NEEDED = "{0} is not installed. `make test` installs it; by hand: {1}."


def need_browser() -> None:
    """Fail, not skip, when a piece is missing: a page that was never opened is not tested."""
    if shutil.which("node") is None:
        pytest.fail(NEEDED.format("Node.js", "apt-get install nodejs npm"))
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        pytest.fail(NEEDED.format("What web/package-lock.json lists", "cd web && npm ci"))
    places = [
        "/usr/bin/chromium",
        "/usr/bin/chromium-browser",
        "/usr/bin/google-chrome",
        os.environ.get("HEADWISE_CHROMIUM", ""),
    ]
    if not any(place and Path(place).exists() for place in places):
        pytest.fail(NEEDED.format("Chromium", "apt-get install chromium"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    need_browser()
    folder = tmp_path_factory.mktemp("page")
    atlas = synthetic_atlas(folder / "run" / "atlas")
    add_run(folder / "run", 6, 9)
    page = report.write(atlas, folder / "report.html")
    words = ["node", str(WEB / "test" / "page.mjs"), str(page)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_missing_browser_fails_with_a_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(pytest.fail.Exception, match="Node.js is not installed. `make test` installs it"):
        need_browser()


def test_it_loads_from_a_file_without_error_or_request(found):
    assert found["errors"] == []
    assert found["requests"] == []


def test_arrow_keys_move_the_selection_and_the_card_follows(found):
    keys = found["keyboard"]
    moves = ("start", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "Home", "End")
    assert [keys[k] for k in moves] == ["L5.H1", "L6.H1", "L6.H2", "L5.H2", "L5.H1", "L0.H1", "L29.H1"]
    assert keys["focused"] == keys["card"] == keys["enter"] == "L29.H1"
    assert keys["stops"] == 1
    assert keys["address"] == "#L29.H1"


def test_a_link_opens_its_head_and_its_state(found):
    link = found["hash"]
    assert (link["opened"], link["colour"], link["side"]) == ("L7.H4", "induction_ablation", "Is looked at by")
    assert (link["followed"], link["clicked"]) == ("L2.H3", "L3.H3")
    assert link["unknown"] == "L5.H1"


def test_the_table_is_the_maps_twin(found):
    state = found["state"]
    assert state["rows"] == 270
    assert state["sorted"].startswith("Role")
    assert state["address"] == "#L3.H3&side=key&view=table"


def test_tokens_are_visible_and_can_be_chosen(found):
    pattern = found["pattern"]
    assert pattern["tokens"] == 31
    assert "\u2423" in pattern["text"] and "\u21b5" in pattern["text"] and "\n" not in pattern["text"]
    assert (pattern["chosen"], pattern["moved"]) == ("6", "7")
    assert pattern["weight"].startswith("0 <|start|>, weight ")
    compile(pattern["code"], "card", "exec")
    assert 'atlas.claims(unit="L5.H1")' in pattern["code"]


def test_a_dot_shows_its_plan_on_the_map_by_pointer_and_by_key(found):
    tried = found["tradeoffs"]
    # 27 of 90 KV heads are full, and three heads read from each.
    assert (tried["before"], tried["hovered"], tried["after"], tried["focused"], tried["kept"]) == (0, 81, 0, 81, 81)
    assert tried["says"].startswith("Shown: plan 0.4. Of 90 KV heads 27 full (ringed); 63 by cache.duo, sink 64")
    assert tried["cell"].endswith(" full")
    assert "L5.G" not in tried["label"] and tried["label"].startswith("plan 0.4, accepted: 98 % of the answers kept")
    assert "In plans" not in tried["card"] and "(rejected): cache.duo" in tried["card"] and "rank" in tried["card"]


def test_every_dot_is_reached_by_the_arrow_keys(found):
    tried = found["tradeoffs"]
    # Two trials of five caches share the full one; three of the four benched caches were asked for answers.
    assert tried["dots"] == [12, 3] and tried["stops"] == [1, 1]
    assert len(set(tried["walk"])) == 12 and tried["walk"][-1] == tried["walk"][-2]


def test_presses_go_through_dots_that_lie_on_one_another(found):
    first, second, third = found["tradeoffs"]["pressed"]
    assert {first, second} == {"0.2/full", "bench/DynamicCache/2048"} and third == first


def test_a_chosen_dot_gives_its_numbers_and_stays_in_the_address(found):
    tried = found["tradeoffs"]
    assert tried["address"] == "#L5.H1&dot=0.4%2Fplan"
    assert tried["quality"] == "#L5.H1&dot=0.4%2Fplan&quality=nll"
    for part in (
        "plan 0.4, accepted",
        "20.3 MB, 43 % of the full cache's",
        "27 cache.preallocated",
        "98 % of 12 answers",
    ):
        assert part in tried["numbers"]
    assert tried["closed"] == 0 and tried["linked"] == "plan 0.2, rejected"
    assert tried["rows"] == 9 and "at 1,024 tokens" in tried["sentence"]
    assert "torn.json is not a headwise plan" in tried["out"] and "/" not in tried["out"]


def test_the_threshold_shows_the_largest_edges_and_stays_in_the_address(found):
    drawn = found["circuit"]
    assert (drawn["edges"], drawn["one"], drawn["few"], drawn["linked"]) == (40, 1, 12, 7)
    assert drawn["all"] >= 90 and drawn["says"].startswith(f"40 of {drawn['all']} edges, each at least ")
    assert drawn["address"] == "#L5.H1&graph=why-mary-john-0a1b2c&edges=12"
    assert "explain the behaviour, in this made-up example" in drawn["verdict"]
    assert drawn["rows"] == 12 and drawn["task"] == 40 and drawn["other"] == f"#{drawn['before']}&graph=ioi"
    assert "torn.parquet is not a headwise graph" in drawn["out"] and "/" not in drawn["out"]


def test_places_of_a_circuit_are_reached_by_arrow_keys(found):
    drawn = found["circuit"]
    assert drawn["stops"] == 1
    first, _, back, top = drawn["walk"]
    assert first == drawn["before"] and back != "logits" and top == "logits"
    assert drawn["label"].startswith("logits: reads ")


def test_a_pressed_place_or_edge_gives_its_numbers_and_its_code(found):
    drawn = found["circuit"]
    place = drawn["before"]
    assert drawn["heading"] == place and f"node={place}" in drawn["picked"]
    assert "Reads" in drawn["numbers"] and "Is read by" in drawn["numbers"] and "%" in drawn["numbers"]
    assert " to " in drawn["edge"] and drawn["closed"] == 0
    for code in (drawn["code"], drawn["bench"]):
        compile(code, "circuit", "exec")
    assert "shown = graph.top(12)" in drawn["code"] and "PathPatching(senders=(" in drawn["code"]
    assert (
        drawn["bench"].count("print(graph[") == 12
        and "print(worth.faithfulness, worth.left)  # 0.83 0.11" in drawn["bench"]
    )
    assert drawn["opened"] == f"#{place}&graph=ioi&node={drawn['pressed'].replace('>', '%3E')}"


def test_training_shows_a_line_a_head_and_follows_the_selected_one(found):
    seen = found["training"]
    assert ["; 54 lines," in said or "; 1 lines," in said for said in seen["lines"]] == [True, True]
    assert seen["rows"] == 54 and seen["first"] == "L5.H1"
    assert seen["says"].startswith("L5.H1: induction ") and "half of its change between steps" in seen["says"]
    assert seen["picked"] == "#L5.H1" and seen["address"] == "#L5.H1&curve=match%40train"
    assert "Edit L1.pattern of heads 0, 3, steps 0 to 425" in seen["legend"]
    assert "Reset embed at every 25th step" in seen["legend"] and "change of phase" in seen["legend"]
    compile(seen["code"], "training", "exec")
    assert 'tape.curve("match", "train", "L5.H1")' in seen["code"]


def test_axe_finds_no_violation_in_light_or_dark(found):
    assert {name: rules for name, rules in found["violations"].items() if rules} == {}
    assert min(found["checks"].values()) > 15
    assert len(found["violations"]) == 11


def test_the_same_modules_work_as_notebook_widgets(found):
    made = found["widgets"]
    assert made["headmap"]["picked"] == "L2.H3" and made["headmap"]["saved"] > 0
    assert made["headmap"]["followed"] == "Map L7.H4"
    assert made["headcard"]["followed"].strip() == "L7.H4"
    assert made["patternview"]["followed"].startswith("Pattern of L7.H4")
    assert made["tradeoffview"]["followed"] == "Trade-offs L7.H4"
    assert made["trainingview"]["followed"].strip() == "Training"
    assert made["circuitview"]["followed"].strip() == "Circuit" and made["circuitview"]["node"] == "logits"
    assert all((one["left"], one["heard"]) == (0, 0) for one in made.values())


def test_it_fits_a_narrow_window(found):
    assert found["size"]["overflow"] <= 0
    assert found["checks"]["narrow"] > 15
