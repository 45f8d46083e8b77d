"""The lab: a small model learns a lesson, edits hold parts of it, runs go on where they were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from headwise import lab
from headwise.asked import asked
from headwise.data import FewShotLabels
from headwise.do import do
from headwise.lab import Edit, Pass, Reset, Switch, Tiny, TinyConfig, Training, measure, pattern, train
from headwise.measuring import measured
from headwise.models import open_model
from headwise.tap import tap
from headwise.tape import Tape
from headwise.task import answer_logits

LESSON = FewShotLabels(classes=20, dim=8)
SHORT = Training(steps=12, batch=8, lr=1e-3, measure_every=4, rows=16, checkpoint_every=5)


def config(**more) -> TinyConfig:
    return TinyConfig(**LESSON.config(layers=2, heads=4, width=16, **more))


def curve(edits=(), seed=3, **more):
    return train(config(), LESSON, replace(SHORT, **more), edits, seed=seed)


PLAIN = curve()


def test_the_same_seed_gives_the_same_curve_and_another_another():
    again, other = curve(), curve(seed=4)
    assert again.losses == PLAIN.losses and again.tape.rows == PLAIN.tape.rows
    assert other.losses != PLAIN.losses
    torch.rand(7)
    assert curve().losses == PLAIN.losses


@pytest.mark.parametrize("site", ["L1.pattern", "L0.scores", "L1.H2.z", "L0.resid_post", "logits"])
@pytest.mark.parametrize("grad", ["through", "ste"])
def test_an_edit_that_changes_nothing_leaves_every_loss_as_it_is(site, grad):
    assert curve([Edit(site, lab.scale(1.0), grad=grad)]).losses == PLAIN.losses


def gradients(edits):
    model = config().build(0)
    batch = LESSON.make(n=8)
    with lab.holding(model, edits, lab.Scene(LESSON, batch)):
        LESSON.loss(answer_logits(model, batch), batch).mean().backward()
    return {name: value.grad for name, value in model.named_parameters()}


def nothing(gradient) -> bool:
    return gradient is None or not gradient.any()


def test_a_site_that_is_cut_gets_no_gradient_at_all():
    live = Edit("L1.pattern", lab.scale(2.0))
    free, through, cut = gradients([]), gradients([live]), gradients([replace(live, grad="cut")])
    for name in ("blocks.1.attention.q_proj.weight", "blocks.1.attention.k_proj.weight"):
        assert not nothing(free[name]) and not nothing(through[name]) and nothing(cut[name])
    assert not nothing(cut["blocks.1.attention.v_proj.weight"])
    one = gradients([Edit("L1.H2.pattern", pattern("match"), grad="cut")])["blocks.1.attention.q_proj.weight"]
    per_head = one.view(4, 4, 16).abs().sum((1, 2))
    assert per_head[2] == 0 and (per_head[[0, 1, 3]] > 0).all()


def test_straight_through_has_the_value_of_the_edit_and_the_gradient_of_none():
    batch, model = LESSON.make(n=8), config().build(0)
    found = {}
    for grad in ("cut", "ste"):
        with lab.holding(model, [Edit("L1.z", 0.5, grad=grad)]):
            found[grad] = answer_logits(model, batch)
    assert torch.equal(found["cut"], found["ste"])
    assert not nothing(gradients([Edit("L1.z", 0.5, grad="ste")])["blocks.1.attention.v_proj.weight"])
    assert nothing(gradients([Edit("L1.z", 0.5, grad="cut")])["blocks.1.attention.v_proj.weight"])


def test_heads_and_mix_say_how_much_is_held():
    batch, model = LESSON.make(n=4), config().build(0)
    with tap(model, "L1.z") as plain:
        model(**batch.inputs)
    with lab.holding(model, [Edit("L1.z", 1.0, spare=(3,), mix=0.25)]), tap(model, "L1.z") as held:
        model(**batch.inputs)
    assert torch.equal(held["L1.z"][:, :, 3], plain["L1.z"][:, :, 3])
    assert torch.allclose(held["L1.z"][:, :, :3], 0.25 + 0.75 * plain["L1.z"][:, :, :3])


def test_a_pass_equals_the_passes_made_by_hand():
    batch, model = LESSON.make(n=8), config().build(0)
    moved = lab.value_of("L0.resid_pre", along="label to item")
    plain = lab.value_of("L0.resid_pre")
    shown = Pass("L1.pattern", [Edit("L1.resid_pre", moved)])
    edits = [Edit("L1.resid_pre", plain), Edit("L1.pattern", shown)]
    with lab.holding(model, edits, lab.Scene(LESSON, batch)):
        ours = answer_logits(model, batch)
    LESSON.loss(ours, batch).mean().backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    model.zero_grad()
    from headwise.do import Patch

    with tap(model, "L0.resid_pre", grad=True) as first:
        model(**batch.inputs)
    embedded = first["L0.resid_pre"]
    shifted = embedded.clone()
    shifted[:, 1::2] = embedded[:, 0:-1:2]
    with do(model, Patch("L1.resid_pre", shifted)), tap(model, "L1.pattern", grad=True) as second:
        model(**batch.inputs)
    with do(model, Patch("L1.resid_pre", embedded), Patch("L1.pattern", second["L1.pattern"])):
        theirs = answer_logits(model, batch)
    assert torch.allclose(ours, theirs, atol=1e-6)
    LESSON.loss(theirs, batch).mean().backward()
    for name, value in model.named_parameters():
        if name in grads:
            assert torch.allclose(grads[name], value.grad, atol=1e-6), name


def test_a_graft_gets_no_gradient_and_leaves_the_model_as_it_was():
    donor, model, batch = lab.frozen(config().build(9)), config().build(0), LESSON.make(n=8)
    with tap(donor, "L1.pattern") as theirs:
        donor(**batch.inputs)
    with lab.holding(model, [Edit("L1.pattern", Pass("L1.pattern", model=donor))]), tap(model, "L1.pattern") as ours:
        answer_logits(model, batch).sum().backward()
    assert torch.equal(ours["L1.pattern"], theirs["L1.pattern"])
    assert all(value.grad is None for value in donor.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_reset_clears_the_moments_of_its_parameter_only():
    model = config().build(0)
    optimiser = Training().make(model)
    batch = LESSON.make(n=8)
    for _ in range(3):
        optimiser.zero_grad()
        LESSON.loss(answer_logits(model, batch), batch).mean().backward()
        optimiser.step()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    moments = {name: optimiser.state[value]["exp_avg_sq"].clone() for name, value in model.named_parameters()}
    reset = Reset("blocks.0.attention.q_proj")
    reset.apply(model, optimiser, reset.spreads(model), torch.Generator().manual_seed(0))
    for name, value in model.named_parameters():
        hit = name == "blocks.0.attention.q_proj.weight"
        assert torch.equal(value, before[name]) != hit
        assert bool(optimiser.state[value]["exp_avg_sq"].any()) != hit and moments[name].any()
        assert (float(optimiser.state[value]["step"]) == 0) == hit
    part = Reset("embed.weight", rows=(2, 5))
    part.apply(model, optimiser, part.spreads(model), torch.Generator().manual_seed(0))
    changed = (model.embed.weight.detach() != before["embed.weight"]).any(-1)
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]
    state = optimiser.state[model.embed.weight]
    assert not state["exp_avg_sq"][2:5].any() and state["exp_avg_sq"][5:].any() and float(state["step"]) == 3


def test_schedules_say_when():
    on = [step for step in range(12) if (lab.every(3) & lab.steps(0, 7)).on(step)]
    assert on == [3, 6]
    assert [s for s in range(5) if (~lab.steps(1, 3) | lab.every(2)).on(s)] == [0, 2, 3, 4]
    tape = lab.Tape([(0, "loss", "train", "", 1.0), (4, "loss", "train", "", 0.2), (8, "loss", "train", "", 0.9)])
    late = lab.after("loss", below=0.5)
    assert [s for s in (0, 3, 4, 7, 9) if late.on(s, tape)] == [4, 7, 9]
    clamp = Edit("L1.z", 0.0, when=lab.steps(4, 8))
    run, always = curve([clamp]), curve([Edit("L1.z", 0.0)])
    assert run.losses[:4] == PLAIN.losses[:4] and run.losses[4] != PLAIN.losses[4]
    assert run.losses[4] != always.losses[4]
    other = replace(LESSON, world=1)
    assert curve([Switch(other, lab.steps(6))]).losses[:6] == PLAIN.losses[:6]
    assert curve([Switch(other, lab.steps(6))]).losses[6:] != PLAIN.losses[6:]


def test_a_progress_measure_at_the_start_is_the_first_loss_of_the_clamped_run():
    edits = [Edit("L1.pattern", pattern("match"), heads=(3,)), Edit("L1.z", 0.0, spare=(3,))]
    clamped = curve(edits)
    free = train(config(), LESSON, SHORT, seed=3, progress={"match": edits})
    assert free.losses == PLAIN.losses
    first = measure(config().build(3), LESSON, edits, rows=SHORT.rows, seed=3)["loss"]
    assert first == clamped.tape.curve("loss")[1][0] == free.tape.curve("loss", "train | match")[1][0]


SCRIPT = """
import sys, time
from pathlib import Path
import tests.test_lab as lab_tests
from headwise.lab import Reset, every, train
slow = train
edits = [Reset("embed", every(5))]
import headwise.training as training
update = training._Loop._update
def slowly(self, step):
    update(self, step)
    time.sleep(float(sys.argv[2]))
