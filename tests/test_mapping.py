"""The main job, end to end, on a planted model: the map names the planted heads and nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from families import FAMILIES
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from headwise import mapping
from headwise.atlas import Atlas
from headwise.claim import Claim
from headwise.data import Planted
from headwise.mapping import Job, kind_of, map_model

JOB = Job(prompts=32, candidates=4, nulls=8)


@pytest.fixture(scope="module")
def planted():
    return Planted().build(seed=1)


@pytest.fixture(scope="module")
def atlas(planted, tmp_path_factory) -> Atlas:
    return map_model(planted.model, planted.tokenizer, tmp_path_factory.mktemp("map") / "planted", job=JOB)


def test_planted_heads_are_named(planted, atlas: Atlas) -> None:
    provable = {"induction", "previous token", "duplicate token", "name mover", "successor", "retrieval"}
    named = {(c.unit, c.role) for c in atlas.claims() if c.verdict == "proved"}
    assert {(u, r) for u, r in planted.truth.items() if r in provable} <= named
    assert not {u for u, _ in named} & set(planted.decoys)


def test_what_was_not_done_says_why(atlas: Atlas) -> None:
    assert all(isinstance(reason, str) and len(reason) > 20 for reason in atlas.about["skipped"].values())
    assert atlas.about["tasks"]["induction"]["accuracy"] == 1.0


def test_claims_belong_to_held_out_prompts(atlas: Atlas) -> None:
    for claim in atlas.claims(role="induction"):
        if claim.rung("needed"):
            assert claim.about["task"]["rows"] == 16


def test_the_number_of_prompts_holds_for_every_task(atlas: Atlas) -> None:
    assert {name: task["n"] for name, task in atlas.about["tasks"].items()} == dict.fromkeys(atlas.about["tasks"], 32)
    assert atlas.score("sink").about["task"]["n"] == 32


def test_a_second_run_measures_nothing_again(planted, atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in atlas.path.rglob("*.parquet") if "scores" in str(p)}
    claims = atlas.claims()
    monkeypatch.setattr(mapping.Proof, "run", None)
    again = map_model(planted.model, planted.tokenizer, atlas.path, job=JOB)
    assert {p: p.stat().st_mtime_ns for p in atlas.path.rglob("*.parquet") if "scores" in str(p)} == before
    assert sorted(c.sentence() for c in again.claims()) == sorted(c.sentence() for c in claims)


def test_an_interrupted_run_goes_on(planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mapping._Bench, "screen", interrupt)
        with pytest.raises(KeyboardInterrupt):
            map_model(planted.model, planted.tokenizer, tmp_path / "a", job=JOB)
    half = Atlas(tmp_path / "a")
    assert "induction" in half.names() and not half.claims()
    assert not list((tmp_path / "a").rglob("*.part"))
    whole = map_model(planted.model, planted.tokenizer, tmp_path / "a", job=JOB)
    assert whole.claims()


def test_between_two_proofs_nothing_is_called_proved(planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One role alone might show what the correction over the whole map takes back."""
    run, done = mapping.Proof.run, []

    def two(self: object, *args: object, **options: object) -> list:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[2])
        return run(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mapping.Proof, "run", two)
        with pytest.raises(KeyboardInterrupt):
            map_model(planted.model, planted.tokenizer, tmp_path / "a", job=JOB)
    half = Atlas(tmp_path / "a").claims()
    assert {c.role for c in half} == set(done) and {c.verdict for c in half} == {"unknown"}
    whole = map_model(planted.model, planted.tokenizer, tmp_path / "a", job=JOB)
    assert {c.role for c in whole.claims() if c.verdict == "proved"} >= set(done)


def test_claims_that_a_later_run_does_not_make_are_dropped(planted, atlas: Atlas, tmp_path: Path) -> None:
    copy = Atlas(shutil.copytree(atlas.path, tmp_path / "a"))
    copy.add_claims([Claim("L0.H0", "induction", "proved", copy.claims()[0].rungs)])
    mine = Claim("L0.H1", "my own", "proved", copy.claims()[0].rungs)
    copy.add_claims([mine])
    copy.note(skipped={"needle": "a reason of old"})
    again = map_model(planted.model, planted.tokenizer, copy.path, job=JOB)
    assert not again.claims(role="induction", unit="L0.H0") and again.claims(unit="L0.H1", role="my own")
    assert len(again.claims()) == len(atlas.claims()) + 1
    assert again.about["skipped"] == atlas.about["skipped"]


