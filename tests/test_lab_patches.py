"""Digits in patches: what is cut where, and which images are taught."""

import sys

import pytest
import torch

from headwise import replicate
from headwise.data import DigitImages, DigitPatches
from headwise.data.digits_images import part_of_digits
from headwise.lab import PatchSize, Training, train

pytest.importorskip("sklearn")


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patches_tile_the_image(patch):
    lesson = DigitPatches(patch=patch)
    images = torch.arange(128.0).view(2, 8, 8)
    cut = lesson.cut(images)
    assert cut.shape == (2, lesson.tokens + 1, patch**2) and not cut[:, -1].any()
    assert torch.equal(cut[:, 0].view(2, patch, patch), images[:, :patch, :patch])
    assert torch.equal(cut[:, lesson.tokens - 1].view(2, patch, patch), images[:, -patch:, -patch:])
    if patch < 8:
        assert torch.equal(cut[:, 1].view(2, patch, patch), images[:, :patch, patch : 2 * patch])


def test_test_images_are_others_and_whole_parts_are_drawn():
    lesson = DigitPatches(patch=8)
    test = lesson.on("test").make(n=500, seed=1)
    pixels, digits, _ = part_of_digits("test")
    assert sorted(map(tuple, test.inputs["inputs_embeds"][:, 0].tolist())) == sorted(
        map(tuple, pixels.flatten(1).tolist())
    )
    assert sorted(test.answer[:, 0].tolist()) == sorted(digits.tolist())
    same = DigitImages("test").make(None, 500)
    assert torch.equal(same.inputs["pixel_values"].sum(), pixels.sum())
    assert len(lesson.make(n=2000)) == 2000


def test_images_that_are_taught_are_moved():
    lesson = DigitPatches(patch=8, moved=2)
    still = DigitPatches(patch=8)
    taught = {lesson.split: lesson.make(n=60, seed=3), "still": still.make(n=60, seed=3)}
    moved, plain = (one.inputs["inputs_embeds"][:, 0].view(60, 8, 8) for one in taught.values())
    kinds = set()
    for now, before in zip(moved, plain, strict=True):
        wide = torch.nn.functional.pad(before, (2,) * 4, value=-1.0)
        fits = [(y, x) for y in range(5) for x in range(5) if torch.equal(wide[y : y + 8, x : x + 8], now)]
        assert fits
        kinds.update(fits)
    assert len(kinds) > 15
    test = lesson.on("test").make(n=20, seed=1)
    assert torch.equal(test.inputs["inputs_embeds"], still.on("test").make(n=20, seed=1).inputs["inputs_embeds"])


def test_digits_are_learned():
    one = PatchSize().conditions()["4 x 4, 4 tokens"]
    run = train(one.model, one.lesson, Training(steps=60, lr=4e-3, batch=64, measure_every=30, rows=200), seed=1)
    assert run.tape.last("accuracy", "test") > 0.4


def test_without_scikit_learn_a_sentence_says_so(monkeypatch):
    part_of_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="come with scikit-learn, which is not installed"):
        DigitPatches().make(n=2)


def test_what_does_not_tile_is_refused():
    with pytest.raises(ValueError, match="do not tile"):
        DigitPatches(patch=3)
    with pytest.raises(ValueError, match="cannot be moved by 8 pixels; allowed are 0 to 7"):
        DigitPatches(moved=8)


def test_the_replication_is_found():
    assert replicate.find("s097").name == "patch_size"
