"""The report in a real browser: offline, by keyboard, by link, and for readers who use assistive technology."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_atlas import synthetic_atlas

from headwise.view import report

WEB = Path(__file__).parent.parent / "web"
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
    page = report.write(synthetic_atlas(folder / "atlas" / "synthetic"), folder / "report.html")
    run = subprocess.run(
        ["node", str(WEB / "test" / "page.mjs"), str(page), str(folder)], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout) | {"shots": sorted(p.name for p in folder.glob("*.png"))}


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


def test_axe_finds_no_violation_in_light_or_dark(found):
    assert {name: rules for name, rules in found["violations"].items() if rules} == {}
    assert min(found["checks"].values()) > 15
    assert len(found["violations"]) == 6


def test_the_same_modules_work_as_notebook_widgets(found):
    made = found["widgets"]
    assert made["headmap"]["picked"] == "L2.H3" and made["headmap"]["saved"] > 0
    assert made["headmap"]["followed"] == "Map L7.H4"
    assert made["headcard"]["followed"].strip() == "L7.H4"
    assert made["patternview"]["followed"].startswith("Pattern of L7.H4")
    assert all((one["left"], one["heard"]) == (0, 0) for one in made.values())


def test_it_fits_a_narrow_window(found):
    assert found["size"]["overflow"] <= 0
    assert "narrow.png" in found["shots"]
