"""Masks: algebra, files, and equality to weights set to zero."""

import copy

import pytest
import torch
from families import FAMILIES

from headwise.anatomy import anatomy
from headwise.do import do
from headwise.mask import Mask


def test_algebra_goes_by_units():
    a, b = Mask({"L0.H1": 0.0, "L1.H2": 0.5}), Mask({"L1.H2": 0.25, "L0.mlp": 2.0})
    assert list(a | b) == ["L0.H1", "L0.mlp", "L1.H2"]
    assert (a | b)["L1.H2"] == 0.25
    assert (a & b) == Mask({"L1.H2": 0.5})
    assert (a - b) == Mask.of(["L0.H1"])
    assert a.jaccard(b) == pytest.approx(1 / 3)
    assert Mask().jaccard(Mask()) == 1.0
    assert a["L7.H7"] == 1.0
    assert "L0.H1" in a
    assert len({a, Mask(dict(a.units))}) == 1


def test_a_mask_cannot_be_changed():
    with pytest.raises(TypeError):
        Mask.of(["L0.H1"]).units["L0.H1"] = 1.0


@pytest.mark.parametrize(
    ("units", "said"),
    [({"L0.H1": float("nan")}, "finite"), ({"L0.G1": 0.0}, "cannot be masked"), ({"head one": 0.0}, "not a unit")],
)
def test_what_cannot_be_masked_is_said(units, said):
    with pytest.raises(ValueError, match=said):
        Mask(units)


def test_file_round_trip(tmp_path):
    mask = Mask({"L0.H1": 0.0, "L1.mlp": 1.5})
    path = tmp_path / "deep" / "mask.json"
    mask.save(path)
    mask.save(path)
    assert Mask.load(path) == mask
    assert [p.name for p in path.parent.iterdir()] == ["mask.json"]
    path.write_text('{"units": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="not a headwise mask"):
        Mask.load(path)
    with pytest.raises(ValueError, match="not a headwise mask"):
        Mask.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_a_silent_head_equals_zeroed_weights(name):
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs()
    cut = copy.deepcopy(model)
    for layer, head in ((0, 1), (1, 3)):
        out = anatomy(cut).layer(layer).out
        width = anatomy(cut).layer(layer).value_dim
        weight = out.weight if type(out).__name__ == "Conv1D" else out.weight.T
        with torch.no_grad():
            weight[head * width : (head + 1) * width] = 0
    with torch.no_grad(), do(model, *Mask.of(["L0.H1", "L1.H3"]).do()):
        masked = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(masked, cut(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_strengths_scale_and_one_changes_nothing():
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    assert Mask({"L0.H1": 1.0}).do() == []
    with torch.no_grad():
        plain = model(**inputs).logits
        with do(model, *Mask({"L0.H1": 3.0, "L1.mlp": 0.5}).do()):
            changed = model(**inputs).logits
    assert not torch.allclose(plain, changed)
