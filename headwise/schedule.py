"""When something happens in training: `steps(0, 900)`, `every(25)`, `after("loss", below=0.3)`, and their combinations.

Edits, resets and switches of data share these. A schedule is data: it has no state of its own, so that a run that was
killed and goes on decides as the first would have. Combine with `&`, `|` and `~`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwise.tape import Tape


@dataclass(frozen=True)
class When:
    """Base: whether something is on at a step, given what was measured so far."""

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        """Whether it is on at this step, counted from 0. The base is always on."""
        return True

    def __and__(self, other: "When") -> "When":
        return Both(self, other)

    def __or__(self, other: "When") -> "When":
        return ~Both(~self, ~other)

    def __invert__(self) -> "When":
        return Not(self)


always = When()


@dataclass(frozen=True)
class Not(When):
    """The opposite."""

    inner: When

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        return not self.inner.on(step, tape)


@dataclass(frozen=True)
class Both(When):
    """Both at once."""

    left: When
    right: When

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        return self.left.on(step, tape) and self.right.on(step, tape)


@dataclass(frozen=True)
class Steps(When):
    """From step `first` up to, not with, step `end`; to the last where there is no end."""

    first: int = 0
    end: int | None = None

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        return self.first <= step and (self.end is None or step < self.end)


@dataclass(frozen=True)
class Every(When):
    """At each `n`-th step, the first of them step `n`."""

    n: int

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        return step > 0 and step % self.n == 0


@dataclass(frozen=True)
class After(When):
    """From the first measurement on in which a metric fulfils a condition; it then stays on."""

    metric: str
    below: float | None = None
    above: float | None = None
    condition: Callable[[float], bool] | None = None
    split: str = "train"

    def holds(self, value: float) -> bool:
        """Whether one value fulfils the condition."""
        if self.condition is not None:
            return bool(self.condition(value))
        return value < self.below if self.below is not None else self.above is not None and value > self.above

    def on(self, step: int, tape: "Tape | None" = None) -> bool:
        if tape is None:
            return False
        return any(self.holds(value) for at, value in tape.points(self.metric, self.split) if at <= step)


def steps(first: int = 0, end: int | None = None) -> Steps:
    """On from step `first` up to, not with, step `end`. Raises ValueError when that is no step at all."""
    if first < 0 or (end is not None and end <= first):
        raise ValueError(f"steps({first}, {end}) holds no step; the end must be above the first, which is 0 or more.")
    return Steps(first, end)


def every(n: int) -> Every:
    """On at each `n`-th step (not at step 0). Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"every({n}) is no rhythm; allowed are 1, 2, 3 and so on.")
    return Every(n)


def after(
    metric: str,
    condition: Callable[[float], bool] | None = None,
    *,
    below: float | None = None,
    above: float | None = None,
    split: str = "train",
) -> After:
    """On from the first measurement in which the metric is below or above a bound (or fulfils `condition`).

    Args:
        metric: a name on the tape, such as "loss" or "accuracy"; of one head "induction L1.H3".
        split: the prompts it is measured on.

    Raises:
        ValueError: not exactly one of condition, below and above is given.
    """
    if sum(one is not None for one in (condition, below, above)) != 1:
        raise ValueError(f"after({metric!r}) takes exactly one of a condition, below= and above=.")
    return After(metric, below, above, condition, split)
