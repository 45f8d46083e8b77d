"""The rule that turns evidence into a verdict."""

import math

import pytest

from headwise.claim import FLOOR, ROLES, Claim, Rung, role, settle

NAN = math.nan


def rung(step: str, p: float = 0.001, value: float = 1.0, null: float = 0.1, share: float = 0.3) -> Rung:
    return Rung(step, "x", value, 0.5, 1.5, null, p, NAN, 24, share, False)


SEEN = Rung("seen", "induction", 0.9, 0.8, 1.0, NAN, NAN, NAN, 8, NAN, True)


def test_needed_and_enough_prove() -> None:
    (claim,) = settle([Claim("L5.H1", "induction", rungs=[SEEN, rung("needed"), rung("enough")])])
    assert claim.verdict == "proved"
    assert claim.sentence() == "L5.H1 induction: proved (needed, enough)"


@pytest.mark.parametrize(
    ("needed", "enough", "verdict"),
    [
        ({"p": 0.5}, {}, "unknown"),
        ({}, {"p": 0.5}, "unknown"),
        ({"p": 0.5}, {"p": 0.5}, "refuted"),
        ({"share": FLOOR / 2}, {"share": FLOOR / 2}, "refuted"),
        ({"value": 0.1, "null": 0.2}, {"value": -1.0}, "refuted"),
        ({"p": 0.04, "share": FLOOR / 2}, {"p": 0.5}, "refuted"),
    ],
)
def test_anything_less_does_not(needed: dict, enough: dict, verdict: str) -> None:
    (claim,) = settle([Claim("L5.H1", "induction", rungs=[SEEN, rung("needed", **needed), rung("enough", **enough)])])
    assert claim.verdict == verdict


def test_seen_alone_is_unknown() -> None:
    (claim,) = settle([Claim("L0.H0", "sink", rungs=[SEEN])])
    assert claim.verdict == "unknown" and "seen" in claim.sentence()


def test_the_correction_is_over_the_whole_family() -> None:
    """One claim at p = 0.02 is proved alone, and is not among fifty like it."""
    alone = Claim("L5.H1", "induction", rungs=[rung("needed", p=0.02), rung("enough", p=0.02)])
    assert settle([alone])[0].verdict == "proved"
    assert {c.verdict for c in settle([alone] * 50)} == {"unknown"}


def test_settling_twice_changes_nothing() -> None:
    once = settle([Claim("L5.H1", "induction", rungs=[SEEN, rung("needed"), rung("enough", p=0.03)])])
    assert settle(once) == once


def test_roles_are_named_once_and_found() -> None:
    assert len({r.name for r in ROLES}) == len(ROLES)
    assert role("previous_token").name == "previous token"
    with pytest.raises(ValueError, match="'reader' is not a role.*induction"):
        role("reader")
