"""Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors. Amos et al., 2023.
arXiv:2310.02980

Row s027 of the mission. Expressions as in ListOps (Nangia and Bowman, 2018), but short and shallow.
"""

import random
from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch

OPERATIONS = ("max", "min", "median", "sum")
CLOSE, EMPTY, ASK = 14, 15, 16  # digits are tokens 0 to 9, operations 10 to 13


@dataclass(frozen=True)
class ListOps(Lesson):
    """Nested operations on digits, such as max(3, min(7, 2)): which digit is the value?

    A prompt is empty tokens, the expression, and a token that asks. Sums are taken modulo 10, medians are rounded down.
    So many expressions are taught, again and again; the split "test" has 500 others.

    Fields:
        examples: expressions that are taught.
        depth: operations inside each other. `most`: operands of one. `length`: tokens of an expression.
        due: "answer", the value; or "inputs", every next token, for training on the same expressions without values.
    """

    row: ClassVar[str] = "s027"
    tests: ClassVar[tuple[str, ...]] = ("test",)

    examples: int = 3000
    depth: int = 2
    most: int = 4
    length: int = 24
    due: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.due not in ("answer", "inputs"):
            raise ValueError(f"due={self.due!r} is nothing to be taught; allowed are 'answer' and 'inputs'.")
        if self.depth < 1 or self.most < 2 or self.length < self.most + 2:
            raise ValueError(
                f"Expressions of depth {self.depth} with {self.most} operands do not fit {self.length} tokens; allowed "
                "are depth 1, 2 operands and 2 tokens more than operands, or more."
            )

    @property
    def shape(self) -> Shape:
        """Tokens; the value is one of the digits."""
        return Shape(self.length + 1, ASK + 1, vocab_size=ASK + 1)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Different expressions as far as there are enough, then any. An empty token is never due."""
        ids, values = _expressions(self.examples, self.depth, self.most, self.length, self.world)
        part = slice(0, self.examples) if self.split == "train" else slice(self.examples, None)
        ids, values = ids[part], values[part]
        size = len(ids)
        rows = torch.randperm(size, generator=draw)[:n] if n <= size else torch.randint(size, (n,), generator=draw)
        tokens = ids[rows]
        if self.due == "inputs":
            at, answer = torch.arange(self.length - 1).repeat(n, 1), tokens[:, 1 : self.length]
            return Batch({"input_ids": tokens}, at=at, answer=answer, weight=(answer != EMPTY).float())
        return Batch({"input_ids": tokens}, at=torch.full((n, 1), self.length), answer=values[rows][:, None])

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among digits, or among tokens."""
        return {"chance": log(10 if self.due == "answer" else CLOSE + 1), "perfect": 0.0}


def value(tokens: list[int]) -> int:
    """The value of an expression."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token == CLOSE:
            operation, *digits = stack.pop()
            stack[-1].append(_apply(OPERATIONS[operation - 10], sorted(digits)))
        elif token >= 10:
            stack.append([token])
        else:
            stack[-1].append(token)
    return stack[0][0]


def _apply(operation: str, digits: list[int]) -> int:
    if operation == "sum":
        return sum(digits) % 10
    if operation == "median":
        return (digits[(len(digits) - 1) // 2] + digits[len(digits) // 2]) // 2
    return digits[-1] if operation == "max" else digits[0]


def _grown(draw: random.Random, depth: int, most: int) -> list[int]:
    """An expression of at most this depth, its outermost operation for sure."""
    found = [10 + draw.randrange(len(OPERATIONS))]
    for _ in range(draw.randint(2, most)):
        deeper = depth > 1 and draw.random() < 0.35
        found += _grown(draw, depth - 1, most) if deeper else [draw.randrange(10)]
    return [*found, CLOSE]


@cache
def _expressions(examples: int, depth: int, most: int, length: int, world: int) -> tuple[Tensor, Tensor]:
    """All expressions [examples + 500, length + 1], none twice, and their values."""
    draw = random.Random(f"list operations {world}")
    found: dict[tuple[int, ...], int] = {}
    tries = 100 * (examples + 500)
    while len(found) < examples + 500:
        one = _grown(draw, depth, most)
        tries -= 1
        if not tries:
            raise ValueError(
                f"There are no {examples + 500} expressions of depth {depth} in {length} tokens; use fewer."
            )
        if len(one) <= length:
            found[tuple(one)] = value(one)
    rows = [[EMPTY] * (length - len(one)) + [*one, ASK] for one in found]
    return torch.tensor(rows), torch.tensor(list(found.values()))
