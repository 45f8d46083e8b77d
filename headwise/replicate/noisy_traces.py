"""Understanding the Effect of Noise in LLM Training Data with Algorithmic Chains of Thought. Havrilla and Iyer, 2024.
arXiv:2402.04004

Row s049 of the mission. Neither kind of noise changes which token is the likeliest at a step, so the harm must lie in
what else is likely. Sums are therefore taken in two ways: by tokens drawn as the model finds them likely, and by the
likeliest tokens.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from headwise.data.traces import written
from headwise.lab import NoisyTraces as Experiment
from headwise.lesson import generator
from headwise.replicate import Outcome, Replication, settle
from headwise.training import Run

WAYS = ("drawn", "likeliest")


@dataclass(frozen=True)
class NoisyTraces(Replication):
    """Accuracy of sums that models reach by totals of their own, after lessons with noise of both kinds."""

    row: ClassVar[str] = "s049"
    claim: ClassVar[str] = (
        "Much static noise in chains of thought does no harm, and dynamic noise, which carries on, does a lot."
    )
    paper: ClassVar[str] = (
        "extremely robust to high levels of static noise, significantly worse with less dynamic noise"
    )

    prompts: ClassVar[int] = 2000
    near: ClassVar[float] = 0.05
    least_drop: ClassVar[float] = 0.15
    least_clean: ClassVar[float] = 0.95

    def run(self, seed: int = 0) -> Outcome:
        """Three seeds of every condition."""
        lab = Experiment(full=self.full)
        found = lab.run(tuple(seed + one for one in lab.seeds))
        right = {
            name: {way: [self._right(run, way) for run in runs.values()] for way in WAYS}
            for name, runs in found.runs.items()
        }
        lessons = {name: next(iter(runs.values())).lesson for name, runs in found.runs.items()}
        loss = found.last("loss")
        lines = {name: lesson.lines()["Bayes"] for name, lesson in lessons.items()}
        return self._judge(right, {name: lesson.right for name, lesson in lessons.items()}, loss, lines)

    def _right(self, run: Run, way: str) -> float:
        batch = run.lesson.on("clean").make(None, self.prompts, 1049 + run.seed)
        said = written(run.model, batch, generator(run.seed, 1049) if way == "drawn" else None)
        return float((said[:, -1] == batch.answer[:, -1]).float().mean())

    def _judge(self, right: dict, data: dict[str, float], loss: dict, lines: dict) -> Outcome:
        mean = {way: {name: fmean(by[way]) for name, by in right.items()} for way in WAYS}
        drop = {way: {name: by["clean"] - value for name, value in by.items()} for way, by in mean.items()}
        drawn = drop["drawn"]

        def apart(way: str) -> bool:
            return drop[way]["static 50%"] <= self.near and drop[way]["dynamic 50%"] >= self.least_drop

        checks = {
            f"with noise in half of the traces, drawn sums lose at most {self.near * 100:.0f} points if it is static, "
            f"at least {self.least_drop * 100:.0f} if it is dynamic": apart("drawn"),
            "the likeliest sums too": apart("likeliest"),
            f"static noise in all traces costs drawn sums at most {self.near * 100:.0f} points": drawn["static 100%"]
            <= self.near,
            "dynamic noise in a quarter of the traces costs them more than static noise in all": drawn["dynamic 25%"]
            > drawn["static 100%"],
            f"without noise at least {self.least_clean:.0%} of them are right": mean["drawn"]["clean"]
            >= self.least_clean,
        }
        measured = "; ".join(
            f"{name} {mean['drawn'][name]:.1%} drawn and {mean['likeliest'][name]:.1%} by the likeliest tokens"
            for name in right
        )
        said = ", ".join(f"{name} {share:.1%}" for name, share in data.items() if share < 1)
        baseline = f"right sums in the lessons themselves: {said}, else 100%"
        numbers = {"right": right, "right in the lessons": data, "loss": loss, "loss of Bayes": lines}
        return settle(f"sums that are right: {measured}", baseline, checks, numbers)
