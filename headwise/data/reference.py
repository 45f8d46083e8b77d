"""Real text that is on every machine: the reference of the Python language that `help` shows; or a file."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path


@cache
def paragraphs(path: str = "") -> tuple[str, ...]:
    """The paragraphs of the reference, or of a UTF-8 text file, in order; each the first time that it comes.

    Raises:
        ValueError: the file cannot be read, or this Python carries no reference.
    """
    if path:
        try:
            return _once(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path!r} cannot be read as text: {error}. A UTF-8 text file is needed.") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("This Python carries no reference (pydoc_data); give a text file as `path`.") from error
    return _once("\n\n".join(topics[name] for name in sorted(topics)))


def plain_paragraphs(least: int = 200) -> tuple[str, ...]:
    """Those paragraphs of the reference that are plain sentences, of `least` characters or more, each on one line."""
    lines = (" ".join(part.split()) for part in paragraphs() if part[0].isupper() and "\n " not in part)
    return tuple(line for line in lines if len(line) >= least)


def digest(parts: Sequence[str]) -> str:
    """16 hex digits that stand for a text: versions of Python differ a little in theirs."""
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


def _once(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for part in text.split("\n\n") if part.strip())) or ("",)
