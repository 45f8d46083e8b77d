"""What people ask a model to write: requests whose answer repeats a text, and requests whose answer does not.

They have no answer key; they are what ways to generate are timed on. Answers that repeat a text are begun with its
first words, as a small model does not always do what it is asked. Second turns that ask for a variation of an answer
are the idea of MT-Redundant (Dumitru et al., 2025, arXiv:2502.08923), put together here from other parts.
"""

import random
import re
from typing import TYPE_CHECKING, NamedTuple

from headwise.data.layout import check_count, encode, start_ids
from headwise.data.prose import KINDS, PEOPLE, STATES, THINGS, VERBS, WHEN, WHERE
from headwise.data.reference import plain_paragraphs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COPYING = ("edit", "quote", "summarise", "variation")
OPEN = ("story", "explain", "list", "advise", "describe")
OTHERS = ("garden", "letter", "machine", "river", "window", "castle", "orange", "planet")
SHORT, LONG = 250, 700
BEGUN = 6


class Request(NamedTuple):
    """One request: its kind, the turns so far (the user begins), the ids to go on from, how the answer is begun."""

    kind: str
    turns: tuple[str, ...]
    ids: list[int]
    begun: str = ""


def copying(tokenizer: "PreTrainedTokenizerBase", n: int, seed: int = 0) -> list[Request]:
    """Requests whose answers repeat most of a passage, of the kinds `COPYING` in turn.

    Passages are from the reference that Python carries, 250 to 700 characters each.

    Raises:
        ValueError: fewer than 1 were asked for.
    """
    check_count(n)
    draw = random.Random(f"requests copying {seed}")
    passages = [one for one in plain_paragraphs(SHORT) if len(one) <= LONG and _frequent(one)]
    chosen = [draw.choice(passages) for _ in range(n)]
    return [
        _request(tokenizer, kind, _copying(kind, passage, draw), " ".join(passage.split()[:BEGUN]))
        for kind, passage in _in_turn(COPYING, chosen)
    ]


def open_ended(tokenizer: "PreTrainedTokenizerBase", n: int, seed: int = 0) -> list[Request]:
    """Requests whose answers repeat little, of the kinds `OPEN` in turn.

    Raises:
        ValueError: fewer than 1 were asked for.
    """
    check_count(n)
    draw = random.Random(f"requests open {seed}")
    return [_request(tokenizer, kind, (_open(kind, draw),)) for kind, _ in _in_turn(OPEN, [""] * n)]


def _in_turn(kinds: tuple[str, ...], values: list[str]) -> list[tuple[str, str]]:
    return [(kinds[i % len(kinds)], value) for i, value in enumerate(values)]


def _frequent(passage: str) -> str:
    """The word of five letters or more that a passage uses most, "" where none comes twice."""
    words = re.findall(r"\b[a-z]{5,}\b", passage)
    best = max(words, key=lambda word: (words.count(word), -words.index(word)), default="")
    return best if words.count(best) > 1 else ""


def _copying(kind: str, passage: str, draw: random.Random) -> tuple[str, ...]:
    old, new = _frequent(passage), draw.choice(OTHERS)
    if kind == "edit":
        return (f'Rewrite the text below with every "{old}" changed to "{new}". Change nothing else.\n\n{passage}',)
    if kind == "quote":
        return (f"Repeat the text below word for word.\n\n{passage}",)
    if kind == "summarise":
        return (f"Shorten the text below. Keep the sentences that matter as they are.\n\n{passage}",)
    ask = f"Explain what the reference of Python says about {old}."
    return (ask, passage, f'Give the same answer again, but say "{new}" instead of "{old}".')


def _open(kind: str, draw: random.Random) -> str:
    person, thing, what = draw.choice(PEOPLE), draw.choice(THINGS), draw.choice(KINDS)
    place, when = draw.choice(WHERE), draw.choice(WHEN)
    return {
        "story": f"Write a short story: {person} {draw.choice(VERBS)} a {what} {thing} {place} {when}.",
        "explain": f"Explain to a child how a {thing} is made, and what one does with it {when}.",
        "list": f"List ten different uses of a {what} {thing}.",
        "advise": f"What should {person} do when {draw.choice(STATES)} {place}? Give some advice.",
        "describe": f"Describe a {what} {thing} {place} {when}, as a poet would.",
    }[kind]


def _request(tokenizer: "PreTrainedTokenizerBase", kind: str, turns: tuple[str, ...], begun: str = "") -> Request:
    """The ids of a conversation and of the beginning of its answer, by the tokenizer's template where it has one."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        return Request(kind, turns, encode(tokenizer, text + begun), begun)
    text = "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in said)
    ids = start_ids(tokenizer) + encode(tokenizer, f"{text}\n\nAssistant: {begun}".rstrip())
    return Request(kind, turns, ids, begun)
