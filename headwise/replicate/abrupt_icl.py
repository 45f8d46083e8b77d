"""The mechanistic basis of data dependence and abrupt learning in an in-context classification task. Reddy, 2023.
arXiv:2312.03002

Row s074 of the mission. Scaled down as in `headwise.lab.AbruptICL`, with the two-parameter head beside it.
"""

from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import ClassVar

import numpy as np

from headwise.comparison import Comparison
from headwise.lab.abrupt_icl import AbruptICL
from headwise.lab.two_parameter_head import TwoParameterHead
from headwise.replicate import Outcome, Replication, settle
from headwise.tape import Tape

NEW, ABSENT = "new classes", "absent"


@dataclass(frozen=True)
class AbruptLearning(Replication):
    """Accuracy on new classes over training, over numbers of classes, and with as many labels as pairs."""

    row: ClassVar[str] = "s074"
    claim: ClassVar[str] = (
        "Reading labels in the prompt is learned abruptly, by an induction head, after a plateau, and competes with "
        "knowing them by heart."
    )
    paper: ClassVar[str] = (
        "labels of the prompt are guessed first, then both attention measures and the accuracy on new classes rise "
        "together; few classes are known by heart, many are read; two parameters reproduce it; with as many labels as "
        "pairs it is unreliable"
    )

    changed: ClassVar[str] = (
        "it was measured every 100 updates at first, and of five seeds not all were seen below 0.4 when labels of the "
        "prompt were first seen at 0.8; every 25 since then, where labels are read. Thresholds are as they were."
    )

    plateau: ClassVar[float] = 0.8
    low: ClassVar[float] = 0.4
    high: ClassVar[float] = 0.8
    least_fit: ClassVar[float] = 0.9
    least_share: ClassVar[float] = 0.8

    def run(self, seed: int = 0) -> Outcome:
        """One seed of every condition; five when `full`."""
        lab = AbruptICL()
        seeds = tuple(lab.seeds[0] + seed + i for i in range(5 if self.full else 1))
        found = lab.run(seeds)
        theory = TwoParameterHead().train(seeds[0])
        few, some, many = (f"{k} classes" for k in lab.classes)
        icl = {name: self._mean(found, name, NEW) for name in found.names}
        iwl = {name: self._mean(found, name, ABSENT) for name in found.names}
        numbers = {
            "new classes": icl,
            "absent": iwl,
            "fit of the two-parameter head": overlaid(found.tape(many), theory),
            "two-parameter head": {k: theory.last(k) for k in ("look_back", "match")}
            | {NEW: theory.last("accuracy", NEW)},
            "moments": {str(seed): moments(found.tape(many, seed)) for seed in seeds},
            "curve": found.tape(many).curve("accuracy", NEW),
            "curve of the two-parameter head": theory.curve("accuracy", NEW),
        }
        return self._judge(numbers, [found.tape(many, seed) for seed in seeds], (few, some, many))

    @staticmethod
    def _mean(found: Comparison, name: str, split: str) -> float:
        return fmean(found.tape(name, seed).last("accuracy", split) for seed in found.seeds)

    def _judge(self, numbers: dict, tapes: list[Tape], names: tuple[str, str, str]) -> Outcome:
        icl, iwl = numbers["new classes"], numbers["absent"]
        few, _, many = names
        alike = "as many labels as pairs"
        fit = numbers["fit of the two-parameter head"]
        before = [m["heads"] <= m["new classes"] for m in numbers["moments"].values()]
        enough = ceil(self.least_share * len(before))
        checks = {
            f"labels of the prompt get {self.plateau} of the probability while new classes are below {self.low}, which "
            f"later pass {self.high} ({many})": all(self._plateau(tape) for tape in tapes),
            f"{few} are known by heart (absent above {self.high}, new below {self.low}), {many} are read": iwl[few]
            > self.high
            and icl[few] < self.low
            and icl[many] > self.high
            and iwl[many] < self.low,
            "both attention measures are half risen no later than the accuracy on new classes, in "
            f"{enough} of {len(before)} seeds": sum(before) >= enough,
            f"with as many labels as pairs new classes stay below {self.low}": icl[alike] < self.low,
            f"the two-parameter head's curve explains {self.least_fit} of the variance once time is scaled": fit
            >= self.least_fit,
        }
        measured = (
            "accuracy on new classes / absent: "
            + ", ".join(f"{name} {icl[name]:.2f}/{iwl[name]:.2f}" for name in icl)
            + f"; two-parameter head {numbers['two-parameter head'][NEW]:.2f}, R2 of its curve {fit:.2f}; steps at "
            + f"which attention and new classes are half risen ({many}): "
            + ", ".join(f"{m['heads']:.0f} and {m['new classes']:.0f}" for m in numbers["moments"].values())
        )
        baseline = "chance 0.25 on new classes, 0.06 on absent ones (0.25 with four labels)"
        return settle(measured, baseline, checks, numbers)

    def _plateau(self, tape: Tape) -> bool:
        guessed = tape.time_to("in_context", above=self.plateau)
        then = dict(tape.points("accuracy", NEW)).get(int(guessed) if guessed < float("inf") else -1, 1.0)
        return then < self.low and tape.last("accuracy", NEW) > self.high


def half(points: list[tuple[int, float]]) -> float:
    """The step at which a number first made half of its rise from the first to the largest value."""
    first, most = points[0][1], max(value for _, value in points)
    return next(max(1.0, float(step)) for step, value in points if value >= (first + most) / 2)


def moments(tape: Tape) -> dict[str, float]:
    """Half-rise steps of both attention measures (the later of them) and of the accuracy on new classes."""
    ila, tla = tape.points("previous_token", unit="L0.H0"), tape.points("induction", unit="L1.H0")
    return {"heads": max(half(ila), half(tla)), "new classes": half(tape.points("accuracy", NEW))}


def overlaid(net: Tape, theory: Tape) -> float:
    """R2 of the two-parameter head's curve as a prediction of the network's, both against step / half-rise step."""
    ours, theirs = net.points("accuracy", NEW), theory.points("accuracy", NEW)
    x, y = (np.array(part) for part in zip(*ours, strict=True))
    u, v = (np.array(part) for part in zip(*theirs, strict=True))
    predicted = np.interp(x / half(ours), u / half(theirs), v)
    return float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
