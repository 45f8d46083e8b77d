"""The catalogue: complete, true to the sources, and read without torch."""

import subprocess
import sys
from dataclasses import is_dataclass

import pytest

from headwise import data, heads
from headwise.method import HeadMethod, Method, catalogue, find, load
from headwise.task import Task


def test_every_card_is_whole() -> None:
    cards = catalogue()
    assert len(cards) >= 25 and len({c.name for c in cards}) == len(cards)
    for card in cards:
        assert card.title and card.summary[-1] in ".?", card.name
        assert set(card.brief()) == {"name", "room", "title", "authors", "year", "arxiv", "seed"}


def test_every_head_method_names_its_paper() -> None:
    for card in catalogue("heads"):
        assert card.authors and card.year, card.name


@pytest.mark.parametrize("card", catalogue(), ids=lambda c: c.name)
def test_the_card_is_the_class(card) -> None:
    cls = load(card.name)
    assert cls.__name__ == card.class_name and is_dataclass(cls) and issubclass(cls, Method)
    assert issubclass(cls, {"heads": HeadMethod, "data": Task}.get(card.room, Method)) or not issubclass(cls, Task)
    assert cls.row == card.seed
    if issubclass(cls, HeadMethod) and cls.needs:
        assert find(f"data.{cls.needs}")


def test_classes_are_names_of_their_room() -> None:
    assert heads.Induction is load("heads.induction") and data.Induction is load("data.induction")
    assert "Ablation" in dir(heads)
    with pytest.raises(AttributeError, match="Did you mean"):
        heads.Inductio  # noqa: B018


def test_names_are_found_or_the_nearest_is_named() -> None:
    assert find("ablation").name == "heads.ablation"
    with pytest.raises(ValueError, match="heads.induction or data.induction|data.induction or heads.induction"):
        find("induction")
    with pytest.raises(ValueError, match="Did you mean 'heads.induction'"):
        find("heads.inductoin")
    with pytest.raises(ValueError, match="no room 'head'.*Did you mean 'heads'"):
        catalogue("head")


def test_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from headwise.method import catalogue; catalogue(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_identity_is_name_and_fields() -> None:
    assert heads.Ablation(value="zero").identity()["name"] == "heads.ablation"
    assert heads.Ablation(value="zero").identity()["fields"]["value"] == "zero"
