"""Experiments of the lab, their command line, claims that heads grew, and edits in a Hugging Face Trainer."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from command_line import refused, run
from synthetic_atlas import score_table
from test_docs import ROOT, blocks, first, schema, table
from transformers import Trainer, TrainingArguments

from headwise import lab
from headwise.atlas import Atlas
from headwise.claim import role
from headwise.data import Exemplars, FewShotLabels
from headwise.experiment import Experiment
from headwise.growth import nominated, with_skill
from headwise.lab import Edit, Reset, TinyConfig, Training, compare, pattern, train
from headwise.lab.clamped_induction import CLAMPS
from headwise.measuring import measured
from headwise.method import catalogue, load
from headwise.score import Score

LESSON = FewShotLabels(classes=20, dim=8)
CONFIG = TinyConfig(**LESSON.config(layers=2, heads=4, width=16))
SHORT = Training(steps=12, batch=8, lr=1e-3, measure_every=4, rows=16)
EXPERIMENTS = [cls for card in catalogue("lab") if issubclass(cls := load(card.name), Experiment)]


@pytest.mark.parametrize("cls", EXPERIMENTS, ids=lambda cls: cls.__name__)
def test_every_condition_of_every_experiment_can_be_trained(cls):
    for name, one in cls().conditions().items():
        few = replace(one.training, steps=2, measure_every=1, rows=8, batch=4)
        found = train(one.model, one.lesson, few, one.edits, seed=1)
        assert all(torch.isfinite(torch.tensor(loss)) for loss in found.losses), name
        assert set(one.lesson.looks) <= {row[1] for row in found.tape.rows}
    assert cls(full=True).conditions()


@pytest.mark.parametrize("cls", EXPERIMENTS, ids=lambda cls: cls.__name__)
def test_what_lessons_promise(cls):
    for one in cls().conditions().values():
        lesson = one.lesson
        for split in ("train", *lesson.tests):
            here = lesson.on(split)
            batch, again, other = here.make(None, 40, 1), here.make(None, 40, 1), here.make(None, 40, 2)
            assert all(torch.equal(v, again.inputs[k]) for k, v in batch.inputs.items())
            assert any(not torch.equal(v, other.inputs[k]) for k, v in batch.inputs.items())
            assert batch.about["split"] == split
            length = next(iter(batch.inputs.values())).shape[1]
            for cell in here.cells(batch).values():
                assert cell.dtype == torch.bool and cell.shape[-2:] == (length, length) and len(cell) in (1, 40)
                assert not cell.triu(1).any()
        assert all(line >= 0 for line in lesson.lines().values())


def test_items_and_labels_stand_where_the_cells_say():
    batch = LESSON.make(None, 50, 0)
    said, cells = LESSON.said(batch), LESSON.cells(batch)
    assert torch.equal(said[torch.arange(50), cells["match"][:, -1].int().argmax(-1)], batch.answer[:, 0])
    assert torch.equal(said[torch.arange(50), cells["rival"][:, -1].int().argmax(-1)], batch.foil[:, 0])
    items = batch.inputs["inputs_embeds"][..., : LESSON.dim]
    same = cells["item"][:, -1].int().argmax(-1)
    assert torch.equal(items[torch.arange(50), same], items[:, -1])
    assert (said[:, ::2] == -1).all() and (said[:, 1::2] >= 0).all()
    swapped = LESSON.said(replace(batch, inputs=batch.corrupt))
    assert torch.equal(swapped[torch.arange(50), cells["match"][:, -1].int().argmax(-1)], batch.foil[:, 0])
    held = {
        tuple(sorted(row))
        for row in LESSON.on("new labels").said(LESSON.on("new labels").make(None, 90))[:, 1::2].tolist()
    }
    seen = {tuple(sorted(row)) for row in LESSON.said(LESSON.make(None, 200))[:, 1::2].tolist()}
    assert held and seen and not held & seen


@pytest.mark.parametrize(
    "lesson",
    [
        Exemplars(classes=64), Exemplars(classes=64, burst=2), Exemplars(classes=64, labels=4), Exemplars(zipf=1.0),
    ],
)  # fmt: skip
def test_exemplars_ask_what_the_prompt_holds_or_does_not(lesson):
    lesson = replace(lesson, spread=0.0)
    for split, there in (("train", True), ("new classes", True), ("swapped", True), ("absent", False)):
        batch = lesson.on(split).make(None, 60, 0)
        items = batch.inputs["inputs_embeds"]
        same = (items[:, 0:-1:2] == items[:, -1:]).all(-1)
        assert same.any(-1).all() if there else not same.any()
        if there:
            labels = lesson.shown(batch)
            assert all((row[hit] == answer).all() for row, hit, answer in zip(labels, same, batch.answer, strict=True))
            assert (same.sum(-1) == lesson.burst).all()
        places = batch.inputs["position_ids"]
        assert places.min() >= 0 and places.max() < lesson.window and len(places[:, 0].unique()) > 5
    loose = replace(lesson, bursty=0.5).make(None, 400, 0).inputs["inputs_embeds"]
    share = (loose[:, 0:-1:2] == loose[:, -1:]).all(-1).any(-1).float().mean()
    assert 0.4 < share < 0.6


def test_runs_of_one_seed_are_paired_and_go_on_in_a_folder(tmp_path):
    match = [Edit("L1.pattern", pattern("match"))]
    asked = {"none": [], "match, all": match}
    found = compare(asked, model=CONFIG, lesson=LESSON, training=SHORT, seeds=(1, 2), folder=tmp_path)
    alone = train(CONFIG, LESSON, SHORT, match, seed=2)
    assert found.runs["match, all"][2].losses == alone.losses
    kept = lab.Comparison.load(tmp_path)
    assert kept.goal is None
    assert kept.seeds == [1, 2] and kept.tape("none", 2).rows == found.tape("none", 2).rows
    first, second = found.time_to("loss", below=10.0)
    assert first.times == [0.0, 0.0] and first.name == "none" and second.wins == 0
    worse = found.time_to("loss", below=0.0)
    assert worse[0].median == float("inf") and worse[0].ratio != worse[0].ratio
    with pytest.raises(ValueError, match="There is no run 'nine'"):
        found.tape("nine")
    with pytest.raises(ValueError, match="give compare"):
        compare({"none": []}, seeds=(1,))
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        compare({"odd": [Edit("L1.z", lambda value, scene: value)]}, model=CONFIG, lesson=LESSON, processes=2)


@pytest.mark.slow
def test_two_processes_give_the_curves_of_one():
    asked = {"none": [], "match": [Edit("L1.pattern", pattern("match"))]}
    two = compare(asked, model=CONFIG, lesson=LESSON, training=SHORT, seeds=(1, 2), processes=2)
    one = compare(asked, model=CONFIG, lesson=LESSON, training=SHORT, seeds=(1, 2))
    for name in asked:
        for seed in (1, 2):
            assert two.runs[name][seed].losses == one.runs[name][seed].losses


@pytest.mark.slow
def test_runs_that_wait_do_not_begin_when_one_fails(tmp_path):
    # There is no site L9.z in two layers.
    asked = {"bad": [Edit("L9.z", pattern("match"))]}
    with pytest.raises(ValueError, match="L9"):
        compare(
            asked | dict.fromkeys(map(str, range(20)), ()),
            model=CONFIG, lesson=LESSON, training=replace(SHORT, steps=400), seeds=(1,), processes=2, folder=tmp_path,
        )  # fmt: skip
    assert len(list(tmp_path.glob("*/seed=1"))) < 12


def test_the_commands_of_the_lab(capsys, tmp_path, monkeypatch):
    listed = json.loads(run(capsys, "lab", "ls", "--json").out)
    assert {"lab.clamped_induction", "lab.abrupt_icl"} <= {row["name"] for row in listed}
    assert list(listed[0]) == first("headwise ls --json") + first("headwise lab ls --json")
    assert "clamped_induction" in run(capsys, "lab", "ls").out

    conditions = lab.ClampedInduction.conditions

    def shorter(self):
        few = {"training": replace(SHORT, until=None)}
        return {name: replace(one, **few) for name, one in conditions(self).items() if name in CLAMPS}

    monkeypatch.setattr(lab.ClampedInduction, "conditions", shorter)
    words = ("lab", "run", "clamped_induction", "--seeds", 2, "--only", "none", "--only", "match", "--out", tmp_path)
    done = json.loads(run(capsys, *words, "--json").out)
    assert list(done) == first("headwise lab run --json")
    assert all(key in dict(table("headwise lab run --json"))["conditions"] for key in done["conditions"][0])
    kept = tmp_path / "none" / "seed=5"
    assert schema(pl.read_parquet(kept / "tape.parquet")) == [row[:2] for row in table("tape.parquet")]
    drawn = blocks(ROOT / "docs" / "contracts.md", "text")[1][1]
    assert {line.split("/")[0].strip() for line in drawn.splitlines()[1:]} == {path.name for path in kept.iterdir()}
    assert [row["condition"] for row in done["conditions"]] == ["none", "match"]
    assert done["grown"] == [] and Path(done["page"]) == tmp_path / "training.html" and Path(done["page"]).is_file()
    assert "No head comes near induction" in Atlas(kept / "atlas").about["skipped"]["grown induction"]
    assert "times sooner than 'none'" in run(capsys, *words).out
    kept = json.loads(run(capsys, "lab", "compare", tmp_path, "--metric", "accuracy", "--above", 0.0, "--json").out)
    assert [row["condition"] for row in kept] == ["none", "match"] and len(kept[0]["times"]) == 2
    assert {*kept[0], "loss"} == set(done["conditions"][0])
    goal = f"loss is below {lab.ClampedInduction.goal[2]:.3g}"
    assert goal in run(capsys, "lab", "compare", tmp_path).out
    assert goal in run(capsys, "lab", "compare", tmp_path, "--metric", "loss").out
    refused(run(capsys, "lab", "compare", tmp_path, "--metric", "accuracy"), "When is accuracy done? Nothing here says")
    refused(run(capsys, "lab", "compare", tmp_path, "--below", 1.0, "--above", 0.1), "were both given")
    refused(
        run(capsys, "lab", "run", "clamped_inductions"), "There is no experiment", "Did you mean 'clamped_induction'"
    )
    refused(run(capsys, "lab", "run", "clamped_induction", "--only", "nine"), "has no condition 'nine'")
    refused(run(capsys, "lab", "compare", tmp_path / "nothing"), "holds no comparison")
    refused(run(capsys, "lab", "compare", tmp_path, "--metric", "speed"), "The tape holds no 'speed'")


def test_a_head_grew_only_with_the_skill():
    losses = [(0, 2.0), (10, 1.9), (20, 1.0), (30, 0.1), (40, 0.1)]

    def tape(values):
        rows = [(step, "loss", "train", "", loss) for step, loss in losses]
        rows += [(10 * i, "induction", "train", "L1.H0", value) for i, value in enumerate(values)]
        return lab.Tape(rows)

    assert with_skill(tape([0, 0, 0.5, 0.9, 0.9]), "induction", "L1.H0")
    assert not with_skill(tape([0, 0.8, 0.9, 0.9, 0.9]), "induction", "L1.H0")
    assert not with_skill(tape([0, 0, 0, 0, 0.9]), "induction", "L1.H0")
    assert not with_skill(tape([0.5, 0, 0, 0, 0.4]), "induction", "L1.H0")


def test_the_weaker_half_of_a_layer_is_what_the_stronger_is_compared_with():
    def scored(*layers):
        places = [(layer, index) for layer, values in enumerate(layers) for index in range(len(values))]
        return Score("induction", score_table(places, np.array([v for values in layers for v in values])), "head")

    part = role("induction")
    assert nominated(scored([0.0, 0.1], [0.9, 0.8, 0.7, 0.95]), part) == ["L1.H3", "L1.H0"]
    assert nominated(scored([0.0, 0.1], [0.1, 0.31, 0.2, 0.29]), part) == ["L1.H1"]
    assert nominated(scored([0.4], [0.9]), part) == ["L1.H0", "L0.H0"]
    assert nominated(scored([0.0, 0.1]), part) == []


def test_claims_need_a_folder_and_a_head(tmp_path):
    with pytest.raises(ValueError, match="kept nothing"):
        lab.grown_claims(train(CONFIG, LESSON, SHORT))
    kept = train(CONFIG, LESSON, SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match="No head comes near induction"):
        lab.grown_claims(kept)
    with pytest.raises(ValueError, match="does not measure 'sink'"):
        lab.grown_claims(kept, "sink")


@pytest.mark.slow
def test_induction_heads_grow(tmp_path):
    lesson = FewShotLabels(classes=50, dim=32)
    config = TinyConfig(**lesson.config(layers=2, heads=4, width=32))
    run = train(config, lesson, Training(steps=2500, lr=1e-3, measure_every=50), seed=5, folder=tmp_path)
    assert run.tape.last("accuracy", "new classes") > 0.9
    claims = lab.grown_claims(run)
    grown = [claim for claim in claims if claim.rung("grown").passed]
    assert grown and all(claim.unit.startswith("L1") for claim in grown)
    assert any(claim.verdict == "proved" and "grown" in claim.sentence() for claim in grown)
    assert [claim.unit for claim in run.atlas.claims("induction")] == [claim.unit for claim in claims]


@pytest.mark.slow
def test_a_run_from_the_command_line_ends_with_an_atlas_in_which_a_head_grew(capsys, tmp_path):
    words = ("lab", "run", "clamped_induction", "--seeds", 1, "--only", "none", "--out", tmp_path)
    (grown,) = json.loads(run(capsys, *words, "--json").out)["grown"]
    assert (grown["condition"], grown["seed"], grown["unit"]) == ("none", 5, "L1.H3")
    assert grown["says"] == "L1.H3 induction: proved (needed, enough, grown)"
    atlas = Atlas(tmp_path / "none" / "seed=5" / "atlas")
    (claim,) = atlas.claims("induction")
    assert claim.rung("grown").passed and claim.verdict == "proved" and "skipped" not in atlas.about


class Prompts(torch.utils.data.Dataset):
    def __init__(self):
        batch = LESSON.make(None, 64)
        self.x = batch.inputs["inputs_embeds"]
        self.y = torch.full(self.x.shape[:2], -100)
        self.y[:, -1:] = batch.answer

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"inputs_embeds": self.x[row], "labels": self.y[row]}


def test_a_trainer_holds_edits_on_a_schedule(tmp_path):
    def trained(changes):
        model = CONFIG.build(0)
        told = lab.EditCallback(changes)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            disable_tqdm=True, save_strategy="no", use_cpu=True, seed=1, learning_rate=1e-2,
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=Prompts(), callbacks=[told]).train()
        assert not model._forward_hooks and not model._forward_pre_hooks
        return told.tape.curve("loss")[1], model

    free, _ = trained([])
    late, _ = trained([Edit("L1.z", 0.0, when=lab.steps(3))])
    assert late[:3] == free[:3] and late[3] != free[3]
    fresh, _ = trained([Reset("embed", lab.every(2))])
    assert fresh[:2] == free[:2] and fresh[2] != free[2]
    with pytest.raises(ValueError, match="not Switch"):
        lab.EditCallback([lab.Switch(LESSON)])


def test_a_callback_draws_resets_apart_and_lets_go_of_a_training_that_was_stopped():
    model = CONFIG.build(0)
    parts = [f"blocks.0.attention.{side}_proj" for side in "qk"]
    told = lab.EditCallback([*(Reset(name, std=1.0) for name in parts), Edit("L1.z", 0.0)])
    step = SimpleNamespace(global_step=0)
    told.on_train_begin(None, step, None, model=model)
    told.on_step_begin(None, step, None, model=model, optimizer=torch.optim.Adam(model.parameters()))
    weights = dict(model.named_parameters())
    assert not torch.equal(*(weights[f"{name}.weight"] for name in parts))
    batch = LESSON.make(None, 4)
    held = model(**batch.inputs).logits
    told.on_train_begin(None, step, None, model=model)
    assert not torch.equal(model(**batch.inputs).logits, held)


def test_the_two_parameter_head_has_a_landscape():
    theory = lab.TwoParameterHead(steps=4, every=2, batch=8)
    tape = theory.train(0)
    assert tape.curve("match")[0] == [0, 2, 4] and theory.train(0).rows == tape.rows
    found = theory.landscape(theory.network(), torch.linspace(0, 4, 3), rows=16)
    assert found.shape == (3, 3) and found.isfinite().all()


def test_lines_and_looks_are_measured():
    @dataclass(frozen=True)
    class Blind(FewShotLabels):
        looks = {}

    found = measured(CONFIG.build(0), LESSON.make(None, 8), Blind(classes=20, dim=8))
    assert found.heads == {} and set(found.numbers) == {"loss", "accuracy"}
