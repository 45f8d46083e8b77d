"""Prompts of one's own as a file of JSON lines: what a pair is, and how it is read and checked."""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = ("prompt", "answer", "foil", "corrupt")


class Pair(NamedTuple):
    """A prompt, what should come after it, what should not, and the prompt minimally changed; the last two may lack."""

    prompt: str
    answer: str
    foil: str | None = None
    corrupt: str | None = None


def read_pairs(file: Path) -> dict[str, Pair]:
    """The pairs of a file with one JSON object a line, each under its place ("mine.jsonl, line 3").

    Lines without any text are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is no pair; the sentence names the line.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder, where a file of pairs is needed: one JSON object a line.")
    if not file.is_file():
        beside = [one.name for one in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, n=1)
        raise ValueError(f"There is no file of pairs {file}.{f' Did you mean {near[0]!r}?' if near else ''}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text, as a file of pairs must be: {error.reason}.") from error
    places = {f"{file.name}, line {i}": line for i, line in enumerate(lines, 1) if line.strip()}
    if not places:
        raise ValueError(f"{file} holds no pairs; a pair is a JSON object on one line.")
    return checked({where: _parsed(line, where) for where, line in places.items()})


def _parsed(line: str, where: str) -> Pair:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a JSON {type(value).__name__}, not an object with prompt and answer.")
    for name in value:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has a field {name!r}; allowed are {', '.join(FIELDS)}.{hint}")
    for name in FIELDS[:2]:
        if name not in value:
            raise ValueError(f"{where} lacks {name!r}; a pair needs prompt and answer, and may have foil and corrupt.")
    return Pair(**value)


def checked(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The pairs, if all of them make sense and all or none have a foil, and all or none a corrupt prompt.

    Raises:
        ValueError: a text is empty or no text, an answer is its foil, a corrupt prompt is its prompt, or some lack what
            others have.
    """
    for where, pair in pairs.items():
        for name, text in pair._asdict().items():
            if text is None and name in FIELDS[2:]:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{where} has {text!r} as its {name}, where a text is needed.")
            if not text.strip():
                raise ValueError(f"{where} has an empty {name}.")
        if pair.foil is not None and pair.answer.strip() == pair.foil.strip():
            raise ValueError(f"{where} has the answer {pair.answer!r} as its foil too; they must differ.")
        if pair.corrupt == pair.prompt:
            raise ValueError(f"{where} has a corrupt prompt that is the prompt itself; something must differ.")
    for name in FIELDS[2:]:
        there = {where: getattr(pair, name) is not None for where, pair in pairs.items()}
        if len(set(there.values())) > 1:
            lacking = next(where for where, has in there.items() if not has)
            raise ValueError(f"{lacking} has no {name}, while others have; give it to all pairs or to none.")
    return pairs
