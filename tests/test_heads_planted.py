"""Planted models, all of whose heads are written by hand: detectors find their own, and fall for decoys."""

import pytest

from headwise.data.planted import Planted, PlantedModel
from headwise.heads import Induction
from headwise.method import load

PLANTED = {
    "previous_token": "previous token",
    "current_token": "current token",
    "duplicate_token": "duplicate token",
    "induction": "induction",
    "echo": "duplicate token",
    "razor_induction": "induction",
    "retrieval": "retrieval",
    "name_mover": "name mover",
    "successor": "successor",
    "composition": "induction",
    "k_composition": "induction",
    "copying": "induction",
}
RECIPES = [(Planted(), 0), (Planted(), 1), (Planted(kv_heads=3), 2), (Planted(noise=0.05), 3)]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: f"seed {recipe[1]}")
def planted(request) -> PlantedModel:
    recipe, seed = request.param
    return recipe.build(seed)


@pytest.mark.parametrize("name", PLANTED)
def test_every_detector_finds_its_planted_head(name, planted):
    method = load(f"heads.{name}")()
    batch = load(f"data.{method.needs}")().make(planted.tokenizer, 6) if method.needs else None
    score = method.score(planted.model, batch)
    unit = next(unit for unit, role in planted.truth.items() if role == PLANTED[name])
    # Whatever else matches what followed, or copies, is as it should be; all others must stay behind.
    alike = {"copying": ("retrieval", "name mover", "current token")}.get(name, ("retrieval",))
    rivals = [
        u for u in score.table["unit"] if u != unit and u not in planted.decoys and planted.truth.get(u) not in alike
    ]
    best = max(score[u] for u in rivals if score[u] == score[u])
    assert score[unit] > best + 0.02, (unit, score[unit], best)
    if method.evidence == "seen":
        assert score[unit] > 0.8


def test_decoys_look_like_what_they_are_not(planted):
    batch = load("data.repeated_tokens")().make(planted.tokenizer, 4)
    score = Induction().score(planted.model, batch)
    assert all(score[unit] > 0.8 for unit in planted.decoys)