training._Loop._update = slowly
train(lab_tests.config(), lab_tests.LESSON, lab_tests.SHORT, edits, seed=3, folder=sys.argv[1])
"""


def test_a_run_that_was_killed_goes_on_to_the_same_curve(tmp_path):
    edits = [Reset("embed", lab.every(5))]
    whole = train(config(), LESSON, SHORT, edits, seed=3, folder=tmp_path / "whole")
    folder = tmp_path / "killed"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "0.3"], env=env)
    try:
        for _ in range(600):
            if (folder / "state.safetensors").exists():
                break
            assert child.poll() is None
            time.sleep(0.1)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (folder / "checkpoints" / "step=12").exists()
    resumed = train(config(), LESSON, SHORT, edits, seed=3, folder=folder)
    assert resumed.losses == whole.losses and resumed.tape.rows == whole.tape.rows
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="holds another run: its seed"):
        train(config(), LESSON, SHORT, edits, seed=4, folder=folder)
    longer = train(config(), LESSON, replace(SHORT, steps=16), edits, seed=3, folder=folder)
    assert longer.losses[:12] == whole.losses and len(longer.losses) == 16


def louder(value, scene, by=1.0):
    return value * by


def test_functions_that_share_a_name_are_told_apart():
    model = config().build(0)

    def told(to, training=SHORT):
        words = asked(model, LESSON, training, [Edit("L1.z", to)], 3, {})
        return json.loads(json.dumps([words["edits"], words["training"]]))

    def times(factor):
        return lambda value, scene: value * factor

    assert told(times(2.0)) == told(times(2.0)) != told(times(3.0))
    assert told(lambda value, scene: value + 1) != told(lambda value, scene: value - 1)
    assert told(lambda value, scene, by=1: value * by) != told(lambda value, scene, by=2: value * by)
    assert told(partial(louder, by=2.0)) == told(partial(louder, by=2.0)) != told(partial(louder, by=3.0))
    assert told(times(louder)) != told(times(times(2.0)))
    source = "lambda value, scene: value if scene.step in {'a', 'b', 3} else [each for each in value]"
    first, second = (eval(compile("\n" * lines + source, f"file {lines}", "eval")) for lines in (0, 7))
    assert told(first) == told(second)
    low, lower = (replace(SHORT, until=lab.after("loss", lambda loss, b=bound: loss < b)) for bound in (0.5, 0.1))
    assert told(louder, low) == told(louder, low) != told(louder, lower)
    assert " at 0x" not in json.dumps(told(partial(louder, by=2.0), low))


def test_a_run_has_an_atlas_and_checkpoints_that_open(tmp_path):
    run = train(config(), LESSON, SHORT, seed=3, folder=tmp_path)
    assert run.losses == PLAIN.losses
    assert sorted(p.name for p in (tmp_path / "atlas" / "scores").iterdir()) == [
        "step=0", "step=10", "step=12", "step=5",
    ]  # fmt: skip
    last = run.tape.heads("induction")
    now = run.atlas.score("induction")
    assert now["L1.H2"] == pytest.approx(last["L1.H2"], abs=1e-6)
    opened, tokenizer = open_model(run.atlas.about["source"])
    assert isinstance(opened, Tiny) and tokenizer is None
    batch = LESSON.make(n=4)
    assert torch.equal(answer_logits(opened, batch), answer_logits(run.model, batch))
    assert lab.Tape.load(tmp_path / "tape.parquet").rows == run.tape.rows


@pytest.mark.parametrize(
    "shape",
    [
        {"pos": "learned", "mlp": 24}, {"pos": "none", "norm": "rms"}, {"norm": "none", "residual": False, "layers": 1},
        {"pos": "onehot", "width": 32, "max_positions": 8, "classifier": [12, 12]}, {"head_dim": 6, "bias": True},
    ],
)  # fmt: skip
def test_every_shape_can_be_looked_into(shape, tmp_path):
    model = TinyConfig(**LESSON.config(**{"heads": 4, "width": 16, **shape})).build(1)
    batch = LESSON.make(n=4)
    with tap(model, "pattern", "z", "q_pre", "resid_post") as taken:
        answer_logits(model, batch)
    last = max(taken.by_layer("pattern"))
    assert torch.allclose(taken[f"L{last}.pattern"].sum(-1), torch.ones(4, 4, 5))
    assert set(measured(model, batch, LESSON).heads) == {"induction", "previous_token"}
    model.save_pretrained(tmp_path)
    assert torch.equal(answer_logits(Tiny.from_pretrained(tmp_path), batch), answer_logits(model.eval(), batch))


def test_a_tiny_of_tokens_generates_with_a_cache_as_without():
    model = TinyConfig(vocab_size=20, layers=2, heads=2, width=16, mlp=16, tie_word_embeddings=True).build(0).eval()
    ids = torch.arange(6)[None] + 3
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0] + [1] * ids.shape[1]])
    places = torch.arange(padded.shape[1])[None] - 2
    seen = model(input_ids=padded, attention_mask=mask, position_ids=places.clamp_min(0)).logits[:, 2:]
    assert torch.allclose(seen, model(input_ids=ids).logits, atol=1e-5)


def test_what_a_user_may_get_wrong_is_a_sentence():
    for make, said in (
        (lambda: TinyConfig(input_size=4, outputs=2, pos="alibi"), "pos='alibi' is unknown"),
        (lambda: TinyConfig(), "exactly one of them"),
        (lambda: TinyConfig(input_size=4), "must say how many outputs"),
        (lambda: TinyConfig(input_size=4, outputs=2, read_in=False), "must fill the stream"),
        (lambda: Edit("L1.z", grad="off"), "no way for gradients"),
        (lambda: Edit("L1.z", heads=(1,), spare=(2,)), "not both"),
        (lambda: curve([Edit("L1.z", heads=(9,))]), "heads 0 to 3"),
        (lambda: curve([Edit("L1.pattern", pattern("matches"))]), "no pattern here; known are previous"),
        (lambda: curve([Reset("embedding")]), "starts no parameter"),
        (lambda: lab.after("loss"), "exactly one"),
        (lambda: lab.every(0), "no rhythm"),
        (lambda: lab.steps(5, 5), "holds no step"),
        (lambda: Training(optimiser="lion"), "unknown to training"),
        (lambda: FewShotLabels(pairs=9), "allowed are 2 to 5"),
        (lambda: LESSON.on("old labels"), "no split of FewShotLabels"),
        (lambda: PLAIN.tape.curve("speed"), "The tape holds no 'speed'"),
        (lambda: PLAIN.atlas, "kept nothing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make()


def test_a_step_that_fails_leaves_no_edit_in_the_model(monkeypatch):
    model = Tiny(config())
    inputs = LESSON.make(None, 4, 0)
    with torch.no_grad():
        before = answer_logits(model, inputs)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, LESSON, Training(steps=3, batch=4), [Edit("L1.z", 0)])
    with torch.no_grad():
        assert torch.equal(answer_logits(model.eval(), inputs), before)


def test_an_unfinished_run_is_not_compared(tmp_path):
    lab.compare(
        {"none": []}, model=config(), lesson=LESSON, training=Training(steps=2, batch=4), seeds=(1,), folder=tmp_path
    )
    assert lab.Comparison.load(tmp_path).seeds == [1]
    (file,) = tmp_path.rglob("tape.parquet")
    Tape.load(file).save(file, {"done": False})
    with pytest.raises(ValueError, match="holds no finished run yet"):
        lab.Comparison.load(tmp_path)
