"""What a method is, how it is identified, and the catalogue that finds all of them without importing torch."""

import ast
import difflib
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.score import Score
    from headwise.task import Batch

ROOMS = ("data", "heads", "cache", "attention", "circuits", "features", "decode", "lab")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """Base of every method in every room: a frozen dataclass whose fields are its options."""

    row: ClassVar[str] = ""

    def identity(self) -> dict[str, Any]:
        """Name in the catalogue, and the value of every field."""
        room, module = type(self).__module__.split(".")[-2:]
        return {"name": f"{room}.{module}", "fields": asdict(self) if fields(self) else {}}


@dataclass(frozen=True)
class HeadMethod(Method):
    """Base of the heads room: a number per unit.

    Class attributes: `evidence`, the rung of the ladder on which its numbers stand; `needs`, the data task it wants, ""
    when it reads weights only.
    """

    evidence: ClassVar[str] = "seen"
    needs: ClassVar[str] = "repeated_tokens"

    def score(self, model: "PreTrainedModel", batch: "Batch | None") -> "Score":
        """One number per unit of the model on these prompts."""
        raise TypeError(f"{type(self).__name__} does not say how it scores.")


@dataclass(frozen=True)
class Card:
    """One entry of the catalogue, read from the method's source."""

    name: str
    room: str
    title: str
    authors: str
    year: int | None
    arxiv: str
    seed: str
    class_name: str
    summary: str
    fields: dict[str, str]
    file: str

    def brief(self) -> dict[str, Any]:
        """The contract of `headwise ls --json`."""
        keys = ("name", "room", "title", "authors", "year", "arxiv", "seed")
        return {key: getattr(self, key) for key in keys}


def _method_class(tree: ast.Module) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            return node
    return None


def _paper(doc: str) -> tuple[str, str, int | None, str]:
    """Title, authors, year and arXiv id from a docstring of the form `Title. Authors, 2022. arXiv:2209.11895`."""
    first = " ".join(doc.split("\n\n")[0].split())
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", first)
    found = re.match(r"^(?P<title>.+?[.?!]) (?P<authors>[^.]*(?:et al\.)?[^.]*?),? (?P<year>(?:19|20)\d\d)\b", first)
    if not found:
        return first.rstrip("."), "", None, arxiv[1] if arxiv else ""
    return found["title"].rstrip("."), found["authors"].strip(" ,"), int(found["year"]), arxiv[1] if arxiv else ""


def _card(room: str, file: Path) -> Card | None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = _method_class(tree)
    if node is None:
        return None
    title, authors, year, arxiv = _paper(ast.get_docstring(tree) or "")
    options: dict[str, str] = {}
    seed = ""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if "ClassVar" in ast.unparse(line.annotation):
                if line.target.id == "row" and isinstance(line.value, ast.Constant):
                    seed = str(line.value.value)
            else:
                default = f" = {ast.unparse(line.value)}" if line.value is not None else ""
                options[line.target.id] = ast.unparse(line.annotation) + default
    summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    name = f"{room}.{file.stem}"
    return Card(name, room, title, authors, year, arxiv, seed, node.name, summary, options, file.name)


@functools.cache
def _all_cards() -> tuple[Card, ...]:
    cards = []
    for room in ROOMS:
        for file in sorted((_HERE / room).glob("*.py")):
            if file.stem != "__init__" and (card := _card(room, file)):
                cards.append(card)
    return tuple(cards)


def catalogue(room: str | None = None) -> list[Card]:
    """Every method, or those of one room.

    Raises:
        ValueError: there is no such room.
    """
    if room is not None and room not in ROOMS:
        raise ValueError(f"There is no room {room!r}. Rooms: {', '.join(ROOMS)}.{_nearest(room, ROOMS)}")
    return [card for card in _all_cards() if room in (None, card.room)]


def _nearest(name: str, names: "tuple[str, ...] | list[str]") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def find(name: str) -> Card:
    """The card of a method, by its full name ("heads.induction") or by its last part where only one room has it.

    Raises:
        ValueError: no method has that name; the nearest one is named.
    """
    cards = _all_cards()
    hits = [c for c in cards if c.name == name] or [c for c in cards if c.name.split(".")[1] == name]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise ValueError(f"{name!r} could be {' or '.join(c.name for c in hits)}.")
    raise ValueError(f"There is no method {name!r}.{_nearest(name, [c.name for c in cards])} `headwise ls` shows all.")


def find_task(name: str) -> Card:
    """The card of a task of the data room, by its name with or without the room.

    Raises:
        ValueError: no method has that name, or it is not a task.
    """
    card = find(name if "." in name else f"data.{name}")
    if card.room != "data":
        raise ValueError(f"{card.name} is not a task. `headwise ls data` lists the tasks.")
    return card


def load(name: str) -> type[Method]:
    """Import and return the class of a method."""
    card = find(name)
    return getattr(importlib.import_module(f"headwise.{card.name}"), card.class_name)


def room_exports(package: str, init_file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a room: each file's class is a name of the room, loaded on use."""
    where: dict[str, str] = {}
    for file in sorted(Path(init_file).parent.glob("*.py")):
        if file.stem != "__init__" and (node := _method_class(ast.parse(file.read_text(encoding="utf-8")))):
            where[node.name] = file.stem

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"{package} has no {name!r}.{_nearest(name, list(where))}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return __getattr__, lambda: sorted(where), sorted(where)
