"""Algorithmic tasks in two languages: a RASP-L program, where there is a short one, and plain Python beside it.

Texts are tokens: the mark, the bits, then letters (which are numbers too), then hints, numbers that stand before what
they count. A prompt ends in the mark, and the answer of most tasks does too.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from headwise import rasp
from headwise.rasp import Seq, Size, compare, each, kqv, moved, places, select, shift, where, width

MARK, ZERO, ONE = 0, 1, 2
LETTER = 3


class Algorithm(NamedTuple):
    """A task.

    Attributes:
        ask: a prompt of so many items, where the longest may have `most`: (random, items, most) -> tokens.
        answer: what is to be said, in plain Python.
        program: the same in RASP-L: (text, first hint) -> what is said next at every position. None where no short
            program is known.
    """

    ask: Callable[[random.Random, int, int], list[int]]
    answer: Callable[[list[int]], list[int]]
    program: Callable[[Seq, int], Seq] | None = None


def letters(most: int) -> int:
    """How many letters there are: two for each item of the longest prompt; as many hints come after them."""
    return 2 * most


def vocabulary(most: int) -> int:
    """How many tokens there are."""
    return LETTER + 2 * letters(most)


# Prompts


def _count(draw: random.Random, items: int, most: int) -> list[int]:
    first = draw.randrange(LETTER, LETTER + letters(most) - items + 1)
    return [first, first + items - 1, MARK]


def _few(draw: random.Random, items: int, most: int) -> list[int]:
    """Letters out of five, one of them more often than every other."""
    while True:
        found = [draw.randrange(LETTER, LETTER + 5) for _ in range(items)]
        first, *rest = (n for _, n in Counter(found).most_common(2))
        if first > 1 and first not in rest:
            return [*found, MARK]


def _different(draw: random.Random, items: int, most: int) -> list[int]:
    return [MARK, *draw.sample(range(LETTER, LETTER + letters(most)), items), MARK]


def _bits(draw: random.Random, items: int, most: int) -> list[int]:
    return [MARK, *(draw.choice((ZERO, ONE)) for _ in range(items)), MARK]


def _hinted(draw: random.Random, items: int, most: int) -> list[int]:
    """Bits, each behind a hint; the hints are numbers in a row that begins anywhere."""
    first = draw.randrange(LETTER + letters(most), vocabulary(most) - items + 1)
    pairs = ((first + i, draw.choice((ZERO, ONE))) for i in range(items))
    return [MARK, *(token for pair in pairs for token in pair), MARK]


# Answers in plain Python


def _counted(prompt: list[int]) -> list[int]:
    return [*range(prompt[0], prompt[1] + 1), MARK]


def _commonest(prompt: list[int]) -> list[int]:
    return [Counter(prompt[:-1]).most_common(1)[0][0]]


def _again(prompt: list[int]) -> list[int]:
    return [*prompt[1:-1], MARK]


def _odd(prompt: list[int]) -> list[int]:
    return [ONE if prompt.count(ONE) % 2 else ZERO]


def _odd_so_far(prompt: list[int]) -> list[int]:
    said, odd = [], False
    for hint, bit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        odd ^= bit == ONE
        said += [hint, ONE if odd else ZERO]
    return [*said, MARK]


# Programs


def _count_program(x: Seq, hint: int) -> Seq:
    before = shift(x)
    first, last = shift(before), kqv(x, MARK, before)
    onward = where(compare(x, "==", last), MARK, moved(x, 1))
    return where(compare(x, "==", MARK), first, onward)


def _mode_program(x: Seq, hint: int) -> Seq:
    seen, here = width(select(x, x)), places(x)
    most = kqv(here, here, seen, "<=")
    return kqv(seen, most, x)


def _copy_program(x: Seq, hint: int) -> Seq:
    return kqv(shift(x), x, x)


def _after_hint(x: Seq, before: Seq) -> Seq:
    """What came two tokens after the hint before this token when it came first: the next hint, or the mark."""
    return kqv(shift(before), before, x)


def _copy_hinted_program(x: Seq, hint: int) -> Seq:
    before = shift(x)
    is_bit = each(lambda v: (v == ZERO) | (v == ONE), x)
    return where(is_bit, _after_hint(x, before), kqv(before, x, x))


def _parity_program(x: Seq, hint: int) -> Seq:
    before = shift(x)
    same = kqv(before, x, x)
    parity = each(lambda bit, last: np.where((bit == ONE) ^ (last == ONE), ONE, ZERO), same, before)
    on = where(each(lambda v: v >= hint, x), parity, _after_hint(x, before))
    return where(compare(x, "==", MARK), same, on)


TASKS: dict[str, Algorithm] = {
    "count": Algorithm(_count, _counted, _count_program),
    "mode": Algorithm(_few, _commonest, _mode_program),
    "copy different letters": Algorithm(_different, _again, _copy_program),
    "copy bits with hints": Algorithm(_hinted, _again, _copy_hinted_program),
    "parity step by step with hints": Algorithm(_hinted, _odd_so_far, _parity_program),
    "copy bits": Algorithm(_bits, _again),
    "parity": Algorithm(_bits, _odd),
}


def lengths() -> dict[str, Size | None]:
    """How long every program is; None where there is none."""
    found: dict[str, Size | None] = {}
    for name, task in TASKS.items():
        text = rasp.tokens([task.ask(random.Random(0), 4, 8)])
        found[name] = None if task.program is None else rasp.size(task.program(text, LETTER + letters(8)))
    return found


def agreement(name: str, inputs: int = 1000, most: int = 20, seed: int = 0) -> float:
    """Share of random prompts after which the program says just what plain Python says, from 2 to `most` items.

    The program runs once on prompts with their answers; where it says all of an answer so, it would write it too.

    Raises:
        ValueError: the task has no program.
    """
    task = TASKS[name]
    if task.program is None:
        raise ValueError(f"There is no short program for {name!r} that could agree with anything.")
    program, hint = task.program, LETTER + letters(most)
    draw, right = random.Random(seed), 0
    sizes = sorted(draw.randint(2, most) for _ in range(inputs))
    for items in sorted(set(sizes)):
        prompts = [task.ask(draw, items, most) for _ in range(sizes.count(items))]
        answers = np.array([task.answer(prompt) for prompt in prompts])
        texts = rasp.tokens(np.concatenate([prompts, answers[:, :-1]], 1))
        said = program(texts, hint).values[:, -answers.shape[1] :]
        right += int((said == answers).all(-1).sum())
    return right / inputs
