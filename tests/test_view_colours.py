"""Colours of the views: one look a role, text that reads on every ground, even maps."""

import json
from pathlib import Path

import numpy as np
import pytest

from headwise.claim import ROLES
from headwise.view import report

PALETTE = json.loads((Path(report.__file__).parent / "palette.json").read_text(encoding="utf-8"))


def test_every_role_has_a_colour_and_a_mark_of_its_own():
    roles = PALETTE["roles"]
    assert list(roles) == [role.name for role in ROLES] + ["unknown"]
    looks = [(entry["colour"], entry["barred"]) for name, entry in roles.items() if name != "unknown"]
    marks = [entry["mark"] for entry in roles.values()]
    assert len(set(looks)) == len(looks) and len(set(marks)) == len(marks)


def contrast(one: str, two: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("ink", ["text", "quiet", "accent", "passed", "failed"])
def test_text_reads_on_every_ground(theme, ink):
    page = PALETTE["page"][theme]
    assert min(contrast(page[ink], page[ground]) for ground in ("ground", "panel", "sunk")) >= 4.5
    assert contrast(page["text"], page["attend"]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_of_cache_has_a_shape_of_its_own_and_stands_out(theme):
    kinds, page = PALETTE["caches"].values(), PALETTE["page"][theme]
    assert len({kind["glyph"] for kind in kinds}) == len({kind["colour"] for kind in kinds}) == len(kinds)
    assert min(contrast(page[kind["colour"]], page["panel"]) for kind in kinds) >= 3


@pytest.mark.parametrize("name", ["sequential", "diverging"])
def test_colour_maps_are_even(name):
    lights = [contrast(colour, "#000000") for colour in PALETTE[name]]
    rising = np.diff(lights)
    if name == "sequential":
        assert (rising > 0).all()
    else:
        middle = len(lights) // 2
        assert (rising[: middle - 1] > 0).all() and (rising[middle + 1 :] < 0).all()