def test_a_score_on_other_prompts_has_no_say(planted, atlas: Atlas, tmp_path: Path) -> None:
    """A newer score of the same name, made by hand, nominates nobody."""
    copy = Atlas(shutil.copytree(atlas.path, tmp_path / "a"))
    score = copy.score("induction")
    table = score.table.with_columns(value=pl.lit(1.0))
    copy.add(replace(score, table=table, about=score.about | {"task": {"task": "of my own"}}))
    assert copy.score("induction").table["value"].min() == 1
    again = map_model(planted.model, planted.tokenizer, copy.path, job=JOB)
    assert sorted(c.sentence() for c in again.claims()) == sorted(c.sentence() for c in atlas.claims())


def test_one_method_only(planted, tmp_path: Path) -> None:
    atlas = map_model(planted.model, planted.tokenizer, tmp_path / "a", methods=("sink", "heads.entropy"), job=JOB)
    assert atlas.names() == ["entropy", "sink"] and not atlas.claims()
    with pytest.raises(ValueError, match="Did you mean"):
        map_model(planted.model, planted.tokenizer, tmp_path / "a", methods=("entropie",), job=JOB)


@pytest.mark.slow
def test_thorough_scans_every_head(planted, tmp_path: Path) -> None:
    atlas = map_model(
        planted.model, planted.tokenizer, tmp_path / "a", job=Job(prompts=8, candidates=2, nulls=4, thorough=True)
    )
    for name in ("ablation_resample_on_induction", "ablation_mean_on_induction", "restore_on_induction"):
        assert len(atlas.score(name).table) == len(atlas.heads())
    assert atlas.score("ablation_resample_on_induction").top(1)[0] in planted.truth
    # A planted model is sure of its answers: their log-probability has no slope, so the screen has nothing to say here.
    assert -1 <= atlas.about["tasks"]["induction"]["screen_rank_correlation"] <= 1


def test_an_encoder_is_seen_and_not_proved(planted, tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**size, vocab_size=len(planted.tokenizer))).eval()
    atlas = map_model(model, planted.tokenizer, tmp_path / "a", job=Job(prompts=4))
    assert set(atlas.names()) == set(mapping.SEEN["encoder"])
    claims = atlas.claims()
    assert {r.step for c in claims for r in c.rungs} <= {"seen"} and {c.verdict for c in claims} <= {"unknown"}
    assert "does not continue text" in atlas.about["skipped"]["proofs"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_vision_model_is_shown_pictures_of_its_size(tmp_path: Path, channels: int) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**size, image_size=24, patch_size=4, num_channels=channels)
    atlas = map_model(ViTForImageClassification(config), None, tmp_path / "a", job=Job(prompts=4))
    assert set(atlas.names()) == set(mapping.SEEN["vision"]) and not atlas.claims()
    assert atlas.score("entropy").about["task"]["enlarged"] == [channels, 24, 24]
    assert 0 < atlas.score("distance_profile").table["value"].min() < 6


def test_kinds_of_models() -> None:
    assert kind_of(FAMILIES["llama"].build()) == "decoder"
    assert kind_of(FAMILIES["bert"].build()) == "encoder"
    assert kind_of(FAMILIES["vit"].build()) == "vision"
    with pytest.raises(ValueError, match="encoder-decoder"):
        kind_of(FAMILIES["t5"].build())


def test_heads_listing_is_json(atlas: Atlas) -> None:
    listed = json.loads(json.dumps(atlas.heads()))
    assert {"unit", "role", "verdict", "scores"} <= set(listed[0])


def test_an_earlier_checkpoint_is_a_step(planted, atlas: Atlas, tmp_path: Path) -> None:
    """Scores of another step stand beside those of the final weights; claims are of the final weights only."""
    earlier = Planted(noise=0.3).build(seed=1)
    claims = [c.sentence() for c in atlas.claims()]
    again = map_model(earlier.model, earlier.tokenizer, atlas.path, methods=("induction",), job=JOB, step=-1)
    assert again.names(step=-1) == ["induction"]
    assert again.score("induction", step=-1).about["fingerprint"] != atlas.about["fingerprint"]
    assert [c.sentence() for c in again.claims()] == claims
    with pytest.raises(ValueError, match="not of"):
        map_model(earlier.model, earlier.tokenizer, atlas.path, methods=("induction",), job=JOB)
