"""Secrets hidden in long plain prose, and asked for at its end: the shared part of the tasks that hide several."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import (
    Piece,
    Prompt,
    columns,
    encode,
    pad_id,
    start_ids,
    write,
)
from headwise.data.prose import sentences
from headwise.task import Batch, Task, pad_left


class Secret(NamedTuple):
    """What is hidden: the line it stands in up to the secret itself, the secret, and what corrupt prompts hide."""

    stem: str
    said: str
    instead: str


def filler(tokenizer: PreTrainedTokenizerBase, seed: str, room: int, length: int) -> list[str]:
    """Sentences of plain prose that fill at most `room` tokens of a prompt of `length`.

    Raises:
        ValueError: not one sentence fits.
    """
    flow, said, used = sentences(seed), [], 0
    while used <= room:
        said.append(next(flow))
        used += len(encode(tokenizer, f" {said[-1]}"))
    said = said[:-1]
    if not said:
        raise ValueError(
            f"{length} tokens have no room for what is hidden and some prose; try {length + 30 - room} or more."
        )
    return said


def codes(
    tokenizer: PreTrainedTokenizerBase, stem: str, draw: Callable[[], str], what: str
) -> Iterator[tuple[str, list[int]]]:
    """Endless drawn texts with their ids as they follow `stem`, all of the same number of ids.

    Raises:
        ValueError: the tokenizer does not know what is drawn.
    """

    def ways() -> Iterator[tuple[str, list[int], int]]:
        while True:
            said = draw()
            prompt = write(tokenizer, [(stem, None), (f" {said}", "said")])
            yield said, prompt.ids[slice(*prompt.spans["said"])], len(prompt.ids)

    sample = list(islice(ways(), 200))
    different = {tuple(ids) for _, ids, _ in sample}
    if len(different) < 2 or any(tokenizer.unk_token_id in ids for ids in different):
        raise ValueError(f"This tokenizer does not know the {what}, so that it cannot tell one secret from another.")
    size = Counter((len(ids), width) for _, ids, width in sample).most_common(1)[0][0]
    return ((said, ids) for said, ids, width in ways() if (len(ids), width) == size)


def keys(tokenizer: PreTrainedTokenizerBase, stem: str, words: Sequence[str]) -> list[str]:
    """The stem with each word in its place.

    Raises:
        ValueError: the tokenizer does not know one of the words.
    """
    if any(tokenizer.unk_token_id in encode(tokenizer, word) for word in words):
        raise ValueError(f"This tokenizer does not know all of {words[0]}, {words[1]} and the like, the keys.")
    return [stem.format(key=word) for word in words]


def secret(stem: str, flow: Iterator[tuple[str, list[int]]]) -> Secret:
    """A secret, and another one for the corrupt prompts that differs from it in every token."""
    said, ids = next(flow)
    for instead, other in islice(flow, 1000):
        if all(a != b for a, b in zip(ids, other, strict=True)):
            return Secret(stem, said, instead)
    raise ValueError(f"Of 1000 draws none differs from {said!r} in every token of this tokenizer.")


def hide(said: Sequence[str], hidden: Sequence[Secret], asked: Sequence[int], draw: random.Random) -> list[list[Piece]]:
    """Sentences with each secret on a line of its own at a random place, and at the end the asked ones once more.

    Returns:
        the pieces of the clean and of the corrupt prompt. Piece "hidden_0" is the secret asked for first, "answer_0"
        the same where it is asked for, and so on.
    """
    places: dict[int, list[int]] = {}
    for number in range(len(hidden)):
        places.setdefault(draw.randint(1, len(said)), []).append(number)
    both = []
    for corrupt in (False, True):
        pieces: list[Piece] = []
        for i, one in enumerate(said, 1):
            pieces.append((one + ("" if i in places or i == len(said) else " "), None))
            for number in places.get(i, ()):
                item = hidden[number]
                inside = item.instead if corrupt and number in asked else item.said
                name = f"hidden_{asked.index(number)}" if number in asked else None
                pieces += [(f"\n{item.stem}", None), (f" {inside}", name), (".", None)]
            if i in places and i < len(said):
                pieces.append(("\n", None))
        for i, number in enumerate(asked):
            item = hidden[number]
            pieces += [(f"\n{item.stem}", f"question_{i}"), (f" {item.said}", f"answer_{i}"), (".", None)]
        both.append(pieces[:-1])
    return both


def lay_out_asked(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[list[list[Piece]]],
    n: int,
    seed: int,
) -> Batch:
    """What `hide` made as a left-padded batch, read at all tokens of its answers.

    Span "question" goes from the first question to the end of the prompt; the answers stand in the prompt, so that a
    later one is asked for after the right earlier ones.

    Raises:
        ValueError: the tokenizer writes a secret in another way where it is hidden than where it is asked for.
    """
    first = start_ids(tokenizer)
    clean, corrupt = ([_marked(write(tokenizer, pair[i])) for pair in pairs] for i in (0, 1))
    asked = sum(name.startswith("answer_") for name in clean[0].spans)
    ids, mask = pad_left([first + p.ids for p in clean], pad_id(tokenizer))
    other, _ = pad_left([first + p.ids for p in corrupt], pad_id(tokenizer))
    spans, changed = columns(clean, ids.shape[1]), columns(corrupt, other.shape[1])
    at, answer, foil = [], [], []
    for row in range(len(clean)):
        said = [ids[row, slice(*spans[f"answer_{i}"][row].tolist())] for i in range(asked)]
        there = [ids[row, slice(*spans[f"hidden_{i}"][row].tolist())] for i in range(asked)]
        instead = [other[row, slice(*changed[f"hidden_{i}"][row].tolist())] for i in range(asked)]
        same = all(torch.equal(a, b) for a, b in zip(said, there, strict=True))
        if not same or len(clean[row].ids) != len(corrupt[row].ids):
            raise ValueError("This tokenizer writes a secret in another way where it is hidden than where it is asked.")
        at.append(torch.cat([torch.arange(*spans[f"answer_{i}"][row].tolist()) - 1 for i in range(asked)]))
        answer.append(torch.cat(said))
        foil.append(torch.cat(instead))
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask},
        corrupt={"input_ids": other, "attention_mask": mask},
        at=torch.stack(at),
        answer=torch.stack(answer),
        foil=torch.stack(foil),
        spans={name: edges for name, edges in spans.items() if not name.startswith("question_")},
        texts=[p.text for p in clean],
        about=task.about(n, seed),
    )


def _marked(prompt: Prompt) -> Prompt:
    """The prompt with a span "question", from the first question to the end."""
    start = min(low for name, (low, _) in prompt.spans.items() if name.startswith("question_"))
    return prompt._replace(spans={**prompt.spans, "question": (start, len(prompt.ids))})
