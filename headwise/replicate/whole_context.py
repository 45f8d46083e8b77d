"""Make Your LLM Fully Utilize the Context. An et al., 2024. arXiv:2404.16811

Row s150 of the mission. Small models learn to look up values by keys, from questions about any place of the context or
about some of its places only; then all places are asked for.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from headwise.data import AnswerAnywhere
from headwise.lab import WholeContext as Experiment
from headwise.lab.whole_context import accuracy_by_place
from headwise.replicate import Outcome, Replication, settle


@dataclass(frozen=True)
class WholeContext(Replication):
    """Accuracy by the place of the answer, after training on answers anywhere, at the ends and at the start."""

    row: ClassVar[str] = "s150"
    claim: ClassVar[str] = "Training on answers that lie anywhere makes a model use all of its context, not its ends."
    paper: ClassVar[str] = "even from start to end of 32K tokens; NarrativeQA F1 from 23.5 to 26.9, MMLU 59.3 to 59.2"

    least_won: ClassVar[float] = 0.10
    least_closed: ClassVar[float] = 0.5

    def run(self, seed: int = 0) -> Outcome:
        """One seed of each way of asking; three, and questions both ways, where `full`."""
        lab = Experiment(way="both" if self.full else "forward", full=self.full)
        seeds = tuple(seed + one for one in ((5, 6, 7) if self.full else lab.seeds))
        found = lab.run(seeds)
        curves: dict[str, list[float]] = {}
        for name, runs in found.runs.items():
            each = [accuracy_by_place(run.model, cast(AnswerAnywhere, run.lesson), seed=seed) for run in runs.values()]
            curves[name] = [sum(values) / len(values) for values in zip(*each, strict=True)]
        looks = {name: by[min(by)].heads("retrieval", "anywhere") for name, by in found.tapes.items()}
        asked = {name: by[min(by)].last("accuracy") for name, by in found.tapes.items()}
        return self._judge(curves, looks, asked)

    def _judge(
        self, curves: dict[str, list[float]], looks: dict[str, dict[str, float]], asked: dict[str, float]
    ) -> Outcome:
        mean = {name: sum(curve) / len(curve) for name, curve in curves.items()}
        gap = {name: max(curve) - min(curve) for name, curve in curves.items()}
        middle = {name: self._middle(curve) for name, curve in curves.items()}

        def better_than(other: str) -> bool:
            closed = gap["uniform"] <= self.least_closed * gap[other]
            return closed and mean["uniform"] >= mean[other] + self.least_won

        checks = {
            f"the mean over places is at least {100 * self.least_won:.0f} points above that after training on the "
            "start, and the gap between the best and the worst place at most half": better_than("start"),
            "the same against training on both ends": better_than("ends"),
            "after training on the ends the middle half is worse than the ends": middle["ends"]
            < (curves["ends"][0] + curves["ends"][-1]) / 2 - self.least_won,
        }
        measured = (
            f"accuracy over all places {mean['uniform']:.2f} with answers anywhere in training (best minus worst "
            f"place {gap['uniform']:.2f}, middle half {middle['uniform']:.2f}; {asked['uniform']:.2f} where asked)"
        )
        baseline = "; ".join(
            f"answers at the {name}: {mean[name]:.2f} ({gap[name]:.2f}, {middle[name]:.2f}; {asked[name]:.2f})"
            for name in ("ends", "start")
        )
        numbers = {
            "by place": curves,
            "mean": mean,
            "gap": gap,
            "middle": middle,
            "heads that look at the answer": looks,
        }
        return settle(measured, baseline, checks, numbers)

    def _middle(self, curve: list[float]) -> float:
        """Mean over the middle half of the places."""
        inner = curve[len(curve) // 4 : len(curve) - len(curve) // 4]
        return sum(inner) / len(inner)
