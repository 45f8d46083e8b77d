"""The protocol of proof on planted models: what does the work is proved, what only looks like it is not."""

import pytest

from headwise.anatomy import anatomy
from headwise.claim import settle
from headwise.data import IOI, Induction, Needle, Planted, Successor
from headwise.verify import Proof, prove

TASKS = {
    "induction": Induction(),
    "previous token": Induction(),
    "duplicate token": IOI(),
    "name mover": IOI(),
    "successor": Successor(),
    "retrieval": Needle(length=60),
}


@pytest.fixture(scope="module")
def planted():
    return Planted().build(seed=0)


def units(planted, role: str) -> list[str]:
    return [u for u, r in planted.truth.items() if r == role]


@pytest.mark.parametrize("role", TASKS)
def test_planted_heads_are_proved(planted, role: str) -> None:
    batch = TASKS[role].make(planted.tokenizer, n=16, seed=1)
    (claim,) = prove(planted.model, batch, role, units(planted, role))
    assert claim.verdict == "proved", claim.sentence()
    assert claim.rung("needed").p_holm < 0.01 and claim.rung("enough").share > 0.5


def test_a_mute_decoy_is_refuted(planted) -> None:
    """It attends as an induction head does, and nothing hangs on it."""
    (decoy,) = planted.decoys
    batch = Induction().make(planted.tokenizer, n=16, seed=1)
    claims = prove(planted.model, batch, "induction", [*units(planted, "induction"), decoy])
    assert [c.verdict for c in claims] == ["proved", "refuted"]


def test_a_twin_is_enough_but_not_needed() -> None:
    planted = Planted(decoys=("twin",)).build(seed=3)
    batch = Induction().make(planted.tokenizer, n=16, seed=1)
    twins = list(planted.decoys)
    for claim in prove(planted.model, batch, "induction", twins):
        assert claim.verdict == "unknown"
        assert claim.rung("enough").passed and not claim.rung("needed").passed


def test_random_heads_are_not_proved(planted) -> None:
    """Heads with no part in the task, tested as if they had one."""
    idle = [u for u in anatomy(planted.model).units() if u not in planted.truth and u not in planted.decoys][::4]
    batch = Induction().make(planted.tokenizer, n=16, seed=1)
    assert {c.verdict for c in prove(planted.model, batch, "induction", idle)} == {"refuted"}


def test_a_head_of_another_task_is_not_proved(planted) -> None:
    batch = Successor().make(planted.tokenizer, n=16, seed=1)
    (claim,) = prove(planted.model, batch, "successor", units(planted, "name mover"))
    assert claim.verdict == "refuted"


def test_the_null_is_drawn_from_the_candidates_layers(planted) -> None:
    drawn = Proof(nulls=4, seed=0).draw(planted.model, ["L1.H0"], {"L1.H1"})
    assert len(drawn) == 4 and all(u.startswith("L1.") for u in drawn) and not {"L1.H0", "L1.H1"} & set(drawn)
    assert drawn == Proof(nulls=4, seed=0).draw(planted.model, ["L1.H0"], {"L1.H1"})
    everything = [f"L{n}.H{i}" for n in range(4) for i in range(6)]
    with pytest.raises(ValueError, match="no head is left"):
        Proof().draw(planted.model, everything)


def test_bad_requests_are_sentences(planted) -> None:
    batch = Induction().make(planted.tokenizer, n=4, seed=1)
    with pytest.raises(ValueError, match="'L9.H9' is not a head of this model"):
        prove(planted.model, batch, "induction", ["L9.H9"])
    with pytest.raises(ValueError, match="is not a metric"):
        Proof(metric="vibes").run(planted.model, batch, "induction", ["L0.H0"])
    with pytest.raises(ValueError, match="no worse"):
        prove(planted.model, batch.flipped(), "induction", ["L0.H0"])
    alone = type(batch)(batch.inputs, batch.at, batch.answer, about=batch.about)
    with pytest.raises(ValueError, match="no corrupt prompts"):
        prove(planted.model, alone, "induction", ["L0.H0"])


def test_a_proof_can_be_made_again(planted) -> None:
    batch = Induction().make(planted.tokenizer, n=8, seed=1)
    one, two = (
        settle(Proof(nulls=6).run(planted.model, batch, "induction", units(planted, "induction"))) for _ in "ab"
    )
    assert [c.rungs for c in one] == [c.rungs for c in two]
    assert one[0].about["task"]["seed"] == 1 and 0 < len(one[0].about["nulls"]) <= 6
