"""The report: what it holds of an atlas, and what it leaves out with the reason."""

import dataclasses
import json
import re
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic_atlas import (
    FINGERPRINT,
    TEXTS,
    add_run,
    bench_row,
    empty_atlas,
    graph_of,
    plan_of,
    score_table,
    synthetic_atlas,
)

from headwise.atlas import Atlas
from headwise.score import Score
from headwise.view import report
from headwise.view.gather import gather
from headwise.view.training import phase


class Page(HTMLParser):
    """Every element with its attributes, and the text of the data block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "headwise-data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data += data


def page_of(atlas: Atlas, folder: Path) -> Page:
    return Page(report.write(atlas, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> Atlas:
    return synthetic_atlas(tmp_path_factory.mktemp("atlas") / "small", layers=8, heads=9)


def test_the_report_is_one_file_that_fetches_nothing(atlas, tmp_path):
    page = page_of(atlas, tmp_path)
    links = [
        value
        for _, attrs in page.elements
        for key, value in attrs.items()
        if key in ("src", "href", "srcset", "action")
    ]
    assert links == ["data:,"]
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'")
    style = report.built("headwise.css")
    assert "url(" not in style and "@import" not in style
    script = report.built("report.js")
    # The only addresses in the script name XML vocabularies; browsers do not open those.
    assert set(re.findall(r"https?://[^\s\"'`)]+", script)) <= {
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/XML/1998/namespace",
        "http://www.w3.org/2000/xmlns/",
    }
    assert "</script" not in script.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]


def test_the_data_of_the_atlas_arrives_whole(atlas, tmp_path):
    data = json.loads(page_of(atlas, tmp_path).data)
    assert data == json.loads(json.dumps(gather(atlas)))
    units = [head["unit"] for head in data["heads"]]
    assert len(units) == 72
    score = next(one for one in data["scores"] if one["name"] == "induction_stripe")
    assert score["value"][units.index("L5.H1")] == pytest.approx(atlas.score("induction_stripe")["L5.H1"], rel=1e-4)
    assert score["about"]["fingerprint"] == FINGERPRINT
    prompt = next(one for one in data["patterns"] if one["id"] == "code")
    tokens, text, layers = atlas.pattern("code")
    assert prompt["tokens"] == tokens and prompt["text"] == text == TEXTS["code"]
    packed = prompt["layers"]["L5"]
    raw = np.frombuffer(zlib.decompress(b64decode(packed["data"])), np.uint8).reshape(packed["shape"])
    assert np.array_equal(raw, layers[5])
    rung = data["claims"]["L5.H1"][0]["rungs"][-1]
    held = atlas.claims(unit="L5.H1")[0].rungs[-1]
    assert rung["p_holm"] == pytest.approx(held.p_holm, rel=1e-3) and rung["passed"] is held.passed
    assert data["readouts"]["L5.H1"]["ov"][0][0] == " lake"


def test_scores_of_kv_heads_stand_on_every_query_head_that_reads_them(tmp_path):
    atlas = empty_atlas(tmp_path, {0: 4, 3: 4}, {0: 2, 3: 1})
    table = score_table([(0, 0), (0, 1), (3, 0)], np.array([1.0, 2.0, 3.0]), letter="G")
    atlas.add(Score("use", table, "kv", "seen", {}))
    assert gather(atlas)["scores"][0]["value"] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]


def test_trade_offs_hold_what_each_plan_does_and_every_cache_that_was_tried(atlas):
    found = gather(atlas)["tradeoffs"]
    assert found["kv"][:4] == ["L0.G0", "L0.G0", "L0.G0", "L0.G1"] and len(found["kv"]) == 72
    plan = {plan["name"]: plan for plan in found["plans"]}["0.4"]
    held = json.loads(atlas.plans()["0.4"].read_text(encoding="utf-8"))
    assert plan["heads"] == {unit: row["treatment"] for unit, row in held["heads"].items()}
    assert plan["legend"]["full"] == {"text": "cache.preallocated", "all": True}
    assert plan["legend"]["rest"] == {"text": "cache.duo, sink 64, recent 256", "all": False}
    assert plan["scores"]["L5.G0"]["need"] == pytest.approx(held["heads"]["L5.G0"]["scores"]["need"], rel=1e-4)
    dots = {dot["key"]: dot for dot in found["dots"]}
    assert len(dots) == 13 and [dot["kind"] for dot in dots.values()].count("full") == 3
    assert (dots["0.4/plan"]["kept"], dots["0.4/plan"]["plan"], dots["0.4/plan"]["at"]) == (0.98, "0.4", 1024)
    assert dots["0.2/random 2"]["name"] == "random 2, for plan 0.2"
    assert dots["bench/plan 0.4/2048"]["plan"] == "0.4" and dots["bench/StaticCache/2048"]["kept"] is None
    assert list(found["left_out"]) == ["torn"] and found["left_out"]["torn"].startswith("torn.json is not")


def test_a_plan_of_other_weights_or_without_a_trial_is_left_out_with_the_reason(tmp_path):
    atlas = empty_atlas(tmp_path, {0: 4}, {0: 2})
    plan = plan_of({0: 2}, 0.5, np.random.default_rng(0))
    dataclasses.replace(plan, fingerprint="other").save(tmp_path / "plans" / "other.json")
    dataclasses.replace(plan, trial=None).save(tmp_path / "plans" / "untried.json")
    odd = dataclasses.replace(plan.trial, rows=["no row"])
    dataclasses.replace(plan, trial=odd).save(tmp_path / "plans" / "odd.json")
    found = gather(atlas)["tradeoffs"]
    assert list(found["left_out"]) == ["odd", "other", "untried"] and found["dots"] == []
    assert "other weights" in found["left_out"]["other"] and "never tried" in found["left_out"]["untried"]
    assert [plan["name"] for plan in found["plans"]] == ["untried"]
    atlas.add_bench([bench_row("plan untried", 0.4, 30.0, float("nan"))])
    found = gather(atlas)["tradeoffs"]
    assert list(found["left_out"]) == ["odd", "other"]
    assert [(dot["plan"], dot["kept"]) for dot in found["dots"]] == [("untried", None)]


def test_circuits_hold_every_edge_with_where_it_ends(atlas):
    found = gather(atlas)["circuits"]
    assert [graph["name"] for graph in found["graphs"]] == ["ioi", "why-mary-john-0a1b2c"]
    assert list(found["left_out"]) == ["torn"] and found["left_out"]["torn"].startswith("torn.parquet is not")
    task, why = found["graphs"]
    held = atlas.graph("why-mary-john-0a1b2c")
    assert why["title"] == "Mary, not John" and task["title"] == "eap_ig, ioi" and task["question"] is None
    sizes = [abs(edge["weight"]) for edge in why["edges"]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == why["edges_in_all"] == len(held)
    drawn = {node["name"] for node in why["nodes"]}
    for edge in why["edges"]:
        assert edge["weight"] == pytest.approx(held[edge["source"], edge["target"]], rel=1e-4)
        assert set(edge["into"]) <= set(held.nodes_of(edge["target"])) and set(edge["into"]) & drawn
    first = next(node for node in why["nodes"] if node["kind"] == "token")
    assert first["label"] == why["tokens"][first["order"]]
    assert why["question"]["answer"] == "Mary" and "tokens" not in why["question"] and "why" not in why["about"]


def test_code_of_circuits_names_what_made_them(atlas):
    task, why = gather(atlas)["circuits"]["graphs"]
    assert 'Why(target=0.8, steps=5, seed=0).ask(model, tokenizer, "When Mary' in why["code"].replace("'", '"')
    assert 'batch = load("data.ioi")' in task["code"] and 'load("circuits.eap_ig")(steps=5).find' in task["code"]
    for graph in (task, why):
        compile(graph["code"] + "\n" + graph["exact"], "circuit", "exec")
    assert "tokens=True).find(model, reason.batch)" in why["exact"] and "tokens=False" in task["exact"]


def test_a_graph_of_other_weights_is_left_out_with_the_reason(tmp_path):
    atlas = empty_atlas(tmp_path, {0: 4}, {0: 2})
    graph = graph_of(1, 4, 3, np.random.default_rng(0))
    other = dataclasses.replace(graph, about=graph.about | {"fingerprint": "other"})
    other.save(tmp_path / "graphs" / "other.parquet")
    with pytest.raises(ValueError, match="The graph g belongs to weights other; this atlas holds 0123456789abcdef"):
        atlas.add_graph("g", other)
    with pytest.raises(ValueError, match="'a b' cannot name a graph"):
        atlas.add_graph("a b", graph)
    found = gather(atlas)["circuits"]
    assert found["graphs"] == [] and "with other weights than this atlas" in found["left_out"]["other"]
    with pytest.raises(ValueError, match="has no graph 'otter'; it has other. Did you mean 'other'"):
        atlas.graph("otter")


def test_training_holds_a_line_a_head_and_when_something_was_held(tmp_path):
    atlas = empty_atlas(tmp_path / "atlas", {0: 4, 1: 4, 5: 4})
    assert gather(atlas)["training"] is None
    add_run(tmp_path, 6, 4)
    found = gather(atlas)["training"]
    assert found["name"] == "MadeUp, seed 5" and found["steps"] == [0, 2000] and len(found["curves"]) == 49
    curves = {(one["metric"], one["unit"]): one for one in found["curves"]}
    loss, head = curves["loss", ""], curves["induction", "L5.H1"]
    assert len(loss["steps"]) == len(loss["values"]) == 41 and 800 <= loss["phase"][0] < loss["phase"][1] <= 1000
    assert head["phase"] is not None and head["values"][-1] == pytest.approx(0.9, abs=0.05)
    held = found["held"]
    assert held[0] == {"text": "Edit L1.pattern of heads 0, 3", "spans": [[0, 425]]}
    assert held[1] == {"text": "Reset embed at every 25th step", "spans": []}
    (start, end) = held[2]["spans"][0]
    assert 900 < start < 1100 and end == 2000 and held[3]["spans"] is None
    known: dict = {}
    exec(found["code"].replace(f'Path("{tmp_path.name}/', f'Path("{tmp_path}/'), known)
    assert known["tape"].last("loss") == pytest.approx(loss["values"][-1], rel=1e-3)
    (tmp_path / "tape.parquet").write_bytes(b"torn")
    assert gather(atlas)["training"] is None


def test_scores_of_several_steps_make_curves_too(tmp_path):
    atlas = empty_atlas(tmp_path, {0: 2})
    for step, value in ((0, 9.0), (100, 0.1), (200, 0.2)):
        table = score_table([(0, 0), (0, 1)], np.array([value, 0.0]))
        atlas.add(Score("induction", table, "head", "seen", {}, step))
    found = gather(atlas)["training"]
    assert found["name"] == "2 checkpoints" and found["curves"][0]["values"] == [0.1, 0.2]
    assert found["call"] == "[atlas.score(METRIC, step)[UNIT] for step in [100, 200]]"


def test_a_phase_is_the_shortest_stretch_with_half_of_all_change():
    steps = list(range(0, 1000, 10))
    assert phase(steps, [0.0] * 50 + [1.0] * 50) == [490, 500]
    assert phase(steps, [step / 1000 for step in steps]) is None
    assert phase(steps, [1.0] * 100) is None and phase([0, 1], [0.0, 1.0]) is None
    assert phase(steps, [float("nan")] * 50 + [0.0] * 25 + [1.0] * 25) == [740, 750]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    "&lt;",
    "\u2028",
    "\ud800",
    "\x00",
    '"',
    "\\",
    "{title}",
]


def test_no_token_can_leave_the_data_block(tmp_path):
    atlas = empty_atlas(tmp_path / "a", {0: 1}, model="</title><script>alert(2)</script>")
    size = len(HOSTILE)
    atlas.add_pattern("odd", HOSTILE, "</script>", {0: np.zeros((1, size, size), np.uint8)})
    rows = [("L0.H0", "ov", token, token, 1.0, 0) for token in HOSTILE if token != "\ud800"]
    atlas.add_readouts(
        pl.DataFrame(rows, schema=["unit", "circuit", "source", "target", "value", "rank"], orient="row")
    )
    page = page_of(atlas, tmp_path)
    assert [tag for tag, _ in page.elements].count("script") == 2
    tokens = json.loads(page.data)["patterns"][0]["tokens"]
    assert [t for t in tokens if t != "?"] == [t for t in HOSTILE if t != "\ud800"]
    assert "<!--" not in page.data


def test_an_empty_atlas_has_a_report(tmp_path):
    data = gather(empty_atlas(tmp_path / "a", {0: 2, 1: 2}))
    assert data["summary"] == "None of 4 heads is proved. 4 are unknown."
    assert (data["scores"], data["claims"], data["patterns"], data["readouts"]) == ([], {}, [], {})
    assert data["heads"][0]["sentence"] == "L0.H0 is unknown: it was tested for no role."
    assert data["tradeoffs"] is None and data["circuits"] is None
    assert gather(empty_atlas(tmp_path / "b", {}))["summary"] == "This atlas holds no heads yet."


def test_uneven_and_sparse_layers_keep_their_numbers(tmp_path):
    data = gather(empty_atlas(tmp_path, {3: 4, 7: 2, 11: 8}))
    assert data["stacks"] == [{"name": "", "title": "", "layers": [3, 7, 11], "width": 8}]
    assert [h["unit"] for h in data["heads"]][3:6] == ["L3.H3", "L7.H0", "L7.H1"]


def test_numbers_that_are_none_arrive_as_null(tmp_path):
    atlas = empty_atlas(tmp_path / "a", {0: 3})
    table = score_table([(0, 0), (0, 1), (0, 2)], np.array([np.nan, 1.0, 0.5]))
    table = table.with_columns(value=pl.Series([np.nan, np.inf, 0.5]))
    atlas.add(Score("odd", table, "head", "seen", {"threshold": float("nan")}))
    score = json.loads(page_of(atlas, tmp_path).data)["scores"][0]
    assert score["value"] == [None, None, 0.5] and score["about"]["threshold"] is None


def test_writing_leaves_the_old_report_when_it_fails(atlas, tmp_path, monkeypatch):
    out = report.write(atlas, tmp_path / "deep" / "report.html")
    before = out.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(atlas, out)
    assert out.read_bytes() == before and [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_a_package_without_built_files_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "STATIC", tmp_path)
    with pytest.raises(ValueError, match=r"report\.js is missing\. Run `make web`"):
        report.built("report.js")
