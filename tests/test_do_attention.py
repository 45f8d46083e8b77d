"""Interventions inside attention equal an attention function written by hand: values, cuts, frozen patterns."""

import sys

import pytest
import torch
from doing import HEAD, close, run, values
from families import FAMILIES

from headwise.anatomy import anatomy
from headwise.do import Cut, Freeze, Patch, Scale, Zero, do
from headwise.tap import tap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def eager_twin(monkeypatch, edit):
    """A llama whose own eager attention hands q, k, v, scores and pattern of layer 1 to `edit`."""
    model = FAMILIES["llama"].build("eager")
    file = sys.modules[type(model).__module__]

    def attend(module, q, k, v, mask, scaling, **_):
        def see(kind, value):
            return edit(kind, value) if module.layer_idx == 1 else value

        q, k, v = see("q", q), see("k", k), see("v", v)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = see("scores", q @ k.mT * scaling + mask)
        pattern = see("pattern", scores.softmax(-1))
        return (pattern @ v).transpose(1, 2), pattern

    monkeypatch.setattr(file, "eager_attention_forward", attend)
    return model


@pytest.mark.parametrize("kind", ["q", "k", "v", "scores", "pattern"])
@pytest.mark.parametrize("what", ["zero", "scale", "patch", "head", "rows"])
def test_interventions_inside_attention(llama, inputs, kind, what, monkeypatch):
    source = values(llama, FAMILIES["llama"].inputs(seed=1), kind)[f"L1.{kind}"]
    letter = "G" if kind in "kv" else "H"
    edits = {
        "zero": (Zero(f"L1.{kind}"), torch.zeros_like),
        "scale": (Scale(f"L1.{kind}", 0.5, positions=[2, -1]), None),
        "patch": (Patch(f"L1.{kind}", source), lambda v: source),
        "head": (Patch(f"L1.{letter}1.{kind}", source[:, 1]), None),
        "rows": (Zero(f"L1.{kind}", rows=[1]), None),
    }
    one, change = edits[what]
    ours = run(llama, inputs, one)

    def edit(passing, value):
        if passing != kind:
            return value
        if change is not None:
            return change(value)
        new = value.clone()
        if what == "scale":
            new[:, :, [2, -1]] *= 0.5
        elif what == "head":
            new[:, 1] = source[:, 1]
        else:
            new[1] = 0
        return new

    twin = eager_twin(monkeypatch, edit)
    with torch.no_grad():
        close(ours, twin(**inputs)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_cut_equals_a_mask_by_hand(llama, padded, monkeypatch):
    inputs = FAMILIES["llama"].inputs(padded=padded)
    ours = run(llama, inputs, Cut("L1", keys=[5, -2], queries=[6, 9]), Cut("L1.H2", keys=[7], rows=[0]))

    def edit(kind, value):
        if kind == "scores":
            value = value.clone()
            for query in (6, 9):
                value[:, :, query, [5, 8]] = -torch.inf
            value[0, 2, :, 7] = -torch.inf
        return value

    twin = eager_twin(monkeypatch, edit)
    real = inputs.get("attention_mask", torch.ones(3, 10)).bool()
    with torch.no_grad():
        close(ours[real], twin(**inputs)[0][real])


def test_a_query_with_nothing_left_to_see_takes_nothing(llama, inputs):
    with torch.no_grad(), do(llama, Cut("L1.H1", keys=[0, 1, 2])), tap(llama, "L1.z", "L1.pattern") as t:
        llama(**inputs)
    assert torch.equal(t["L1.z"][:, :3, 1], torch.zeros(3, 3, HEAD))
    close(t["L1.pattern"][:, 1, 3:].sum(-1), torch.ones(3, 7))
    assert t["L1.pattern"][:, 1, :, :3].abs().max() == 0 and (t["L1.z"][:, :3, 0] != 0).all()


def test_cut_survives_a_head_that_saw_only_what_is_cut(llama, inputs):
    """A pattern so sharp that nothing else is left in float32: cutting after the softmax would give zero."""
    with torch.no_grad(), do(llama, Scale("L1.q", 500.0)), tap(llama, "L1.pattern") as sharp:
        llama(**inputs)
    key = int(sharp["L1.pattern"][0, 0, -1].argmax())
    with torch.no_grad(), do(llama, Scale("L1.q", 500.0), Cut("L1.H0", keys=[key])), tap(llama, "L1.pattern") as t:
        llama(**inputs)
    close(t["L1.pattern"][0, 0, -1].sum(), torch.tensor(1.0))
    assert t["L1.pattern"][0, 0, -1, key] == 0


def test_cut_with_a_sink_leaves_the_sink_its_share():
    family = FAMILIES["gpt_oss"]
    model, inputs = family.build(), family.inputs()
    with torch.no_grad():
        anatomy(model).layer(1).attention.sinks.normal_()
    with torch.no_grad(), do(model, Cut("L1", keys=[8], queries=[9])), tap(model, "L1.pattern", "L1.scores") as t:
        model(**inputs)
    sinks = anatomy(model).layer(1).attention.sinks
    scores = torch.cat([t["L1.scores"][:, :, 9], sinks.expand(3, -1)[..., None]], -1).clone()
    scores[..., 8] = -torch.inf
    close(t["L1.pattern"][:, :, 9], scores.softmax(-1)[..., :-1])


def test_freeze_keeps_the_pattern_of_another_run(llama, inputs):
    other = FAMILIES["llama"].inputs(seed=1)
    clean = values(llama, other, "pattern")
    with torch.no_grad(), do(llama, Freeze("L1.H2", clean), Freeze("L0", clean)), tap(llama, "pattern") as t:
        llama(**inputs)
    close(t["L1.H2.pattern"], clean["L1.H2.pattern"])
    close(t["L0.pattern"], clean["L0.pattern"])
    assert not torch.allclose(t["L1.H1.pattern"], clean["L1.H1.pattern"], atol=1e-3)
