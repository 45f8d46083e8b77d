"""RASP-L: programs that a causal transformer can run on texts of any length, step by step, and how long they are.

    x = tokens([[0, 5, 7, 6, 0, 5, 7]])
    said = kqv(shift(x), x, x)          # the token after the earlier one that is the same as this one
    said.values[0, -1], size(said)      # 6, Size(steps=3, attention=2, layers=2)

A program is a function of the tokens; what it has at a position is what it says next. `select` and `aggregate` look
back, as a head of attention does, everything else happens at each position alone, as in an MLP. Places and counts grow
with the text: they may be compared with each other and moved by one, but there is no arithmetic with them, since what
a network learns of such sums on short texts tells nothing of long ones.

The language is that of Zhou et al., 2023, arXiv:2310.16028; the interpreter is our own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
REDUCTIONS = ("mean", "max", "min")
_numbers = count()


class Size(NamedTuple):
    """How long a program is: all its steps, those that are attention, and the longest chain of attention in it."""

    steps: int
    attention: int
    layers: int


@dataclass(frozen=True, eq=False)
class Seq:
    """One value a position, in several texts at once.

    Attributes:
        values: [B, T].
        grows: whether they are places or counts, which are larger in longer texts.
        made: the steps that were needed, each a number of its own and whether it is attention.
        layers: attention steps one after the other that were needed.
    """

    values: NDArray[Any]
    grows: bool = False
    made: frozenset[tuple[int, bool]] = frozenset()
    layers: int = 0


@dataclass(frozen=True, eq=False)
class Selection:
    """Which earlier positions (or itself) each position looks at: [B, T, T], queries first, and what that needed."""

    cells: NDArray[np.bool_]
    made: frozenset[tuple[int, bool]]
    layers: int


def tokens(ids: ArrayLike) -> Seq:
    """Texts of the same length, [B, T], as what programs begin with."""
    values = np.asarray(ids)
    if values.ndim != 2:
        raise ValueError(f"A program runs on texts [B, T]; these have {values.ndim} axes.")
    return Seq(values)


def places(x: Seq) -> Seq:
    """The position of each position, from 0."""
    return Seq(np.broadcast_to(np.arange(x.values.shape[1]), x.values.shape), grows=True)


def size(x: Seq) -> Size:
    """How long the program is that made this; what it computed in vain does not count."""
    return Size(len(x.made), sum(attention for _, attention in x.made), x.layers)


# At each position alone


def each(function: Callable[..., ArrayLike], *given: Seq) -> Seq:
    """A function of the values at a position: arrays in, an array out. Raises ValueError for places and counts."""
    if any(one.grows for one in given):
        raise ValueError("Places and counts may be compared and moved by one; no other function takes them.")
    return _step(np.asarray(function(*(one.values for one in given))), given)


def compare(left: Seq, relation: str, right: "Seq | int") -> Seq:
    """Whether a relation such as "<" holds at a position; places and counts are compared with their like only."""
    other = _as(right, left)
    _alike(left, other)
    return _step(_relation(relation)(left.values, other.values), (left, other))


def moved(x: Seq, by: int) -> Seq:
    """The next value (`by` 1) or the one before (-1). Raises ValueError for more, which would be arithmetic."""
    if by not in (1, -1):
        raise ValueError(f"Values are moved by 1 or -1 at a step, not by {by}.")
    return _step(x.values + by, (x,), grows=x.grows)


def where(condition: Seq, then: "Seq | int", otherwise: "Seq | int") -> Seq:
    """One value or the other."""
    first, second = _as(then, condition), _as(otherwise, condition)
    _alike(first, second)
    chosen = np.where(condition.values.astype(bool), first.values, second.values)
    return _step(chosen, (condition, first, second), grows=first.grows)


# Looking back


def select(keys: Seq, queries: "Seq | int", relation: str = "==") -> Selection:
    """Where the key of this or an earlier position stands in a relation to the query here."""
    asked = _as(queries, keys)
    _alike(keys, asked)
    fits = _relation(relation)(keys.values[:, None, :], asked.values[:, :, None])
    length = keys.values.shape[1]
    causal = np.tril(np.ones((length, length), dtype=bool))
    return Selection(fits & causal, keys.made | asked.made, max(keys.layers, asked.layers))


def aggregate(selection: Selection, values: Seq, how: str = "max", default: int = 0) -> Seq:
    """The mean, largest or smallest of the selected values, and `default` where nothing is selected."""
    if how not in REDUCTIONS:
        raise ValueError(f"{how!r} is no way to aggregate; allowed are {', '.join(REDUCTIONS)}.")
    cells, given = selection.cells, values.values[:, None, :]
    number = cells.sum(-1)
    if how == "mean":
        if values.grows:
            raise ValueError("A mean of places or counts is arithmetic with them; allowed are max and min.")
        found = (cells * given).sum(-1) / np.maximum(number, 1)
    elif how == "max":
        found = np.where(cells, given, np.iinfo(np.int64).min).max(-1)
    else:
        found = np.where(cells, given, np.iinfo(np.int64).max).min(-1)
    made = selection.made | values.made
    layers = 1 + max(selection.layers, values.layers)
    return Seq(np.where(number > 0, found, default), values.grows, made | {(next(_numbers), True)}, layers)


def width(selection: Selection) -> Seq:
    """How many positions are selected, a count."""
    made = selection.made | {(next(_numbers), True)}
    return Seq(selection.cells.sum(-1), True, made, selection.layers + 1)


def kqv(keys: Seq, queries: "Seq | int", values: Seq, relation: str = "==", how: str = "max", default: int = 0) -> Seq:
    """Select and aggregate in one: a head of attention."""
    return aggregate(select(keys, queries, relation), values, how, default)


# Made of these


def shift(x: Seq, default: int = -1) -> Seq:
    """The value at the position before."""
    here = places(x)
    return kqv(here, moved(here, -1), x, default=default)


def induct(keys: Seq, queries: Seq, values: Seq, default: int = -1) -> Seq:
    """The value right after the last position before this one whose key is the query here."""
    here = places(keys)
    after = kqv(shift(keys, default=np.iinfo(np.int64).min), queries, here, default=-1)
    return kqv(here, after, values, default=default)


def generate(program: Callable[[Seq], Seq], ids: ArrayLike, steps: int) -> NDArray[np.int64]:
    """What a program says after texts of the same length [B, T], token by token: [B, steps]."""
    text = np.asarray(ids)
    for _ in range(steps):
        text = np.concatenate([text, program(tokens(text)).values[:, -1:]], 1)
    return text[:, text.shape[1] - steps :]


def _as(value: "Seq | int", like: Seq) -> Seq:
    return value if isinstance(value, Seq) else Seq(np.full(like.values.shape, value))


def _alike(left: Seq, right: Seq) -> None:
    if left.grows != right.grows:
        raise ValueError("Places and counts may be compared and mixed with each other, not with tokens.")


def _relation(name: str) -> Callable[[Any, Any], Any]:
    if name not in RELATIONS:
        raise ValueError(f"{name!r} is no relation; allowed are {' '.join(RELATIONS)}.")
    return RELATIONS[name]


def _step(values: NDArray[Any], given: "tuple[Seq, ...]", grows: bool = False) -> Seq:
    made = frozenset().union(*(one.made for one in given)) | {(next(_numbers), False)}
    return replace(given[0], values=values, grows=grows, made=made, layers=max(one.layers for one in given))
