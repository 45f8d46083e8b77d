"""Random rules over facts, and whether they can all hold: every assignment is tried, 64 of them in one machine word.

A rule is a clause of literals: literal 2i is fact i, literal 2i + 1 its denial. "If a and not b then c" is the clause
not a, b, c; so all literals of a rule but the last stand denied among its conditions.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FACTS = 12


@cache
def _held(facts: int) -> NDArray[np.uint64]:
    """[2 facts, words] under which assignments each literal holds, a bit an assignment."""
    states = np.arange(2**facts)
    bits = np.stack([(states >> fact) & 1 == sign for fact in range(facts) for sign in (1, 0)])
    packed = np.packbits(bits, axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def satisfiable(
    clauses: "NDArray[np.int64] | Tensor", facts: int, count: "NDArray[np.int64] | Tensor"
) -> NDArray[np.bool_]:
    """Whether some assignment makes all clauses true, one answer a problem.

    Args:
        clauses: [B, most, k] literals of 0 to 2 facts - 1.
        facts: at most 12.
        count: [B] how many of the clauses there are; what follows them is not looked at.

    Raises:
        ValueError: more facts than can be tried one by one.
    """
    if not 1 <= facts <= FACTS:
        raise ValueError(f"{facts} facts cannot be tried one by one; allowed are 1 to {FACTS}.")
    literals, number = np.asarray(clauses), np.asarray(count)
    held = _held(facts)
    left = np.full((len(literals), held.shape[1]), np.iinfo(np.uint64).max, dtype=np.uint64)
    left &= np.bitwise_or.reduce(held, 0)
    for i in range(literals.shape[1]):
        true = np.bitwise_or.reduce(held[literals[:, i]], 1)
        left &= np.where((i < number)[:, None], true, np.iinfo(np.uint64).max)
    return left.any(1)


def random_clauses(n: int, most: int, facts: int, width: int, draw: torch.Generator) -> Tensor:
    """[n, most, width] literals: different facts in a clause, each denied or not, all alike."""
    chosen = torch.rand(n, most, facts, generator=draw).topk(width, -1).indices
    return 2 * chosen + torch.randint(2, chosen.shape, generator=draw)


def share(facts: int, count: int, width: int, draw: torch.Generator, n: int = 400) -> float:
    """Share of random problems that can be satisfied."""
    clauses = random_clauses(n, count, facts, width, draw)
    return float(satisfiable(clauses, facts, np.full(n, count)).mean())


def crossing(facts: int, width: int, draw: torch.Generator, n: int = 400) -> float:
    """Clauses per fact at which half of random problems can be satisfied, between the two counts next to it."""
    low, high = 1, 2
    while share(facts, high, width, draw, n) > 0.5:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(facts, middle, width, draw, n) > 0.5 else (low, middle)
    # The curve is nearly straight here: a line through it is steadier than two neighbouring counts.
    counts = np.arange(max(1, low - 3), high + 4)
    shares = np.array([share(facts, int(one), width, draw, n) for one in counts])
    slope, start = np.polyfit(counts, shares, 1)
    return float((0.5 - start) / slope / facts)


def told(clause: list[int], names: "tuple[str, ...] | list[str]") -> str:
    """A clause as a rule in words: "If ann and not bob then cat."."""

    def one(literal: int) -> str:
        return ("not " if literal % 2 else "") + names[literal // 2]

    *conditions, last = clause
    return f"If {' and '.join(one(literal ^ 1) for literal in conditions)} then {one(last)}."
