"""Writes the pages that are made from code and kept results; `--check` only says whether they are up to date.

python docs/generate.py            methods.md from the catalogue, replications.md from docs/replications/
python docs/generate.py --check    exit code 1 when a page differs from what would be written
"""

import sys
from pathlib import Path

from headwise import replicate
from headwise.method import ROOMS, Card, catalogue

DOCS = Path(__file__).parent
ROOM_WORDS = {
    "data": "Prompts with an answer key, `make(tokenizer, n, seed) -> Batch`.",
    "heads": "A number per head, `score(model, batch) -> Score`.",
    "cache": "Which keys and values exist, `store(reserve) -> Store`.",
    "attention": "How queries mix values.",
    "circuits": "Edges between places, `find(model, batch) -> Graph`.",
    "features": "A basis or reader fitted to activations.",
    "decode": "Which token comes next.",
    "lab": "A trained model and its history.",
}


def cite(card: Card) -> str:
    """The paper behind a method, with its arXiv id where it has one."""
    paper = f"{card.authors}, {card.year}. *{card.title}.*" if card.year else f"*{card.title}.*"
    # Titles that end in a question mark keep it.
    paper = paper.replace("?.*", "?*")
    return paper + (f" arXiv:{card.arxiv}." if card.arxiv else "")


def method(card: Card) -> list[str]:
    """One method: its sentence, its options with their defaults, its paper."""
    lines = [f"### {card.name}", "", f"`headwise.{card.room}.{card.class_name}`. {card.summary}", ""]
    if card.fields:
        lines += [*(f"- `{option}: {kind}`" for option, kind in card.fields.items()), ""]
    return [*lines, cite(card) + (f" Row {card.seed} of the mission." if card.seed else ""), ""]


def methods() -> str:
    """The page of all methods, by room."""
    cards = catalogue()
    lines = [
        "# Methods",
        "",
        "Written by `make docs` from the docstrings of the rooms. `headwise show NAME` prints the same in a terminal.",
        "",
    ]
    for room in ROOMS:
        chosen = [card for card in cards if card.room == room]
        lines += [f"## {room}", "", f"{ROOM_WORDS.get(room, '')} {len(chosen)} of them.".strip(), ""]
        lines += ["| method | what it computes | paper |", "| --- | --- | --- |"]
        for card in chosen:
            paper = f"{card.authors}, {card.year}" if card.year else card.title
            summary = card.summary.replace("|", "\\|")
            lines.append(f"| [{card.name}](#{card.name.replace('.', '')}) | {summary} | {paper} |")
        lines.append("")
        for card in chosen:
            lines += method(card)
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    made = {"methods.md": methods()}
    if any((DOCS / "replications").glob("*.json")):
        made["replications.md"] = replicate.page(DOCS / "replications")
    return made


def main() -> int:
    """Write the pages, or check them."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        sys.stdout.write(f"{', '.join(stale)} {'is stale: run make docs' if check else 'written'}.\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
