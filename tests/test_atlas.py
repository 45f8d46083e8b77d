"""The store: what goes in comes out, a crash leaves what was there, other weights are refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES

from headwise.atlas import Atlas, write_aside
from headwise.claim import Claim, Rung
from headwise.heads import Ablation
from headwise.score import COLUMNS, Score
from headwise.task import Batch


@pytest.fixture
def model():
    return FAMILIES["llama"].build()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    ids, other = torch.randint(5, 40, (4, 8)), torch.randint(5, 40, (4, 8))
    return Batch(
        {"input_ids": ids},
        torch.full((4, 1), 7),
        torch.full((4, 1), 6),
        corrupt={"input_ids": other},
        about={"task": "t"},
    )


def test_scores_come_back_as_they_went_in(model, batch, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    score = Ablation(value="zero").score(model, batch)
    atlas.add(score)
    kept = Atlas(tmp_path / "a").score("ablation_zero")
    assert kept.table.equals(score.table) and kept.about == json.loads(json.dumps(score.about, default=str))
    assert kept.evidence == "needed" and kept.key == score.key
    assert atlas.made(score.about) is not None
    assert atlas.made(score.about | {"task": {"task": "other"}}) is None


def test_the_layout_is_the_contract(model, batch, tmp_path: Path) -> None:
    """Columns unit, layer, index, value, low, high, n; score and step are partitions; provenance is metadata."""
    atlas = Atlas.of(model, tmp_path / "a")
    atlas.add(Ablation(value="zero").score(model, batch))
    (file,) = (tmp_path / "a" / "scores").rglob("*.parquet")
    assert file.parent.name == "score=ablation_zero" and file.parent.parent.name == "step=0"
    assert pl.read_parquet(file, hive_partitioning=False).columns == list(COLUMNS)
    scan = pl.scan_parquet(tmp_path / "a" / "scores", hive_partitioning=True).collect()
    assert set(scan.columns) == {*COLUMNS, "score", "step"}
    note = json.loads(pl.read_parquet_metadata(file)["headwise"])
    assert (
        note["about"]["method"]["name"] == "heads.ablation"
        and note["about"]["fingerprint"] == atlas.about["fingerprint"]
    )


def test_adding_twice_keeps_one(model, batch, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    for _ in range(2):
        atlas.add(Ablation(value="zero").score(model, batch))
    assert len(list((tmp_path / "a").rglob("*.parquet"))) == 1


def test_other_weights_are_refused(model, batch, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    other = FAMILIES["llama"].build(seed=1)
    with pytest.raises(ValueError, match="not of"):
        Atlas.of(other, tmp_path / "a")
    with pytest.raises(ValueError, match="belongs to weights"):
        atlas.add(Ablation(value="zero").score(other, batch))


def test_not_an_atlas(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no atlas.json"):
        Atlas(tmp_path)
    (tmp_path / "atlas.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Atlas(tmp_path)
    (tmp_path / "atlas.json").write_text('{"format": 99, "version": "9.0"}')
    with pytest.raises(ValueError, match="newer"):
        Atlas(tmp_path)


def test_a_missing_score_names_the_nearest(model, batch, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    atlas.add(Ablation(value="zero").score(model, batch))
    with pytest.raises(ValueError, match="Did you mean 'ablation_zero'"):
        atlas.score("ablation_zer")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_aside(file, lambda p: p.write_text("old"))

    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_aside(file, broken)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_claims_and_roles(model, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    proof = [Rung(s, "x", 1.0, 0.5, 1.5, 0.1, 0.001, 0.002, 24, 0.3, True) for s in ("needed", "enough")]
    atlas.add_claims([Claim("L1.H0", "retrieval", "proved", proof), Claim("L1.H0", "induction", "proved", proof)])
    atlas.add_claims([Claim("L1.H0", "retrieval", "refuted", proof), Claim("L0.H1", "retrieval", "refuted", proof)])
    assert {(c.unit, c.role): c.verdict for c in atlas.claims()} == {
        ("L1.H0", "induction"): "proved",
        ("L1.H0", "retrieval"): "refuted",
        ("L0.H1", "retrieval"): "refuted",
    }
    assert atlas.claims(unit="L1.H0", role="induction")[0].rungs == proof
    heads = {h["unit"]: h for h in atlas.heads()}
    assert heads["L1.H0"]["role"] == "induction" and heads["L1.H0"]["verdict"] == "proved"
    assert heads["L0.H1"]["role"] == "unknown" and heads["L0.H1"]["verdict"] == "refuted"
    assert heads["L0.H0"]["verdict"] == "unknown"


def test_patterns_and_readouts(model, tmp_path: Path) -> None:
    atlas = Atlas.of(model, tmp_path / "a")
    arrays = {0: np.arange(18, dtype=np.uint8).reshape(2, 3, 3), 10: np.zeros((2, 3, 3), np.uint8)}
    atlas.add_pattern("ioi", [" a", "\n", "é"], " a\né", arrays)
    tokens, text, back = atlas.pattern("ioi")
    assert tokens == [" a", "\n", "é"] and text == " a\né" and list(back) == [0, 10] and (back[0] == arrays[0]).all()
    with pytest.raises(ValueError, match="keeps no patterns"):
        atlas.pattern("nothing")
    with pytest.raises(ValueError, match="cannot name a prompt"):
        atlas.add_pattern("../x", [], "", {})
    assert atlas.readouts().is_empty() and not atlas.has_readouts()


def test_a_score_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="not a rung"):
        Score("x", pl.DataFrame(schema=COLUMNS), evidence="believed")
    with pytest.raises(ValueError, match="cannot name a score"):
        Score("a/b", pl.DataFrame(schema=COLUMNS))
    with pytest.raises(ValueError, match="columns"):
        Score("x", pl.DataFrame({"a": [1]}))


def test_a_file_that_is_no_score(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="not a headwise score"):
        Score.load(tmp_path / "a.parquet")
